"""Replay: the last transitions, for learning off-policy."""

from typing import Any

import torch
from torch import Tensor


class Replay:
    """The last `capacity` items, each with the same named fields; the oldest are overwritten."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._fields: dict[str, Tensor] = {}
        self._next = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, **fields: Tensor) -> None:
        """Append n items given as tensors `[n, ...]`; the first call fixes the names and shapes."""
        counts = {len(values) for values in fields.values()}
        if len(counts) != 1 or (self._fields and fields.keys() != self._fields.keys()):
            raise ValueError(f"expected equally many of each of {sorted(self._fields or fields)}")
        (count,) = counts
        if count > self._capacity:
            raise ValueError(f"{count} items do not fit into a replay of {self._capacity}")
        if not self._fields:
            self._fields = {
                name: torch.zeros(self._capacity, *values.shape[1:], dtype=values.dtype)
                for name, values in fields.items()
            }
        places = torch.arange(self._next, self._next + count) % self._capacity
        for name, values in fields.items():
            self._fields[name][places] = values
        self._next = (self._next + count) % self._capacity
        self._size = min(self._size + count, self._capacity)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` items drawn uniformly with replacement."""
        if not self._size:
            raise ValueError("nothing to draw from: the replay is empty")
        places = torch.randint(self._size, (count,), generator=generator)
        return {name: values[places] for name, values in self._fields.items()}

    def state_dict(self) -> dict[str, Any]:
        """The filled part; as large as the replay itself."""
        fields = {name: values[: self._size] for name, values in self._fields.items()}
        return {"fields": fields, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fields, self._next, self._size = {}, 0, 0
        if state["fields"]:
            self.add(**state["fields"])
        self._next = state["next"]
