"""DPO's claim: more reward for the same KL than fine-tuning on the preferred responses."""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    METRIC,
    TOKENS,
    best_of_four,
    preferences,
    reference_policy,
    trained,
)
from postgrad.objectives.pairwise import logistic, margin
from postgrad.seeding import generator

STEPS = 100
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("dpo", {"learning_rate": 3e-5}),
    "cDPO": ("dpo", {"learning_rate": 3e-5, "label_smoothing": 0.1}),
    "Preferred-FT": ("sft", {"learning_rate": 3e-4}),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([5] if quick else []))
    rows = preferences(policy, seed)
    slug, settings = ARMS[arm]
    exact = {}
    if arm == "DPO":
        exact = {
            "reward of the best of four by gold reward": best_of_four(policy, seed),
            "tabular KL to the optimum": tabular_divergence(seed),
        }
    outcome = trained(
        slug,
        {"max_response_tokens": TOKENS, **settings},
        policy,
        {"data": rows},
        seed,
        steps=10 if quick else STEPS,
        samples=30 if quick else 600,
    )
    return Outcome({**outcome.values, **exact}, outcome.curves)


def tabular_divergence(seed: int, beta: float = 0.5, actions: int = 6) -> float:
    """KL of DPO's optimum on infinite data to pi_ref exp(r / beta) / Z, for one prompt.

    All ordered pairs, weighted by their Bradley-Terry probability, stand for infinite data.
    """
    random = generator(seed, "tabular")
    reward, reference = torch.randn(2, actions, generator=random, dtype=torch.float64)
    reference = reference.log_softmax(0)
    first, second = torch.cartesian_prod(torch.arange(actions), torch.arange(actions)).unbind(1)
    wins = torch.sigmoid(reward[first] - reward[second])
    logits = torch.zeros(actions, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimiser.zero_grad()
        policy = logits.log_softmax(0)
        delta = margin(policy[first], policy[second], reference[first], reference[second])
        value = (wins * logistic(beta * delta)).mean()
        value.backward()
        return value

    optimiser.step(closure)
    policy = logits.detach().log_softmax(0)
    optimum = (reference + reward / beta).log_softmax(0)
    return float((policy.exp() * (policy - optimum)).sum())


CLAIM = Claim(
    slug="dpo",
    statement="For the same divergence from the reference policy DPO reaches more reward than "
    "supervised fine-tuning on the preferred responses (Preferred-FT).",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; gold "
    "reward = approving words - disapproving words (8 words each, -3 to 3); 300 pairs drawn from "
    "the reference on 150 subjects, Bradley-Terry labels; measured on 30 other subjects",
    metric=METRIC,
    higher_is_better=True,
    method="DPO",
    baseline="Preferred-FT",
    arms=tuple(ARMS),
    run=run,
    notes="All arms see the same pairs (Preferred-FT their chosen half) in 100 steps of 32. "
    "Learning rates 3e-5, 1e-4 and 3e-4 were tried for DPO and Preferred-FT and the first two for "
    "cDPO (label smoothing 0.1), all on seed 100, which is not reported. Every tenth step is "
    "measured; the step that counts is chosen on 20 validation subjects. Reward and KL are means "
    "of 600 samples; with 200 to choose by, noise left the arms not separable at 3 seeds and at 5 "
    "(0.90 to 0.58). "
    "Preferred-FT stays at the quality of the chosen responses, whatever KL it is allowed.",
)
