"""Losses for control: mirror descent policy optimisation (MDPO, arXiv 2005.09814) and critics.

All losses are per sample `[B]`; a method takes their mean. PPO for control is `clipped_surrogate`
of `policy_gradient` on `[B]`, with `clipped_value_loss`.
"""

import math

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape


def md_closed_form(policy: Tensor, advantages: Tensor, t: float) -> Tensor:
    """The exact mirror-descent step on tables `[S, A]`: pi'(a|s) = pi(a|s) exp(t A(s, a)) / Z(s).

    It maximises E_pi'[A] - KL(pi' || pi)/t, whose value is then (1/t) log Z(s).
    """
    expect_same_shape(policy=policy, advantages=advantages)
    _expect_step_size(t)
    return torch.softmax(policy.log() + t * advantages, dim=-1)


def mdpo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, kl: Tensor, t: float
) -> Tensor:
    """On-policy MDPO's loss `[B]`: -(rho A - KL(pi || pi_k)/t) (arXiv 2005.09814, sec. 4.1).

    rho = pi(a|s)/pi_k(a|s) from log-probabilities `[B]`; `kl` `[B]` is the exact KL(new || old) at
    each state, t > 0 the step size of mirror descent. Gradient through `logprobs` and `kl`.
    Where the policy is so far from the old one that the ratio overflows, the loss is infinite.
    """
    expect_dimensions(1, logprobs=logprobs)
    expect_same_shape(logprobs=logprobs, old=old_logprobs, advantages=advantages, kl=kl)
    _expect_step_size(t)
    if bool((kl < -1e-6).any()):
        raise ValueError(f"an exact KL is never negative, got {float(kl.min()):.3g}")
    ratio = (logprobs - old_logprobs.detach()).exp()
    return -(ratio * advantages.detach()) + kl / t


def tsallis_log(log_x: Tensor, p: float) -> Tensor:
    """log_p(x) = (x^(1 - p) - 1)/(1 - p) of x given as log x; the logarithm for p = 1."""
    if p == 1:
        return log_x
    return torch.expm1((1 - p) * log_x) / (1 - p)


def off_policy_mdpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    q_values: Tensor,
    *,
    t: float,
    entropy_coefficient: float,
    tsallis_q: float = 1.0,
) -> Tensor:
    """Off-policy MDPO's policy loss `[B]` (arXiv 2005.09814, sec. 4.2 and the authors' code).

    With c = 1/t, lambda the entropy coefficient and L = log_{2-q} summed over the action's
    dimensions: c L(pi) + q (lambda - c) L(pi_k) - Q. For c = lambda and q = 1 it is SAC's loss.

    `logprobs`, `old_logprobs` `[B, A]`: log-densities of each dimension of an action sampled from
    pi with reparameterisation, under pi and the frozen pi_k; `q_values` `[B]`. Gradients flow
    through all three into the action: freeze the parameters of pi_k and Q. The authors' code floors
    densities at 1e-6; here they enter as logarithms, which need no floor.
    """
    expect_dimensions(2, logprobs=logprobs)
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    _expect_step_size(t)
    _expect_one_per_row(logprobs, q_values)
    if not entropy_coefficient >= 0:
        raise ValueError(f"entropy_coefficient must be at least 0, got {entropy_coefficient}")
    new = tsallis_log(logprobs, 2 - tsallis_q).sum(1)
    old = tsallis_log(old_logprobs, 2 - tsallis_q).sum(1)
    return new / t + tsallis_q * (entropy_coefficient - 1 / t) * old - q_values


@torch.no_grad()
def soft_value_target(q_values: Tensor, logprobs: Tensor, entropy_coefficient: float) -> Tensor:
    """Target of V `[B]`: min_i Q_i(s, a) - lambda log pi(a|s), for one action a ~ pi.

    `q_values` `[C, B]` are those of C critics, `logprobs` `[B]` of the whole action (for Tsallis
    entropies: the sum of log_{2-q} over its dimensions).
    """
    expect_dimensions(2, q_values=q_values)
    if not len(q_values):
        raise ValueError("q_values must be those of at least one critic, got none")
    expect_same_shape(one_critic=q_values[0], logprobs=logprobs)
    return q_values.min(0).values - entropy_coefficient * logprobs


@torch.no_grad()
def one_step_target(
    rewards: Tensor, next_values: Tensor, terminations: Tensor, discount: float
) -> Tensor:
    """Target of Q `[B]`: r + discount V(s'), without V(s') where the episode terminated.

    `terminations` `[B]` is boolean and excludes truncations, after which V(s') still counts.
    """
    expect_dimensions(1, rewards=rewards)
    expect_same_shape(rewards=rewards, next_values=next_values, terminations=terminations)
    return rewards + discount * torch.where(terminations, 0.0, next_values)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) (PPO's and MDPO's code).

    In the shape of `values`: one a state.
    """
    expect_same_shape(values=values, old_values=old_values, returns=returns)
    old_values, returns = old_values.detach(), returns.detach()
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square())


def _expect_step_size(t: float) -> None:
    if not (t > 0 and math.isfinite(t)):
        raise ValueError(f"the step size t must be positive and finite, got {t}")


def _expect_one_per_row(rows: Tensor, values: Tensor) -> None:
    if values.shape != rows.shape[:1]:
        raise ValueError(f"expected values [{len(rows)}], got {list(values.shape)}")
