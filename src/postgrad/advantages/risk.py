"""Risk measures of bundled rewards, and the quantiles they need (RiskPO, arXiv 2510.00911).

The score of a bundle is the sum of the rewards of one response each to several prompts. `scores`
`[M]` are those of M bundles; advantages are of bundles, until a credit shares them out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers
from postgrad.advantages.group import group_mean_centred

Credit = Literal["uniform", "std", "sum-mean", "score"]

_SAME = 1e-3  # a deviation below this is that of rewards that are all alike
_NOTHING = 1e-6  # a sum of centred rewards below this has no shares


def bundles(groups: Tensor, size: int, random: torch.Generator) -> Tensor:
    """The bundle `[N]` (from 0) of every response, by groups `[N]` of the responses to one prompt.

    `size` groups after one another, in order of their ids, make a set. Each has its responses
    shuffled by `random`, and the j-th of each are one bundle: a set has as many bundles as a group
    has responses, and every response is in one. Bundle b belongs to set b // (responses a group).

    Raises:
        ValueError: the number of groups is no multiple of `size`, or groups differ in length.
    """
    if groups.ndim != 1 or size < 1:
        raise ValueError(f"expected groups [N] and a size of 1 or more, got {groups.shape}, {size}")
    if not len(groups):
        raise ValueError("groups must be those of at least one response, got none")
    ids, counts = groups.unique(return_counts=True)
    if len(ids) % size:
        raise ValueError(f"{len(ids)} groups do not make whole bundles of {size}")
    if len(counts.unique()) > 1:
        raise ValueError(f"groups must have one number of responses, got {counts.tolist()}")
    each = int(counts[0])
    found = torch.empty_like(groups)
    for place, group in enumerate(ids):
        order = torch.randperm(each, generator=random)
        found[(groups == group).nonzero().squeeze(1)] = place // size * each + order
    return found


def bundle_scores(rewards: Tensor, bundle: Tensor) -> Tensor:
    """The sum of the rewards `[N]` of each bundle, `[M]`."""
    if rewards.ndim != 1 or rewards.shape != bundle.shape:
        raise ValueError(
            f"rewards and bundle must both be [N], got {list(rewards.shape)}, {list(bundle.shape)}"
        )
    count = int(bundle.max()) + 1 if len(bundle) else 0
    return torch.zeros(count, dtype=rewards.dtype).index_add(0, bundle, rewards)


def mixed_value_at_risk(
    scores: Tensor, low: Tensor | float, high: Tensor | float, omega: float
) -> Tensor:
    """A = -omega (q_a - R)^+ - (q_b - R)^+, in the shape of the scores R (MVaR, the paper's form).

    The direction of steepest ascent of (1 + omega) times the mean score below the quantile q_a
    (`low`) plus the mean between q_a and q_b (`high`). Never positive, and 0 from q_b on.
    """
    low, high = _ordered(scores, low, high)
    if not omega >= 0:
        raise ValueError(f"omega must be at least 0, got {omega}")
    return -omega * (low - scores).clamp(min=0) - (high - scores).clamp(min=0)


def averaged_value_at_risk(
    scores: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    levels: tuple[float, float],
    omega: float,
    *,
    tail: Literal["lower", "upper"] = "lower",
    baseline: bool = True,
) -> Tensor:
    """The released code's mixture (omega A_tail + A_range) / (omega + 1), in the shape of scores R.

    With quantiles q_a, q_b (`low`, `high`) at the `levels` a and b,

        A_range = (clip(R, q_a, q_b) - q_b) / (b - a)
        A_tail  = -(q_a - R)^+ / a,  or of the upper tail (R - q_b)^+ / (1 - b), which seeks risk

    Each is divided by its own width, so the tail counts for more than in the paper's form. Without
    `baseline` the range is measured from q_a, and advantages have both signs.
    """
    low, high = _ordered(scores, low, high)
    first, last = levels
    if not 0 < first < last < 1:
        raise ValueError(f"levels must satisfy 0 < a < b < 1, got {first} and {last}")
    if not omega >= 0:
        raise ValueError(f"omega must be at least 0, got {omega}")
    origin = high if baseline else low
    between = (torch.minimum(torch.maximum(scores, low), high) - origin) / (last - first)
    if tail == "lower":
        outside = -(low - scores).clamp(min=0) / first
    elif tail == "upper":
        outside = (scores - high).clamp(min=0) / (1 - last)
    else:
        raise ValueError(f"tail must be 'lower' or 'upper', got {tail!r}")
    return (omega * outside + between) / (omega + 1)


def shared_out(
    advantages: Tensor, bundle: Tensor, rewards: Tensor, groups: Tensor, credit: Credit
) -> Tensor:
    """The advantages `[M]` of bundles as those of their responses `[N]`.

    - "uniform": each has its bundle's.
    - "std": over the deviation of the rewards to its prompt (1 where they are all alike).
    - "sum-mean": times its share d / sum d of the bundle's centred rewards d; equal shares where
      their sum is 0.
    - "score": half where the response is right, half as much again where it is wrong.
    """
    own = advantages[bundle]
    if credit == "uniform":
        return own
    if credit == "score":
        expect_numbers(rewards=rewards)
        return torch.where(rewards > 0, 0.5 * own, 1.5 * own)
    centred = group_mean_centred(rewards, groups)
    if credit == "std":
        _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        squares = torch.zeros(len(counts), dtype=rewards.dtype).index_add(0, index, centred**2)
        variance = (squares / (counts - 1).clamp(min=1))[index]
        return own / torch.where(variance < _SAME**2, 1.0, variance).sqrt()
    if credit == "sum-mean":
        total = bundle_scores(centred, bundle)[bundle]
        size = bundle_scores(torch.ones_like(rewards), bundle)[bundle]
        nothing = total.abs() < _NOTHING
        return own * torch.where(nothing, 1 / size, centred / torch.where(nothing, 1.0, total))
    raise ValueError(f"credit must be 'uniform', 'std', 'sum-mean' or 'score', got {credit!r}")


class QuantileTracker:
    """Quantiles of a distribution that changes slowly, followed from sample to sample.

        q_s <- q_s + rate (s - share of the samples below q_s)

    The first samples give the first values. They never cross.
    """

    def __init__(self, levels: Sequence[float], rate: float):
        if not all(0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
            raise ValueError(f"levels must rise between 0 and 1, got {list(levels)}")
        if not rate > 0:
            raise ValueError(f"the rate must be above 0, got {rate}")
        self._levels = torch.tensor(levels, dtype=torch.float64)
        self._rate = rate
        self._values = torch.zeros(0, dtype=torch.float64)

    @property
    def started(self) -> bool:
        return len(self._values) > 0

    @property
    def values(self) -> Tensor:
        """The quantiles `[levels]`, float64; none before the first update."""
        return self._values.cummax(0).values if self.started else self._values

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Take in samples `[n]`; none change nothing."""
        if not len(samples):
            return
        expect_numbers(samples=samples)
        samples = samples.double()
        if not self.started:
            self._values = samples.quantile(self._levels)
            return
        below = (samples[None, :] < self._values[:, None]).double().mean(1)
        self._values = self._values + self._rate * (self._levels - below)

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self._values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._values = state["values"].clone()


def _ordered(scores: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    first, last = (torch.as_tensor(value).to(scores) for value in (low, high))
    if not bool((first <= last).all()):
        raise ValueError(f"the lower quantile must not be above the upper, got {low} and {high}")
    return first, last
