"""GTPO's claim: from the same samples it learns more than GRPO, and keeps the form of answers."""

import re
from typing import Any

import torch

from postgrad.claims.addition_warm_up import Form, greedy_accuracy, untrained, warmed_up
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks.addition import Addition
from postgrad.tasks.formats import Row

METRIC, FORMAT, LOWEST, ENTROPY = "accuracy", "format kept", "format at its worst", "entropy"
STEPS, PROMPTS, SAMPLES = 120, 16, 8
EVALUATE_EVERY, EVALUATED, TESTED = 20, 300, 2000

_WRITTEN = re.compile(r"<(\d{4})>")


def _read(text: str) -> str | None:
    found = _WRITTEN.fullmatch(text)
    return found[1] if found else None


FORM = Form("in brackets", lambda digits, chance: f"<{digits}>", _read, tokens=8)


def form_and_sum(completions: list[str], answer: list[str]) -> list[float]:
    """1 for four digits in brackets, and 1 more if they are the sum."""
    found = [_read(text) for text in completions]
    return [(f is not None) + float(f == a) for f, a in zip(found, answer, strict=True)]


_WITHOUT_FILTER = {"name": "gtpo", "entropy_threshold": None}
_GRPO = {"slug": "grpo", "kl_coefficient": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "GTPO": {"slug": "gtpo"},
    "GRPO": _GRPO,
    "GRPO with KL": {**_GRPO, "kl_coefficient": 0.04},
    "GTPO without the filter": {
        "slug": "gtpo",
        "mask": _WITHOUT_FILTER,
        "advantage": {"name": "gtpo", "gamma": 0.0},
    },
    "GTPO without conflicts": {"slug": "gtpo", "mask": {"name": "gtpo", "conflicts": False}},
}
# what their own recipes have for other models
_LOOP = {"schedule": "constant", "weight_decay": 0.0, "clip_norm": 1.0}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    own = {"learning_rate": 1e-4, **ARMS[arm]}
    slug = own.pop("slug")
    steps, tested = (4, 100) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed, form=FORM)
    test = Addition("gtpo claim").draw(tested, digits=3)
    curves: dict[str, list[tuple[float, float]]] = {
        METRIC: [(0, greedy_accuracy(policy, test, FORM))],
        FORMAT: [(0, format_kept(policy, test[:EVALUATED]))],
        ENTROPY: [],
    }
    for step, metrics in train_in_steps(
        slug,
        seed,
        {
            "model": policy,
            "data": Addition(f"claim {seed}", weights=[1, 1, 1]).draw(PROMPTS * steps),
            "reward": form_and_sum,
        },
        steps=steps,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": FORM.tokens},
        **_LOOP,
        **own,
    ):
        if metrics:
            curves[ENTROPY].append((step, metrics["response/entropy"]))
        if step % EVALUATE_EVERY == 0 and step < steps:
            curves[METRIC].append((step, greedy_accuracy(policy, test[:EVALUATED], FORM)))
            curves[FORMAT].append((step, format_kept(policy, test[:EVALUATED])))
    curves[METRIC].append((steps, greedy_accuracy(policy, test, FORM)))
    curves[FORMAT].append((steps, format_kept(policy, test[:EVALUATED])))
    values = {
        METRIC: curves[METRIC][-1][1],
        "accuracy before": curves[METRIC][0][1],
        FORMAT: curves[FORMAT][-1][1],
        LOWEST: min(kept for _, kept in curves[FORMAT]),
        "entropy at the end": sum(h for _, h in curves[ENTROPY][-12:]) / len(curves[ENTROPY][-12:]),
    }
    return Outcome(values, {**curves, ENTROPY: curves[ENTROPY][::3]})


def format_kept(policy: LanguagePolicy, test: list[Row]) -> float:
    """The share of samples to unseen sums that are four digits in brackets."""
    prompts = [policy.render(row["prompt"]) for row in test]
    settings = SamplingSettings(max_new_tokens=FORM.tokens, temperature=1.0)
    with torch.no_grad():
        texts = generate(policy, prompts, settings, seeds=range(len(prompts))).texts
    return sum(_read(text) is not None for text in texts) / len(texts)


CLAIM = Claim(
    slug="gtpo",
    statement="From the same samples GTPO, which never lowers what good and bad responses share "
    "and leaves out uncertain ones, learns more than GRPO.",
    task="addition with the answer in brackets, `<8110>`: a small transformer, warmed up until it "
    f"solves about half of the 3-digit sums; {STEPS} steps of {PROMPTS} prompts (a third "
    f"each of 1, 2 and 3 digits) with {SAMPLES} samples, 1 for the form and 1 for the sum; "
    f"accuracy of greedy answers to {TESTED} unseen 3-digit sums",
    metric=METRIC,
    higher_is_better=True,
    method="GTPO",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding("More samples keep the form when GRPO's keep it least", LOWEST, "GTPO", "GRPO"),
        Finding(
            "The filter and the entropy in the advantage help",
            METRIC,
            "GTPO",
            "GTPO without the filter",
        ),
        Finding("So do the conflict tokens", METRIC, "GTPO", "GTPO without conflicts"),
    ),
    notes="Learning rates 1e-4, 3e-4 and 1e-3 were tried for GTPO and GRPO on seed 100, with other "
    "sums than those reported, over a third of the steps; 1e-4 was best for both (0.65 and "
    "0.61 of 300 sums, from 0.48; 3e-4 0.55 and 0.56). At 1e-3 both unlearn the sums (0.06 "
    "and 0.14) and keep the form: what the paper sees GRPO lose late in training is not lost "
    "here. Schedule, weight decay and clipping are the same for all arms.",
)
