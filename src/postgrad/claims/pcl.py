"""PCL's claim: prompts chosen by a value model teach more than prompts in turn."""

import random
from typing import Any

import torch

from postgrad.batch import Batch
from postgrad.claims.addition_warm_up import TOKENS, greedy_accuracy, untrained, warmed_up
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.tasks.addition import Addition
from postgrad.tasks.formats import Row

STEPS, PROMPTS, SAMPLES, POOL_FACTOR = 80, 32, 8, 4
EVALUATE_EVERY, EVALUATED, TESTED = 20, 300, 2000
METRIC, USEFUL, COST = "accuracy", "useful responses", "responses for each that is learnt from"

_SAME = {"mask": "none", "advantage": "centred", "aggregation": "sequence-mean"}
ARMS: dict[str, dict[str, Any]] = {
    "PCL": {"learning_rate": 3e-4, "pool_factor": POOL_FACTOR, "value_rate": 3.0},
    "PCL, a quarter in turn": {
        "learning_rate": 3e-4,
        "pool_factor": POOL_FACTOR,
        "value_rate": 3.0,
        "uniform_share": 0.25,
    },
    "prompts in turn": {"learning_rate": 3e-4, **_SAME},
    "dynamic sampling": {"learning_rate": 3e-4, **_SAME},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    steps, tested = (3, 300) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed)
    sums = Addition("pcl claim")
    test = [row for digits in (1, 3) for row in sums.draw(tested // 2, digits=digits)]
    start = greedy_accuracy(policy, test)
    data = mixed(seed, POOL_FACTOR * PROMPTS * steps)
    hard = torch.tensor([row["digits"] == 3 and "+" in row["prompt"] for row in data])
    useful, on_hard, errors = [], [], []

    def collect(method: Any, step: int) -> Batch:
        dynamic = arm == "dynamic sampling"
        batch = informative(method, step) if dynamic else method.collect(step)
        useful.append(float((batch.advantages != 0).float().mean()))
        on_hard.append(float(hard[batch.row].float().mean()))
        return batch

    curves: dict[str, list[tuple[float, float]]] = {METRIC: [(0, start)]}
    for step, metrics in train_in_steps(
        "pcl" if arm.startswith("PCL") else "policy-gradient",
        seed,
        {"model": policy, "data": data, "reward": matches},
        collect,
        steps=steps,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": TOKENS},
        **ARMS[arm],
    ):
        if "value/error" in metrics:
            errors.append(metrics["value/error"])
        if step % EVALUATE_EVERY == 0 and step < steps:
            curves[METRIC].append((step, greedy_accuracy(policy, test[:: tested // EVALUATED])))
    end = greedy_accuracy(policy, test)
    curves[METRIC].append((steps, end))
    for name, shares in ((USEFUL, useful), ("share of hard sums", on_hard)):
        curves[name] = [(step + 1.0, share) for step, share in enumerate(shares)][::5]
    values = {
        METRIC: end,
        "accuracy before": start,
        USEFUL: sum(useful) / len(useful),
        COST: float(POOL_FACTOR if arm == "dynamic sampling" else 1),
    }
    if errors:
        values["error of the value model at the end"] = sum(errors[-12:]) / len(errors[-12:])
    return Outcome(values, curves)


def mixed(seed: int, count: int) -> list[Row]:
    """Rows of which half are products, a quarter sums of 1 digit, a quarter sums of 3 digits.

    A product is asked for as a sum is, and answered by its last four digits, the last one first:
    nothing that the warm-up has taught.
    """
    kinds = random.Random(f"pcl {seed}")
    sums = Addition(f"claim {seed}")
    rows = []
    for number in range(count):
        kind = kinds.random()
        row = sums.draw(1, digits=1 if kind < 0.25 else 3, start=number)[0]
        if kind >= 0.5:
            first, second = map(int, row["prompt"].rstrip("=").split("+"))
            answer = f"{first * second % 10_000:04d}"[::-1]
            row = {**row, "prompt": row["prompt"].replace("+", "*"), "answer": answer}
        rows.append(row)
    return rows


def matches(completions: list[str], answer: list[str]) -> list[float]:
    """1 for the answer, else 0."""
    return [float(said == right) for said, right in zip(completions, answer, strict=True)]


def informative(method: PolicyGradient, step: int) -> Batch:
    """Rollouts of as many candidates as PCL looks at; the prompts nearest to a half are kept."""
    pool = torch.arange(POOL_FACTOR * PROMPTS) + step * POOL_FACTOR * PROMPTS
    batch = method.sampled(pool.tolist(), step)
    means = batch.reward.view(-1, SAMPLES).mean(1)
    kept = (means - 0.5).abs().argsort(stable=True)[:PROMPTS]
    return method.learnable(batch.select(torch.isin(batch.group, kept).nonzero().squeeze(1)))


CLAIM = Claim(
    slug="pcl",
    statement="From the same number of rollouts, prompts that a value model expects to be solved "
    "half of the time teach more than prompts in turn.",
    task="addition: a small transformer, warmed up until it solves about half of the 3-digit sums; "
    f"{STEPS} steps of {PROMPTS} prompts with {SAMPLES} samples, out of {POOL_FACTOR * PROMPTS} "
    "candidates a step (half products, which it never gets right, a quarter sums of 1 digit, a "
    "quarter of 3); accuracy of greedy answers to 2000 other sums of 1 and 3 digits",
    metric=METRIC,
    higher_is_better=True,
    method="PCL",
    baseline="prompts in turn",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "More of the responses are to prompts that are neither always nor never solved",
            USEFUL,
            "PCL",
            "prompts in turn",
        ),
        Finding(
            "Dynamic sampling, which samples all candidates to choose among them, teaches more a "
            "step, for four times the rollouts",
            METRIC,
            "dynamic sampling",
            "PCL",
        ),
    ),
    notes="The task is a second version: on thirds of 1, 2 and 3 digits, tested on 3 digits, "
    "prompts in turn had been ahead as well (0.85 to 0.80, seed 100). No learning rate was "
    "tuned for this claim: 3e-4 is GRPO's best on such sums. In 60 steps on seed 100, which "
    "is not reported, PCL had more useful responses than prompts in turn (0.70 to 0.41) and "
    "learnt less (0.78 to 0.85): after the first steps it hardly chose 3-digit sums any "
    "more, probably because products, with the same digits, had taught the value model that "
    "such prompts are never solved, and what is not chosen is not learnt better. The arm "
    "that draws a quarter of its prompts whatever their value is the remedy that suggests "
    "itself; the paper does without.",
)
