"""A second preference beside correctness, such as how early a tool is called (ASPO).

`feature` `[N]` is what is preferred small or large: the place of the first call, a length, a share.
`eligible` `[N]` bool says which responses have it and are right; all others are left as they are.
Two forms, after arXiv 2508.19201: on the advantage, where it can never outweigh correctness, and on
the reward, which the paper rejects.
"""

import math

import torch
from torch import Tensor


def shape_advantage(
    advantages: Tensor,
    eligible: Tensor,
    feature: Tensor,
    scale: Tensor,
    groups: Tensor,
    *,
    delta: float = -2.0,
    bound: float = 0.7,
) -> Tensor:
    """Advantages `[N]` with a bounded bias for the feature (ASPO, arXiv 2508.19201, eq. 2).

        A'_i = A_i + clip(delta (f_i - mean f) / mean s, -k |A_i|, k |A_i|)    for eligible i

    with f the feature, s its scale and both means over the eligible of the group. As k < 1 no
    advantage changes its sign, and where it is 0, as in a group that is right throughout, it stays
    0. For correct responses A_i >= 0, so the paper's A_i and |A_i| are the same; the latter keeps
    the sign for any advantage.

    Args:
        advantages: `[N]`, after normalisation.
        eligible: `[N]` bool.
        feature: `[N]`; what it is where not eligible does not matter.
        scale: `[N]`, positive where eligible: the unit that the feature is measured in.
        groups: `[N]` integer ids.
        delta: weight; below 0 a smaller feature is better, 0 changes nothing.
        bound: k, from 0 (nothing changes) to below 1.
    """
    _expect(advantages, eligible, feature, scale, groups=groups)
    if not math.isfinite(delta):
        raise ValueError(f"delta must be finite, got {delta}")
    if not 0 <= bound < 1:
        raise ValueError(f"bound must lie in [0, 1): at 1 signs could change, got {bound}")
    if bool((scale[eligible] <= 0).any()):
        raise ValueError("the scale of every eligible response must be positive")
    index, counts = _eligible_groups(eligible, groups, advantages.dtype)
    means = _sums(torch.where(eligible, feature, 0.0), index, counts) / counts
    unit = (_sums(torch.where(eligible, scale, 0.0), index, counts) / counts)[index]
    bias = delta * (feature - means[index]) / torch.where(eligible, unit, 1.0)
    most = bound * advantages.abs()
    return torch.where(eligible, advantages + bias.clamp(-most, most), advantages)


def shaped_rewards(
    rewards: Tensor,
    eligible: Tensor,
    feature: Tensor,
    groups: Tensor,
    *,
    delta: float = -0.1,
    limit: float = 2.0,
) -> Tensor:
    """Rewards `[N]` with a bonus for the feature (arXiv 2508.19201, eq. 1): what ASPO rejects.

        r'_i = r_i + delta clip((f_i - mean f) / std f, -c, c)    for eligible i

    with mean and sample deviation over the eligible of the group; no bonus where fewer than two are
    eligible or all have one feature. In a group that is right throughout, normalisation blows
    the bonus up to unit variance, and about half of the correct responses are punished.

    Args:
        rewards: `[N]`, before normalisation.
        eligible, feature, groups, delta: as for `shape_advantage`.
        limit: c, above 0.
    """
    _expect(rewards, eligible, feature, groups=groups)
    if not math.isfinite(delta) or not limit > 0:
        raise ValueError(f"delta must be finite and limit above 0, got {delta} and {limit}")
    index, counts = _eligible_groups(eligible, groups, rewards.dtype)
    means = _sums(torch.where(eligible, feature, 0.0), index, counts) / counts
    centred = torch.where(eligible, feature - means[index], 0.0)
    squares = _sums(centred.square(), index, counts)
    variance = (squares / (counts - 1).clamp(min=1))[index]
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    bonus = delta * (centred / deviation).clamp(-limit, limit)
    bonus = torch.where(variance > 0, bonus, 0.0)
    return torch.where(eligible, rewards + bonus, rewards)


def _expect(values: Tensor, eligible: Tensor, *others: Tensor, groups: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (values, eligible, *others, groups)]
    if values.ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"all must be [N], got {shapes}")
    if eligible.dtype != torch.bool or groups.is_floating_point():
        raise ValueError(
            f"eligible must be boolean and groups integer, got {eligible.dtype} and {groups.dtype}"
        )
    if any(not bool(torch.isfinite(tensor[eligible]).all()) for tensor in (values, *others)):
        raise ValueError("every eligible response needs a finite feature and scale")


def _eligible_groups(eligible: Tensor, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The position `[N]` of each item's group, and how many are eligible `[G]`, at least 1."""
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1 if len(index) else 0
    counts = torch.zeros(size, dtype=dtype, device=groups.device)
    return index, counts.index_add(0, index, eligible.to(dtype)).clamp(min=1)


def _sums(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(0, index, values.to(like.dtype))
