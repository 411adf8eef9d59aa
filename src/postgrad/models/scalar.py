"""Language models with one number a token in place of words: reward models and critics."""

import copy
import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from postgrad.errors import PostgradError
from postgrad.models.network import base_of, pad_right
from postgrad.models.scoring import final_states, plain_states, predicting_states, spread
from postgrad.models.text_network import TextNetwork

_SCALAR = "ForSequenceClassification"


class ScalarModel(TextNetwork):
    """A causal transformer whose head gives one number for the text up to a token.

    The network is transformers' `…ForSequenceClassification` with one label, the form in which
    reward models are shared; the number of a text is that of its very last token.
    """

    def __init__(self, network: nn.Module, tokenizer: Any):
        head = getattr(base_of(network), "score", None)
        if head is None or base_of(network).config.num_labels != 1:
            raise PostgradError(
                f"{type(base_of(network)).__name__} is no reward model: expected a causal "
                "transformer for sequence classification with one label"
            )
        super().__init__(network, tokenizer, "states")

    @classmethod
    def on_body_of(cls, other: TextNetwork) -> Self:
        """A copy of another network's body, with a head that says 0 to everything."""
        from transformers import AutoModelForSequenceClassification

        base: Any = base_of(other.network)
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        config.pad_token_id = other.tokenizer.pad_token_id
        with torch.device("meta"):  # the weights are replaced at once
            network: Any = AutoModelForSequenceClassification.from_config(config)
        body = copy.deepcopy(base_of(other.merged()).base_model).requires_grad_(True)
        setattr(network, network.base_model_prefix, body)
        head = nn.Linear(network.score.in_features, 1, bias=False)
        nn.init.zeros_(head.weight)
        network.score = head.to(base.device, base.dtype)
        return cls(network, other.tokenizer)

    @property
    def prompts_as_turns(self) -> bool | None:
        """Whether plain prompts were a user's turn in training; None if it was trained elsewhere.

        Kept in the model's configuration, so that whoever loads it renders prompts in the same way.
        """
        found: bool | None = getattr(base_of(self.network).config, "prompts_as_turns", None)
        return found

    @prompts_as_turns.setter
    def prompts_as_turns(self, value: bool) -> None:
        base_of(self.network).config.prompts_as_turns = value

    @property
    def head(self) -> nn.Module:
        """The linear map `[d] -> [1]`."""
        head: nn.Module = base_of(self.network).score
        return head

    def rewards(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        """The number `[N]` of each prompt `[P]` with its response `[L]`, at its last token.

        Gradients flow to the trainable weights.

        Raises:
            PostgradError: prompt and response together exceed the model's context.
        """
        return self.read(self.features(prompts, responses))

    def features(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        """The last token's hidden states `[N, d]`, which the head reads."""
        prompts, responses = self.checked(prompts, responses)
        if self.shares_prefixes:
            last: Tensor = self(final_states, self.network, prompts, responses)
            return last
        states = self(plain_states, self.network, prompts, responses)
        return torch.stack([several[-1] for several in states])

    def values(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        """The numbers `[N, T]` of prompt and response up to BEFORE each response token.

        That is V(s_t) of the state s_t = (x, y_<t) in which token t is chosen; 0 at padding.
        """
        prompts, responses = self.checked(prompts, responses)

        def numbers() -> Tensor:
            if self.shares_prefixes:
                return self._read(predicting_states(self.network, prompts, responses))
            several = plain_states(self.network, prompts, responses)
            return self._read(torch.cat([states[:-1] for states in several]))

        _, mask = pad_right(list(responses))
        return spread(self(numbers), mask)

    def read(self, states: Tensor) -> Tensor:
        """The head's numbers `[...]` of hidden states `[..., d]`."""
        numbers: Tensor = self(self._read, states)
        return numbers

    def _read(self, states: Tensor) -> Tensor:
        # in float32, also where autocast would round: rewards differ in the third digit
        with torch.autocast(states.device.type, enabled=False):
            numbers: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return numbers.squeeze(-1).float()


def is_reward_model(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a folder, or a Hub id, names a reward model and not a language model."""
    folder = os.path.expanduser(name)
    if not os.path.isfile(os.path.join(folder, "config.json")) and name.count("/") != 1:
        return False  # an embedded model, or nothing
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return False  # who loads it as a language model says what is wrong
    return (config.architectures or [""])[0].endswith(_SCALAR)


def load_scalar(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> ScalarModel:
    """A reward model from a local folder or the Hub.

    Raises:
        PostgradError: it cannot be loaded, or is no reward model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        kinds = config.architectures or ["a model of no kind"]
        if not kinds[0].endswith(_SCALAR):
            raise PostgradError(
                f"{name} holds {kinds[0]}: expected a reward model "
                "(…ForSequenceClassification), as `postgrad train reward-modeling` saves it"
            )
        network = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise PostgradError(f"reward model {name!r} cannot be loaded: {reason[0]}") from problem
    return ScalarModel(network.to(device), tokenizer)
