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
