"""A hundred actions, of which the reference policy rarely takes some, and rewards that it covers or
does not: the bandit of arXiv 2404.14367 (official code, Asap7772/understanding-rlhf).

The reference's actions are a Cauchy variable of location -0.7 and scale 0.4, squashed by tanh into
100 bins. Reward R1 peaks at action 70, where the reference has little mass, R2 at 20, where it has
much. A policy is a table of logits, or a network on contexts that the reward does not depend on.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from postgrad.advantages.moments import RunningMoments
from postgrad.advantages.pairing import reward_pairs
from postgrad.advantages.sample_weights import (
    best_of_n_weights,
    exponential_weights,
    without_negatives,
)
from postgrad.objectives.divergence import weighted_reinforce
from postgrad.objectives.pairwise import PairLoss, margin
from postgrad.objectives.policy_gradient import clipped_surrogate
from postgrad.seeding import generator

ACTIONS, CONTEXT = 100, 100
PEAKS = {"R1": 70, "R2": 20}


def data_policy(seed: int) -> Tensor:
    """Probabilities `[100]`: shares of the bins among 10 000 draws."""
    uniform = torch.rand(10_000, generator=generator(seed, "data policy"), dtype=torch.float64)
    squashed = torch.tanh(-0.7 + 0.4 * torch.tan(math.pi * (uniform - 0.5)))
    bins = ((squashed + 1) / 2 * ACTIONS).long().clamp(max=ACTIONS - 1)
    return torch.bincount(bins, minlength=ACTIONS).double() / len(bins)


def peaked_reward(peak: float, width: float = 10.0) -> Tensor:
    """exp(-((a - peak)/width)^2) of every action, `[100]`."""
    actions = torch.arange(ACTIONS, dtype=torch.float64)
    return torch.exp(-((actions - peak) / width).square())


# Policies ------------------------------------------------------------------------------------


class Table(nn.Module):
    """The same distribution in every context."""

    def __init__(self, probabilities: Tensor):
        super().__init__()
        self.logits = nn.Parameter(probabilities.log())

    def forward(self, contexts: Tensor) -> Tensor:
        """Log-probabilities `[P, 100]`."""
        return self.logits.log_softmax(-1).expand(len(contexts), -1)


class Network(nn.Module):
    """A network of two hidden layers on contexts `[P, 100]`."""

    def __init__(self, seed: int, hidden: int = 64):
        super().__init__()
        sizes = [CONTEXT, hidden, hidden, ACTIONS]
        random = generator(seed, "network")
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)
        )
        for parameter in self.parameters():
            bound = CONTEXT**-0.5 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=random)

    def forward(self, contexts: Tensor) -> Tensor:
        """Log-probabilities `[P, 100]`."""
        for layer in self.layers[:-1]:
            contexts = torch.relu(layer(contexts))
        logits: Tensor = self.layers[-1](contexts)
        return logits.log_softmax(-1)


def draw_contexts(count: int, seed: int, *stream: object) -> Tensor:
    """Contexts `[count, 100]`, uniform in the unit cube."""
    random = generator(seed, "contexts", *stream)
    return torch.rand(count, CONTEXT, generator=random, dtype=torch.float64)


def fitted_network(seed: int, target: Tensor, steps: int = 500) -> Network:
    """A network that was fine-tuned on the data policy: the reference of what learns from there."""
    network = Network(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        loss = -(network(draw_contexts(64, seed, "fit", step)) @ target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


# Losses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """N actions in each of P contexts: rewards, and log-probabilities that stay fixed, `[P, N]`."""

    rewards: Tensor
    reference: Tensor
    sampler: Tensor


Objective = Callable[[Tensor], Tensor]  # of the policy's log-probabilities [P, N], a number
Loss = Callable[[Drawn], Objective]  # may remember earlier rounds


def weighted(weights: Tensor) -> Objective:
    """-sum w log pi(a), the mean over contexts."""
    return lambda logprobs: (
        weighted_reinforce(logprobs.flatten(), weights.flatten()).sum() / len(weights)
    )


def preferred_fine_tuning(drawn: Drawn) -> Objective:
    """Fine-tuning on the better action of every pair."""
    wins = (drawn.rewards.unsqueeze(2) > drawn.rewards.unsqueeze(1)).sum(2)
    return weighted(wins / drawn.rewards.shape[1])


def best_of_n(against_worst: float = 0.0) -> Loss:
    return lambda drawn: weighted(best_of_n_weights(drawn.rewards, against_worst))


def reward_weighted(beta: float) -> Loss:
    return lambda drawn: weighted(exponential_weights(drawn.rewards, beta))


class Reinforce:
    """REINFORCE with rewards standardised by the moments of all that were seen; with a clip, PPO.

    Without `negatives` the least advantage is subtracted from all, so that nothing is pushed down.
    """

    def __init__(self, *, negatives: bool = True, clip: float | None = None):
        self._moments = RunningMoments(1)
        self._negatives = negatives
        self._clip = clip

    def __call__(self, drawn: Drawn) -> Objective:
        self._moments.update(drawn.rewards.reshape(-1, 1))
        spread = (self._moments.variance + 1e-8).sqrt()
        advantages = (drawn.rewards - self._moments.mean) / spread
        if not self._negatives:
            advantages = without_negatives(advantages)
        if self._clip is None:
            return weighted(advantages / advantages.shape[1])
        clip = self._clip

        def surrogate(logprobs: Tensor) -> Tensor:
            ratio = (logprobs - drawn.sampler).exp()
            return clipped_surrogate(ratio, advantages, clip, clip).mean()

        return surrogate


def pairwise(loss: PairLoss) -> Loss:
    """A loss of the margin of all pairs of a context whose rewards differ."""

    def prepared(drawn: Drawn) -> Objective:
        prompt, won, lost = reward_pairs(drawn.rewards)
        reference = drawn.reference

        def objective(logprobs: Tensor) -> Tensor:
            delta = margin(
                logprobs[prompt, won],
                logprobs[prompt, lost],
                reference[prompt, won],
                reference[prompt, lost],
            )
            return loss(delta).sum() / max(1, len(prompt))

        return objective

    return prepared


# Learning ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Rounds of `prompts` times `samples` actions, from each of which `steps` steps learn.

    Online, the policy itself draws a round's actions; offline, the reference does.
    """

    online: bool = True
    rounds: int = 30
    prompts: int = 10
    samples: int = 10
    steps: int = 10
    learning_rate: float = 0.03

    def __post_init__(self) -> None:
        if min(self.rounds, self.prompts, self.steps) < 1 or self.samples < 2:
            raise ValueError(
                f"expected at least 1 round, prompt and step and 2 samples, got {self}"
            )

    def in_rounds(self, rounds: int) -> "Budget":
        """The same samples and steps in other rounds, which have to divide both."""
        prompts, steps = self.rounds * self.prompts, self.rounds * self.steps
        if prompts % rounds or steps % rounds:
            raise ValueError(f"{prompts} prompts and {steps} steps do not make {rounds} rounds")
        return replace(self, rounds=rounds, prompts=prompts // rounds, steps=steps // rounds)

    def offline(self) -> "Budget":
        """All samples at once, by the reference."""
        return replace(self.in_rounds(1), online=False)


@dataclass(frozen=True)
class Point:
    """After so many steps: expected reward and KL to the reference, exact but for the contexts."""

    step: int
    reward: float
    divergence: float


def learn(
    policy: nn.Module,
    contexts: Tensor,
    reward: Tensor,
    loss: Loss,
    budget: Budget,
    seed: int,
    held_out: Tensor | None = None,
    every: int = 10,
) -> list[Point]:
    """Train `policy`, which is its own reference at the start, by Adam; measured as it goes.

    Each round draws its contexts out of `contexts`; measured is on `held_out`, or the same ones.
    """
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.Adam(policy.parameters(), lr=budget.learning_rate)
    random = generator(seed, "actions")
    held_out = contexts if held_out is None else held_out
    points = [_measured(0, policy, reference, held_out, reward)]
    for number in range(budget.rounds):
        chosen = torch.randint(len(contexts), (budget.prompts,), generator=random)
        at = contexts[chosen]
        with torch.no_grad():
            known = reference(at)
            sampler = policy(at) if budget.online else known
            actions = torch.multinomial(sampler.exp(), budget.samples, True, generator=random)
        objective = loss(
            Drawn(reward[actions], known.gather(1, actions), sampler.gather(1, actions))
        )
        for inner in range(budget.steps):
            optimiser.zero_grad()
            objective(policy(at).gather(1, actions)).backward()
            optimiser.step()
            step = number * budget.steps + inner + 1
            if step % every == 0:
                points.append(_measured(step, policy, reference, held_out, reward))
    return points


@torch.no_grad()
def _measured(
    step: int, policy: nn.Module, reference: nn.Module, contexts: Tensor, reward: Tensor
) -> Point:
    log_policy, log_reference = policy(contexts), reference(contexts)
    expected = (log_policy.exp() @ reward).mean()
    divergence = (log_policy.exp() * (log_policy - log_reference)).sum(-1).mean()
    return Point(step, float(expected), float(divergence))
