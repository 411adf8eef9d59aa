"""Any method that learns from a verifier, trained on fresh sums and tested on unseen hard ones."""

from dataclasses import dataclass, field
from typing import Any

from postgrad.claims.addition_warm_up import TOKENS, greedy_accuracy, untrained, warmed_up
from postgrad.claims.stepping import Collect, own_batch, train_in_steps
from postgrad.methods.base import Metrics
from postgrad.models.language import LanguagePolicy
from postgrad.tasks.addition import Addition

STEPS, PROMPTS, SAMPLES = 120, 32, 8
EVALUATE_EVERY, EVALUATED, TESTED = 20, 300, 2000

Curve = list[tuple[float, float]]


def task(steps: int = STEPS, prompts: int = PROMPTS) -> str:
    """What `trained_on_sums` does, in words."""
    return (
        "addition: a small transformer, warmed up until it solves about half of the 3-digit sums; "
        f"{steps} steps of {prompts} fresh prompts (a third each of 1, 2 and 3 digits) with "
        f"{SAMPLES} samples; accuracy of greedy answers to {TESTED} unseen 3-digit sums"
    )


@dataclass
class Training:
    """What became of a run: the policy, its test accuracy over steps, every step's metrics."""

    policy: LanguagePolicy
    accuracy: Curve
    metrics: list[Metrics] = field(default_factory=list)

    def series(self, name: str) -> list[float]:
        """A metric at every step that learnt something; a 0 if none did."""
        return [metrics[name] for metrics in self.metrics if metrics] or [0.0]

    def curve(self, name: str, every: int = 5) -> Curve:
        points = [(float(i + 1), m[name]) for i, m in enumerate(self.metrics) if m]
        return points[::every]

    def late(self, name: str) -> float:
        """A metric's mean over the last tenth of the steps."""
        values = self.series(name)[-max(1, len(self.metrics) // 10) :]
        return sum(values) / len(values)


def trained_on_sums(
    settings: dict[str, Any],
    seed: int,
    quick: bool,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    *,
    target: float = 0.45,
    collect: Collect = own_batch,
    evaluate_every: int = EVALUATE_EVERY,
) -> Training:
    """Train the method `settings["slug"]` with the other settings, from the warmed-up model.

    `target` is how well that solves hard sums, `collect` may change what is learnt from.
    """
    slug, own = settings["slug"], {k: v for k, v in settings.items() if k != "slug"}
    steps, tested = (4, 100) if quick else (steps, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed, target)
    test = Addition("grpo claim").draw(tested, digits=3)
    found = Training(policy, [(0.0, greedy_accuracy(policy, test))])
    training = train_in_steps(
        slug,
        seed,
        {
            "model": policy,
            "data": Addition(f"claim {seed}", weights=[1, 1, 1]).draw(prompts * steps),
            "reward": "addition",
        },
        collect,
        **{
            "steps": steps,
            "batch_size": prompts,
            "rollout": {"samples": SAMPLES, "max_new_tokens": TOKENS, "temperature": 1.0},
            "warmup_steps": 0,
            **own,
        },
    )
    for step, metrics in training:
        found.metrics.append(metrics)
        if step % evaluate_every == 0 and step < steps:
            found.accuracy.append((float(step), greedy_accuracy(policy, test[:EVALUATED])))
    found.accuracy.append((float(steps), greedy_accuracy(policy, test)))
    return found
