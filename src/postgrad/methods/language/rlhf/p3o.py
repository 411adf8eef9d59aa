"""Pairwise PPO."""

from typing import Any, Unpack

from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Place
from postgrad.methods.language.base import Given
from postgrad.methods.language.rlhf.trajectory import TrajectoryPolicyGradient, TrajectorySettings
from postgrad.objectives.trajectory import Clipping, p3o_loss


class P3OSettings(TrajectorySettings):
    """P3O's settings."""

    clipping: Clipping = setting(
        "separate", "separate: each response's ratio (P3O-V1); joint: the pair's (P3O-V2)"
    )
    eps: float = setting(
        0.2, "ratios, or with clipping=joint log-ratios, are clipped this far (uncertain)", gt=0
    )
    beta: float = setting(0.05, "weight of the KL in the reward (the paper varies it)", ge=0)


class P3O(TrajectoryPolicyGradient):
    """Pairwise Proximal Policy Optimization (Wu et al. 2023, arXiv:2310.00212).

    Comparisons determine a reward only up to a number that depends on the prompt, r(x, y) +
    delta(x); PPO's update changes with delta, this one does not. It learns from the difference
    between two responses to one prompt, as whole trajectories, so it needs neither a critic nor a
    baseline. With R = r(x, y) - beta log pi_old(y|x)/pi_ref(y|x), rho = pi(y|x)/pi_old(y|x) and
    constants c,

        c_i = (R_i - R_j) rho_j
        L   = - 1/2 sum_i min(c_i rho_i, c_i clip(rho_i, 1 - eps, 1 + eps))           (separate)

        c   = (R_1 - R_2) rho_1 rho_2,    z = log pi(y_1|x) - log pi(y_2|x)
        L   = - 1/2 min(c z, c clip(z, z_old - eps, z_old + eps))                     (joint)

    Where pi = pi_old both have the gradient -(R_1 - R_2)/2 grad(log pi(y_1) - log pi(y_2)), an
    unbiased policy gradient and the direction of DPO's. The value of the first is 0 there: follow
    the reward, not the loss. Ratios are those of sums over tokens, so they leave 1 quickly with
    long responses: few steps a rollout. `rollout.samples` above 2 takes all pairs of a group (not
    in the paper); with one step a rollout the gradient is then that of `rloo`. No official code is
    known; eps and beta are not given by the sources used (uncertain).
    """

    Config = P3OSettings
    parts = FourParts(
        mask="clip of each response's ratio, or of the pair's log-ratio",
        denominator="the policy that sampled",
        advantage="difference of the rewards, less KL, of two responses to a prompt",
        gradient="log-likelihood ratio of two responses",
    )
    config: P3OSettings

    def __init__(
        self, config: P3OSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        if config.clipping == "separate" and config.eps >= 1:
            raise PostgradError(
                f"eps: expected less than 1 with clipping=separate, got {config.eps:g}"
            )
        super().__init__(config, place, reward=reward, **given)

    def credit(self, rewards: Tensor) -> Tensor:
        return rewards - rewards[:, :1]  # in double precision: an offset leaves no rounding behind

    def losses(self, logprobs: Tensor, old: Tensor, credit: Tensor) -> Tensor:
        return p3o_loss(logprobs, old, credit, self.config.eps, self.config.clipping)
