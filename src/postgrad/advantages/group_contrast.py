"""Whether an optional behaviour helps with a prompt: by groups of responses with and without it."""

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers


def group_contrast_mask(correct: Tensor, behaves: Tensor, tolerance: float) -> Tensor:
    """M `[P]`: 1 where the behaviour helps, -1 where it hurts, else 0 (GCPO, 2506.07160, eq. 4).

    `correct` and `behaves` `[P, G]` are of G responses to each of P prompts: their accuracy, and
    (boolean) whether they show the behaviour. With D = mean accuracy with it - mean without,
    M = 1 if D > tolerance, -1 if D < -tolerance; 0 too where all responses show it, or none.
    """
    if correct.ndim != 2 or correct.shape != behaves.shape or behaves.dtype != torch.bool:
        raise ValueError(
            "correct and behaves must both be [P, G], behaves boolean, got "
            f"{list(correct.shape)} and {list(behaves.shape)} {behaves.dtype}"
        )
    if not tolerance >= 0:
        raise ValueError(f"the tolerance must be at least 0, got {tolerance}")
    expect_numbers(correct=correct)
    sides = []
    for side in (behaves, ~behaves):
        sides.append(torch.where(side, correct, 0.0).sum(1) / side.sum(1).clamp(min=1))
    difference = sides[0] - sides[1]
    comparable = behaves.any(1) & (~behaves).any(1)
    helps = (difference > tolerance).to(correct) - (difference < -tolerance).to(correct)
    return torch.where(comparable, helps, 0.0)


def bounded_length(lengths: Tensor, reference: float) -> Tensor:
    """min(|y| / reference, 1) of lengths in tokens `[N]`."""
    if not reference > 0:
        raise ValueError(f"the reference length must be above 0, got {reference}")
    if bool((lengths < 0).any()) or not bool(torch.isfinite(lengths.float()).all()):
        raise ValueError("lengths must be finite and at least 0")
    return (lengths.float() / reference).clamp(max=1.0)
