"""Regression of log-ratios on advantages (direct advantage policy optimisation, arXiv 2412.18279).

For a state s, an action a of several tokens and a fixed reference, with A the advantage of a under
the reference and u = log pi(a|s) - log pi_ref(a|s),

    L = 1/2 E_{s, a} [(A/beta - u)^2]

At u = 0 its gradient is the policy gradient -E[A grad log pi] / beta. The minimiser does not lower
the regularised improvement

    I_s = E_{a ~ pi} A(s, a) - beta KL(pi(.|s) || pi_ref(.|s))

below its value at the reference, 0. It is not pi_ref exp(A/beta)/Z, which maximises I_s: where pi
must sum to 1, u + lambda (pi_ref/nu) e^u = A/beta with nu the distribution of the actions.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape

_HALVINGS, _NEWTON_STEPS = 100, 20


def advantage_regression(logp: Tensor, logp_ref: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """(A/beta - u)^2 / 2 of each state and action, `[B]`.

    Args:
        logp: `[B]` log pi(a|s), the SUM over the action's tokens.
        logp_ref: `[B]` the reference's.
        advantages: `[B]` of the actions under the reference.
        beta: strength of the KL to the reference.
    """
    expect_dimensions(1, logp=logp)
    expect_same_shape(logp=logp, logp_ref=logp_ref, advantages=advantages)
    _expect_positive(beta)
    return (advantages / beta - (logp - logp_ref)).square() / 2


def success_loss(logits: Tensor, success: Tensor) -> Tensor:
    """Cross-entropy `[...]` of V = sigmoid(logits) with shares of success in [0, 1].

    -m log V - (1 - m) log(1 - V): least where V = m.
    """
    expect_same_shape(logits=logits, success=success)
    if not bool(((success >= 0) & (success <= 1)).all()):
        raise ValueError("shares of success must lie in [0, 1]")
    return binary_cross_entropy_with_logits(logits, success.to(logits), reduction="none")


def step_improvement(policy: Tensor, reference: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """I_s `[...]` of policies over the reference; all tables are `[..., K]`."""
    expect_same_shape(policy=policy, reference=reference, advantages=advantages)
    _expect_positive(beta)
    divergence = torch.xlogy(policy, policy / reference)
    return (policy * advantages - beta * divergence).sum(-1)


def regression_minimiser(
    reference: Tensor, advantages: Tensor, beta: float, weights: Tensor | None = None
) -> Tensor:
    """The policy `[..., K]` that minimises sum_a nu_a (A_a/beta - u_a)^2 among distributions.

    Args:
        reference: `[..., K]`, positive distributions; in float64 the result is exact to 1e-12.
        advantages: `[..., K]`, whose mean under the reference is not below 0.
        beta: strength of the KL to the reference.
        weights: nu `[..., K]`, positive; by default the reference.
    """
    weights = reference if weights is None else weights
    expect_same_shape(reference=reference, advantages=advantages, weights=weights)
    _expect_positive(beta)
    aims = advantages / beta
    if bool(((reference * aims).sum(-1) < -1e-6).any()):
        raise ValueError("the mean of the advantages under the reference must not be below 0")

    def log_ratios(multiplier: Tensor) -> Tensor:
        """u of u + c e^u = A/beta: with x = log c + u that is x + e^x = log c + A/beta."""
        shift = (multiplier * reference / weights).log()
        right = shift + aims
        x = torch.where(right > 1, right.clamp(min=1).log(), right)  # not below the solution
        for _ in range(_NEWTON_STEPS):
            x = x - (x + x.exp() - right) / (1 + x.exp())
        return torch.where(x > 0, x - shift, aims - x.exp())

    def mass(multiplier: Tensor) -> Tensor:
        return (reference * log_ratios(multiplier).exp()).sum(-1, keepdim=True)

    high = torch.ones_like(aims[..., :1])
    low = 1e-12 * high
    while bool((mass(high) > 1).any()):
        high = torch.where(mass(high) > 1, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = mass(middle) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    policy = reference * log_ratios(high).exp()
    return policy / policy.sum(-1, keepdim=True)


def _expect_positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
