"""Which prompts are worth sampling from: by what is known of their success rates."""

import torch
from torch import Tensor


def uncertainty(values: Tensor, exploration: float) -> Tensor:
    """sqrt(v (1 - v)) + exploration `[P]`: the spread of a reward of mean v (arXiv 2509.13232)."""
    if bool(((values < 0) | (values > 1) | values.isnan()).any()):
        raise ValueError("values must lie between 0 and 1")
    if not exploration >= 0:
        raise ValueError(f"exploration must be at least 0, got {exploration}")
    return (values * (1 - values)).sqrt() + exploration


def draw_by_weight(weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """`count` positions drawn with probabilities proportional to `weights` `[P]`.

    Without repeats unless more are asked for than there are of a positive weight.
    """
    if weights.ndim != 1 or not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights must be [P], finite and at least 0")
    possible = int((weights > 0).sum())
    if count < 1 or possible == 0:
        raise ValueError(f"cannot draw {count} of {possible} prompts")
    return torch.multinomial(weights, count, replacement=count > possible, generator=random)


def nearest_to(values: Tensor, target: float, count: int, random: torch.Generator) -> Tensor:
    """Positions of the `count` values `[P]` nearest to `target`; among equals, chance decides.

    Nearest first (PCL, arXiv 2510.01135).
    """
    if values.ndim != 1 or not bool(torch.isfinite(values).all()):
        raise ValueError("values must be [P] and finite")
    if not 1 <= count <= len(values):
        raise ValueError(f"cannot choose {count} of {len(values)} prompts")
    shuffled = torch.randperm(len(values), generator=random)
    order = (values[shuffled] - target).abs().argsort(stable=True)
    return shuffled[order[:count]]
