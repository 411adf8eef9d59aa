"""Which of the sampled responses are learnt from."""

import torch
from torch import Tensor


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether each response `[N]` belongs to a group whose rewards differ, boolean `[N]`.

    All others have no advantage within their group (dynamic sampling, arXiv 2503.14476).
    """
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"rewards and groups must both be [N], got {list(rewards.shape)} and "
            f"{list(groups.shape)}"
        )
    _, index = torch.unique(groups, return_inverse=True)
    sizes = int(index.max()) + 1 if len(index) else 0
    lowest = rewards.new_full((sizes,), torch.inf).scatter_reduce(0, index, rewards, "amin")
    highest = rewards.new_full((sizes,), -torch.inf).scatter_reduce(0, index, rewards, "amax")
    return (lowest < highest)[index]


def first_groups(groups: Tensor, most: int) -> Tensor:
    """Positions `[n]` of the items of the first `most` groups, in order of the groups' ids."""
    return torch.isin(groups, groups.unique()[:most]).nonzero().squeeze(1)
