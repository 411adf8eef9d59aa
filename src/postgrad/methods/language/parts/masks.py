"""Stabilisation masks: where the gradient stops."""

from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.language.parts.base import Around, Mask
from postgrad.objectives import estimator


class Filtered(Settings):
    """Which responses are left out whatever the policy does."""

    drop_truncated: bool = setting(
        False, "leave out responses that were cut at the length limit (overlong filtering)"
    )


class FilteredMask(Mask):
    """What the masks on the ratio share: responses that were cut can be left out."""

    Config = Filtered

    def prepared(self, batch: Batch) -> Batch:
        if not self.config.drop_truncated:
            return batch
        return batch.with_fields(mask=batch.mask & batch.finished[:, None])


class NoMask(FilteredMask):
    """every sampled token teaches"""

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        return weight


class Clip(Filtered):
    """The range of the ratio pi / pi_old."""

    clip_low: float = setting(0.2, "the lower bound of the ratio is 1 - clip_low", gt=0, lt=1)
    clip_high: float = setting(0.2, "the upper bound of the ratio is 1 + clip_high", gt=0)


class DualClip(Clip):
    dual_clip: float | None = setting(
        None, "upper bound of the ratio for negative advantages (dual-clip PPO)", gt=1
    )


class PPOClip(FilteredMask):
    """PPO's clip: no gradient where the ratio has left its range on the winning side"""

    Config = DualClip

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        keep, bound = estimator.clip_bounds(
            ratio, advantages, self.config.clip_low, self.config.clip_high, self.config.dual_clip
        )
        return estimator.stabilised(weight, keep, bound)


class OneSide(FilteredMask):
    """REC's one-sided mask: PPO's clip for any denominator, with nothing in the place of a token"""

    Config = Clip

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        keep = estimator.one_side(ratio, advantages, self.config.clip_low, self.config.clip_high)
        return estimator.stabilised(weight, keep)


class TwoSide(FilteredMask):
    """REC's two-sided mask: no gradient outside the range, whatever the advantage"""

    Config = Clip

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        keep = estimator.two_side(ratio, self.config.clip_low, self.config.clip_high)
        return estimator.stabilised(weight, keep)


class RingRange(Clip):
    outer_low: float = setting(0.6, "below 1 - outer_low what raises the ratio counts", gt=0)
    outer_high: float = setting(2.0, "above 1 + outer_high what lowers the ratio counts", gt=0)


class Ring(FilteredMask):
    """REC's ring: the two-sided mask, and far outside of it what pulls the policy back"""

    Config = RingRange

    def __init__(self, config: RingRange, around: Around):
        super().__init__(config, around)
        for side in ("low", "high"):
            inner, outer = getattr(config, f"clip_{side}"), getattr(config, f"outer_{side}")
            if outer <= inner:
                raise PostgradError(
                    f"mask.outer_{side}: must be above mask.clip_{side}, {inner:g}, got {outer:g}"
                )

    def __call__(self, weight: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        keep = estimator.ring(
            ratio,
            advantages,
            self.config.clip_low,
            self.config.clip_high,
            self.config.outer_low,
            self.config.outer_high,
        )
        return estimator.stabilised(weight, keep)
