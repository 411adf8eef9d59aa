"""Random preference games in tables, and how far from equilibrium a method is step by step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.objectives.game import duality_gap, exploitability, random_game, wins_against
from postgrad.objectives.pairwise import logistic
from postgrad.seeding import generator

_POINTS = 25  # of a trajectory

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Games:
    """`preferences` `[G, K, K]` of G games, and log-probabilities `[G, K]` of their references."""

    preferences: Tensor
    reference: Tensor

    @classmethod
    def draw(cls, seed: int, count: int, size: int, *, uniform: bool = False) -> "Games":
        """References are the softmax of standard normal numbers, or uniform."""
        random = generator(seed, "games")
        games = torch.stack([random_game(size, random) for _ in range(count)])
        logits = torch.randn(count, size, generator=random, dtype=torch.float64)
        return cls(games, (logits * (not uniform)).log_softmax(-1))

    def win_rates(self, policy: Tensor) -> Tensor:
        """P(y > policy) `[G, K]`, of log-probabilities `[G, K]`."""
        return wins_against(self.preferences, policy.exp())

    def gap(self, policy: Tensor, tau: float) -> float:
        """The median over games of the duality gap regularised towards the references by tau."""
        gaps = duality_gap(self.preferences, policy.exp(), self.reference.exp(), tau)
        return float(gaps.median())

    def exploited(self, probabilities: Tensor) -> float:
        """The median over games of max_y P(y > policy) - 1/2, of probabilities `[G, K]`."""
        return float(exploitability(self.preferences, probabilities).median())

    def trajectory(self, step: Callable[[Tensor, int], Tensor], steps: int, tau: float) -> Curve:
        """The gap after some of `steps` steps from the reference, and after the last.

        `step(policy, t)`, t from 0, returns the next log-probabilities `[G, K]`.
        """
        marks = torch.logspace(0, torch.tensor(steps).log10(), _POINTS, dtype=torch.float64)
        wanted = {0, *marks.round().long().tolist()}
        policy = self.reference
        curve = [(0.0, self.gap(policy, tau))]
        for count in range(1, steps + 1):
            policy = step(policy, count - 1)
            if count in wanted:
                curve.append((float(count), self.gap(policy, tau)))
        return curve


def bradley_terry(preferences: Tensor, mu: Tensor) -> Tensor:
    """The reward `[K]`, its mean under mu 0, that fits best to comparisons of pairs drawn from mu.

    argmin over r of the mean of -P(i > j) log sigma(r_i - r_j), for infinitely many comparisons.
    """
    reward = torch.zeros_like(mu, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [reward],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    weights = mu.unsqueeze(-1) * mu * preferences

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = (weights * logistic(reward.unsqueeze(-1) - reward)).sum()
        value.backward()
        return value

    optimiser.step(closure)
    found = reward.detach()
    return found - (mu * found).sum()
