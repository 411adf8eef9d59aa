"""Random preference games in tables, and how far from equilibrium a method is step by step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.objectives.game import duality_gap, random_game
from postgrad.objectives.pairwise import logistic
from postgrad.seeding import generator

GAMES, RESPONSES = 10, 10
_POINTS = 25  # of a trajectory

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Games:
    """Games between responses, P `[G, K, K]`, and the reference of each, log mu `[G, K]`."""

    preferences: Tensor
    log_mu: Tensor

    @classmethod
    def draw(cls, seed: int) -> "Games":
        """Uniform preferences; the reference is the softmax of normal numbers."""
        random = generator(seed, "matrix games")
        preferences = torch.stack([random_game(RESPONSES, random) for _ in range(GAMES)])
        logits = torch.randn(GAMES, RESPONSES, generator=random, dtype=torch.float64)
        return cls(preferences, logits.log_softmax(-1))

    def gap(self, log_policy: Tensor, tau: float) -> float:
        """The median over games of the duality gap regularised by tau."""
        gaps = duality_gap(self.preferences, log_policy.exp(), self.log_mu.exp(), tau)
        return float(gaps.median())

    def trajectory(self, step: Callable[[Tensor, int], Tensor], steps: int, tau: float) -> Curve:
        """The gap after some of `steps` steps from the reference, and after the last.

        `step(log_policy, t)`, t from 0, returns the next log-policy `[G, K]`.
        """
        marks = torch.logspace(0, torch.tensor(steps).log10(), _POINTS, dtype=torch.float64)
        wanted = {0, *marks.round().long().tolist()}
        log_policy = self.log_mu
        curve = [(0.0, self.gap(log_policy, tau))]
        for count in range(1, steps + 1):
            log_policy = step(log_policy, count - 1)
            if count in wanted:
                curve.append((float(count), self.gap(log_policy, tau)))
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
