"""Rewards of single tokens that come from elsewhere than the end of a response."""

from torch import Tensor


def log_ratio_reward(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    scale: float,
    clip: float | None = None,
) -> Tensor:
    """clip(b log pi_r(y_t|s_t) / pi_ref(y_t|s_t), -c, c) `[N, T]`, constant, 0 at padding.

    Of a policy pi_r that is optimal for a token reward under a KL to pi_ref of weight beta, beta
    log pi_r/pi_ref is that reward up to the difference of a potential, V(s_{t+1}) - V(s_t); DPO
    learns such a policy from preferences (RTO, arXiv 2404.18922). `scale` b comes first, then the
    limit `clip` c on the scaled value (None: no limit). `mask` `[N, T]` says which tokens count.
    """
    if not logprobs.shape == reference_logprobs.shape == mask.shape or logprobs.ndim != 2:
        raise ValueError(
            f"logprobs {list(logprobs.shape)}, reference_logprobs "
            f"{list(reference_logprobs.shape)} and mask {list(mask.shape)} must all be [N, T]"
        )
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got {scale}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no limit, got {clip}")
    rewards = scale * (logprobs - reference_logprobs).detach()
    if clip is not None:
        rewards = rewards.clamp(-clip, clip)
    return rewards.masked_fill(~mask, 0.0)
