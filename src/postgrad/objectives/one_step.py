"""What one gradient step on logits does to every bin, for each direction of the KL.

Of a categorical p = softmax(z) that is fitted to q (arXiv 2404.14367; formulas rederived): p' is
what one step of size eta on z makes of p. Maximum likelihood descends the forward KL, policy
gradients towards pi_ref exp(r/beta)/Z the reverse KL. The forward one moves every bin in proportion
to q - p. The reverse one moves likely bins by their log-ratio and hardly touches those with p near
0: it relocates mass from where the policy is, and seeks modes.
"""

from dataclasses import dataclass

from torch import Tensor

from postgrad.objectives.shapes import expect_same_shape


@dataclass(frozen=True)
class OneStep:
    """One step of gradient descent on logits.

    Attributes:
        divergence: what is descended, `[...]` in nats.
        gradient: with respect to the logits, `[..., K]`.
        policy: p' `[..., K]`.
        log_ratio: log p'/p `[..., K]`.
        constant: what is the same in all log-ratios of one p, from the normaliser, `[...]`.
    """

    divergence: Tensor
    gradient: Tensor
    policy: Tensor
    log_ratio: Tensor
    constant: Tensor


def forward_kl_step(policy: Tensor, target: Tensor, eta: float) -> OneStep:
    """One step on KL(q || p), whose gradient is p_j - q_j.

    log p'_j/p_j = eta (q_j - p_j) + c. `policy` and `target` `[..., K]` are positive distributions.
    """
    _expect_distributions(policy, target)
    divergence = (target * (target.log() - policy.log())).sum(-1)
    return _step(policy, policy - target, divergence, eta)


def reverse_kl_step(policy: Tensor, target: Tensor, eta: float) -> OneStep:
    """One step on KL(p || q), whose gradient is p_j [log p_j/q_j - KL(p || q)].

    log p'_j/p_j = eta p_j [log q_j/p_j + KL(p || q)] + c. Both are positive distributions
    `[..., K]`.
    """
    _expect_distributions(policy, target)
    log_ratio = policy.log() - target.log()
    divergence = (policy * log_ratio).sum(-1)
    gradient = policy * (log_ratio - divergence.unsqueeze(-1))
    return _step(policy, gradient, divergence, eta)


def _step(policy: Tensor, gradient: Tensor, divergence: Tensor, eta: float) -> OneStep:
    if not eta > 0:
        raise ValueError(f"the step size must be positive, got {eta}")
    updated = (policy.log() - eta * gradient).log_softmax(-1)
    log_ratio = updated - policy.log()
    constant = (log_ratio + eta * gradient)[..., 0]
    return OneStep(divergence, gradient, updated.exp(), log_ratio, constant)


def _expect_distributions(policy: Tensor, target: Tensor) -> None:
    expect_same_shape(policy=policy, target=target)
    for name, given in (("policy", policy), ("target", target)):
        if not bool((given > 0).all()) or bool(((given.sum(-1) - 1).abs() > 1e-5).any()):
            raise ValueError(f"{name} must be positive and sum to 1")
