"""The unified policy gradient estimator: four parts that the surrogates of all its methods share.

After "Towards a Unified View of Large Language Model Post-Training" (arXiv 2509.04419, §3):

    gradient = mask · (1 / pi_ref) · A · grad pi  =  mask · (pi / pi_ref) · A · grad log pi

- the *reference denominator* pi_ref: the policy that sampled (importance sampling), the present
  policy as a constant (REINFORCE, supervised fine-tuning), or 1 (off-policy samples of unknown
  probability);
- the *likelihood gradient*: of each token, of the whole response, or shaped;
- the *stabilisation mask*: which tokens teach at all, by how far the policy has moved;
- the *advantage* A (see `postgrad.advantages`).

    weight = token_weight(logprobs - denominator, mask)
    bounded = stabilised(weight, *clip_bounds(ratio.detach(), advantages, 0.2, 0.2))
    loss = -bounded * advantages                     # per token; then `policy_gradient.aggregate`

Tensors are `[N, T]`: N responses of at most T tokens. `weight` carries the gradient; the masks are
functions of `ratio` = pi / pi_old, the change since sampling, and constant. They keep a ratio that
is NaN, so that the loss shows it.
"""

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_same_shape, expect_tokens


def token_weight(log_weight: Tensor, mask: Tensor) -> Tensor:
    """pi(y_t) / pi_ref(y_t) from its logarithm, `[N, T]`; 1 at padding."""
    expect_tokens(mask, log_weight=log_weight)
    return torch.where(mask, log_weight, 0.0).exp()


def sequence_weight(log_weight: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of a response's token weights, at each of its tokens (GSPO, 2507.18071).

    `[N, T]`; 1 at padding and for an empty response.
    """
    expect_tokens(mask, log_weight=log_weight)
    total = torch.where(mask, log_weight, 0.0).sum(1, keepdim=True)
    return torch.where(mask, total / mask.sum(1, keepdim=True).clamp(min=1), 0.0).exp()


def shaped_weight(logprobs: Tensor, mask: Tensor, gamma: float = 0.1) -> Tensor:
    """f(p) = p / (p + gamma) of token probabilities, `[N, T]`; 0 at padding.

    For off-policy samples whose own probability is unknown (LUFFY, arXiv 2504.14945; Critique-GRPO,
    2506.03106): its gradient weighs grad log p by gamma p / (p + gamma)^2, most at p = gamma, so
    that unlikely tokens still count.
    """
    expect_tokens(mask, logprobs=logprobs)
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    probability = torch.where(mask, logprobs, 0.0).exp()
    return torch.where(mask, probability / (probability + gamma), 0.0)


def stabilised(weight: Tensor, keep: Tensor, bound: Tensor | float = 0.0) -> Tensor:
    """The weight where `keep` is true; elsewhere the constant `bound`, through which no gradient
    flows. All `[N, T]`, `keep` boolean.
    """
    bound = torch.as_tensor(bound, dtype=weight.dtype, device=weight.device).expand_as(weight)
    expect_same_shape(weight=weight, keep=keep, bound=bound)
    return torch.where(keep, weight, bound.detach())


def clip_bounds(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clip as a mask: which ratios keep their gradient, and what the others are held at.

    A ratio is held at 1 + clip_high where the advantage is positive and it is above that, at
    1 - clip_low where negative and below, and at `dual_clip` where negative and above (arXiv
    1912.09729, eq. 5). With weight = ratio, -A · stabilised is `clipped_surrogate`.
    """
    expect_same_shape(ratio=ratio, advantages=advantages)
    _expect_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    low, high = torch.full_like(ratio, 1 - clip_low), torch.full_like(ratio, torch.inf)
    low = torch.where(advantages < 0, low, -torch.inf)
    high = torch.where(advantages > 0, 1 + clip_high, high)
    if dual_clip is not None:
        high = torch.where(advantages < 0, dual_clip, high)
    return (ratio >= low) & (ratio <= high), ratio.clamp(low, high)


def one_side(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """A >= 0 and ratio <= 1 + high, or A <= 0 and ratio >= 1 - low (REC-OneSide, 2509.24203)."""
    expect_same_shape(ratio=ratio, advantages=advantages)
    _expect_range(low, high)
    up = (advantages >= 0) & (ratio <= 1 + high)
    return up | ((advantages <= 0) & (ratio >= 1 - low)) | ratio.isnan()


def two_side(ratio: Tensor, low: float, high: float) -> Tensor:
    """1 - low <= ratio <= 1 + high, whatever the advantage (REC-TwoSide, 2509.24203)."""
    _expect_range(low, high)
    return ~((ratio < 1 - low) | (ratio > 1 + high))


def ring(
    ratio: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    outer_low: float,
    outer_high: float,
) -> Tensor:
    """`two_side`, and outside [1 - outer_low, 1 + outer_high] what pulls the ratio back to 1.

    REC-Ring (2509.24203). Raises ValueError unless the outer range contains the inner one.
    """
    expect_same_shape(ratio=ratio, advantages=advantages)
    if not (outer_low > low and outer_high > high):
        raise ValueError(
            f"the outer range must contain the inner one, got {outer_low}, {outer_high} "
            f"around {low}, {high}"
        )
    back_up = (advantages >= 0) & (ratio <= 1 - outer_low)
    back_down = (advantages <= 0) & (ratio >= 1 + outer_high)
    return two_side(ratio, low, high) | back_up | back_down


def _expect_range(low: float, high: float) -> None:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"the lower distance must lie in [0, 1], the upper be at least 0, got {low}, {high}"
        )
