"""GRPO's claim: the group's mean as baseline learns more than online rejection fine-tuning."""

from typing import Any

from postgrad.claims.addition_training import task, trained_on_sums
from postgrad.claims.base import Claim, Outcome

METRIC = "accuracy"

# learning rates: see the notes
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": {"learning_rate": 3e-4},
    "Dr. GRPO": {
        "learning_rate": 3e-4,
        "advantage": "centred",
        "aggregation": "sequence-sum-constant",
    },
    "online rejection fine-tuning": {"learning_rate": 3e-4, "advantage": "reward"},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    training = trained_on_sums({"slug": "grpo", **ARMS[arm]}, seed, quick)
    values = {
        METRIC: training.accuracy[-1][1],
        "accuracy before": training.accuracy[0][1],
        "entropy at the end": training.late("response/entropy"),
        "degenerate groups at the end": training.late("reward/degenerate_groups"),
    }
    curves = {
        METRIC: training.accuracy,
        "training reward": training.curve("reward"),
        "entropy": training.curve("response/entropy"),
        "degenerate groups": training.curve("reward/degenerate_groups"),
    }
    return Outcome(values, curves)


CLAIM = Claim(
    slug="grpo",
    statement="From the same number of samples GRPO learns more than online rejection fine-tuning, "
    "which raises every correct response by the same weight and lowers none.",
    task=task(),
    metric=METRIC,
    higher_is_better=True,
    method="GRPO",
    baseline="online rejection fine-tuning",
    arms=tuple(ARMS),
    run=run,
    notes="Learning rates 1e-4, 3e-4 and 1e-3 were tried for every arm on seed 100, the first two "
    "again on seed 101, with other sums than those reported; 3e-4 was best for all. There the "
    "paper's KL coefficient of 0.04 changed GRPO little (0.67 instead of 0.68), and 300 steps "
    "widened the gap in favour of rejection fine-tuning (0.86 to 0.75). The reason: with rewards "
    "of 0 and 1 and responses of one length, rejection fine-tuning and Dr. GRPO have the same "
    "expected gradient and differ in its variance alone. After the warm-up the squared score of a "
    "wrong response is 9 times that of a right one (265 to 28, seed 101), so the baseline of least "
    "variance, E[r s^2] / E[s^2], is 0.07: nearer to none than to the mean reward of 0.4. The "
    "paper compares the two under the graded rewards of a reward model.",
)
