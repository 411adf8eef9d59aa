"""Divergences that are known by samples: their values, and policy gradients that lower them.

The reverse KL to a reference, as a surrogate whose gradient is the KL's (HyPO, arXiv 2406.01462),
and f-divergences to a target that is known up to a constant (f-DPG, arXiv 2302.08215). With a
policy pi and a target p, t = pi(x)/p(x) for a whole response x:

    D_f(pi || p) = E_p[f(t)] + f'(inf) pi(p = 0),   f convex, f(1) = 0
    grad D_f     = E_pi[f'(t) grad log pi(x)]

No gradient flows through f'(t): what it would add cancels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape

KLGradient = Literal["reinforce", "rloo", "token"]


def reverse_kl_surrogate(
    logprobs: Tensor, reference: Tensor, mask: Tensor, estimator: KLGradient = "rloo"
) -> Tensor:
    """A value `[B]` a prompt whose gradient estimates that of KL(pi || pi_ref) without bias.

    `logprobs`, `reference` and the boolean `mask` `[B, k, T]` are of the tokens of k samples of pi.
    With c_i = log pi(y_i)/pi_ref(y_i), constant for the gradient (arXiv 2406.01462):

    - "reinforce": mean_i c_i log pi(y_i).
    - "rloo": mean_i A_i log pi(y_i), A_i = c_i less the mean of the others' c; needs k >= 2.
    - "token": mean_i sum_t (sum_{s >= t} c_is) log pi(y_it): a token answers for what follows.

    Its value is not the KL; that is the mean of c. Differentiating the mean of c itself would give
    a gradient of mean zero, for E[grad log pi] = 0.
    """
    expect_dimensions(3, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    expect_same_shape(mask=mask, logprobs=logprobs, reference=reference)
    logprobs = torch.where(mask, logprobs, 0.0)
    log_ratio = torch.where(mask, logprobs - reference, 0.0).detach()
    if not mask.shape[1]:
        raise ValueError("logprobs must be of at least one sample a prompt, got none")
    if estimator == "token":
        to_go = log_ratio.flip(2).cumsum(2).flip(2)
        return (to_go * logprobs).sum(2).mean(1)
    whole = log_ratio.sum(2)
    if estimator == "rloo":
        samples = mask.shape[1]
        if samples < 2:
            raise ValueError(f"'rloo' needs at least 2 samples a prompt, got {samples}")
        whole = (whole - whole.mean(1, keepdim=True)) * samples / (samples - 1)
    elif estimator != "reinforce":
        raise ValueError(f"estimator must be 'reinforce', 'rloo' or 'token', got {estimator!r}")
    return (whole * logprobs.sum(2)).mean(1)


@dataclass(frozen=True)
class FDivergence:
    """One divergence D_f(pi || p), by its generator and its slope.

    Attributes:
        generator: f of t = pi/p, a tensor of any shape, float64 for exact values.
        slope: f'(t) as a function of log t, so that neither end overflows before it must.
        limit: f'(inf), what the slope tends to where the target has no probability.
    """

    generator: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    limit: float


def _js(t: Tensor) -> Tensor:
    return torch.xlogy(t, 2 * t / (t + 1)) - ((t + 1) / 2).log()


LOG_2 = math.log(2)

# forward-kl is KL(p || pi), reverse-kl KL(pi || p), js twice the Jensen-Shannon divergence; the
# chi2 of the two arguments in the same order as the KLs
DIVERGENCES = {
    "forward-kl": FDivergence(lambda t: -t.log(), lambda log_t: -torch.exp(-log_t), 0.0),
    "reverse-kl": FDivergence(lambda t: torch.xlogy(t, t), lambda log_t: log_t + 1, math.inf),
    "tv": FDivergence(lambda t: (1 - t).abs() / 2, lambda log_t: log_t.sign() / 2, 0.5),
    "js": FDivergence(_js, lambda log_t: LOG_2 - softplus(-log_t), LOG_2),
    "chi2": FDivergence(lambda t: t - 2 + 1 / t, lambda log_t: -torch.expm1(-2 * log_t), 1.0),
    "reverse-chi2": FDivergence(
        lambda t: (t - 1).square(), lambda log_t: 2 * torch.expm1(log_t), math.inf
    ),
}
DivergenceName = Literal["forward-kl", "reverse-kl", "tv", "js", "chi2", "reverse-chi2"]


def f_divergence(divergence: FDivergence, policy: Tensor, target: Tensor) -> Tensor:
    """D_f(policy || target) of two distributions `[..., K]`, exactly; infinite where it is."""
    expect_same_shape(policy=policy, target=target)
    inside = target != 0
    ratio = torch.where(inside, policy, 1.0) / torch.where(inside, target, 1.0)
    value = torch.where(inside, target * divergence.generator(ratio), 0.0).sum(-1)
    outside = torch.where(inside, 0.0, policy).sum(-1)
    return value + torch.where(outside > 0, divergence.limit * outside, 0.0)


def pseudo_rewards(
    divergence: FDivergence, log_policy: Tensor, log_target: Tensor, log_partition: Tensor | float
) -> Tensor:
    """-f'(pi/p) `[n]` float64, constant: the reward whose policy gradient lowers D_f(pi || p).

    log pi and log P `[n]` are those of whole responses; p = P/Z. Where P is 0 (log P = -inf) it is
    -f'(inf), which is -inf for the divergences that cannot do without support.
    """
    expect_dimensions(1, log_policy=log_policy)
    expect_same_shape(log_policy=log_policy, log_target=log_target)
    log_t = log_policy.detach().double() - (log_target.double() - log_partition)
    if bool(log_t.isnan().any()) or bool((log_target == math.inf).any()):
        raise ValueError("log-probabilities must be numbers, and log P must not be +inf")
    return -divergence.slope(log_t)


def weighted_reinforce(
    logprobs: Tensor, advantages: Tensor, log_weights: Tensor | None = None
) -> Tensor:
    """-w A log pi `[n]` of responses that q sampled, w = pi/q (None: q is pi).

    With A = -f'(pi/p) - B this is f-DPG's loss (arXiv 2302.08215). A baseline B stays inside the
    weight: off-policy it is unbiased only so.
    """
    expect_dimensions(1, logprobs=logprobs)
    expect_same_shape(logprobs=logprobs, advantages=advantages)
    weights = torch.ones_like(advantages)
    if log_weights is not None:
        expect_same_shape(logprobs=logprobs, log_weights=log_weights)
        weights = log_weights.exp()
    return -(weights * advantages).detach().to(logprobs.dtype) * logprobs


def divergence_by_samples(
    divergence: FDivergence,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_target: Tensor,
    log_partition: Tensor | float,
) -> Tensor:
    """Values `[n]` float64 of samples of q whose mean estimates D_f(pi || p).

    Each is p/q f(pi/p), and f'(inf) pi/q where the target has no probability.
    """
    expect_dimensions(1, log_policy=log_policy)
    expect_same_shape(log_policy=log_policy, log_proposal=log_proposal, log_target=log_target)
    policy, proposal = log_policy.detach().double(), log_proposal.detach().double()
    log_p = log_target.double() - log_partition
    inside = log_p != -math.inf
    safe = torch.where(inside, log_p, policy)
    within = (safe - proposal).exp() * divergence.generator((policy - safe).exp())
    return torch.where(inside, within, divergence.limit * (policy - proposal).exp())


def fit_moments(
    features: Tensor,
    moments: Tensor,
    rate: float = 0.05,
    iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Tensor:
    """lambda `[d]` float64 with which P = a exp(lambda phi) has the means `moments` `[d]` of phi.

    `features` `[C, n, d]` are those of n samples of a in each of C contexts, whose means are
    averaged. Every context's samples are weighted by exp(lambda phi), normalised; lambda follows
    the gap to the moments until it is below the tolerance (or the iterations are over).
    """
    expect_dimensions(3, features=features)
    if moments.shape != features.shape[2:]:
        raise ValueError(
            f"{features.shape[2]} features need as many moments, got {list(moments.shape)}"
        )
    if not features.shape[0] or not features.shape[1]:
        raise ValueError(f"features must be of at least one sample, got {list(features.shape)}")
    features, moments = features.double(), moments.double()
    weights = torch.zeros_like(moments)
    for _ in range(iterations):
        share = (features @ weights).softmax(1)
        gap = moments - (share.unsqueeze(2) * features).sum(1).mean(0)
        if float(gap.abs().max()) < tolerance:
            break
        weights = weights + rate * gap
    return weights
