"""What the parts of a policy gradient are: mask, denominator, advantage and likelihood gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Settings
from postgrad.errors import PostgradError

Scoring = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Around:
    """What a part may know of the run it works in.

    Attributes:
        seed: the run's.
        steps: of the run.
        prompts: a step.
        samples: responses to a prompt.
        updates: optimiser steps a rollout.
        stale: whether samples of an older policy are learnt from.
        rows: the training data; a batch's `row` `[N]` counts in it. Empty where a method has none.
    """

    seed: int = 0
    steps: int = 1
    prompts: int = 1
    samples: int = 1
    updates: int = 1
    stale: bool = False
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)


class Part:
    """One of the four; the first line of a subclass's docstring says what it does.

    Whatever a part remembers between steps is in its `state_dict`.

    Attributes:
        needs_entropies: batches must have `entropies` `[N, T]` of the predictions.
    """

    Config: ClassVar[type[Settings]] = Settings
    needs_entropies: ClassVar[bool] = False

    def __init__(self, config: Any, around: Around):
        """Raises PostgradError where it cannot work in such a run."""
        self.config = config
        self.around = around

    def after(self, batch: Batch, score: Scoring) -> None:
        """After the updates on a batch. `score` gives log-probabilities `[N, T]` of responses."""

    def describe(self) -> dict[str, float]:
        """Metrics of what it remembers, or of the last batch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class Advantage(Part, ABC):
    """Rewards to advantages."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """`[N]`, or `[N, T]` where tokens differ, from `reward`, `group` and more of a batch."""


class Mask(Part, ABC):
    """Which tokens teach: by what was sampled, once, and by how far the policy has moved."""

    def chosen(self, batch: Batch) -> Batch:
        """The responses that are learnt from, by their `advantages`; nothing else is scored."""
        return batch

    def prepared(self, batch: Batch) -> Batch:
        """The batch, maybe with fewer tokens in its `mask`, or with `token_weights` `[N, T]`."""
        return batch

    @abstractmethod
    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The weight `[N, T]`, held constant where the gradient is to stop.

        `ratio` `[N, T]` is pi / pi_old without gradient, `advantages` `[N, T]`.
        """


class Denominator(Part, ABC):
    """What the policy's probability is divided by."""

    @abstractmethod
    def __call__(self, logprobs: Tensor, old: Tensor) -> Tensor:
        """Its logarithm `[N, T]`, a constant, from those of the policy and of the sampler."""


class Gradient(Part, ABC):
    """Of which function of the probabilities the gradient is taken.

    Attributes:
        denominators: names of the denominators that it is defined for; empty: all.
        whole_responses: all tokens of a response have one ratio.
    """

    denominators: ClassVar[tuple[str, ...]] = ()
    whole_responses: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, log_weight: Tensor, mask: Tensor) -> Tensor:
        """The weight `[N, T]` from log pi - log denominator `[N, T]`, 1 or 0 at padding."""


def require_groups(around: Around, what: str) -> None:
    """Stop unless prompts have at least two responses, which `what` compares."""
    if around.samples < 2:
        raise PostgradError(
            f"rollout.samples: {what} compares the responses to a prompt, so it needs at least 2 "
            f"samples, got {around.samples}"
        )


def require_one_update(around: Around, what: str) -> None:
    """Stop at several optimiser steps a rollout, or rollouts of an older policy."""
    if around.updates > 1:
        raise PostgradError(
            f"epochs, minibatches: {what} takes the policy to be the one that sampled, so there "
            f"can be one optimiser step a rollout, got {around.updates}"
        )
    if around.stale:
        raise PostgradError(
            f"sync_every, sync_delay, replay, rollout.stale, carry: {what} takes the policy to be "
            "the one that sampled, so expected 1, 0, 0, 0 and 0: no older policy may sample"
        )


def group_means(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Means `[G]` of values `[N]` by group, in order of the groups' ids, and positions `[N]`."""
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), dtype=values.dtype).index_add(0, index, values)
    return totals / counts, index
