"""How hard prompts are for the present policy, by how many of their responses are right.

A group is the responses to one prompt. `solved` `[N]` is boolean, `group` `[N]` holds ids; what is
returned about the G groups is in order of their ids.
"""

import torch
from torch import Tensor

EASY, MEDIUM, HARD = 0, 1, 2


def solve_counts(solved: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Right responses `[G]` and responses `[G]` of every group."""
    if solved.dtype != torch.bool or solved.dim() != 1 or solved.shape != group.shape:
        raise ValueError(
            f"solved must be boolean [N] and group [N], got {solved.dtype} {list(solved.shape)} "
            f"and {list(group.shape)}"
        )
    _, index = torch.unique(group, return_inverse=True)
    total = torch.bincount(index)
    return torch.bincount(index[solved], minlength=len(total)), total


def of_groups(chosen: Tensor, group: Tensor) -> Tensor:
    """Places `[n]` of all items of the groups that are `chosen` `[G]`."""
    ids, index = torch.unique(group, return_inverse=True)
    if chosen.dtype != torch.bool or chosen.shape != ids.shape:
        raise ValueError(
            f"chosen must be boolean [{len(ids)}], one for each group, got {chosen.dtype} "
            f"{list(chosen.shape)}"
        )
    return chosen[index].nonzero().squeeze(1)


def has_signal(right: Tensor, total: Tensor) -> Tensor:
    """Some responses of the group are right and some are not: 0 < right < total, `[G]`."""
    return (right > 0) & (right < total)


def difficulty(
    accuracy: Tensor, hard: float = 0.3, medium_low: float = 0.3, medium_high: float = 0.7
) -> Tensor:
    """HARD where accuracy <= hard, MEDIUM in (medium_low, medium_high], else EASY (CLPO, `[G]`)."""
    if not 0 <= hard <= medium_low <= medium_high <= 1:
        raise ValueError(
            "expected 0 <= hard <= medium_low <= medium_high <= 1, got "
            f"{hard}, {medium_low}, {medium_high}"
        )
    medium = (accuracy > medium_low) & (accuracy <= medium_high)
    labels = torch.where(medium, MEDIUM, EASY)
    return torch.where(accuracy <= hard, HARD, labels)
