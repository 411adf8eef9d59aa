"""Which responses count, and how much, whoever drew them (RED, arXiv 2509.24203).

`rewards` `[N]` is one number per response; `groups` `[N]` holds integer ids of their prompts.
"""

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers
from postgrad.advantages.group import group_mean_centred


def balanced(rewards: Tensor, groups: Tensor, random: torch.Generator) -> Tensor:
    """Which responses are kept, `[N]` bool, so that no group has more negatives than positives.

    Positives are at or above their group's mean, negatives below; of the negatives as many as there
    are positives are kept, drawn by `random` (RED-Drop).
    """
    expect_numbers(rewards=rewards)
    negative = group_mean_centred(rewards, groups) < 0
    keep = torch.ones_like(negative)
    for group in groups.unique():
        own = groups == group
        below = (own & negative).nonzero().squeeze(1)
        surplus = len(below) - int((own & ~negative).sum())
        if surplus > 0:
            keep[below[torch.randperm(len(below), generator=random)[:surplus]]] = False
    return keep


def centred_among_kept(rewards: Tensor, groups: Tensor, keep: Tensor) -> Tensor:
    """A_i = r_i - mean of the kept responses of its group, `[N]`; 0 for what is not kept."""
    if keep.shape != rewards.shape or keep.dtype != torch.bool:
        raise ValueError(
            f"keep must be boolean of shape {list(rewards.shape)}, got {keep.dtype} of shape "
            f"{list(keep.shape)}"
        )
    advantages = torch.zeros_like(rewards)
    advantages[keep] = group_mean_centred(rewards[keep], groups[keep])
    return advantages


def exponentially_weighted(
    rewards: Tensor, groups: Tensor, temperature: float, weighted_mean: bool = False
) -> Tensor:
    """w_i A_i with A_i = r_i - mean of its group and w_i = exp(A_i / T), `[N]` (RED-Weight).

    With `weighted_mean` A_i is then taken from the group's mean under these weights, as where the
    weighted pairwise consistency is derived; they are not normalised in either case. Raises
    ValueError where a weight overflows.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    centred = group_mean_centred(rewards, groups)
    weights = (centred / temperature).exp()
    if not bool((weights * centred).isfinite().all()):
        raise ValueError(
            f"exp(A/T) overflows: A reaches {float(centred.max()):g}, the temperature is "
            f"{temperature:g}"
        )
    if weighted_mean:
        ids, index = torch.unique(groups, return_inverse=True)
        totals = torch.zeros(2, len(ids), dtype=rewards.dtype).index_add(
            1, index, torch.stack([weights * centred, weights])
        )
        centred = centred - (totals[0] / totals[1])[index]
    return weights * centred
