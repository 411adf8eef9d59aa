"""What each of several samples of a prompt weighs in a weighted likelihood, L = -sum w log pi(y).

`rewards` `[P, N]` are of N samples to each of P prompts; weights have the same shape. Best-of-n,
reward-weighted regression and REINFORCE differ in nothing but these weights (arXiv 2404.14367),
and a weight below 0 is what is called a negative gradient there.
"""

import torch
from torch import Tensor


def best_of_n_weights(rewards: Tensor, against_worst: float = 0.0) -> Tensor:
    """1 for the best of a prompt's samples, minus `against_worst` for the worst; else 0.

    Equally good samples share a weight, as if one of them were drawn. With `against_worst` the
    likelihood of the worst is pushed down without bound.
    """
    _expect_groups(rewards)
    if not against_worst >= 0:
        raise ValueError(f"against_worst must be at least 0, got {against_worst}")
    best = rewards == rewards.amax(1, keepdim=True)
    worst = rewards == rewards.amin(1, keepdim=True)
    shares = [chosen / chosen.sum(1, keepdim=True) for chosen in (best, worst)]
    weights: Tensor = (shares[0] - against_worst * shares[1]).to(rewards.dtype)
    return weights


def exponential_weights(rewards: Tensor, beta: float, normalised: bool = False) -> Tensor:
    """exp(r/beta): reward-weighted regression (Peters & Schaal 2007).

    `normalised` divides by the sum over the prompt's samples: beta near 0 is then best-of-n, a
    large beta fine-tuning on all samples alike. Raises ValueError where a weight overflows.
    """
    _expect_groups(rewards)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if normalised:
        return (rewards / beta).softmax(1)
    weights = (rewards / beta).exp()
    if not bool(weights.isfinite().all()):
        raise ValueError(f"exp(r/beta) overflows: rewards reach {float(rewards.max()):g}")
    return weights


def without_negatives(weights: Tensor) -> Tensor:
    """w - min w over all that is given, so that no weight is below 0 (arXiv 2404.14367)."""
    if not weights.numel():
        raise ValueError("weights must be of at least one sample, got none")
    return weights - weights.min()


def _expect_groups(rewards: Tensor) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [P, N], got shape {list(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise ValueError(f"at least 2 samples a prompt are needed, got {rewards.shape[1]}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite")
