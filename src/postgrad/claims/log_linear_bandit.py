"""A log-linear bandit whose optimum is known, with preference pairs whose labels are flipped."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.objectives.pairwise import margin
from postgrad.seeding import generator

PROMPTS, ACTIONS, FEATURES = 20, 10, 8
BETA = 1.0


@dataclass(frozen=True)
class Bandit:
    """Features `[prompts, actions, d]`, true weights `[d]` and labelled pairs.

    The true reward is `features @ weights`, the reference policy is uniform and pi_theta is the
    softmax of `features @ theta`, so the optimum is theta = weights / beta. A pair (prompt, chosen,
    rejected) `[n, 3]` is labelled by the Bradley-Terry model and then flipped at a known rate.
    """

    features: Tensor
    weights: Tensor
    pairs: Tensor

    @classmethod
    def draw(cls, seed: int, pairs: int, flip_rate: float) -> "Bandit":
        """Features, weights and unflipped labels depend on the seed alone."""
        world = generator(seed, "bandit")
        features = torch.randn(PROMPTS, ACTIONS, FEATURES, generator=world, dtype=torch.float64)
        weights = 0.5 * torch.randn(FEATURES, generator=world, dtype=torch.float64)
        chance = torch.rand(
            5, pairs, generator=generator(seed, "pairs", pairs), dtype=torch.float64
        )
        prompt, first = (chance[0] * PROMPTS).long(), (chance[1] * ACTIONS).long()
        second = (first + 1 + (chance[2] * (ACTIONS - 1)).long()) % ACTIONS
        reward = features @ weights
        lost = chance[3] > torch.sigmoid(reward[prompt, first] - reward[prompt, second])
        swap = lost ^ (chance[4] < flip_rate)
        chosen, rejected = torch.where(swap, second, first), torch.where(swap, first, second)
        return cls(features, weights, torch.stack([prompt, chosen, rejected], dim=1))

    def fit(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """theta `[d]` at the least mean loss of the pairs' margins Delta, by L-BFGS from 0."""
        theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")
        prompt, chosen, rejected = self.pairs.unbind(1)
        reference = torch.full((len(prompt),), -math.log(ACTIONS), dtype=torch.float64)

        def closure() -> Tensor:
            optimiser.zero_grad()
            policy = (self.features @ theta).log_softmax(-1)
            likely = policy[prompt, chosen], policy[prompt, rejected]
            value = loss(margin(*likely, reference, reference)).mean()
            value.backward()
            return value

        optimiser.step(closure)
        return theta.detach()

    def lists(self, seed: int, count: int, size: int, noise: float) -> tuple[Tensor, ...]:
        """Prompts `[n]`, `size` different actions of each `[n, K]`, and their rewards with noise.

        The noise is normal with that standard deviation.
        """
        random = generator(seed, "lists", count)
        prompt = torch.randint(PROMPTS, (count,), generator=random)
        actions = torch.rand(count, ACTIONS, generator=random).argsort(1)
        errors = torch.randn(count, ACTIONS, generator=random, dtype=torch.float64)
        reward = (self.features @ self.weights)[prompt].gather(1, actions) + noise * errors
        return prompt, actions[:, :size], reward[:, :size]

    def reward_at(self, theta: Tensor, divergence: float) -> float:
        """Expected reward at this KL to the reference, reached by scaling theta alone."""
        low, high = 0.0, 100 / float(theta.norm())
        for _ in range(60):
            middle = (low + high) / 2
            too_far = self._moments(middle * theta)[1] > divergence
            low, high = (low, middle) if too_far else (middle, high)
        return self._moments(low * theta)[0]

    def gap(self, theta: Tensor) -> float:
        """J(pi*) - J(pi_theta), J = E[r] - beta KL(pi || pi_ref), the mean over prompts."""
        return self._objective(self.weights / BETA) - self._objective(theta)

    def _objective(self, theta: Tensor) -> float:
        reward, divergence = self._moments(theta)
        return reward - BETA * divergence

    def _moments(self, theta: Tensor) -> tuple[float, float]:
        """Expected reward and KL to the reference, means over prompts."""
        log_policy = (self.features @ theta).log_softmax(-1)
        policy, reward = log_policy.exp(), self.features @ self.weights
        divergence = (policy * (log_policy + math.log(ACTIONS))).sum(-1)
        return float((policy * reward).sum(-1).mean()), float(divergence.mean())

    def error(self, theta: Tensor) -> float:
        """Distance of the implicit reward's weights beta theta from the true ones."""
        return float((BETA * theta - self.weights).norm())
