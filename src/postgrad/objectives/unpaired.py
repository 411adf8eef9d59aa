"""Losses of single responses that are labelled desirable or undesirable."""

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape


def mismatched_kl(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(pi || pi_ref), a number without gradient, at least 0 (KTO, 2402.01306).

    `log_ratio` `[N]` are log pi(y'|x)/pi_ref(y'|x) of responses y' that belong to other prompts of
    the batch. They are not samples of the policy, so this is a biased but cheap stand-in.
    """
    expect_dimensions(1, log_ratio=log_ratio)
    if len(log_ratio) == 0:
        raise ValueError("the estimate needs at least one mismatched pair")
    return log_ratio.detach().mean().clamp(min=0)


def kto(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's loss `[N]` (arXiv 2402.01306, eq. 7): weight - value, up to a constant of the label.

    desirable_weight [1 - sigma(beta (log_ratio - kl))] of a desirable response, and
    undesirable_weight [1 - sigma(beta (kl - log_ratio))] of an undesirable one.

    Args:
        log_ratio: `[N]` log pi(y|x)/pi_ref(y|x), sums over tokens.
        desirable: `[N]` bool.
        kl: the reference point, a number or `[N]`, without gradient.
    """
    expect_dimensions(1, log_ratio=log_ratio)
    expect_same_shape(log_ratio=log_ratio, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be boolean, got {desirable.dtype}")
    if kl.ndim:
        expect_same_shape(log_ratio=log_ratio, kl=kl)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(
            f"weights must be at least 0, got {desirable_weight} and {undesirable_weight}"
        )
    liked = desirable.to(log_ratio.dtype)
    weight = desirable_weight * liked + undesirable_weight * (1 - liked)
    return weight * torch.sigmoid(beta * (1 - 2 * liked) * (log_ratio - kl))
