"""From judged samples to pairs and lists: which responses are learnt from, best first.

A group is K responses to one prompt. `preferences` `[K, K]` holds P(i preferred to j), with
P + P^T = 1; functions that choose return indices into the group.
"""

import warnings

import torch
from torch import Tensor


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


def log_odds(probabilities: Tensor, margin: float = 1e-6) -> Tensor:
    """logit p = log p/(1 - p), in the same shape: a reward, from P(response over a baseline).

    RSO, arXiv 2309.06657. Probabilities are kept `margin` away from 0 and 1, with a warning where
    that changes any.

    Raises:
        ValueError: a value is no probability.
    """
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


def first_round(preferences: Tensor) -> list[list[int]]:
    """Disjoint pairs of neighbours, the preferred first (of equals the first); K is even."""
    size = preferences.shape[-1]
    if size % 2:
        raise ValueError(f"pairs of neighbours need an even number of responses, got {size}")
    return [_match(preferences, i, i + 1) for i in range(0, size, 2)]


def tournament(preferences: Tensor) -> list[list[int]]:
    """The K - 1 matches of a knock-out: neighbours meet and winners play on (the last of an odd
    number without a match), the preferred response of each first.
    """
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
