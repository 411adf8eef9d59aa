"""GRPO-Guard: Flow-GRPO with ratios centred at one and steps of equal weight."""

from typing import Literal

from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts
from postgrad.methods.diffusion.base import FlowPolicyGradient
from postgrad.methods.diffusion.settings import FlowSettings
from postgrad.objectives.flow import ratio_norm, regulated_step_loss


class GRPOGuardSettings(FlowSettings):
    """GRPO-Guard's settings."""

    bias_reduce: Literal["sample", "batch"] = setting(
        "sample",
        "the bias is averaged over each image's dimensions, or over the micro-batch too as the "
        "authors' code does",
        source="paper",
    )


class GRPOGuard(FlowPolicyGradient):
    """GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching (arXiv 2510.22319).

    Since log-probabilities are averaged over dimensions, Flow-GRPO's log-ratio has a negative mean
    and a spread that both depend on the step's noise: positive advantages hardly ever reach the
    clip, and low-noise steps dominate. GRPO-Guard removes the mean, equalises the spread, and
    divides a step's loss by its length, so that clipping restrains every step alike.

        log rho~_j = s_j (log rho_j + mean_d[(mu - mu_old)^2] / (2 s_j^2))
                   = mean_d[(mu - mu_old) eps_j]
        L_j = 1/D_j mean_i max(-A_i rho~_ij, -A_i clip(rho~_ij, 1 - eps, 1 + eps)),
        D_j = t_j - t_{j+1}

    The gradient flows through the bias too. The mean is per image as in the paper; the code's mean
    over the micro-batch is `bias_reduce=batch`. The loss is as in the code: the remaining factor
    1 + sigma^2 (1 - t)/(2t) of the step's gradient stays. Averaged weights are updated after every
    optimiser step.
    """

    Config = GRPOGuardSettings
    config: GRPOGuardSettings
    clips = (1e-3, 2e-6)
    recipe = {"learning_rate": 3e-4, "steps": 100}
    parts = FourParts(
        mask="PPO clip of each step's normalised ratio",
        denominator="the policy that sampled the trajectory, the log-ratio's mean removed",
        advantage="reward standardised within the prompt's images, the same for all steps",
        gradient="normalised log-ratio of a stochastic step, divided by the step's length",
    )

    def log_ratio(self, batch: Batch, mean: Tensor, logprobs: Tensor) -> Tensor:
        return ratio_norm(
            logprobs,
            batch.old_logprobs,
            mean,
            batch.old_means,
            batch.deviations,
            self.config.bias_reduce,
        )

    def surrogate(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        length = batch.time - batch.next_time
        return regulated_step_loss(log_ratio, batch.advantages, length, self.clip)
