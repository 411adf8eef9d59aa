"""What the language methods share: their settings, and how a policy and its data are found."""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.models.language import LanguagePolicy, LoraSettings, load_policy
from postgrad.sampling.generation import SamplingSettings
from postgrad.tasks import Examples, load


class DataSettings(Settings):
    """A data set by name, and how to read it; a plain string is its name."""

    name: str = setting("", "embedded task, local file, or Hugging Face data set", min_length=1)
    split: str | None = setting(None, "train or test; the task's own choice when empty")
    format: str | None = setting(None, "data format; recognised from the columns when empty")
    columns: dict[str, str] = setting({}, "our column name: the name in the data")
    settings: dict[str, Any] = setting({}, "settings of an embedded task, e.g. its difficulty")
    limit: int | None = setting(None, "use only so many rows", gt=0)
    chat: bool | None = setting(
        None, "wrap plain prompts as a user's turn; empty: embedded tasks yes, own data no"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class LoraOptions(Settings):
    """Low-rank adapters (peft)."""

    rank: int = setting(16, "rank of the update", gt=0)
    alpha: int = setting(32, "scale: the update is multiplied by alpha / rank", gt=0)
    targets: str | list[str] = setting("all-linear", "which layers: all-linear, or their names")


class RolloutSettings(Settings):
    """How the policy is sampled."""

    samples: int = setting(8, "completions a prompt (the group)", gt=0)
    max_new_tokens: int = setting(64, "completion budget in tokens", gt=0)
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    top_p: float = setting(1.0, "nucleus: smallest set of tokens with this mass", gt=0, le=1)
    top_k: int = setting(0, "only the k likeliest tokens; 0: all", ge=0)
    stop: list[str] = setting([], "strings that end a completion")

    def sampling(self, temperature: float | None = None) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop),
        )


class LanguageSettings(Settings):
    """Settings of every method that trains a causal language model."""

    model: str = setting("smollm2", "smollm2, tiny, a local folder, or a Hugging Face id")
    data: DataSettings = setting(DataSettings(name="docstrings"), "training data")
    eval_data: DataSettings | None = setting(None, "held-out data; the task's test split if empty")
    eval_size: int = setting(128, "how many held-out rows an evaluation uses", gt=0)
    batch_size: int = setting(8, "rows of data a step", gt=0)
    tune: Literal["full", "lora"] = setting("full", "train all weights, or low-rank adapters")
    lora: LoraOptions = setting(LoraOptions(), "adapters, with tune=lora")
    trust_remote_code: bool = setting(False, "run code that a model repository brings along")
    max_prompt_tokens: int | None = setting(
        None, "longest prompt; an error beyond it, the context when empty", gt=0
    )


def find_policy(
    config: LanguageSettings, place: Place, model: LanguagePolicy | None = None
) -> LanguagePolicy:
    """The policy that `config` names, on its device, or the one that was passed from Python."""
    if model is not None:
        return model
    lora = config.lora
    targets = lora.targets if isinstance(lora.targets, str) else tuple(lora.targets)
    return load_policy(
        config.model,
        tune=config.tune,
        lora=LoraSettings(lora.rank, lora.alpha, targets),
        device=str(place.device),
        trust_remote_code=config.trust_remote_code,
        seed=place.seed,
    )


def find_data(
    config: DataSettings,
    place: Place,
    needed: str | tuple[str, ...],
    rows: Examples | list[dict[str, Any]] | None,
) -> Examples:
    """The examples that `config` names, or those passed from Python, in (one of) the formats."""
    if isinstance(rows, list):
        rows = Examples.from_rows(rows, columns=config.columns)
    examples = rows or load(
        config.name,
        split=config.split or "train",
        format=config.format,
        columns=config.columns,
        settings=config.settings,
        seed=place.seed,
    )
    formats = (needed,) if isinstance(needed, str) else needed
    found = examples.require(*formats).first(config.limit)
    return found if config.chat is None else replace(found, chat=config.chat)


def find_held_out(
    config: LanguageSettings,
    place: Place,
    needed: str,
    rows: Examples | list[dict[str, Any]] | None = None,
) -> Examples | None:
    """Held-out examples: `eval_data`, or the test split of an embedded task, or none.

    `rows` are training data that were passed from Python in place of `data`: without test split.
    """
    if config.eval_data is not None:
        return find_data(config.eval_data, place, needed, None)
    if rows is not None or not Examples.has_test_split(config.data.name):
        return None
    return find_data(config.data.model_copy(update={"split": "test"}), place, needed, None)


def render_prompts(
    policy: LanguagePolicy, examples: Examples, config: LanguageSettings, reserve: int
) -> list[Tensor]:
    """Token ids of every prompt; stops at one that leaves no room for `reserve` more tokens.

    Tasks whose prompts are meant for chat models come as a user turn where the model has a chat
    template.
    """
    chat = examples.chat and policy.has_chat_template
    room = policy.context_length - reserve
    limit = min(config.max_prompt_tokens or room, room)
    if limit < 1:
        raise PostgradError(
            f"max_new_tokens: {reserve} leaves no room for a prompt in the model's context of "
            f"{policy.context_length} tokens"
        )
    prompts = []
    for number, row in enumerate(examples.rows):
        prompt = row["prompt"]
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = policy.render(prompt)
        if len(ids) > limit:
            raise PostgradError(
                f"{examples.where(number)}: the prompt has {len(ids)} tokens, at most {limit} fit "
                f"(context {policy.context_length}, {reserve} kept for the response)"
            )
        prompts.append(ids)
    return prompts


def pad(values: list[Tensor], length: int | None = None) -> Tensor:
    """Ragged rows as one tensor `[N, T]`, zero on the right."""
    length = max((len(v) for v in values), default=0) if length is None else length
    padded = torch.zeros(len(values), length, dtype=values[0].dtype)
    for row, value in enumerate(values):
        padded[row, : len(value)] = value
    return padded
