"""Named values about the same items: what `collect` returns and `loss` reads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Batch:
    """Fields about N items, each a tensor `[N, ...]` or a list of N values.

    Reading is by attribute (`batch.rewards`). Some fields have a meaning to the loop:

    - `mask` `[N, T]`: which response tokens count. Its sum is `batch.tokens`.
    - `cost` `[N]`: how many tokens an item occupies in a forward pass, for micro-batches.
    - `shared_cost` `[N]`, with `group` `[N]`: tokens that neighbours of one group occupy only once.

    `items` and `tokens` are those of the whole batch that one optimiser step sees. A part made by
    `split` keeps the whole's numbers, so a loss written as `sum(...) / batch.items` (or `.tokens`)
    adds up to the same gradient however the batch is cut.
    """

    def __init__(self, *, whole: tuple[int, int] | None = None, **fields: Any):
        lengths = {name: len(values) for name, values in fields.items()}
        if not lengths or len(set(lengths.values())) != 1:
            raise ValueError(f"fields of a batch must have one common length, got {lengths}")
        self._fields = fields
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_fields"][name]
        except KeyError:
            raise AttributeError(f"this batch has no field {name!r}") from None

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def fields(self) -> dict[str, Any]:
        return dict(self._fields)

    @property
    def items(self) -> int:
        """Number of items in the whole batch of which this is a part."""
        return self._whole[0] if self._whole else len(self)

    @property
    def tokens(self) -> int:
        """Number of response tokens that count in the whole batch of which this is a part."""
        return self._whole[1] if self._whole else self._own_tokens()

    def _own_tokens(self) -> int:
        return int(self._fields["mask"].sum()) if "mask" in self._fields else 0

    def with_fields(self, **fields: Any) -> "Batch":
        """The same items with some fields added or replaced."""
        return Batch(whole=self._whole, **{**self._fields, **fields})

    def select(self, index: Tensor) -> "Batch":
        """The chosen items `[n]` as a whole batch of their own."""
        return Batch(**self._take(index))

    def joined(self, other: "Batch") -> "Batch":
        """These items and then those of `other`, which has the same fields, as a whole batch.

        Where their responses differ in length, `[N, T]` is filled with zeros on the right.
        """
        fields: dict[str, Any] = {}
        for name, more in other.fields().items():
            own = self._fields[name]
            fields[name] = _stacked(own, more) if isinstance(own, Tensor) else [*own, *more]
        return Batch(**fields)

    def split(self, budget: int | None) -> Iterator["Batch"]:
        """Consecutive parts whose cost adds up to at most `budget` (at least one item each).

        Groups with a `shared_cost` stay whole unless a group alone exceeds the budget.
        """
        whole = (self.items, self.tokens)
        if budget is None or "cost" not in self._fields:
            yield Batch(whole=whole, **self._fields)
            return
        start, used = 0, 0
        for first, cost in self._units(budget):
            if first > start and used + cost > budget:
                yield Batch(whole=whole, **self._take(torch.arange(start, first)))
                start, used = first, 0
            used += cost
        yield Batch(whole=whole, **self._take(torch.arange(start, len(self))))

    def _units(self, budget: int) -> Iterator[tuple[int, int]]:
        """What is better not cut apart: its first item and its cost."""
        costs = torch.as_tensor(self._fields["cost"]).tolist()
        if "shared_cost" not in self._fields:
            yield from enumerate(costs)
            return
        shared = torch.as_tensor(self._fields["shared_cost"]).tolist()
        groups = torch.as_tensor(self._fields["group"]).tolist()
        first, used = 0, shared[0]
        for i, cost in enumerate(costs):
            if i > first and (groups[i] != groups[first] or used + cost > budget):
                yield first, used
                first, used = i, shared[i]
            used += cost
        yield first, used

    def _take(self, index: Tensor) -> dict[str, Any]:
        positions = index.tolist()
        return {
            name: values[index] if isinstance(values, Tensor) else [values[i] for i in positions]
            for name, values in self._fields.items()
        }


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    if one.dim() == 1:
        return torch.cat([one, other])
    longest = max(one.shape[1], other.shape[1])
    return torch.cat([functional.pad(t, (0, longest - t.shape[1])) for t in (one, other)])
