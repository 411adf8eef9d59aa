"""HAPO's claim: measured by their prompt's own record, correct answers become shorter."""

import random
from typing import Any

import torch

from postgrad.batch import Batch
from postgrad.claims.addition_warm_up import Form, untrained, warmed_up
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.stepping import own_batch, train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks.addition import Addition
from postgrad.tasks.formats import Row

METRIC, ACCURACY, RECORD = "length of correct answers", "accuracy", "mean record"
FILLER, MOST, BUDGET = ".", 12, 8
ROWS, PROMPTS, SAMPLES, EPOCHS, DIGITS = 64, 16, 8, 10, 2
TARGET, TESTED = 0.6, 1000


def _fill(digits: str, chance: random.Random) -> str:
    return digits + FILLER * chance.randint(0, MOST)


def _read(text: str) -> str:
    return text.rstrip(FILLER)


FORM = Form("before dots", _fill, _read, tokens=MOST + 6, digits=DIGITS)


def solved(completions: list[str], answer: list[str]) -> list[float]:
    """1 where the digits before the dots are the answer."""
    return [float(_read(text) == true) for text, true in zip(completions, answer, strict=True)]


def within_budget(
    completions: list[str], answer: list[str], completion_ids: list[list[int]]
) -> list[float]:
    """That, less what a response is longer than the budget, as a share of it and at most 1."""
    right = solved(completions, answer)
    over = [max(0, len(ids) - BUDGET) / BUDGET for ids in completion_ids]
    return [reward - min(1.0, excess) for reward, excess in zip(right, over, strict=True)]


ARMS: dict[str, dict[str, Any]] = {
    "HAPO": {"slug": "hapo"},
    "HAPO, mean": {"slug": "hapo", "history": "mean"},
    "GRPO": {"slug": "grpo"},
    "fixed budget": {"slug": "grpo", "reward": within_budget},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    own = {"reward": solved, "learning_rate": 3e-4, **ARMS[arm]}
    slug, reward = own.pop("slug"), own.pop("reward")
    epochs, tested = (1, 50) if quick else (EPOCHS, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed, TARGET, FORM)
    stream = Addition("hapo claim")
    test = stream.draw(tested, digits=DIGITS)
    rows = distinct(Addition(f"hapo {seed}"))
    lengths, rewards, records = [], [], []

    def collect(method: Any, step: int) -> Batch:
        batch = own_batch(method, step)
        answers = [rows[i]["answer"] for i in batch.row.tolist()]
        right = torch.tensor(solved(batch.texts, answers))
        tokens = torch.tensor([float(len(response)) for response in batch.responses])
        rewards.append(float(right.mean()))
        lengths.append(float((right * tokens).sum() / right.sum().clamp(min=1)))
        if slug == "hapo" and len(method.tracker):
            records.append((float(step + 1), method.tracker.mean))
        return batch

    start = tried(policy, test)
    for _ in train_in_steps(
        slug,
        seed,
        {"model": policy, "data": rows, "reward": reward},
        collect,
        steps=epochs * ROWS // PROMPTS,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": FORM.tokens, "temperature": 1.0},
        kl_coefficient=0.0,
        **own,
    ):
        pass
    end = tried(policy, test)
    last = slice(-ROWS // PROMPTS, None)
    values = {
        METRIC: end[1],
        ACCURACY: end[0],
        "length before": start[1],
        "accuracy before": start[0],
        "training reward at the end": sum(rewards[last]) / len(rewards[last]),
    }
    if records:
        values[RECORD] = records[-1][1]
    curves = {
        METRIC: [(step + 1.0, length) for step, length in enumerate(lengths)][::2],
        "training reward": [(step + 1.0, reward) for step, reward in enumerate(rewards)][::2],
    }
    return Outcome(values, {**curves, **({RECORD: records[::2]} if records else {})})


def distinct(stream: Addition) -> list[Row]:
    """The first prompts of a stream that are different."""
    rows = {row["prompt"]: row for row in stream.draw(2 * ROWS, digits=DIGITS)}
    return list(rows.values())[:ROWS]


def tried(policy: LanguagePolicy, test: list[Row]) -> tuple[float, float]:
    """The share of unseen sums that a sample solves, and the mean tokens of those that do."""
    prompts = [policy.render(row["prompt"]) for row in test]
    settings = SamplingSettings(max_new_tokens=FORM.tokens, temperature=1.0)
    with torch.no_grad():
        found = generate(policy, prompts, settings, seeds=range(len(prompts)))
    right = solved(found.texts, [row["answer"] for row in test])
    tokens = [len(response) for response in found.responses]
    correct = [n for n, mark in zip(tokens, right, strict=True) if mark]
    return sum(right) / len(right), sum(correct) / max(len(correct), 1)


CLAIM = Claim(
    slug="hapo",
    statement="Rewarded against the shortest correct answer that each prompt has had, correct "
    "answers become shorter than under GRPO on correctness alone.",
    task=f"addition with 0 to {MOST} dots after the four digits of the sum, which a small "
    "transformer has learnt to write at random and which say nothing; "
    f"{EPOCHS} passes over {ROWS} sums of {DIGITS} digits, {PROMPTS} a step with {SAMPLES} "
    f"samples; tokens of correct samples for {TESTED} new sums (5 is the least), and how many are "
    "correct",
    metric=METRIC,
    higher_is_better=False,
    method="HAPO",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            f"They become shorter than under one budget of {BUDGET} tokens for all",
            METRIC,
            "HAPO",
            "fixed budget",
            higher_is_better=False,
        ),
        Finding(
            "The shortest answer as record shortens more than the mean",
            METRIC,
            "HAPO",
            "HAPO, mean",
            higher_is_better=False,
        ),
        Finding("GRPO solves more of them", ACCURACY, "GRPO", "HAPO"),
    ),
    notes="Learning rates 1e-4 and 3e-4 were tried for HAPO and GRPO on seed 100, with other sums "
    "than those reported; 3e-4 gave both the higher reward on the sums trained on. There the "
    "length was 5.0 under HAPO and 6.0 under GRPO, at 1e-4 5.3 and 10.3: GRPO shortens "
    "answers too, though nothing rewards it, and later. The dots come after the sum where the "
    "paper's models think before they answer: a model of this size does not soon learn to add "
    "at places that vary. No arm has a KL to the initial policy.",
)
