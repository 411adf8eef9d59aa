"""Policy-gradient losses per token: REINFORCE, PPO's clipped surrogate, GRPO and its relatives.

Language tensors are `[N, T]`: N responses of at most T tokens, with a boolean `mask` of the tokens
that count. Padding may hold anything, even NaN: it reaches neither values nor gradients. The loss
of a method is a loss per token, then `aggregate`. GRPO as in DeepSeekMath (2402.03300, eq. 3):

    ratio = importance_ratio(logprobs, old_logprobs, mask)
    loss = clipped_surrogate(ratio, advantages, 0.2, 0.2)
    loss = loss + beta * kl_estimate(logprobs, reference_logprobs, mask, kind="k3")
    loss = aggregate(loss, mask, how="sequence-mean")
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_same_shape, expect_tokens

RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "sequence-sum-constant"]
KLEstimator = Literal["k1", "k2", "k3"]


def _log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """log numerator - log denominator `[N, T]`, 0 at padding so that exp() is safe there."""
    return torch.where(mask, numerator - denominator, 0.0)


def importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: RatioLevel = "token"
) -> Tensor:
    """How much likelier the policy makes what the old policy sampled, `[N, T]`; 1 at padding.

    - "token": r_t = pi(y_t) / pi_old(y_t) (PPO, arXiv 1707.06347).
    - "sequence": the geometric mean of the response's token ratios, the same at each of its tokens
      (GSPO, arXiv 2507.18071, eq. 7); an empty response has ratio 1.

    The gradient flows through `logprobs` only. Log-ratios are not limited: a policy so far from the
    old one that the ratio overflows gives an infinite value, not a wrong one.
    """
    expect_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = _log_ratio(logprobs, old_logprobs.detach(), mask)
    if level == "token":
        return log_ratio.exp()
    if level == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(mask, mean, 0.0).exp()
    raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")


def reinforce(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-A_t log pi(y_t), `[N, T]`, 0 at padding (Williams 1992). `advantages` `[N, T]` is constant.

    With advantages of 1 this is the negative log-likelihood of supervised fine-tuning.
    """
    expect_tokens(mask, logprobs=logprobs, advantages=advantages)
    advantages = torch.where(mask, advantages.detach(), 0.0)
    return -advantages * torch.where(mask, logprobs, 0.0)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's loss max(-rA, -clip(r, 1 - clip_low, 1 + clip_high) A), in the shape of `ratio`.

    PPO (arXiv 1707.06347, eq. 7) has clip_low = clip_high; DAPO's clip-higher (arXiv 2503.14476)
    clip_high > clip_low. `dual_clip` c > 1 limits the loss of a negative advantage to -cA (arXiv
    1912.09729, eq. 5). `advantages` has the shape of `ratio` and is constant.
    """
    expect_same_shape(ratio=ratio, advantages=advantages)
    _expect_clip_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    advantages = advantages.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clip_fractions(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    mask: Tensor | None = None,
) -> dict[str, float]:
    """How often the clip takes the gradient away: metrics for `clipped_surrogate`.

    `clipped` is the fraction of all entries, `clipped_positive` that of the entries with a positive
    advantage (r > 1 + clip_high), `clipped_negative` with a negative one (r < 1 - clip_low). A
    fraction of no entries is 0. Only entries where `mask` is true count (all without a mask).
    """
    expect_same_shape(ratio=ratio, advantages=advantages)
    _expect_clip_range(clip_low, clip_high)
    counted = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
    positive, negative = counted & (advantages > 0), counted & (advantages < 0)
    high, low = positive & (ratio > 1 + clip_high), negative & (ratio < 1 - clip_low)
    return {
        "clipped": _fraction(high | low, counted),
        "clipped_positive": _fraction(high, positive),
        "clipped_negative": _fraction(low, negative),
    }


def _fraction(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(int(whole.sum()), 1)


def _expect_clip_range(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low must lie in [0, 1] and clip_high be at least 0, got {clip_low}, {clip_high}"
        )


def kl_estimate(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    kind: KLEstimator = "k3",
    level: RatioLevel = "token",
) -> Tensor:
    """Estimates of KL(pi || pi_ref) from tokens that pi sampled, `[N, T]`, 0 at padding.

    With d = log pi - log pi_ref (Schulman, "Approximating KL divergence", 2020):
    "k1" d, unbiased, may be negative; "k2" d^2/2, biased, its gradient is that of the KL in
    expectation; "k3" exp(-d) - 1 + d, unbiased and never negative. The gradient flows through
    `logprobs` only. At level "sequence" d is that of the whole response, the sum over its tokens,
    and the tokens share the estimate evenly: their sum is that of the response.
    """
    expect_tokens(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = _log_ratio(logprobs, reference_logprobs.detach(), mask)
    if level == "token":
        return _divergence(difference, kind)
    if level == "sequence":
        whole = _divergence(difference.sum(1, keepdim=True), kind)
        return torch.where(mask, whole / mask.sum(1, keepdim=True).clamp(min=1), 0.0)
    raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")


def _divergence(difference: Tensor, kind: KLEstimator) -> Tensor:
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    how: Aggregation,
    *,
    items: int | None = None,
    tokens: int | None = None,
    constant: float | None = None,
) -> Tensor:
    """One scalar from a value per token `[N, T]`.

    - "token-mean": over all tokens that count (DAPO, arXiv 2503.14476).
    - "sequence-mean": mean over a response's tokens, then over responses (GRPO, arXiv 2402.03300);
      an empty response contributes 0 and still counts as an item.
    - "sequence-sum": sum over a response's tokens, then mean over responses (REINFORCE of whole
      responses).
    - "sequence-sum-constant": sum over a response's tokens divided by `constant`, usually the
      longest allowed response, then mean over responses (Dr. GRPO, arXiv 2503.20783).

    `items` and `tokens` are the totals of the batch of one optimiser step; pass them when this is a
    part of it (`batch.items`, `batch.tokens`), and the parts add up to the whole. Without them the
    tensors given here are the whole batch.
    """
    expect_tokens(mask, per_token=per_token)
    items = len(mask) if items is None else items
    values = torch.where(mask, per_token, 0.0)
    if how == "token-mean":
        tokens = int(mask.sum()) if tokens is None else tokens
        return values.sum() / _at_least_one(tokens, "tokens")
    if how == "sequence-mean":
        means = values.sum(1) / mask.sum(1).clamp(min=1)
        return means.sum() / _at_least_one(items, "items")
    if how == "sequence-sum":
        return values.sum() / _at_least_one(items, "items")
    if how == "sequence-sum-constant":
        if constant is None or not constant > 0:
            raise ValueError(f"'sequence-sum-constant' needs a positive constant, got {constant}")
        return values.sum() / (_at_least_one(items, "items") * constant)
    raise ValueError(
        "how must be 'token-mean', 'sequence-mean', 'sequence-sum' or 'sequence-sum-constant', got "
        + repr(how)
    )


def _at_least_one(count: int, name: str) -> int:
    if count < 1:
        raise ValueError(f"the batch has no {name} that count, so its mean is undefined")
    return count
