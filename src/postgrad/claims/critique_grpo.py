"""Critique-GRPO's claim: what is learnt from refinements is not learnt from rewards alone."""

from typing import Any

from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.worked_sums import (
    REFINEMENT,
    SAMPLES,
    STEPS,
    TESTED,
    TOKENS,
    started,
    trained,
)

METRIC = "accuracy on hard sums"
RATE = 3e-4
PLAIN: dict[str, Any] = {
    "learning_rate": RATE,
    "mask": "none",
    "advantage": "centred",
    "aggregation": "sequence-sum-constant",
    "entropy_coefficient": 0.001,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Critique-GRPO": ("critique-grpo", {"learning_rate": RATE, "refinement_text": REFINEMENT}),
    "GRPO": ("policy-gradient", PLAIN),
    "GRPO with twice the samples": (
        "policy-gradient",
        {**PLAIN, "rollout": {"samples": 2 * SAMPLES, "max_new_tokens": TOKENS}},
    ),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy, steps, tested = started(seed, quick, "refinement")
    slug, settings = ARMS[arm]
    return trained(slug, policy, seed, steps, tested, **settings)


CLAIM = Claim(
    slug="critique-grpo",
    statement="With refinements of wrong responses, written after a critique and learnt without "
    "it, the policy solves more of what it failed on throughout than with GRPO at the same number "
    "of samples.",
    task="sums of digits with their workings: a small transformer that solves short sums, none of "
    "the long ones, and has learnt to mend workings when it is told the answer; "
    f"{STEPS} steps of 32 fresh sums, half of them long, with 8 samples and 8 refinements, or 16 "
    f"samples; accuracy of greedy answers to {TESTED} unseen long sums, without critiques",
    metric=METRIC,
    higher_is_better=True,
    method="Critique-GRPO",
    baseline="GRPO with twice the samples",
    arms=tuple(ARMS),
    run=run,
    notes="Learning rate 3e-4 for all arms, the same as in the claim of HPT; no other was "
    "compared. The critique names the answer, as simple-gt does, in the few words of this "
    "world. Nearly all refinements that are kept are right (0.98 on seed 100), since the "
    "policy has learnt in advance to mend workings of long sums. GRPO is without clip and "
    "with the mean as baseline, as responses are in Critique-GRPO; it differs in the "
    "refinements alone.",
    findings=(
        Finding("It solves more than GRPO with as many samples in its loss", METRIC,
                "Critique-GRPO", "GRPO"),
        Finding("Easy sums suffer no more than under GRPO", "accuracy on easy sums",
                "Critique-GRPO", "GRPO"),
    ),
)  # fmt: skip
