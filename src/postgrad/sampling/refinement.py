"""Refinements: which of a prompt's second attempts take the place of first ones."""

import torch
from torch import Tensor


def select_refinements(scores: Tensor, kept: int = 1) -> Tensor:
    """Places `[kept]` of the best of n refinements by their scores `[n]`, the first among equals.

    With scores of 0 and 1 these are the first right ones, or the first ones if none is.
    """
    if scores.dim() != 1 or not 1 <= kept <= len(scores):
        raise ValueError(
            f"expected scores [n] and 1 <= kept <= n, got {list(scores.shape)}, {kept}"
        )
    return torch.sort(scores, descending=True, stable=True).indices[:kept]
