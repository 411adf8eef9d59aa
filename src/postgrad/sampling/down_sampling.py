"""Which responses, and which of their tokens, are worth an update (D3S, PODS).

After "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework" (Wang et al. 2025,
arXiv 2509.22115). Ties are broken by position, so that a choice can be repeated.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["batch", "response"]


@dataclass(frozen=True)
class LinearSchedule:
    """From `initial` to `final` in proportion to progress, from 0 to 1."""

    initial: float
    final: float

    def at(self, progress: float) -> float:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        return (1 - progress) * self.initial + progress * self.final


def select_max_variance(values: Tensor, n: int, groups: Tensor | None = None) -> Tensor:
    """Positions, in order, of the `n` values `[N]` of the largest variance; of each group's `n`.

    The variance of a set of fixed size is convex in each element, so the best set is always that of
    the k smallest and the n - k largest values for some k; all are tried after one sort. It stays
    the same if all values are multiplied by one number.
    """
    if values.ndim != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"values must be finite and [N], got {list(values.shape)}")
    if groups is not None:
        if groups.shape != values.shape:
            raise ValueError(f"groups must be {list(values.shape)}, got {list(groups.shape)}")
        members = [(groups == group).nonzero().squeeze(1) for group in groups.unique()]
        chosen = [own[select_max_variance(values[own], n)] for own in members]
        return torch.cat(chosen).sort().values
    if not 2 <= n <= len(values):
        raise ValueError(f"n must lie between 2 and {len(values)}, got {n}")
    ordered, order = values.detach().double().sort(stable=True)
    smallest = torch.arange(n + 1)

    def extremes(powers: Tensor) -> Tensor:
        """The sum over the k smallest and the n - k largest, for k = 0 … n."""
        sums = torch.cat([powers.new_zeros(1), powers.cumsum(0)])
        return sums[smallest] + sums[-1] - sums[len(powers) - n + smallest]

    ordered = ordered - ordered.mean()  # variance is the same, rounding smaller
    spread = extremes(ordered.square()) - extremes(ordered).square() / n
    k = int(spread.argmax())
    return torch.cat([order[:k], order[len(order) - (n - k) :]]).sort().values


def select_tokens(keys: Tensor, mask: Tensor, fraction: float, scope: Scope = "batch") -> Tensor:
    """The share `fraction` of the tokens with the largest keys, as a mask `[N, T]`; at least one.

    Args:
        keys: `[N, T]`; anything where `mask` is false.
        mask: `[N, T]` bool, the tokens to choose from.
        scope: the share is one of all tokens ("batch"), or of each response's.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or keys.shape != mask.shape:
        raise ValueError(
            f"expected a boolean mask [N, T] and keys of its shape, got {mask.dtype} "
            f"{list(mask.shape)} and {list(keys.shape)}"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    if scope not in ("batch", "response"):
        raise ValueError(f"scope must be 'batch' or 'response', got {scope!r}")
    # padding comes last, after real tokens of key 0
    keys = torch.where(mask, keys.detach(), -torch.inf)
    rows, there = (
        (keys, mask) if scope == "response" else (keys.flatten()[None], mask.flatten()[None])
    )
    counts = (fraction * there.sum(1)).round().clamp(min=1).long()
    rank = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((rank < counts[:, None]) & there).view_as(mask)
