"""Policy-gradient losses of whole responses: one log-probability and one reward a response.

`logprobs` `[B, K]` are log pi(y|x) of K responses to each of B prompts, sums over tokens;
`old_logprobs` are the same under pi_old, the policy that sampled them. Only `logprobs` carries
gradients.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.policy_gradient import clipped_surrogate
from postgrad.objectives.shapes import expect_dimensions, expect_same_shape

Clipping = Literal["separate", "joint"]


def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    eps: float = 0.2,
    clipping: Clipping = "separate",
) -> Tensor:
    """Pairwise PPO's loss `[B]` (P3O, arXiv 2310.00212), from reward differences alone.

    With rho_i = pi(y_i)/pi_old(y_i), z = log pi(y_1) - log pi(y_2), and constants c:

    - "separate" (P3O-V1): c_i = (r_i - r_j) rho_j,
      -1/2 sum_i min(c_i rho_i, c_i clip(rho_i, 1 - eps, 1 + eps));
    - "joint" (P3O-V2): c = (r_1 - r_2) rho_1 rho_2,
      -1/2 min(c z, c clip(z, z_old - eps, z_old + eps)).

    Where pi = pi_old both have the gradient -(r_1 - r_2)/2 grad(log pi(y_1) - log pi(y_2)). Of more
    than two responses it is the mean over all pairs. Raises ValueError for K < 2, an `eps` that
    is not positive (or not below 1 when clipping separately), and rewards that are not finite.
    """
    _expect_groups(logprobs, old_logprobs, rewards)
    if not eps > 0 or (clipping == "separate" and not eps < 1):
        allowed = "in (0, 1)" if clipping == "separate" else "above 0"
        raise ValueError(f"eps must be {allowed} with {clipping} clipping, got {eps}")
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite")
    first, second = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1).unbind()
    gap = (rewards[:, first] - rewards[:, second]).detach()
    old_logprobs = old_logprobs.detach()
    ratio = (logprobs - old_logprobs).exp()
    one, other = ratio[:, first], ratio[:, second]
    if clipping == "separate":
        losses = clipped_surrogate(one, gap * other.detach(), eps, eps)
        losses = losses + clipped_surrogate(other, -gap * one.detach(), eps, eps)
    elif clipping == "joint":
        weight = gap * (one * other).detach()
        z = logprobs[:, first] - logprobs[:, second]
        old = old_logprobs[:, first] - old_logprobs[:, second]
        losses = torch.maximum(-weight * z, -weight * z.clamp(old - eps, old + eps))
    else:
        raise ValueError(f"clipping must be 'separate' or 'joint', got {clipping!r}")
    return losses.mean(1) / 2


def clipped_responses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, eps: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate with a response as one action, the mean `[B]` over its K responses.

    -1/K sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i); where pi = pi_old its gradient is
    REINFORCE's, -1/K sum_i A_i grad log pi(y_i). `advantages` `[B, K]` are constant.
    """
    expect_dimensions(2, logprobs=logprobs)
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = (logprobs - old_logprobs.detach()).exp()
    return clipped_surrogate(ratio, advantages, eps, eps).mean(1)


def _expect_groups(logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor) -> None:
    expect_dimensions(2, logprobs=logprobs)
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, rewards=rewards)
    if logprobs.shape[1] < 2:
        raise ValueError(f"pairs need K of at least 2 responses, got {list(logprobs.shape)}")
