"""rDPO's claim: on flipped labels it comes closer to the optimum than DPO, and DPO than cDPO."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.objectives.pairwise import ipo, logistic, margin, robust, smoothed
from postgrad.seeding import generator

PROMPTS, ACTIONS, FEATURES, PAIRS = 20, 10, 8, 4000
BETA = 1.0
FLIP_RATE = 0.3
FLIP_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
SIZES = (1000, 2000, 4000, 8000, 16000)
METRIC = "gap to the optimum"

Loss = Callable[[Tensor, float], Tensor]
# the loss of a margin Delta, given the rate of flips, which all but DPO and IPO are told
LOSSES: dict[str, Loss] = {
    "rDPO": lambda delta, flips: robust(BETA * delta, flips),
    "DPO": lambda delta, flips: logistic(BETA * delta),
    "cDPO": lambda delta, flips: smoothed(BETA * delta, flips),
    "IPO": lambda delta, flips: ipo(delta, BETA),
}


@dataclass(frozen=True)
class Bandit:
    """A log-linear bandit: features `[prompts, actions, d]`, true weights `[d]`, labelled pairs.

    The true reward is `features @ weights`, the reference policy is uniform, and pi_theta is the
    softmax of `features @ theta`; `beta theta = weights` is the optimum. A pair (prompt, first,
    second) `[n, 3]` is labelled by the Bradley-Terry model, then flipped with a known rate.
    """

    features: Tensor
    weights: Tensor
    pairs: Tensor

    @classmethod
    def draw(cls, seed: int, pairs: int, flip_rate: float) -> "Bandit":
        """The same features and weights for a seed; more pairs begin with those of fewer."""
        world = generator(seed, "bandit")
        features = torch.randn(PROMPTS, ACTIONS, FEATURES, generator=world, dtype=torch.float64)
        weights = 0.5 * torch.randn(FEATURES, generator=world, dtype=torch.float64)
        chance = generator(seed, "pairs")
        drawn = torch.rand(pairs, 5, generator=chance, dtype=torch.float64)
        prompt = (drawn[:, 0] * PROMPTS).long()
        first = (drawn[:, 1] * ACTIONS).long()
        second = (first + 1 + (drawn[:, 2] * (ACTIONS - 1)).long()) % ACTIONS
        reward = features @ weights
        lost = drawn[:, 3] > torch.sigmoid(reward[prompt, first] - reward[prompt, second])
        reverse = lost ^ (drawn[:, 4] < flip_rate)
        won, other = torch.where(reverse, second, first), torch.where(reverse, first, second)
        return cls(features, weights, torch.stack([prompt, won, other], dim=1))

    def fit(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """theta `[d]` that minimises the mean loss of the pairs' margins, by L-BFGS from 0."""
        theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")
        prompt, won, lost = self.pairs.unbind(1)
        reference = torch.full((len(prompt),), -torch.tensor(float(ACTIONS)).log().item()).double()

        def closure() -> Tensor:
            optimiser.zero_grad()
            policy = (self.features @ theta).log_softmax(-1)
            delta = margin(policy[prompt, won], policy[prompt, lost], reference, reference)
            value = loss(delta).mean()
            value.backward()
            return value

        optimiser.step(closure)
        return theta.detach()

    def gap(self, theta: Tensor) -> float:
        """J(pi*) - J(pi_theta), J = E[r] - beta KL(pi || pi_ref), over prompts in equal shares."""
        return self._objective(self.weights / BETA) - self._objective(theta)

    def _objective(self, theta: Tensor) -> float:
        log_policy = (self.features @ theta).log_softmax(-1)
        policy, reward = log_policy.exp(), self.features @ self.weights
        divergence = (policy * (log_policy + torch.tensor(float(ACTIONS)).log())).sum(-1)
        return float(((policy * reward).sum(-1) - BETA * divergence).mean())

    def error(self, theta: Tensor) -> float:
        """Distance of the implicit reward's weights from the true ones."""
        return float((BETA * theta - self.weights).norm())
