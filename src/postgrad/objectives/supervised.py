"""Learning from demonstrations by f-divergences, and what a policy's logits say as values.

rho = beta log(pi/pi_ref) is the implicit reward, r = rho + v with a value v, and f* is the convex
conjugate of f. Distribution matching with a KL to the reference (arXiv 2507.00018),

    min_pi D_f(pi || expert) + beta KL(pi || pi_ref),      D_f(p || q) = E_q f(p/q)

has the dual min_r E_expert f*(-r) + V_r, whose optimal value is minus the primal one. Written with
the policy, V_r is v, and the dual is a loss on demonstrations:

    L = E_demonstrations [ f*(-rho - v) ] + v
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_same_shape

Divergence = Literal["tv", "pearson", "hellinger"]


def implicit_reward(logp: Tensor, logp_ref: Tensor, beta: float) -> Tensor:
    """rho = beta (log pi - log pi_ref), of any one shape; up to a value a policy's own reward."""
    expect_same_shape(logp=logp, logp_ref=logp_ref)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return beta * (logp - logp_ref)


def f_divergence(policy: Tensor, expert: Tensor, kind: Divergence) -> Tensor:
    """D_f(policy || expert) `[...]` of distributions `[..., K]`; the expert's are positive.

    f(u) is |u - 1|/2 (tv), (u - 1)^2 (pearson) or (sqrt u - 1)^2 (hellinger).
    """
    expect_same_shape(policy=policy, expert=expert)
    ratio = policy / expert
    if kind == "tv":
        costs = (ratio - 1).abs() / 2
    elif kind == "pearson":
        costs = (ratio - 1).square()
    elif kind == "hellinger":
        costs = (ratio.sqrt() - 1).square()
    else:
        raise _unknown(kind)
    return (expert * costs).sum(-1)


def conjugate(t: Tensor, kind: Divergence) -> Tensor:
    """f*(t), elementwise: t (tv), t + t^2/4 (pearson) or t/(1 - t) (hellinger, t < 1).

    tv's is that of |t| <= 1/2 taken for every t, which makes its loss that of SFT; pearson's that
    of t >= -2, so that its gradient turns around beyond.
    """
    if kind == "tv":
        return t
    if kind == "pearson":
        return t + t.square() / 4
    if kind == "hellinger":
        if not bool((t < 1).all()):
            raise ValueError(
                f"hellinger needs rho + v above -1, got {-float(t.max()):g}: the policy has fallen "
                "too far below the reference for this beta"
            )
        return t / (1 - t)
    raise _unknown(kind)


def demonstration_weight(reward: Tensor, kind: Divergence) -> Tensor:
    """f*'(-reward), elementwise: the weight of grad log pi where the loss is divided by beta.

    1 (tv), 1 - r/2 (pearson) or 1/(1 + r)^2 (hellinger), with reward r = rho + v. Raises ValueError
    for hellinger where r is -1, where the weight is infinite.
    """
    if kind == "tv":
        return torch.ones_like(reward)
    if kind == "pearson":
        return 1 - reward / 2
    if kind == "hellinger":
        if bool((reward == -1).any()):
            raise ValueError("reward must not be -1 with kind 'hellinger'")
        return (1 + reward).pow(-2)
    raise _unknown(kind)


def f_divergence_sft(
    logp: Tensor,
    logp_ref: Tensor,
    kind: Divergence,
    beta: float,
    value: float | Tensor = 0.0,
    floor: float | None = None,
) -> Tensor:
    """[f*(-rho - v) + v] / beta of each demonstration, in the shape of `logp`.

    Divided by beta, every kind has SFT's gradient at the reference (with v = 0). For kind tv it
    is -log pi plus a constant: SFT's loss. `logp` may be sums over responses `[B]`, or token by
    token of any shape, which leaves out the differences of value between states.

    Args:
        logp: log pi of demonstrations.
        logp_ref: the reference's, of the same shape.
        kind: the divergence.
        beta: strength of the KL to the reference.
        value: v, one number or a learned scalar.
        floor: rho + v below it counts as `floor`, without a gradient. Hellinger's is infinite at
            -1; without a floor that is an error.
    """
    reward = implicit_reward(logp, logp_ref, beta) + value
    if floor is not None:
        reward = reward.clamp(min=floor)
    return (conjugate(-reward, kind) + value) / beta


@dataclass(frozen=True)
class LogitValues:
    """Values `[..., T]` and rewards `[..., T]` that a policy's logits imply."""

    values: Tensor
    rewards: Tensor


def values_from_logits(
    logits: Tensor, actions: Tensor, beta: float = 1.0, mask: Tensor | None = None
) -> LogitValues:
    """Logits as action values: V_t = beta logsumexp(l_t) and r_t = beta l_t[a_t] - V_{t+1}.

    In the token MDP with a KL of strength beta to the uniform policy, logits are Q/beta up to a
    shift of each state, and the value after the last token is 0. Rewards telescope:

        sum_t log pi(a_t | s_t) = (sum_t r_t - V_1) / beta

    Args:
        logits: `[..., T, A]`.
        actions: `[..., T]`, the tokens that followed.
        beta: strength of the KL.
        mask: `[..., T]` bool, the tokens that are there, padded on the right; default all. Values
            and rewards are 0 elsewhere.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    expect_same_shape(logits=logits[..., 0], actions=actions, mask=mask)
    logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
    chosen = beta * logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    values = torch.where(mask, beta * logits.logsumexp(-1), 0.0)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    return LogitValues(values, torch.where(mask, chosen - following, 0.0))


def _unknown(kind: str) -> ValueError:
    return ValueError(f"kind must be 'tv', 'pearson' or 'hellinger', got {kind!r}")
