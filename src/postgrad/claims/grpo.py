"""GRPO's claim: the group's mean as baseline learns more than online rejection fine-tuning."""

from typing import Any

from postgrad.claims.addition_warm_up import TOKENS, greedy_accuracy, untrained, warmed_up
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.tasks.addition import Addition

STEPS, PROMPTS, SAMPLES = 120, 32, 8
EVALUATE_EVERY, EVALUATED, TESTED = 20, 300, 2000
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
    steps, tested = (4, 100) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed)
    return trained(ARMS[arm], policy, seed, steps, tested)


def trained(
    settings: dict[str, Any], policy: LanguagePolicy, seed: int, steps: int, tested: int
) -> Outcome:
    """Train on fresh sums, a third of each difficulty; test greedy answers to unseen hard ones."""
    test = Addition("grpo claim").draw(tested, digits=3)
    start = greedy_accuracy(policy, test)
    training = train_in_steps(
        "grpo",
        seed,
        {
            "model": policy,
            "data": Addition(f"claim {seed}", weights=[1, 1, 1]).draw(PROMPTS * steps),
            "reward": "addition",
        },
        steps=steps,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": TOKENS},
        **settings,
    )
    curves: dict[str, list[tuple[float, float]]] = {
        METRIC: [(0, start)],
        "training reward": [],
        "entropy": [],
        "degenerate groups": [],
    }
    for step, metrics in training:
        curves["training reward"].append((step, metrics["reward"]))
        curves["entropy"].append((step, metrics["response/entropy"]))
        curves["degenerate groups"].append((step, metrics["reward/degenerate_groups"]))
        if step % EVALUATE_EVERY == 0 and step < steps:
            curves[METRIC].append((step, greedy_accuracy(policy, test[:EVALUATED])))
    end = greedy_accuracy(policy, test)
    curves[METRIC].append((steps, end))
    last = slice(-max(1, steps // 10), None)

    def recent(name: str) -> float:
        values = [value for _, value in curves[name][last]]
        return sum(values) / len(values)

    values = {
        METRIC: end,
        "accuracy before": start,
        "entropy at the end": recent("entropy"),
        "degenerate groups at the end": recent("degenerate groups"),
    }
    thinned = {name: c if name == METRIC else c[::5] for name, c in curves.items()}
    return Outcome(values, thinned)


CLAIM = Claim(
    slug="grpo",
    statement="From the same number of samples GRPO learns more than online rejection fine-tuning, "
    "which raises every correct response by the same weight and lowers none.",
    task="addition: a small transformer, warmed up until it solves about half of the 3-digit sums; "
    "120 steps of 32 fresh prompts (a third each of 1, 2 and 3 digits) with 8 samples; accuracy of "
    "greedy answers to 2000 unseen 3-digit sums",
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
