"""CLPO's claim: problems that the policy rewrites for itself teach it to solve the originals."""

from typing import Any

from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.worked_sums import (
    PROMPT_TOKENS,
    REWRITE,
    SAMPLES,
    STEPS,
    TESTED,
    TOKENS,
    started,
    trained,
)

METRIC = "accuracy on letters sums"
RATE = 3e-4
CLPO: dict[str, Any] = {
    "learning_rate": RATE,
    "rewrite_hard": REWRITE,
    "rewrite_medium": REWRITE,
    "rewrite_tokens": PROMPT_TOKENS,
    "rollout": {"samples": SAMPLES, "max_new_tokens": TOKENS},
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLPO": ("clpo", CLPO),
    "CLPO without rewriting": ("clpo", {**CLPO, "rewrite": "none"}),
    "CLPO with the same KL for all": ("clpo", {**CLPO, "kl_scale_hard": 1.0}),
    "GRPO": (
        "grpo",
        {
            "learning_rate": RATE,
            "aggregation": "token-mean",
            "kl_coefficient": 0.001,
            "rollout": CLPO["rollout"],
        },
    ),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy, steps, tested = started(seed, quick, "letters")
    slug, settings = ARMS[arm]
    return trained(slug, policy, seed, steps, tested, letters=True, **settings)


CLAIM = Claim(
    slug="clpo",
    statement="With problems that the policy itself puts into words it understands better, and "
    "a weaker KL on hard ones, it learns to solve more of the originals than with GRPO.",
    task="short sums written in letters for digits: a small transformer that works out sums of "
    "digits, turns letters into digits when asked to, and solves few sums in letters; "
    f"{STEPS} steps of 32 fresh sums in letters with 8 samples; accuracy of greedy answers to "
    f"{TESTED} unseen sums in letters",
    metric=METRIC,
    higher_is_better=True,
    method="CLPO",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    notes="Learning rate 3e-4 for all arms, the same as in the claim of HPT; no other was "
    "compared. On seed 100, which is not reported, after a shorter warm-up, CLPO and GRPO "
    "both went from 0.06 to 0.8 within 15 steps: reward alone teaches this wording quickly. "
    "Three of five problems that failed throughout came back through a rewrite with a "
    "signal. A rewrite is always the same sum in digits, for medium problems too.",
    findings=(
        Finding("Rewriting helps beyond leaving out what has no signal", METRIC, "CLPO",
                "CLPO without rewriting"),
        Finding("A weaker KL on hard problems helps", METRIC, "CLPO",
                "CLPO with the same KL for all"),
    ),
)  # fmt: skip
