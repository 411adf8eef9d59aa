"""The contract between a method and the loop: what is this step's batch, and what is its loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings
from postgrad.errors import PostgradError

Metrics = dict[str, float]
LossFunction = Callable[[Batch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class FourParts:
    """A policy-gradient method as four parts (unified policy gradient estimator)."""

    mask: str
    denominator: str
    advantage: str
    gradient: str


@dataclass(frozen=True)
class Place:
    """Where a method lives: the run's seed, device and number of steps (for its own schedules)."""

    seed: int = 0
    device: torch.device = torch.device("cpu")
    steps: int = 1


class Optimise(Protocol):
    """The loop's side of an update: micro-batches, backward, clipping and one optimiser step."""

    def __call__(self, loss: LossFunction, batch: Batch, module: str | None = None) -> Metrics:
        """Minimise `loss` over `batch` by one step of `module`'s optimiser (default: the first).

        `loss` is called on parts of the batch; their losses are added. Returns the metrics
        averaged over parts, weighted by their number of items.
        """
        ...

    def looking_ahead(
        self, module: str | None = None, *, share: float | None = None
    ) -> AbstractContextManager[None]:
        """Inside, steps are on trial: at the end weights and optimiser state are as before.

        Their learning rate is that of the present step, or this `share` of the run's peak.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, an update may collect more: samples and scores in the loop's precision."""
        ...


class NothingToLearn(PostgradError):
    """This step's samples teach nothing, as when all are alike: the loop goes on to the next."""


class Method(ABC):
    """One published method.

    A subclass declares `Config` (its settings, each default with its source), `recipe` (defaults
    it wants for the loop) and, for policy-gradient methods, `parts`; it fills `collect` and `loss`.
    """

    Config: ClassVar[type[Settings]]
    recipe: ClassVar[dict[str, Any]] = {}
    parts: ClassVar[FourParts | None] = None

    def __init__(self, config: Settings, place: Place):
        self.config = config
        self.place = place

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The networks by name. Each that has trainable parameters gets its own optimiser."""

    @classmethod
    def four_parts(cls) -> FourParts | None:
        """Its four parts in words, if it is a policy gradient."""
        return cls.parts

    def rates(self) -> dict[str, float]:
        """Multiples of the run's learning rate by module; 1 where not given."""
        return {}

    def whole_weights(self) -> str | None:
        """Why its weights cannot be in shares, one on each process (`shard`); None if they can."""
        return None

    @abstractmethod
    def collect(self, step: int) -> Batch:
        """The batch of step `step` (from 0): from a dataset, rollouts, an environment, replay …

        Raises:
            NothingToLearn: the step is to be passed over.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The share of this (part of a) batch in the whole batch's loss, and metrics."""

    def minibatches(self, batch: Batch) -> Iterable[Batch]:
        """The batches of the successive optimiser steps of one update; by default one."""
        return [batch]

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        """Learn from one collected batch. Override for several optimisers or inner loops."""
        every = [optimise(self.loss, part) for part in self.minibatches(batch)]
        return {name: sum(m[name] for m in every) / len(every) for name in every[0]}

    def check(self) -> None:
        """Find what would fail later (rewards, context lengths …) before any compute is spent."""

    def evaluate(self) -> Metrics:
        """Metrics on held-out data. Leaves every random state as it found it."""
        return {}

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        """A few rows for people to read: prompt, response, reward terms, advantage per token …"""
        return []

    def evaluation_samples(self) -> list[dict[str, Any]]:
        """Rows for people to read, of the evaluation just made."""
        return []

    def describe_batch(self, batch: Batch) -> Metrics:
        """Metrics of the collected batch as a whole: reward, length, degenerate groups …"""
        return {}

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the data in use, so that a resumed run can tell that it changed."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps besides its modules: tensors, plain data."""
        return {}

    def changing_state(self) -> dict[str, Any]:
        """What of `state_dict` may be half changed where a step fails: copied before every step."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""

    def save(self, folder: Path) -> None:
        """Write the final model into `folder`, in the format its users expect."""

    def engines(self) -> list[Any]:
        """What draws in its networks' place (`sampling.engines.Engine`), where anything does."""
        found = [getattr(module, "engine", None) for module in self.modules().values()]
        return [engine for engine in found if engine is not None]

    def engine_metrics(self) -> Metrics:
        """What is worth watching of the engines since the last call."""
        return {name: value for one in self.engines() for name, value in one.metrics().items()}

    def close(self) -> None:
        """Let go of what it holds besides memory: other processes, connections, files."""
        module: Any
        for module in self.modules().values():
            engine = getattr(module, "engine", None)
            if engine is not None:
                engine.close()
                module.engine = None
