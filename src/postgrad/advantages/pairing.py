"""From judged samples to pairs and lists: which responses are learnt from, best first.

A group is K responses to one prompt. `preferences` `[K, K]` holds P(i preferred to j), with
P + P^T = 1. Signed preferences are 2 P - 1, so that M + M^T = 0. Functions that choose return
indices into the group.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers

Trajectory = dict[str, Tensor]
SignedPreference = Callable[[list[Trajectory], list[Trajectory]], Sequence[float]]


def win_rates(preferences: Tensor) -> Tensor:
    """r `[..., K]`: how often a response is preferred to another of its group, itself left out."""
    size = preferences.shape[-1]
    if preferences.ndim < 2 or preferences.shape[-2] != size or size < 2:
        raise ValueError(
            f"preferences must be [..., K, K] with K of at least 2, got {list(preferences.shape)}"
        )
    expect_numbers(preferences=preferences)
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
    expect_numbers(preferences=preferences)
    size = preferences.shape[-1]
    first, second = torch.triu_indices(size, size, offset=1)
    return [
        [int(i), int(j)] if preferences[i, j] > 0.5 else [int(j), int(i)]
        for i, j in zip(first, second, strict=True)
        if preferences[i, j] != 0.5
    ]


def drawn_verdicts(preferences: Tensor, random: torch.Generator) -> Tensor:
    """One drawn verdict on every pair, `[K, K]`: 1 where i won against j, 0 where it lost.

    i wins with probability P(i preferred to j). The diagonal stays 1/2.
    """
    expect_numbers(preferences=preferences)
    draws = torch.rand(preferences.shape, generator=random, dtype=torch.float64)
    won = (draws.to(preferences.device) < preferences).to(preferences.dtype).triu(1)
    lost = (1 - won).triu(1).mT
    return won + lost + 0.5 * torch.eye(len(preferences)).to(preferences)


def neighbours(preferences: Tensor) -> list[list[int]]:
    """The disjoint pairs (0, 1), (2, 3) …, the preferred response first (the first of equals).

    Of independent samples with `drawn_verdicts` these are the independent labelled pairs that
    theory asks for; the last of an odd number is left out.
    """
    expect_numbers(preferences=preferences)
    return [
        [i, i + 1] if preferences[i, i + 1] >= 0.5 else [i + 1, i]
        for i in range(0, len(preferences) - 1, 2)
    ]


def tournament(preferences: Tensor) -> list[list[int]]:
    """The champion and the last of a tournament, as one pair, or none (INPO, arXiv 2407.00617).

    Neighbours meet; then winners meet winners and losers meet losers, until one champion and one
    last are left; of equals the first wins, and who has nobody to meet moves on. The pair counts
    if the champion is preferred to the last. That needs 3K/2 - 1 verdicts of K = 2^n responses.
    """
    size = preferences.shape[-1]
    if preferences.shape != (size, size) or size < 2:
        raise ValueError(f"preferences must be [K, K] of K >= 2, got {list(preferences.shape)}")
    expect_numbers(preferences=preferences)

    def meet(players: list[int]) -> tuple[list[int], list[int]]:
        winners, losers = [], []
        for i, j in zip(players[::2], players[1::2], strict=False):
            first_wins = bool(preferences[i, j] >= 0.5)
            winners.append(i if first_wins else j)
            losers.append(j if first_wins else i)
        alone = players[-1:] if len(players) % 2 else []
        return winners + alone, losers + alone

    winners, losers = meet(list(range(size)))
    while len(winners) > 1:
        winners, _ = meet(winners)
    while len(losers) > 1:
        _, losers = meet(losers)
    champion, last = winners[0], losers[0]
    return [[champion, last]] if preferences[champion, last] > 0.5 else []


def clear_pairs(wins: Tensor, lead: float | Tensor, least: float = 0.0) -> list[list[int]]:
    """Every pair whose better response is clearly better, that one first (DNO, arXiv 2404.03715).

    `wins` `[K]` are win rates. The better response needs at least `least` and must lead by `lead`,
    a number or one for each `[K]` response. With a lead of 0 these are all pairs.
    """
    leads = torch.as_tensor(lead, dtype=wins.dtype, device=wins.device).expand_as(wins)
    if wins.ndim != 1:
        raise ValueError(f"win rates must be [K], got {list(wins.shape)}")
    expect_numbers(wins=wins, lead=leads)
    order = wins.argsort(descending=True, stable=True).tolist()
    slack = 1e-9  # so that 0.6 leads 0.2 by 0.4 in binary, too
    return [
        [better, worse]
        for place, better in enumerate(order)
        for worse in order[place + 1 :]
        if wins[better] >= least - slack and wins[better] - wins[worse] >= leads[better] - slack
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
    if not bool(((signed + signed.mT).abs() <= 1e-6).all()):
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


def log_odds(probabilities: Tensor, margin: float = 1e-6) -> Tensor:
    """logit p = log p/(1 - p), in the same shape: a reward, from P(response over a baseline).

    RSO, arXiv 2309.06657. Probabilities are kept `margin` away from 0 and 1, with a warning where
    that changes any.

    Raises:
        ValueError: a value is no probability, or the margin not between 0 and 1/2.
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"margin must lie between 0 and 1/2, got {margin}")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]")
    kept = probabilities.clamp(margin, 1 - margin)
    changed = int((kept != probabilities).sum())
    if changed:
        warnings.warn(
            f"{changed} of {probabilities.numel()} preferences are within {margin:g} of 0 or 1: "
            "their rewards are cut there (softer preferences tell such responses apart)",
            stacklevel=2,
        )
    return kept.logit()


def rejection_select(
    rewards: Tensor, count: int, beta: float, generator: torch.Generator
) -> list[int]:
    """`count` of a group's responses, as if drawn from pi exp(r/beta)/Z: statistical rejection.

    `rewards` `[K]` are those of distinct samples of pi (RSO, arXiv 2309.06657). In passes over what
    is left, in order, each response is accepted with probability

        exp((r - r_max)/beta),    r_max the largest reward that is left when the pass begins

    until `count` are; every pass accepts its best. The order is that of acceptance. With `beta` 0
    these are the `count` largest, best first; with a large `beta` the first `count`.

    Raises:
        ValueError: fewer rewards than `count`, a negative `beta`, or rewards that are not finite.
    """
    if rewards.ndim != 1 or not 1 <= count <= len(rewards):
        raise ValueError(f"cannot accept {count} responses of rewards {list(rewards.shape)}")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or above, got {beta}")
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite")
    if beta == 0:
        return rewards.argsort(descending=True, stable=True)[:count].tolist()
    accepted: list[int] = []
    left = torch.arange(len(rewards))
    while len(accepted) < count:
        chance = ((rewards[left] - rewards[left].max()) / beta).exp()
        taken = torch.rand(len(left), generator=generator, dtype=chance.dtype) < chance
        accepted += left[taken].tolist()
        left = left[~taken]
    return accepted[:count]


def knockout(preferences: Tensor) -> list[list[int]]:
    """The K - 1 matches of a knock-out, the preferred response of each first (RSO, 2309.06657).

    Neighbours meet and winners play on, the last of an odd number without a match.
    """
    expect_numbers(preferences=preferences)
    matches: list[list[int]] = []
    players = list(range(preferences.shape[-1]))
    while len(players) > 1:
        played = [
            _match(preferences, players[i], players[i + 1]) for i in range(0, len(players) - 1, 2)
        ]
        matches += played
        players = [winner for winner, _ in played] + players[2 * len(played) :]
    return matches


def _match(preferences: Tensor, i: int, j: int) -> list[int]:
    return [i, j] if preferences[i, j] >= 0.5 else [j, i]


def reward_pairs(rewards: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs in groups of rewards `[P, N]` that differ by more than `threshold`.

    Returns the prompt, the better and the worse place of each, `[M]`; M may be 0.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [P, N] with N of at least 2, got {list(rewards.shape)}")
    if not threshold >= 0:
        raise ValueError(f"the threshold must be at least 0, got {threshold}")
    expect_numbers(rewards=rewards)
    prompt, better, worse = (rewards.unsqueeze(2) - rewards.unsqueeze(1) > threshold).nonzero().T
    return prompt, better, worse
