"""From judged samples to pairs and lists: which responses are learnt from, best first.

A group is K responses to one prompt. `preferences` `[K, K]` holds P(i preferred to j), with
P + P^T = 1; every function returns indices into the group.
"""

import torch
from torch import Tensor


def win_rates(preferences: Tensor) -> Tensor:
    """r `[..., K]`: how often a response is preferred to another of its group, itself left out."""
    size = preferences.shape[-1]
    if preferences.ndim < 2 or preferences.shape[-2] != size or size < 2:
        raise ValueError(
            f"preferences must be [..., K, K] with K of at least 2, got {list(preferences.shape)}"
        )
    itself = preferences.diagonal(dim1=-2, dim2=-1)
    return (preferences.sum(-1) - itself) / (size - 1)


def best_and_worst(preferences: Tensor) -> list[int]:
    """The responses `[2]` that win most and least often; the first of equals, the last of equals.

    The two are always different places, also where all responses are equally good.
    """
    order = win_rates(preferences).argsort(descending=True, stable=True)
    return [int(order[0]), int(order[-1])]


def all_pairs(preferences: Tensor) -> list[list[int]]:
    """Every pair with a preference, the preferred response first."""
    size = preferences.shape[-1]
    first, second = torch.triu_indices(size, size, offset=1)
    return [
        [int(i), int(j)] if preferences[i, j] > 0.5 else [int(j), int(i)]
        for i, j in zip(first, second, strict=True)
        if preferences[i, j] != 0.5
    ]
