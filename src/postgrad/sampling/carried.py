"""Groups of responses of which a step takes those that are complete first; the others go on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.generation import Rollouts, SamplingSettings
from postgrad.sampling.slots import Slots, Windows


@dataclass(frozen=True)
class Taken:
    """The groups that a step learns from.

    Attributes:
        groups: which they are, counted from 0 over the run.
        rollouts: their responses; a token's log-probability is that of the weights that drew it.
        begun: `[N]`: the step in which each response was begun.
    """

    groups: list[int]
    rollouts: Rollouts
    begun: Tensor


@dataclass
class _Response:
    """One that no step has taken yet; `tokens` are there when it is complete."""

    begun: int
    logprobs: list[Tensor]
    tokens: Tensor | None = None
    finished: bool = False


class CarriedGroups:
    """Responses under way, more than a step needs, so that it does not wait for the longest.

    All are continued, a window of tokens at a time, until enough groups are complete; the rest is
    continued in the next step, by the weights of then (APRIL, Zhou et al. 2025, arXiv:2509.18521).
    What is complete and not taken yet goes first in the next step.

    Args:
        size: groups of a step.
        more: groups under way beyond those.
        samples: responses of a group.
    """

    def __init__(self, size: int, more: int, samples: int):
        self._size, self._samples = size, samples
        self._slots = Slots((size + more) * samples)
        self._open: dict[int, _Response] = {}
        self._complete: list[int] = []  # groups, in the order in which they became so

    def take(
        self,
        policy: LanguagePolicy,
        prompt_of: Callable[[int], Tensor],
        settings: SamplingSettings,
        window: int,
        seed: int,
        step: int,
    ) -> Taken:
        """The next groups; `prompt_of` gives the prompt `[P]` of one (see `Slots.advance`)."""
        while len(self._complete) < self._size:
            windows = self._slots.advance(
                policy, lambda item: prompt_of(item // self._samples), settings, window, seed
            )
            self._add(windows, step)
        groups, self._complete = self._complete[: self._size], self._complete[self._size :]
        responses = [self._open.pop(item) for group in groups for item in self._items(group)]
        tokens = [r.tokens.to(policy.device) for r in responses if r.tokens is not None]
        rollouts = Rollouts(
            prompts=[
                prompt_of(group).to(policy.device) for group in groups for _ in range(self._samples)
            ],
            responses=tokens,
            logprobs=[torch.cat(response.logprobs) for response in responses],
            finished=torch.tensor([response.finished for response in responses]),
            texts=[policy.decode(each) for each in tokens],
        )
        return Taken(groups, rollouts, torch.tensor([response.begun for response in responses]))

    def _add(self, windows: Windows, step: int) -> None:
        for place, item in enumerate(windows.items):
            response = self._open.setdefault(item, _Response(step, []))
            response.logprobs.append(windows.rollouts.logprobs[place].cpu())
            if windows.complete[place]:
                response.tokens = windows.whole[place]
                response.finished = bool(windows.rollouts.finished[place])
        for group in sorted({item // self._samples for item in windows.items}):
            members = [self._open.get(item) for item in self._items(group)]
            if all(member is not None and member.tokens is not None for member in members):
                self._complete.append(group)

    def _items(self, group: int) -> range:
        return range(group * self._samples, (group + 1) * self._samples)

    def state_dict(self) -> dict[str, Any]:
        return {
            "slots": self._slots.state_dict(),
            "complete": list(self._complete),
            "open": {item: vars(response) for item, response in self._open.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._slots.load_state_dict(state["slots"])
        self._complete = list(state["complete"])
        self._open = {item: _Response(**response) for item, response in state["open"].items()}
