"""Samples of earlier steps that are learnt from once more."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postgrad.batch import Batch


class PastSamples:
    """The batches of the last `steps` steps; whole groups of them are drawn evenly.

    They must hold `group`, and as `old_logprobs` the log-probabilities that they were sampled with:
    by those they are weighed, however long ago that was.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise ValueError(f"at least one step must be kept, got {steps}")
        self._steps = steps
        self._batches: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Keep a step's batch, in place of the oldest one."""
        self._batches = [*self._batches, batch][-self._steps :]

    def draw(self, groups: int, random: torch.Generator) -> Batch | None:
        """So many different groups, or all there are, with ids from 0; None where there are none.

        Their order is that in which they were added.
        """
        every = [
            (place, group)
            for place, batch in enumerate(self._batches)
            for group in batch.group.unique().tolist()
        ]
        chosen = torch.randperm(len(every), generator=random)[:groups].sort().values.tolist()
        drawn: Batch | None = None
        for number, (place, group) in enumerate(every[i] for i in chosen):
            batch = self._batches[place]
            part = batch.select((batch.group == group).nonzero().squeeze(1))
            part = part.with_fields(group=torch.full((len(part),), number))
            drawn = part if drawn is None else drawn.joined(part)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [batch.fields() for batch in self._batches]}

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._batches = [Batch(**fields) for fields in state["batches"]]
