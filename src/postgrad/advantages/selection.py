"""Which pairs of a data set are learnt from, and how: easy and hard ones (mixed preference
optimisation, arXiv 2403.19443)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Disagreement = Literal["keep", "drop", "flip"]


@dataclass(frozen=True)
class GapSplit:
    """Pairs by the gap that a reward sees in them; all are positions, in order.

    Attributes:
        easy: the gap's size is above gamma.
        hard: it is not.
        dropped: above gamma, but against the label, and left out for that.
        swapped: among the easy: against the label, which is to be turned round.
        gamma: the threshold.
    """

    easy: Tensor
    hard: Tensor
    dropped: Tensor
    swapped: Tensor
    gamma: float


def gap_split(
    chosen: Tensor,
    rejected: Tensor,
    gamma: float | None = None,
    *,
    quantile: float = 0.5,
    disagreement: Disagreement = "drop",
) -> GapSplit:
    """Pairs `[N]` split by the reward's gap g = r(x, y_w) - r(x, y_l): easy where |g| > gamma.

    Only differences of rewards matter, not their level at a prompt, and scaling rewards and gamma
    alike changes nothing.

    Args:
        chosen: `[N]` rewards of the chosen responses.
        rejected: `[N]` rewards of the rejected responses.
        gamma: the threshold; if None, the `quantile` of |g|, which fits rewards of any scale.
        quantile: share of the pairs that are hard, ties aside.
        disagreement: what becomes of easy pairs with g < -gamma, in which the reward contradicts
            the label clearly: they keep it, are dropped, or get it flipped.

    Raises:
        ValueError: shapes that differ, rewards that are not finite, or a threshold out of range.
    """
    if chosen.ndim != 1 or chosen.shape != rejected.shape or not len(chosen):
        raise ValueError(
            f"rewards must both be [N], got {list(chosen.shape)} and {list(rejected.shape)}"
        )
    gaps = chosen - rejected
    if not bool(gaps.isfinite().all()):
        raise ValueError("rewards must be finite")
    if gamma is None:
        if not 0 < quantile < 1:
            raise ValueError(f"the quantile must lie between 0 and 1, got {quantile}")
        gamma = float(gaps.abs().quantile(quantile))
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    far = gaps.abs() > gamma
    against = far & (gaps < 0)
    dropped = against if disagreement == "drop" else torch.zeros_like(far)
    swapped = against if disagreement == "flip" else torch.zeros_like(far)
    if disagreement not in ("keep", "drop", "flip"):
        raise ValueError(f"disagreement must be keep, drop or flip, got {disagreement!r}")
    easy, hard, left_out, turned = (
        mask.nonzero().squeeze(1) for mask in (far & ~dropped, ~far, dropped, swapped)
    )
    return GapSplit(easy, hard, left_out, turned, gamma)
