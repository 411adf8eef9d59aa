"""Rewards that divergence from a reference policy has been taken off."""

from torch import Tensor


def kl_penalised(
    rewards: Tensor, logprobs: Tensor, reference_logprobs: Tensor, beta: float
) -> Tensor:
    """r - beta log(pi_old(y|x) / pi_ref(y|x)), in the shape of `rewards`, without a gradient.

    `rewards` may be one a response, of any shape, with log-probabilities that are sums over its
    tokens (P3O, arXiv 2310.00212; RLOO, arXiv 2402.14740), or one a token (PPO in RLHF). pi_old is
    the policy that sampled; the mean of the log-ratio over its samples is KL(pi_old || pi_ref).
    """
    if not rewards.shape == logprobs.shape == reference_logprobs.shape:
        raise ValueError(
            f"rewards {list(rewards.shape)}, logprobs {list(logprobs.shape)} and "
            f"reference_logprobs {list(reference_logprobs.shape)} must have one shape"
        )
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    return (rewards - beta * (logprobs - reference_logprobs)).detach()


class AdaptiveCoefficient:
    """A KL coefficient that is raised while the KL is above its target and lowered below it.

    beta <- beta (1 + gain clip(KL / target - 1, -0.2, 0.2)) after every batch (Ziegler et al. 2019,
    arXiv 1909.08593, section 2.2). Without a target it stays as it is.
    """

    def __init__(self, value: float, target: float | None = None, gain: float = 0.1):
        if target is not None and not target > 0:
            raise ValueError(f"the target of the KL must be above 0, got {target}")
        self.value = value
        self._target = target
        self._gain = gain

    def update(self, divergence: float) -> None:
        """Take in the mean KL of a batch, in nats a response."""
        if self._target is not None:
            error = min(max(divergence / self._target - 1, -0.2), 0.2)
            self.value *= 1 + self._gain * error
