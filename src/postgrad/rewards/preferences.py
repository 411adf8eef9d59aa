"""Which of two responses is better: preference functions, and those that a reward implies.

A preference function is called as a reward function is, by keywords:

    def prefer(prompts, first, second, **columns) -> list[float]

and returns for every pair the probability, in [0, 1], that `first` is preferred to `second`.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.rewards.functions import (
    RewardFunction,
    RewardSet,
    RewardSpec,
    columns_of,
    load_rewards,
)

Row = Mapping[str, Any]


class Preference(Protocol):
    """P(first preferred to second | prompt), `[N]`, of responses to the prompts of N rows."""

    def __call__(self, rows: Sequence[Row], first: list[str], second: list[str]) -> list[float]: ...

    def probe(self, row: Row) -> None:
        """Try it on one row, before any compute is spent."""
        ...


class BradleyTerry:
    """P(first over second) = sigma((r(first) - r(second)) / scale), of a reward r."""

    def __init__(self, rewards: RewardSet, scale: float = 1.0):
        self.rewards = rewards
        self.scale = scale

    def __call__(self, rows: Sequence[Row], first: list[str], second: list[str]) -> list[float]:
        values, _ = self.rewards.of_rows([*rows, *rows], first + second)
        gaps = zip(values[: len(first)], values[len(first) :], strict=True)
        return [_sigmoid((one - other) / self.scale) for one, other in gaps]

    def probe(self, row: Row) -> None:
        self.rewards.probe(row)


class Judge:
    """A preference function of the user's. Asked in both orders when `symmetric`, and averaged.

    A judge that favours the response it sees first is so made fair:
    P(a over b) = (f(a, b) + 1 - f(b, a)) / 2.
    """

    def __init__(self, function: RewardSet, symmetric: bool = True):
        self._function = function
        self._symmetric = symmetric

    def __call__(self, rows: Sequence[Row], first: list[Any], second: list[Any]) -> list[float]:
        said = self._ask(rows, first, second)
        if not self._symmetric:
            return said
        turned = self._ask(rows, second, first)
        return [(one + 1 - other) / 2 for one, other in zip(said, turned, strict=True)]

    def _ask(self, rows: Sequence[Row], first: list[Any], second: list[Any]) -> list[float]:
        columns = {**columns_of(rows), "first": first, "second": second}
        values, _ = self._function([row["prompt"] for row in rows], first, columns)
        for i, value in enumerate(values):
            if not 0 <= value <= 1:
                name = self._function.terms[0].name
                raise PostgradError(
                    f"preference {name!r} returned {value:g} for pair {i + 1}, expected a "
                    "probability in [0, 1]"
                )
        return values

    def probe(self, row: Row) -> None:
        self([row], ["one response"], ["another response"])


class Noisy:
    """Another preference whose verdicts on a share of the pairs are turned round.

    Which pairs these are is drawn once and for all from `seed` and the texts, in either order, as
    labels of a data set are wrong or right once and for all.

    Attributes:
        unspoilt: the other preference, which evaluations ask.
    """

    def __init__(self, unspoilt: Preference, rate: float, seed: int):
        self.unspoilt = unspoilt
        self._rate, self._seed = rate, seed

    def __call__(self, rows: Sequence[Row], first: list[Any], second: list[Any]) -> list[float]:
        said = self.unspoilt(rows, first, second)
        return [
            1 - value if self._turned(row, one, other) else value
            for value, row, one, other in zip(said, rows, first, second, strict=True)
        ]

    def _turned(self, row: Row, first: Any, second: Any) -> bool:
        pair = sorted([str(first), str(second)])
        return random.Random(repr((self._seed, row["prompt"], pair))).random() < self._rate

    def probe(self, row: Row) -> None:
        self.unspoilt.probe(row)


def load_preference(
    preference: RewardSpec | RewardFunction | None,
    reward: RewardSpec | RewardFunction | Sequence[RewardSpec | RewardFunction] | None,
    *,
    scale: float = 1.0,
    time_limit: float = 60.0,
) -> Preference:
    """The preference that is named: a function's own, or Bradley-Terry of a reward.

    Raises:
        PostgradError: neither or both are named; and all that `load_rewards` raises.
    """
    if preference is not None and reward is not None:
        raise PostgradError("preference: give either preference or reward, not both")
    if preference is not None:
        return Judge(load_rewards(preference, time_limit=time_limit))
    if reward is None:
        raise PostgradError(
            "preference: name what compares two responses, e.g. preference=file.py:function, or a "
            "reward=… whose Bradley-Terry probabilities are to be used"
        )
    return BradleyTerry(load_rewards(reward, time_limit=time_limit), scale)


def preference_matrices(
    preference: Preference, rows: Sequence[Row], texts: Sequence[Sequence[str]]
) -> list[Tensor]:
    """For each row `[K, K]` float64: P(response i preferred to response j), 1/2 on the diagonal.

    Each pair is asked about once, so that P + P^T = 1 exactly; equal texts are 1/2 unasked.
    """
    asked: list[tuple[int, int, int]] = [
        (number, i, j)
        for number, several in enumerate(texts)
        for i in range(len(several))
        for j in range(i + 1, len(several))
        if several[i] != several[j]
    ]
    matrices = [torch.full((len(several), len(several)), 0.5).double() for several in texts]
    if asked:
        said = preference(
            [rows[number] for number, _, _ in asked],
            [texts[number][i] for number, i, _ in asked],
            [texts[number][j] for number, _, j in asked],
        )
        for (number, i, j), value in zip(asked, said, strict=True):
            matrices[number][i, j] = value
            matrices[number][j, i] = 1 - value
    return matrices


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def higher_return(
    first: Sequence[Mapping[str, Tensor]], second: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """Of trajectories: 1 where the first has the larger sum of `rewards`, 1/2 where they tie."""
    gaps = [
        float(one["rewards"].double().sum() - other["rewards"].double().sum())
        for one, other in zip(first, second, strict=True)
    ]
    return [0.5 * (1 + (gap > 0) - (gap < 0)) for gap in gaps]
