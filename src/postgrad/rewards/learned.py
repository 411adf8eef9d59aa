"""A reward that was learnt: a reward model from a run of `reward-modeling`, a folder or the Hub."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.errors import PostgradError, unknown
from postgrad.models.scalar import ScalarModel, load_scalar

SCORING_TOKENS = 16384  # in one forward pass
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LearnedReward:
    """The number that a reward model gives to each prompt with its completion.

    A model of this library reads texts as in its training: a plain prompt as it is, or as a user's
    turn if it was trained on those (or `chat` says so); messages by the chat template up to the
    answer; then the completion and the end token. A reward model from elsewhere reads a
    conversation as its own chat template writes it, answer included, and takes plain prompts for a
    user's turn if it has such a template.
    """

    def __init__(self, model: ScalarModel, chat: bool | None = None):
        self.model = model
        trained = model.prompts_as_turns
        self._whole_conversations = trained is None and model.has_chat_template
        if chat is None:
            chat = model.has_chat_template if trained is None else trained
        if chat and not model.has_chat_template:
            raise PostgradError("reward: chat is on but the reward model has no chat template")
        self._chat = chat

    # decorated, since rewards are called in a thread of their own, where gradients are on
    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        pairs = [self._encoded(*pair) for pair in zip(prompts, completions, strict=True)]
        items = Batch(
            prompts=[prompt for prompt, _ in pairs],
            responses=[response for _, response in pairs],
            cost=torch.tensor([len(prompt) + len(response) for prompt, response in pairs]),
        )
        parts = items.split(SCORING_TOKENS)
        return torch.cat([self.model.rewards(p.prompts, p.responses) for p in parts]).tolist()

    def _encoded(self, prompt: Any, completion: str) -> tuple[Tensor, Tensor]:
        """Token ids of prompt and completion."""
        if self._chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = self.model.render(prompt)
        if isinstance(prompt, str) or not self._whole_conversations:
            return ids, self.model.encode_response(completion)
        answered = [*prompt, {"role": "assistant", "content": completion}]
        whole = ids.new_tensor(
            self.model.tokenizer.apply_chat_template(answered, return_dict=False)
        )
        # a template may write a closed turn in another way than one that is to be continued
        start = len(ids) if whole[: len(ids)].equal(ids) else 1
        return whole[:start], whole[start:]


def learned_reward(
    model: str,
    chat: bool | None = None,
    precision: str = "fp32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> LearnedReward:
    """A reward function of a reward model.

    Args:
        model: a folder, such as RUN/model of a run of `reward-modeling`, or a Hub id.
        chat: whether plain prompts are a user's turn; if empty as in the model's training.
        precision: of its weights, fp32 or bf16.
        device: where it computes; if empty on the first GPU, or on the CPU without one.
        trust_remote_code: run code that a model repository brings along.
    """
    if chat not in (None, True, False):
        raise PostgradError(f"reward {model!r}: chat is true or false, got {chat!r}")
    if precision not in _PRECISIONS:
        raise unknown("precision of a reward model", str(precision), _PRECISIONS)
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder) and not (folder / "config.json").is_file():
        inner = " (the reward model of a run is its folder `model`)"
        raise PostgradError(
            f"reward {model!r}: the folder holds no config.json of a reward model"
            f"{inner if (folder / 'model').is_dir() else ''}"
        )
    found = load_scalar(
        str(folder) if os.path.isdir(folder) else model,
        dtype=_PRECISIONS[precision],
        device=_device(device),
        trust_remote_code=trust_remote_code,
    )
    return LearnedReward(found, chat)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PostgradError(
            f"device of a reward model: expected cpu or cuda[:N], got {name!r}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PostgradError(f"device of a reward model: {name!r}, but torch sees no NVIDIA GPU")
    return device
