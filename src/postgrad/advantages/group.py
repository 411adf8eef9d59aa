"""Advantages from rewards within groups: all responses to one prompt, or the whole batch.

`rewards` `[N]` is one number per response; `groups` `[N]` holds integer group ids in any order (the
prompt's identity, not its text). Groups may differ in size. All-equal rewards give exactly 0.
"""

from typing import Literal

import torch
from torch import Tensor

Deviation = Literal["sample", "population"]


def group_mean_centred(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_i = r_i - mean of its group, `[N]` (Dr. GRPO, arXiv 2503.20783).

    A group of one has advantage 0: its mean is its own reward.
    """
    index, counts = _groups(rewards, groups)
    return _centred(rewards, index, counts)


def group_standardised(
    rewards: Tensor, groups: Tensor, std: Deviation = "sample", eps: float = 1e-4
) -> Tensor:
    """A_i = (r_i - mean) / (standard deviation + eps) within its group, `[N]` (GRPO, 2402.03300).

    The deviation divides by n - 1 ("sample") or n ("population"). Raises ValueError for a group of
    one, which has no deviation.
    """
    index, counts = _groups(rewards, groups)
    _expect_two(counts)
    centred = _centred(rewards, index, counts)
    squares = torch.zeros_like(counts).index_add(0, index, centred.square())
    deviation = _deviation(squares / _divisor(counts, std))[index]
    return centred / (deviation + eps)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_i = r_i - mean of the OTHERS in its group, `[N]` (RLOO, arXiv 2402.14740).

    Equals n/(n - 1) times the mean-centred advantage. Raises ValueError for a group of one.
    """
    index, counts = _groups(rewards, groups)
    _expect_two(counts)
    return _centred(rewards, index, counts) * (counts / (counts - 1))[index]


def batch_standardised(
    values: Tensor, mask: Tensor | None = None, std: Deviation = "sample", eps: float = 1e-8
) -> Tensor:
    """(value - mean) / (standard deviation + eps) over everything that counts, in the same shape.

    `mask` (boolean, the shape of `values`) says what counts; the rest is 0. All-equal values give
    0. Raises ValueError when fewer than two values count.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean of shape {list(values.shape)}, got {mask.dtype} "
            f"of shape {list(mask.shape)}"
        )
    counted = values[mask]
    one_group = torch.zeros(len(counted), dtype=torch.long, device=values.device)
    standardised = group_standardised(counted, one_group, std, eps)
    return torch.zeros_like(values).masked_scatter(mask, standardised)


def lite(rewards: Tensor, groups: Tensor, std: Deviation = "sample", eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean of its group) / (deviation of ALL rewards + eps), `[N]` (2508.08221).

    The deviation is that of the raw rewards, whatever their groups. All-equal groups have 0. Raises
    ValueError for fewer than two rewards.
    """
    index, counts = _groups(rewards, groups)
    whole = torch.tensor([len(rewards)], dtype=rewards.dtype, device=rewards.device)
    _expect_two(whole)
    everywhere = _centred(rewards, torch.zeros_like(index), whole)
    deviation = _deviation(everywhere.square().sum() / _divisor(whole, std))
    return _centred(rewards, index, counts) / (deviation + eps)


def spread_to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """Every token of a response gets its advantage: `[N]` and mask `[N, T]` to `[N, T]`, else 0."""
    if mask.ndim != 2 or advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"advantages {list(advantages.shape)} do not fit a mask of {list(mask.shape)}"
        )
    return torch.where(mask, advantages.unsqueeze(1), 0.0)


def _groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The position `[N]` of each item's group and the sizes `[G]`, in the dtype of the rewards."""
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"rewards and groups must both be [N], got {list(rewards.shape)} and "
            f"{list(groups.shape)}"
        )
    if not rewards.is_floating_point() or groups.is_floating_point():
        raise ValueError(
            f"rewards must be floating point and groups integer, got {rewards.dtype} and "
            f"{groups.dtype}"
        )
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, counts.to(rewards.dtype)


def _centred(rewards: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Rewards minus their group's mean; exactly 0 where all of a group are equal."""
    # Subtracting the smallest first makes equal rewards exactly 0, whatever the mean's rounding.
    smallest = torch.zeros_like(counts).scatter_reduce(
        0, index, rewards, "amin", include_self=False
    )
    shifted = rewards - smallest[index]
    means = torch.zeros_like(counts).index_add(0, index, shifted) / counts
    return shifted - means[index]


def _divisor(counts: Tensor, std: Deviation) -> Tensor:
    if std == "sample":
        return counts - 1
    if std == "population":
        return counts
    raise ValueError(f"std must be 'sample' or 'population', got {std!r}")


def _deviation(variance: Tensor) -> Tensor:
    """The square root; 1 where all are alike, since that of 0 has no finite slope."""
    return torch.where(variance == 0, 1.0, variance).sqrt()


def _expect_two(counts: Tensor) -> None:
    if bool((counts < 2).any()) or len(counts) == 0:
        raise ValueError("every group needs at least 2 responses: one response has no peers")
