"""MaxMin-RLHF's claim: the worst-off group gets more than from one reward model for everybody."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.maxmin import GroupWeights, MaxMinForm, maxmin_reward
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    APPROVING,
    DISAPPROVING,
    NEUTRAL,
    TOKENS,
    gold,
    log_ratios,
    reference_policy,
    sample,
    subjects,
)
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.mixture import em_reward_mixture
from postgrad.seeding import generator

ACTIONS, FEATURES, WORLDS = 20, 5, 20
USERS, PAIRS = 44, 20  # users of a bandit, pairs of a user
OPPOSED = -0.6  # correlation of the two groups' utilities
SHARPNESS = 2.0  # of the labels: P(a over b) = sigma(SHARPNESS (u(a) - u(b)))
TEMPERATURE = 0.1  # of the policies on the bandit
SHARES = (2, 4, 11, 22)  # users in the minority
METRIC = "worst-off group's utility on bandits"

# what the policies on the bandit are for: the groups, and the form of the reward
BANDITS: dict[str, tuple[str, MaxMinForm]] = {
    "MaxMin": ("learnt", "weights"),
    "one reward model": ("one", "group"),
    "mean of the groups": ("learnt", "weights"),
    "least of each sample": ("learnt", "sample"),
    "groups known": ("known", "weights"),
}
# and on a language model
ROUNDS, EM_STEPS, STEPS = 5, 30, 40
METHODS: dict[str, dict[str, Any]] = {
    "MaxMin": {"maxmin": "weights", "weights_rate": 0.3},
    "one reward model": {"em": {"groups": 1}},
    "mean of the groups": {"maxmin": "weights", "weights_rate": 1e-9},
    "least of each sample": {"maxmin": "sample"},
}
MINORITY, ANNOTATORS, ANNOTATED = 4, 20, 40  # users in the minority, users, pairs of each


def run(arm: str, seed: int, quick: bool) -> Outcome:
    exact = on_bandits(arm, seed, 2 if quick else WORLDS)
    if arm not in METHODS:
        return exact
    found = on_opinions(arm, seed, quick)
    return Outcome(
        exact.values | {f"opinions: {name}": value for name, value in found.values.items()},
        exact.curves | {f"opinions: {name}": curve for name, curve in found.curves.items()},
    )


# Bandits -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bandit:
    """Two groups of users with linear utilities, and pairs of actions that the users labelled.

    Attributes:
        features: `[20, d]` of the actions.
        utilities: `[2, 20]` of majority and minority, with mean 0 and deviation 1.
        differences: `[N, d]` features of a pair's preferred action less those of the other.
        users: `[N]` who labelled it.
        groups: `[H]` each user's true group.
    """

    features: Tensor
    utilities: Tensor
    differences: Tensor
    users: Tensor
    groups: Tensor

    @classmethod
    def draw(cls, minority: int, *stream: Any) -> "Bandit":
        random = generator(0, "maxmin", *stream)
        features = torch.randn(ACTIONS, FEATURES, generator=random, dtype=torch.float64)
        first, other = torch.randn(2, FEATURES, generator=random, dtype=torch.float64)
        second = OPPOSED * first + (1 - OPPOSED**2) ** 0.5 * other
        utilities = standardised(torch.stack([first, second]) @ features.T)
        groups = torch.zeros(USERS, dtype=torch.long)
        groups[torch.randperm(USERS, generator=random)[:minority]] = 1
        users = torch.arange(USERS).repeat_interleave(PAIRS)
        one = torch.randint(ACTIONS, users.shape, generator=random)
        two = (one + torch.randint(1, ACTIONS, users.shape, generator=random)) % ACTIONS
        own = utilities[groups[users]]
        gaps = (own.gather(1, one[:, None]) - own.gather(1, two[:, None])).squeeze(1)
        chance = torch.rand(gaps.shape, generator=random, dtype=torch.float64)
        signs = torch.where(chance < (SHARPNESS * gaps).sigmoid(), 1.0, -1.0)
        differences = signs[:, None] * (features[one] - features[two])
        return cls(features, utilities, differences, users, groups)

    def fit(self, mine: Tensor, start: Tensor | None) -> Tensor:
        """A linear Bradley-Terry reward `[d]` of some pairs, by Newton's method."""
        rows = self.differences[mine]
        theta = torch.zeros(FEATURES, dtype=torch.float64) if start is None else start
        decay = 0.1 * torch.eye(FEATURES, dtype=torch.float64)
        for _ in range(8):
            wrong = torch.sigmoid(-(rows @ theta))
            gradient = rows.T @ wrong - decay @ theta
            curvature = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + decay
            theta = theta + torch.linalg.solve(curvature, gradient)
        return theta

    def rewards(self, kind: str, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rewards `[U, 20]` that are learnt, standardised, and the users' groups by them `[H]`."""
        if kind == "known":
            models = [self.fit((self.groups == group)[self.users], None) for group in range(2)]
            assignment = self.groups
        else:
            found = em_reward_mixture(
                self.fit,
                lambda theta: self.differences @ theta,
                self.users,
                1 if kind == "one" else 2,
                restarts=5,
                generator=random,
            )
            models, assignment = found.models, found.assignment
        return standardised(torch.stack(models) @ self.features.T), assignment


def standardised(rewards: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the actions, which the reference draws evenly."""
    deviation, mean = torch.std_mean(rewards, -1, correction=0, keepdim=True)
    return (rewards - mean) / deviation


def policy_for(reward: Tensor) -> Tensor:
    """The optimum `[20]` of a reward with a KL to the even reference."""
    return torch.softmax(reward / TEMPERATURE, 0)


def saddle_weights(rewards: Tensor, steps: int = 500) -> Tensor:
    """lambda `[U]` at which no group is worse off than the others, if it has weight."""
    weights = GroupWeights(len(rewards), 0.03)
    for _ in range(steps):
        weights.update(rewards @ policy_for(maxmin_reward(rewards, "weights", weights.value)))
    return weights.value


def served(arm: str, minority: int, *stream: Any) -> tuple[float, float, float]:
    """True utilities of majority and minority, and the share of users in their right group."""
    kind, form = BANDITS[arm]
    world = Bandit.draw(minority, *stream)
    rewards, assignment = world.rewards(kind, generator(0, "restarts", *stream))
    weights = None
    if form == "weights":
        even = torch.full((len(rewards),), 1 / len(rewards), dtype=torch.float64)
        weights = even if arm == "mean of the groups" else saddle_weights(rewards)
    utilities = world.utilities @ policy_for(maxmin_reward(rewards, form, weights))
    right = float((assignment == world.groups).double().mean())
    return float(utilities[0]), float(utilities[1]), max(right, 1 - right)


def on_bandits(arm: str, seed: int, worlds: int) -> Outcome:
    """The deciding numbers: true utilities under policies that are exact optima."""

    def mean(minority: int, measure: Callable[[tuple[float, ...]], float], count: int) -> float:
        found = [served(arm, minority, seed, minority, world) for world in range(count)]
        return sum(map(measure, found)) / count

    every = [served(arm, MINORITY, seed, MINORITY, world) for world in range(worlds)]
    majority, minority, right = (sum(column) / worlds for column in zip(*every, strict=True))
    values = {
        METRIC: sum(min(one[:2]) for one in every) / worlds,
        "majority's utility on bandits": majority,
        "minority's utility on bandits": minority,
    }
    if BANDITS[arm][0] == "learnt":
        values["users in their group on bandits"] = right
    curve = [
        (count / USERS, mean(count, lambda one: min(one[:2]), max(1, worlds // 4)))
        for count in SHARES
    ]
    return Outcome(values, {"worst-off group's utility over the minority's share": curve})


# Opinions ------------------------------------------------------------------------------------


def plain(text: str) -> float:
    """Neutral words minus words that judge: what the minority likes."""
    words = re.findall("[a-z]+", text)
    judging = APPROVING + DISAPPROVING
    return float(sum((w in NEUTRAL) - (w in judging) for w in words))


LIKINGS = (gold, plain)  # of majority and minority


def annotated(policy: LanguagePolicy, seed: int) -> list[dict[str, str]]:
    """Pairs of different opinions with the user who labelled them, by Bradley-Terry.

    The users take turns; which of them are the minority is drawn.
    """
    prompts = subjects()["training"]
    count = -(-2 * ANNOTATORS * ANNOTATED // len(prompts))
    texts = sample(policy, prompts, count + count % 2, "annotated", seed).texts
    random = generator(seed, "annotators")
    minority = set(torch.randperm(ANNOTATORS, generator=random)[:MINORITY].tolist())
    each = len(texts) // len(prompts)
    rows = []
    for i in range(0, len(texts), 2):
        user, first, second = (i // 2) % ANNOTATORS, texts[i], texts[i + 1]
        liking = LIKINGS[user in minority]
        gap = torch.tensor(liking(first) - liking(second))
        if float(torch.rand((), generator=random)) >= float(gap.sigmoid()):
            first, second = second, first
        if first != second and first.strip() and second.strip():
            row = {"prompt": prompts[i // each], "chosen": first, "rejected": second}
            rows.append({**row, "user": str(user)})
    return rows


def likings(texts: list[str]) -> Tensor:
    """`[2, N]`: what majority and minority think of texts."""
    return torch.tensor([[liking(text) for text in texts] for liking in LIKINGS])


def on_opinions(arm: str, seed: int, quick: bool) -> Outcome:
    """What both groups think of the policy's opinions, in deviations from the reference's."""
    policy = reference_policy(seed, *([5] if quick else []))
    policy.freeze_reference()
    rounds, em_steps, steps = (1, 2, 2) if quick else (ROUNDS, EM_STEPS, STEPS)
    test, count = subjects()["test"], 2 if quick else 20
    before = likings(sample(policy, test, count, "before", seed).texts)
    deviation, mean = torch.std_mean(before, 1)
    own = METHODS[arm]
    settings = {
        **own,
        "em": {
            "rounds": rounds,
            "steps": em_steps,
            "batch_size": 32,
            "rate": 1.0,
            **own.get("em", {}),
        },
        "steps": rounds * em_steps + steps,
        "batch_size": 64,
        "rollout": {"samples": 1, "max_new_tokens": TOKENS},
        "learning_rate": 1e-3,
        "critic_rate": 1.0,
        "kl_coefficient": 0.02,
    }
    curve = []
    rows = annotated(policy, seed)
    training = train_in_steps("maxmin-rlhf", seed, {"model": policy, "data": rows}, **settings)
    for step, _ in training:
        done = step - rounds * em_steps
        if done >= 0 and (done % 10 == 0 or done == steps):
            drawn = sample(policy, test, count, "test", seed, step)
            gained = ((likings(drawn.texts).mean(1) - mean) / deviation).tolist()
            ratio = log_ratios(policy, drawn.prompts, drawn.responses).mean()
            curve.append((float(done), *gained, float(ratio)))
    _, majority, minority, divergence = curve[-1]
    values = {
        "worst-off group": min(majority, minority),
        "majority": majority,
        "minority": minority,
        "KL": divergence,
    }
    return Outcome(
        values,
        {
            "majority": [(step, one) for step, one, _, _ in curve],
            "minority": [(step, one) for step, _, one, _ in curve],
        },
    )


CLAIM = Claim(
    slug="maxmin-rlhf",
    statement="Where a minority's utility opposes the majority's, rewards of two groups learnt "
    "from users' pairs and a policy for whoever is worst off leave the worst-off group with more "
    "than one reward model for everybody does.",
    task="bandits of 20 actions: two linear utilities (correlation -0.6, mean 0 and deviation 1 "
    "over actions), 40 users of the majority and 4 of the minority with 20 Bradley-Terry pairs "
    "each; linear reward models, hard EM over users with 5 starts; policies softmax(R / 0.1); mean "
    "of 20 bandits a seed",
    metric=METRIC,
    higher_is_better=True,
    method="MaxMin",
    baseline="one reward model",
    arms=tuple(BANDITS),
    run=run,
    notes="",
)
