"""PRO's claim: ranking a list teaches more than imitating the best of it."""

from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import METRIC, TOKENS, rankings, reference_policy, trained
from postgrad.objectives.listwise import plackett_luce
from postgrad.seeding import generator

SIZE, STEPS = 5, 60
# method, settings, and lists (or pairs, or demonstrations) a step: 60 responses in every arm
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "PRO": ("pro", {"learning_rate": 3e-4}, 12),
    "PRO without temperature": ("pro", {"learning_rate": 3e-4, "temperature": False}, 12),
    "PRO without SFT": ("pro", {"learning_rate": 1e-4, "beta": 0.0}, 12),
    "SFT on the best": ("sft", {"learning_rate": 3e-4}, 60),
    "DPO, best and worst": ("dpo", {"learning_rate": 3e-5}, 30),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([5] if quick else []))
    slug, settings, batch_size = ARMS[arm]
    found = trained(
        slug,
        {"max_response_tokens": TOKENS, "batch_size": batch_size, **settings},
        policy,
        {"data": rankings(policy, seed, SIZE)},
        seed,
        steps=10 if quick else STEPS,
        samples=30 if quick else 600,
    )
    exact = {}
    if arm == "PRO without temperature":
        exact["tabular KL to the world's policy"] = tabular_divergence(seed)
    return Outcome(found.values | exact, found.curves)


def tabular_divergence(seed: int, actions: int = 5) -> float:
    """KL of PRO's optimum on infinite rankings to the policy of the world that drew them.

    Responses are of one token and drawn by Plackett-Luce; all orders, weighted by their
    probability, stand for infinite data. Without temperatures PRO is their likelihood.
    """
    world = torch.randn(actions, generator=generator(seed, "tabular"), dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(actions))))
    chance = (-plackett_luce(world[orders])).exp()
    logits = torch.zeros(actions, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = (chance * plackett_luce(logits.log_softmax(0)[orders])).sum()
        value.backward()
        return value

    optimiser.step(closure)
    policy, optimum = logits.detach().log_softmax(0), world.log_softmax(0)
    return float((policy.exp() * (policy - optimum)).sum())


CLAIM = Claim(
    slug="pro",
    statement="PRO reaches more reward within 1 nat of the initial policy than supervised "
    "fine-tuning on the best response of every list.",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; gold "
    "reward = approving words - disapproving words (8 words each, -3 to 3); 5 opinions drawn from "
    "the initial policy on each of 150 subjects, scored by gold reward plus noise of deviation 1; "
    "measured on 30 other subjects",
    metric=METRIC,
    higher_is_better=True,
    method="PRO",
    baseline="SFT on the best",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable: on lists of five PRO's ranking terms and SFT on the best response reach "
    "the same reward within 1 nat. Without its SFT term PRO is ahead of all on every seed at "
    "3 nats (1.53 to 1.77), so the SFT term, which the paper needs on long texts, costs here."
    " Learning rates and batch sizes give equal numbers of responses a step (PRO's 12 lists "
    "of 5, SFT's 60, DPO's 30 pairs) and were not tuned arm by arm beyond that. Fitted "
    "without temperatures to all rankings of a tabular world PRO is its policy.",
)
