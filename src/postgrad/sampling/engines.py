"""Engines: what draws responses in a policy's place, by a copy of its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.drawing import SamplingSettings


@dataclass(frozen=True)
class Drawn:
    """One response.

    Attributes:
        tokens: `[L]`, L ≥ 1, with the end token where it ended by one.
        logprobs: `[L]` float32, as `Rollouts.logprobs`: of the distribution they were drawn from,
            as the engine computes it.
        finished: ended by an end token or a stop string, and not by its limit.
    """

    tokens: Tensor
    logprobs: Tensor
    finished: bool


@dataclass(frozen=True)
class Wanted:
    """N responses to be drawn.

    Attributes:
        prompts: token ids `[P]`; equal ones follow each other.
        settings: temperature, restrictions and stop strings.
        seeds: one for each response.
        limits: the most tokens of each response.
    """

    prompts: list[Tensor]
    settings: SamplingSettings
    seeds: list[int]
    limits: list[int]

    def part(self, start: int, stop: int) -> "Wanted":
        """Responses from `start` to before `stop`."""
        return self.chosen(range(start, stop))

    def chosen(self, places: Sequence[int]) -> "Wanted":
        """The responses at these places, in this order."""
        return Wanted(
            [self.prompts[i] for i in places],
            self.settings,
            [self.seeds[i] for i in places],
            [self.limits[i] for i in places],
        )


class Engine(Protocol):
    """Draws responses elsewhere: on other processes and machines, or by another program.

    An engine is given to a policy as `policy.engine`; `generate` then asks it for every response of
    the policy itself. What needs the policy's logits (mixtures with the reference, masks of tokens)
    is drawn in this process all the same, and so is what the reference policy draws.

    Attributes:
        exact: the same seed gives the tokens that this process would draw, with their
            log-probabilities. Where it is false, what is learnt from responses has to be corrected
            for the difference between the two.
    """

    exact: bool

    def draw(self, policy: LanguagePolicy, wanted: Wanted) -> list[Drawn]:
        """The responses that are wanted, drawn by the policy's present weights.

        They are taken up before drawing if they have changed.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What is worth watching of the engine since the last call: time, staleness, faults …"""
        ...

    def close(self) -> None:
        """Let go of processes and memory; it may be called twice."""
        ...


class Asked(Protocol):
    """Responses that are being drawn, by the weights that the policy had when it was asked."""

    def drawn(self) -> list[Drawn]:
        """The responses, once all are there."""
        ...

    def drawn_anyhow(self, policy: LanguagePolicy) -> list[Drawn]:
        """The same; what the engine can no longer draw is drawn by a copy of the policy."""
        ...


@runtime_checkable
class AsksAhead(Engine, Protocol):
    """An engine that draws while this process does something else."""

    def ask(self, policy: LanguagePolicy, wanted: Wanted) -> Asked:
        """Have responses drawn by the policy's present weights, whatever they become meanwhile."""
        ...
