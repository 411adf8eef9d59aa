"""Responses asked for before they are needed: workers draw while this process trains."""

from collections.abc import Mapping
from typing import Any

from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.engines import Asked, AsksAhead, Drawn, Wanted
from postgrad.sampling.generation import Rollouts, rollouts_of


class Ahead:
    """What has been asked for, by the step that it is for.

    The responses to a step are those of the weights at the time of asking, whenever they are drawn.
    They stay until a later step is begun, so that a checkpoint in between has them.

    Args:
        policy: whose weights are drawn by.
        engine: of workers, which draw in the meantime.
    """

    def __init__(self, policy: LanguagePolicy, engine: AsksAhead):
        self._policy, self._engine = policy, engine
        self._asked: dict[int, Asked] = {}
        self._there: dict[int, list[Drawn]] = {}  # from a checkpoint
        self._by: dict[int, int] = {}  # the step at which it was asked
        self.next = 0  # nothing has been asked for this step and those after it

    def begin(self, step: int) -> None:
        """Let go of what was for earlier steps."""
        self.next = max(self.next, step)
        for kept in (self._asked, self._there, self._by):
            for earlier in [one for one in kept if one < step]:
                kept.pop(earlier)

    def ask(self, wanted: Wanted, *, now: int) -> None:
        """Have the responses for step `next` drawn by the present weights, those of step `now`."""
        self._asked[self.next] = self._engine.ask(self._policy, wanted)
        self._by[self.next] = now
        self.next += 1

    def rollouts(self, step: int, wanted: Wanted) -> Rollouts:
        """The responses for a step, `wanted` being what was asked for.

        Raises:
            PostgradError: they cannot be drawn on the cluster any more.
        """
        there = self._there.get(step)
        return rollouts_of(
            self._policy, wanted, self._asked[step].drawn() if there is None else there
        )

    def staleness(self, step: int) -> int:
        """Updates between the weights that drew a step's responses and those of the step."""
        return step - self._by[step]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is under way, once it is there."""
        drawn = {step: one.drawn_anyhow(self._policy) for step, one in self._asked.items()}
        return {
            "next": self.next,
            "by": dict(self._by),
            "drawn": {
                step: [(one.tokens, one.logprobs, one.finished) for one in responses]
                for step, responses in {**self._there, **drawn}.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next, self._by = state["next"], dict(state["by"])
        self._asked = {}
        self._there = {
            step: [Drawn(*response) for response in responses]
            for step, responses in state["drawn"].items()
        }
