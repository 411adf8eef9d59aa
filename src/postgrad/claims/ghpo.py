"""GHPO's claim: hints where every response fails make hard prompts learnable."""

from typing import Any

from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.worked_sums import (
    SAMPLES,
    STEPS,
    TESTED,
    TOKENS,
    started,
    trained,
)

METRIC = "accuracy on hard sums"
RATE = 3e-4
HINTS: dict[str, Any] = {"hint_unit": "lines", "hint_text": "{hint}", "learning_rate": RATE}
ARMS: dict[str, dict[str, Any]] = {
    "GHPO": HINTS,
    "GRPO": {**HINTS, "hint_ratios": []},
    "GRPO with twice the samples": {
        **HINTS,
        "hint_ratios": [],
        "rollout": {"samples": 2 * SAMPLES, "max_new_tokens": TOKENS},
    },
    "half of the solution as a hint for all": {
        **HINTS,
        "hint_ratios": [],
        "cold_start_steps": STEPS,
        "cold_start_ratio": 0.5,
    },
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy, steps, tested = started(seed, quick)
    return trained("ghpo", policy, seed, steps, tested, **ARMS[arm])


CLAIM = Claim(
    slug="ghpo",
    statement="Of prompts that the policy fails on throughout GHPO, which asks them again with a "
    "beginning of their solution, learns more than GRPO from the same prompts.",
    task="sums of digits with their workings: a small transformer that solves short sums and none "
    f"of the long ones; {STEPS} steps of 32 fresh sums, half of them long, with 8 samples; "
    f"accuracy of greedy answers to {TESTED} unseen long sums, without hints",
    metric=METRIC,
    higher_is_better=True,
    method="GHPO",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    notes="Learning rate 3e-4 for all arms, the same as in the claim of HPT; no other was "
    "compared. A hint is a number of whole lines of the workings, and the response goes on "
    "from there. GHPO samples failing prompts up to four times; the value called "
    "hint/responses counts what it samples a step, of which GRPO takes 256 or 512.",
    findings=(
        Finding("GHPO learns more than GRPO with twice the samples, which is what its hints cost "
                "at most", METRIC, "GHPO", "GRPO with twice the samples"),
        Finding("Hints that grow where they are needed do better than half of the solution for all",
                METRIC, "GHPO", "half of the solution as a hint for all"),
        Finding("Fewer groups are without a signal", "mean reward/degenerate_groups", "GHPO",
                "GRPO", higher_is_better=False),
        Finding("Easy sums suffer no more than under GRPO", "accuracy on easy sums", "GHPO",
                "GRPO"),
    ),
)  # fmt: skip
