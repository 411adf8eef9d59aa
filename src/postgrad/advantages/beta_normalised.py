"""Advantages over a Beta density of the success rate (BNPO, arXiv 2506.02864).

With rewards in [0, 1], the success rate p of a prompt is taken as Beta(a, b) over prompts, and the
centred reward is divided by the density of Beta(alpha, beta) at p. Fixed parameters give known
advantages: alpha = beta = 1 divides by 1 (Dr. GRPO), alpha = beta = 3/2 by 8/pi sqrt(p (1 - p)),
GRPO's deviation times a constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta

from postgrad.advantages.group import group_mean_centred

_LEAST_VARIANCE = 1e-12  # of success rates that differ at all


@dataclass(frozen=True)
class BetaFit:
    """How hard the prompts of a batch are, and the normaliser that follows from it.

    Attributes:
        mean, variance: of the success rates, the variance over n - 1.
        a, b: the Beta distribution of these moments; NaN where all rates are equal.
        alpha, beta: parameters of the normaliser, at least 1.
    """

    mean: float
    variance: float
    a: float
    b: float
    alpha: float
    beta: float


def fit_normaliser(rates: Tensor) -> BetaFit:
    """The normaliser of least variance for success rates `[Q]` of Q prompts (BNPO).

        c = m (1 - m) / v - 1,   a = c m,   b = c (1 - m),   alpha = 1 + a/3,   beta = 1 + b/3

    from their mean m and variance v. Rates that are all equal, as that of a single prompt, have no
    such fit: alpha = beta = 1. Where v is above m (1 - m), a and b are negative and alpha and beta
    are held at 1.
    """
    if rates.ndim != 1 or not len(rates) or bool(((rates < 0) | (rates > 1)).any()):
        raise ValueError(f"success rates must be [Q] in [0, 1], Q at least 1, got {rates}")
    rates = rates.double()
    mean = float(rates.mean())
    variance = float(rates.var()) if len(rates) > 1 else 0.0
    if variance < _LEAST_VARIANCE:
        return BetaFit(mean, variance, torch.nan, torch.nan, 1.0, 1.0)
    scale = mean * (1 - mean) / variance - 1
    a, b = scale * mean, scale * (1 - mean)
    return BetaFit(mean, variance, a, b, max(1 + a / 3, 1.0), max(1 + b / 3, 1.0))


@torch.no_grad()
def beta_weights(rates: Tensor, alpha: float, beta: float, limit: float = 1e6) -> Tensor:
    """1 / f(p; alpha, beta), at most `limit`, at success rates p of any shape.

    f is the Beta density; with parameters above 1 it is 0 at p = 0 and 1, where the weight is the
    limit.
    """
    if not (alpha >= 1 and beta >= 1 and limit > 0):
        raise ValueError(
            "alpha and beta must be at least 1 and the limit positive, got "
            f"{alpha}, {beta}, {limit}"
        )
    exact = rates.double()
    log_density = Beta(
        torch.tensor(alpha, dtype=torch.float64),
        torch.tensor(beta, dtype=torch.float64),
        validate_args=False,
    ).log_prob(exact)
    return (-log_density).exp().clamp(max=limit).to(rates.dtype)


def beta_normalised(rewards: Tensor, groups: Tensor, limit: float = 1e6) -> tuple[Tensor, BetaFit]:
    """A_i = (r_i - p) / f(p; alpha, beta) with p the mean of its group, `[N]`, and the fit.

    `rewards` `[N]` in [0, 1], `groups` `[N]` integer ids. All-equal groups have exactly 0, whatever
    f is there. Raises ValueError for other rewards.
    """
    if bool(((rewards < 0) | (rewards > 1)).any()):
        raise ValueError(
            f"rewards must lie in [0, 1], got {float(rewards.min()):g} to {float(rewards.max()):g}"
        )
    centred = group_mean_centred(rewards, groups)
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), dtype=torch.float64).index_add(0, index, rewards.double())
    rates = (totals / counts).clamp(0, 1)
    fit = fit_normaliser(rates)
    weights = beta_weights(rates, fit.alpha, fit.beta, limit)[index].to(rewards)
    return centred * weights, fit


def normalised_variance(a: float, b: float, alpha: float, beta: float) -> float:
    """E[p (1 - p) / f(p; alpha, beta)^2] over p ~ Beta(a, b): the variance that BNPO minimises.

    In closed form B(alpha, beta)^2 B(a + 3 - 2 alpha, b + 3 - 2 beta) / B(a, b); infinite unless
    alpha < (a + 3)/2 and beta < (b + 3)/2.
    """
    if not min(a, b, alpha, beta) > 0:
        raise ValueError(f"parameters must be positive, got {a}, {b}, {alpha}, {beta}")
    left, right = a + 3 - 2 * alpha, b + 3 - 2 * beta
    if left <= 0 or right <= 0:
        return torch.inf
    logarithm = 2 * log_beta(alpha, beta) + log_beta(left, right) - log_beta(a, b)
    return float(logarithm.exp())


def log_beta(x: float, y: float) -> Tensor:
    """log B(x, y) of positive numbers, float64."""
    if not (x > 0 and y > 0):
        raise ValueError(f"x and y must be positive, got {x} and {y}")
    both = torch.tensor([x, y], dtype=torch.float64)
    return torch.lgamma(both).sum() - torch.lgamma(both.sum())
