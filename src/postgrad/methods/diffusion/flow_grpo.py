"""Flow-GRPO: group-relative policy gradients on a flow model's stochastic sampler."""

from torch import Tensor

from postgrad.batch import Batch
from postgrad.methods.base import FourParts
from postgrad.methods.diffusion.base import FlowPolicyGradient
from postgrad.objectives.policy_gradient import clipped_surrogate


class FlowGRPO(FlowPolicyGradient):
    """Flow-GRPO: Training Flow Matching Models via Online RL (arXiv 2505.05470).

    A deterministic flow has no likelihood, so sampling adds noise without changing the marginals:
    every step is then a Gaussian x' = mu + s eps with a log-probability. An image's reward,
    standardised within the images of its prompt, is the advantage of all its steps.

        log rho_j = lp_theta(x_{j+1} | x_j) - lp_old,   lp = mean over dimensions of log N(mu, s^2)
        L = mean_{i,j} max(-A_i rho_ij, -A_i clip(rho_ij, 1 - eps, 1 + eps)) + beta KL

    Deviations: the KL of a step is divided by its variance s^2 = sigma^2 D_j as in the paper (the
    code divides by sigma^2); averaged weights are updated after every optimiser step.
    """

    clips = (5e-3, 1e-4)
    recipe = {"learning_rate": 3e-4, "steps": 100}
    parts = FourParts(
        mask="PPO clip of each step's ratio",
        denominator="the policy that sampled the trajectory",
        advantage="reward standardised within the prompt's images, the same for all steps",
        gradient="log-probability of a stochastic step, averaged over dimensions",
    )

    def log_ratio(self, batch: Batch, mean: Tensor, logprobs: Tensor) -> Tensor:
        old: Tensor = batch.old_logprobs
        return logprobs - old

    def surrogate(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return clipped_surrogate(log_ratio.exp(), batch.advantages, self.clip, self.clip)
