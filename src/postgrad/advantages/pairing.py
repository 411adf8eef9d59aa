"""From judged samples to pairs and lists: which responses are learnt from, best first.

A group is K responses to one prompt. `preferences` `[K, K]` holds P(i preferred to j), with
P + P^T = 1. Signed preferences are 2 P - 1, so that M + M^T = 0.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Trajectory = dict[str, Tensor]
SignedPreference = Callable[[list[Trajectory], list[Trajectory]], Sequence[float]]


def win_rates(preferences: Tensor) -> Tensor:
    """r `[..., K]`: how often a response is preferred to another of its group, itself left out."""
    size = preferences.shape[-1]
    if preferences.ndim < 2 or preferences.shape[-2] != size or size < 2:
        raise ValueError(
            f"preferences must be [..., K, K] with K of at least 2, got {list(preferences.shape)}"
        )
    itself = preferences.diagonal(dim1=-2, dim2=-1)
    return (preferences.sum(-1) - itself) / (size - 1)


def best_and_worst(preferences: Tensor) -> list[int]:
    """The responses `[2]` that win most and least often; the first of equals, the last of equals.

    The two are always different places, also where all responses are equally good.
    """
    order = win_rates(preferences).argsort(descending=True, stable=True)
    return [int(order[0]), int(order[-1])]


def all_pairs(preferences: Tensor) -> list[list[int]]:
    """Every pair with a preference, the preferred response first."""
    size = preferences.shape[-1]
    first, second = torch.triu_indices(size, size, offset=1)
    return [
        [int(i), int(j)] if preferences[i, j] > 0.5 else [int(j), int(i)]
        for i, j in zip(first, second, strict=True)
        if preferences[i, j] != 0.5
    ]


def win_rate_rewards(signed: Tensor) -> Tensor:
    """r_i = 1/(K - 1) sum_{j != i} M_ij, `[..., K]`: self-play's reward (SPO, arXiv 2401.04056).

    `signed` M `[..., K, K]` in [-1, 1] is antisymmetric. A group's rewards lie in [-1, 1] and sum
    to 0, so they are their own baseline; with K = 2 they are (M_12, -M_12), and (r + 1)/2 is the
    win rate.
    """
    size = signed.shape[-1]
    if signed.ndim < 2 or signed.shape[-2] != size or size < 2:
        raise ValueError(
            f"signed preferences must be [..., K, K] with K of at least 2, got {list(signed.shape)}"
        )
    if bool((signed + signed.mT).abs().max() > 1e-6):
        raise ValueError("signed preferences must be antisymmetric: M + M^T = 0")
    if not bool((signed.abs() <= 1).all()):
        raise ValueError("signed preferences must lie in [-1, 1]")
    return signed.sum(-1) / (size - 1)


def best_of_n_divergence(n: int) -> float:
    """log n - (n - 1)/n: KL in nats of the best of n samples from the policy that drew them.

    It is an upper bound, and exact where no two samples are equally good or the same
    (arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


class PreferenceQueue:
    """The last trajectories of recent policies, which new ones are compared with.

    SPO's opponents for control (arXiv 2401.04056). A trajectory is tensors by name.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"a queue needs a size of at least 1, got {size}")
        self._kept: deque[Trajectory] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._kept)

    def push(self, trajectory: Trajectory) -> None:
        """Append one; the oldest leaves when the queue is full."""
        self._kept.append(trajectory)

    def reward(self, trajectory: Trajectory, prefer: SignedPreference) -> float:
        """r = 1/|Q| sum_q M(trajectory, q), with `prefer` giving M in [-1, 1] for every pair."""
        if not self._kept:
            raise ValueError("the queue is empty: there is nothing to compare with")
        signed = prefer([trajectory] * len(self._kept), list(self._kept))
        if len(signed) != len(self._kept) or not all(-1 <= value <= 1 for value in signed):
            raise ValueError(
                f"expected {len(self._kept)} preferences in [-1, 1], got {list(signed)}"
            )
        return math.fsum(signed) / len(signed)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept.clear()
        self._kept.extend(state["kept"])
