"""HPT's claim: imitation where the policy fails and reward elsewhere beat either alone."""

from typing import Any

from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.worked_sums import STEPS, TESTED, trained, untrained, warmed_up

METRIC = "accuracy"
RATE = 3e-4
DR_GRPO: dict[str, Any] = {"gate": -1, "learning_rate": RATE}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "HPT": ("hpt", {"learning_rate": RATE}),
    "Dr. GRPO": ("hpt", DR_GRPO),
    "SFT": ("sft", {"learning_rate": RATE}),
    "SFT, then Dr. GRPO": ("hpt", DR_GRPO),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    steps, tested = (4, 50) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed)
    slug, settings = ARMS[arm]
    first = 0
    if arm == "SFT, then Dr. GRPO":
        first = steps // 2
        trained("sft", policy, seed, first, tested // 5, learning_rate=RATE)
    return trained(slug, policy, seed, steps - first, tested, first=first, **settings)


CLAIM = Claim(
    slug="hpt",
    statement="On prompts with a verifier and demonstrations HPT, which imitates where every "
    "rollout fails and follows the reward elsewhere, ends better than reinforcement alone.",
    task="sums of digits with their workings: a small transformer that solves short sums and none "
    f"of the long ones; {STEPS} steps of 32 fresh sums, half of them long, with 8 samples or one "
    f"demonstration; mean of the accuracies on {TESTED} unseen long and {TESTED} short sums",
    metric=METRIC,
    higher_is_better=True,
    method="HPT",
    baseline="Dr. GRPO",
    arms=tuple(ARMS),
    run=run,
    notes="Learning rate 3e-4 for all arms. On seed 100, which is not reported, 1e-3 was tried "
    "for HPT alone and cost it more of the short sums; no other rate was compared. Dr. GRPO "
    "is HPT with a gate of -1, so without clip; supervised fine-tuning sees one "
    "demonstration a prompt. Here the policy can come upon the answer of a long sum by "
    "chance, so reinforcement is not without any signal.",
    findings=(
        Finding("HPT ends better than supervised fine-tuning on the demonstrations of all prompts",
                METRIC, "HPT", "SFT"),
        Finding("HPT ends better than supervised fine-tuning and then reinforcement", METRIC,
                "HPT", "SFT, then Dr. GRPO"),
        Finding("HPT solves more of the sums that are too hard at the start than reinforcement",
                "accuracy on hard sums", "HPT", "Dr. GRPO"),
    ),
)  # fmt: skip
