"""The four parts of a policy gradient put together."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Choice, Settings, setting, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics
from postgrad.methods.language.parts.base import (
    Advantage,
    Around,
    Denominator,
    Gradient,
    Mask,
    Part,
    Scoring,
)
from postgrad.methods.language.parts.choices import (
    AdvantageChoice,
    DenominatorChoice,
    GradientChoice,
    MaskChoice,
)
from postgrad.models.scoring import TokenScores


class EstimatorSettings(Settings):
    """The four parts of a policy gradient, each with its own settings."""

    mask: MaskChoice = setting("ppo", "which tokens teach, by how far the policy has moved")
    denominator: DenominatorChoice = setting("sampler", "what its probability is divided by")
    advantage: AdvantageChoice = setting("reward", "from rewards to advantages")
    gradient: GradientChoice = setting("token", "the function of probabilities that is followed")


class Estimator:
    """mask · (pi / denominator) · A · grad log pi, of each token.

    Raises:
        PostgradError: parts that do not go together, or not with such a run.
    """

    def __init__(self, config: EstimatorSettings, around: Around):
        self.mask: Mask = _made(config.mask, around)
        self.denominator: Denominator = _made(config.denominator, around)
        self.advantage: Advantage = _made(config.advantage, around)
        self.gradient: Gradient = _made(config.gradient, around)
        possible = self.gradient.denominators
        if possible and config.denominator.name not in possible:
            raise PostgradError(
                f"gradient: {config.gradient.name!r} is a function of probabilities over "
                f"denominator={' or '.join(possible)}, not over {config.denominator.name!r}"
            )

    @staticmethod
    def described(kind: type[Any]) -> FourParts:
        """The four parts that are the defaults of a settings class, in words."""
        config = validated(kind, {})

        def words(choice: Choice) -> str:
            text = inspect.getdoc(choice.implementation(choice.name)) or ""
            return f"{choice.name}: {text.splitlines()[0]}"

        return FourParts(
            *map(words, (config.mask, config.denominator, config.advantage, config.gradient))
        )

    @property
    def parts(self) -> dict[str, Part]:
        return {
            "mask": self.mask,
            "denominator": self.denominator,
            "advantage": self.advantage,
            "gradient": self.gradient,
        }

    def prepared(self, batch: Batch, with_entropies: Callable[[Batch], Batch]) -> Batch:
        """The batch with `advantages`, and with what the mask makes of its tokens.

        `with_entropies` gives a batch its `entropies`; it is called where a part needs them, after
        the mask's choice of responses if it can be.
        """
        if self.advantage.needs_entropies:
            batch = with_entropies(batch)
        batch = self.mask.chosen(batch.with_fields(advantages=self.advantage(batch).float()))
        if any(part.needs_entropies for part in self.parts.values()):
            batch = with_entropies(batch)
        return self.mask.prepared(batch)

    def old_logprobs(self, batch: Batch, scores: TokenScores) -> Tensor:
        """log pi_old `[N, T]`, a constant; the policy's own where it is the one that sampled."""
        new = scores.logprobs.detach()
        if "old_logprobs" not in batch:
            return new
        old: Tensor = batch.old_logprobs[:, : new.shape[1]].to(new)
        return old

    def token_losses(
        self, batch: Batch, scores: TokenScores, advantages: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The loss of each token `[N, T]`, and metrics of the ratio.

        `advantages` `[N]` or `[N, T]` are those of the batch if not given.
        """
        new, mask = scores.logprobs, written(batch, scores)
        advantages = per_token(batch.advantages if advantages is None else advantages, new)
        old = self.old_logprobs(batch, scores)
        denominator = self.denominator(new, old).detach()
        weight = self.gradient(new - denominator, mask)
        with torch.no_grad():
            log_ratio = torch.where(mask, new - old, 0.0)
            if self.gradient.whole_responses:
                ratio = self.gradient(log_ratio, mask)
            else:
                ratio = log_ratio.exp()
        bounded = self.mask(weight, ratio, advantages)
        losses = -bounded * advantages
        if "token_weights" in batch:
            losses = losses * batch.token_weights[:, : new.shape[1]].to(new)
        counted = mask & batch.mask[:, : new.shape[1]].to(mask)
        held = (bounded != weight).detach()
        return losses, {
            "ratio/mean": float(ratio[mask].mean()),
            **{f"ratio/{name}": part for name, part in _held(held, advantages, counted).items()},
        }

    def after(self, batch: Batch, score: Scoring) -> None:
        for part in self.parts.values():
            part.after(batch, score)

    def describe(self) -> Metrics:
        return {
            name: value for part in self.parts.values() for name, value in part.describe().items()
        }

    def state_dict(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])


def written(batch: Batch, scores: TokenScores) -> Tensor:
    """Which tokens `[N, T]` the policy itself chose: all of a response but what a tool said."""
    if "written" not in batch:
        return scores.mask
    return scores.mask & batch.written[:, : scores.mask.shape[1]].to(scores.mask)


def per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages `[N]` or `[N, T']` as `[N, T]`, with the dtype and device of `like` `[N, T]`."""
    if advantages.dim() == 1:
        return advantages.to(like)[:, None].expand_as(like)
    return advantages[:, : like.shape[1]].to(like)


def _made(choice: Choice, around: Around) -> Any:
    return choice.implementation(choice.name)(choice.settings(), around)


def _held(held: Tensor, advantages: Tensor, counted: Tensor) -> Metrics:
    """How often the mask takes the gradient away: of all tokens, and by the advantage's sign."""
    sides = {
        "clipped": counted,
        "clipped_positive": counted & (advantages > 0),
        "clipped_negative": counted & (advantages < 0),
    }
    return {
        name: int((held & side).sum()) / max(int(side.sum()), 1) for name, side in sides.items()
    }
