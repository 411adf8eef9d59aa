"""The order in which a data set is seen: a function of seed and step, with nothing to save."""

import torch
from torch import Tensor

from postgrad.seeding import generator


class Epochs:
    """Shuffled passes over `n` items in batches of `size` without repeats inside a batch.

    Each pass drops the items that do not fill a last batch; another permutation comes next.
    """

    def __init__(self, n: int, size: int, seed: int):
        if n < 1 or size < 1:
            raise ValueError(f"need at least one item and a batch of one, got {n} and {size}")
        self.size = min(size, n)
        self.per_epoch = n // self.size
        self._n = n
        self._seed = seed
        self._last: tuple[int, Tensor] | None = None  # an epoch and its order

    def indices(self, step: int) -> Tensor:
        """The items `[size]` of collected batch `step` (from 0)."""
        epoch, position = divmod(step, self.per_epoch)
        if self._last is None or self._last[0] != epoch:
            random = generator(self._seed, "order", epoch)
            self._last = epoch, torch.randperm(self._n, generator=random)
        return self._last[1][position * self.size : (position + 1) * self.size]

    def item(self, number: int) -> int:
        """The item that is seen after `number` others."""
        return int(self.indices(number // self.size)[number % self.size])
