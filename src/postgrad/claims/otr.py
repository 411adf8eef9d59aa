"""One-Token Rollout's claim: a model that is fine-tuned on one task keeps more of another."""

import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from postgrad import __version__
from postgrad.claims.addition_warm_up import TOKENS, greedy_accuracy, untrained, warmed_up
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.methods.base import Metrics
from postgrad.models.cache import cached_folder
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.tasks.addition import Addition
from postgrad.tasks.formats import Row

METRIC = "mean accuracy of both tasks"
STEPS, BATCH, EVERY, EVALUATED, TESTED = 150, 64, 15, 200, 1000
CORRUPTION = 0.15  # share of demonstrations with a wrong digit
_ROWS, _FIRST_STEPS, _FIRST_RATE = 8000, 200, 2e-3

# learning rates: see the notes
DFT = {"exact": True, "kappa": 1.0, "beta": 0.0, "aggregation": "token-mean"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("sft", {"learning_rate": 3e-5}),
    "DFT": ("otr", {"learning_rate": 3e-5, **DFT}),
    "OTR": ("otr", {"learning_rate": 3e-5, "candidates": 64}),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    steps, tested = (3, 60) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else first_model(seed)
    sums = Addition("otr claim").draw(tested, digits=3)
    new = differences("otr claim", tested)
    slug, settings = ARMS[arm]
    demonstrations = differences(f"claim {seed}", _ROWS, CORRUPTION)
    old_before, new_before = greedy_accuracy(policy, sums), greedy_accuracy(policy, new)
    both = [(new_before, old_before)]
    loss = loss_on(policy, new)
    for step, _ in fine_tuned(slug, policy, demonstrations, seed, steps, **settings):
        if step % EVERY == 0 and step < steps:
            few = (greedy_accuracy(policy, rows[:EVALUATED]) for rows in (new, sums))
            both.append((next(few), next(few)))
    old_after, new_after = greedy_accuracy(policy, sums), greedy_accuracy(policy, new)
    both.append((new_after, old_after))
    values = {
        METRIC: (old_after + new_after) / 2,
        "accuracy on the new task": new_after,
        "accuracy on the old task": old_after,
        "new task before": new_before,
        "old task before": old_before,
        "fall of the loss on the new task": loss - loss_on(policy, new),
    }
    return Outcome(values, {"old task over new task": both})


def differences(seed: str, count: int, corruption: float = 0.0) -> list[Row]:
    """`ddd-ddd=` and the digits' differences modulo 10, least significant first, then a zero.

    The form of `addition` without borrowing; a share `corruption` has one digit replaced.
    """
    rows = []
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        a, b = chance.randint(100, 999), chance.randint(100, 999)
        pairs = zip(f"{a}"[::-1], f"{b}"[::-1], strict=True)
        answer = "".join(str((int(x) - int(y)) % 10) for x, y in pairs) + "0"
        completion = answer
        if chance.random() < corruption:
            place = chance.randrange(3)
            wrong = str((int(answer[place]) + chance.randint(1, 9)) % 10)
            completion = answer[:place] + wrong + answer[place + 1 :]
        rows.append({"prompt": f"{a}-{b}=", "answer": answer, "completion": completion})
    return rows


def first_model(seed: int) -> LanguagePolicy:
    """The warmed-up model of sums, after some training on sums and differences alike; cached."""
    recipe = [_ROWS, _FIRST_STEPS, _FIRST_RATE, BATCH, CORRUPTION]
    versions = [__version__, version("torch")]

    def make(folder: Path) -> None:
        sums = Addition(f"first {seed}").demonstrations(_ROWS, corruption=CORRUPTION, digits=3)
        rows = [*sums, *differences(f"first {seed}", _ROWS, CORRUPTION)]
        policy = warmed_up(seed)
        for _ in fine_tuned("sft", policy, rows, seed, _FIRST_STEPS, learning_rate=_FIRST_RATE):
            pass
        policy.save(folder)

    key = {"seed": seed, "recipe": recipe, "versions": versions}
    return load_policy(str(cached_folder("sums-and-differences", key, make)))


def fine_tuned(
    slug: str, policy: LanguagePolicy, rows: list[Row], seed: int, steps: int, **settings: Any
) -> Iterator[tuple[int, Metrics]]:
    objects = {"model": policy, "data": rows}
    common = {"batch_size": BATCH, "schedule": "constant", "max_response_tokens": TOKENS}
    return train_in_steps(slug, seed, objects, steps=steps, **common, **settings)


@torch.no_grad()
def loss_on(policy: LanguagePolicy, rows: list[Row]) -> float:
    """-log pi of the right answers, in nats a token."""
    prompts = [policy.render(row["prompt"]) for row in rows]
    answers = [policy.encode_response(row["answer"]) for row in rows]
    scores = policy.score(prompts, answers)
    return -float(scores.logprobs[scores.mask].mean())


CLAIM = Claim(
    slug="otr",
    statement="Fine-tuned for the same steps on the same demonstrations, a model that learns from "
    "the rewards of its own next tokens is better on average over the new task and the old one "
    "than after SFT.",
    task="a small transformer that solves most 3-digit sums and few digitwise differences; 150 "
    "steps of 64 demonstrations of differences, 15 % of them with a wrong digit; greedy accuracy "
    "on 1000 unseen differences (new) and 1000 unseen sums (old)",
    metric=METRIC,
    higher_is_better=True,
    method="OTR",
    baseline="SFT",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding("OTR keeps more of the old task.", "accuracy on the old task", "OTR", "SFT"),
        Finding("OTR learns as much of the new task.", "accuracy on the new task", "OTR", "SFT"),
    ),
    notes="Of the learning rates 3e-5, 1e-4, 3e-4, 1e-3 and 3e-3 the first was best by the metric "
    "for every arm on seed 100, which is not reported (3e-5 and 1e-4: SFT 0.77 and 0.62, OTR "
    "0.73 and 0.57; larger ones, in part from an earlier start, leave little of the old task "
    "whatever the method). There OTR forgot no less than SFT where it had learnt as much: at "
    "1e-4 SFT keeps 0.69 of the old task when it solves 0.76 of the new one, OTR 0.60 at "
    "0.78. OTR and dynamic fine-tuning (DFT) hardly differ. K is 64, a vocabulary of about a "
    "hundred tokens needs no more; beta and kappa are the defaults. The first model is the "
    "warmed-up one after 200 steps on sums and differences, since OTR teaches nothing that "
    "the policy never says.",
)
