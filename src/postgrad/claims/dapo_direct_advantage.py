"""The claim of direct advantage policy optimisation: steps are told apart by what a critic says."""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.addition_warm_up import TOKENS, greedy_accuracy, untrained, warmed_up
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.grpo import ARMS as GRPO_ARMS
from postgrad.claims.grpo import STEPS as GRPO_STEPS
from postgrad.claims.grpo import trained
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.models.snapshots import Snapshot
from postgrad.objectives.advantage_regression import regression_minimiser, step_improvement
from postgrad.seeding import generator
from postgrad.tasks.addition import Addition

METRIC = "accuracy"
GATHER, LEARN, PROMPTS, SOLUTIONS, SELECTED, SAMPLES = 12, 60, 32, 8, 4, 8
EVALUATE_EVERY, EVALUATED, TESTED = 10, 300, 2000
ACTIONS, DEPTH, ROUNDS, TREE_BETA = 4, 4, 30, 0.2

# learning rates and beta: see the notes
ARMS: dict[str, dict[str, Any]] = {
    "DAPO": {"values": "critic", "learning_rate": 3e-4, "beta": 0.1},
    "outcomes": {"values": "outcomes", "learning_rate": 3e-4, "beta": 0.1},
    "GRPO": GRPO_ARMS["GRPO"],
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    gather, learn, tested = (1, 2, 100) if quick else (GATHER, LEARN, TESTED)
    policy = untrained(seed) if quick else warmed_up(seed)
    if arm == "GRPO":
        return trained(ARMS[arm], policy, seed, 4 if quick else GRPO_STEPS, tested)
    return regressed(ARMS[arm], policy, seed, gather, learn, tested)


def regressed(
    settings: dict[str, Any],
    policy: LanguagePolicy,
    seed: int,
    gather: int,
    learn: int,
    tested: int,
) -> Outcome:
    """Ends, as the paper's runs, with the best of the policies evaluated on the way."""
    test = Addition("grpo claim").draw(tested, digits=3)
    check = Addition(f"claim check {seed}").draw(EVALUATED, digits=3)
    before = greedy_accuracy(policy, test)
    curve = [(0.0, greedy_accuracy(policy, check))]
    best = Snapshot(policy)
    training = train_in_steps(
        "dapo-direct-advantage",
        seed,
        {
            "model": policy,
            "data": Addition(f"claim {seed}", weights=[1, 1, 1]).draw(PROMPTS * gather),
            "reward": "addition",
        },
        steps=gather + learn,
        gather_steps=gather,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": TOKENS},
        solutions=SOLUTIONS,
        selected=SELECTED,
        delimiter="",
        **{"critic_rate": 3.0, "critic_epochs": 2, "critic_minibatches": 4, **settings},
    )
    states, errors = 0.0, []
    metrics: dict[str, float] = {}
    for step, metrics in training:
        if step <= gather:
            states += metrics["states"]
            errors.append(metrics.get("critic/loss", 0.0) - metrics.get("critic/least_loss", 0.0))
        elif (step - gather) % EVALUATE_EVERY == 0:
            accuracy = greedy_accuracy(policy, check)
            if accuracy > max(y for _, y in curve):
                best.follow()
            curve.append((step - gather, accuracy))
    best.restore()
    values = {
        METRIC: greedy_accuracy(policy, test),
        "accuracy before": before,
        "steps at the best check": max(curve, key=lambda point: point[1])[0],
        "samples": gather * PROMPTS * SOLUTIONS + SAMPLES * states,
        "states learnt from": metrics["states"],
        "log-ratio of steps above the mean": metrics["log_ratio/above"],
        "log-ratio of steps below the mean": metrics["log_ratio/below"],
    }
    if settings["values"] == "critic":
        values |= {"critic's loss beyond the least, first": errors[0], "last": errors[-1]}
        values |= in_a_tree(seed)
    return Outcome(values, {"accuracy at checks": curve})


def in_a_tree(seed: int) -> dict[str, float]:
    """Rounds of exact regression in a random tree, each with the last one's policy as reference.

    Every path of four choices among four ends in success or failure; advantages are exact.
    """
    random = generator(seed, "tree")
    shape = [ACTIONS] * DEPTH
    chances = torch.rand(shape, generator=random, dtype=torch.float64)
    leaves = (chances < 0.3).double()
    policies = [
        torch.randn(shape[: depth + 1], generator=random, dtype=torch.float64).softmax(-1)
        for depth in range(DEPTH)
    ]
    found = {"tree: best value": float(leaves.max())}
    least = 0.0
    for number in range(ROUNDS + 1):
        value, tables = values_of(policies, leaves)
        if number in (0, 1, ROUNDS):
            found[f"tree: value after {number} rounds"] = value
        new = []
        for policy, q in zip(policies, tables, strict=True):
            advantages = q - (policy * q).sum(-1, keepdim=True)
            new.append(regression_minimiser(policy, advantages, TREE_BETA))
            gain = step_improvement(new[-1], policy, advantages, TREE_BETA)
            least = min(least, float(gain.min()))
        policies = new
    return {**found, "tree: least improvement of a state": least}


def values_of(policies: list[Tensor], leaves: Tensor) -> tuple[float, list[Tensor]]:
    """The value of the root, and Q(s, a) at every depth in the shape of the policies."""
    tables = [leaves]
    for policy in reversed(policies[1:]):
        tables.append((policy * tables[-1]).sum(-1))
    tables.reverse()
    return float((policies[0] * tables[0]).sum()), tables


CLAIM = Claim(
    slug="dapo-direct-advantage",
    statement="From the same samples the policy learns more when its log-ratios are regressed on "
    "advantages of steps by a critic than on the mean outcomes of what began with them.",
    task="addition: a small transformer, warmed up until it solves about half of the 3-digit "
    "sums. 12 steps of gathering: 32 fresh prompts each (a third each of 1, 2 and 3 digits), 8 "
    "solutions, of 4 the beginnings, a digit a step, with 8 completions; then 60 steps of "
    "regression, of which the best by 300 other sums is kept. Accuracy of greedy answers to 2000 "
    "unseen 3-digit sums. GRPO: 120 steps of 32 prompts with 8 samples",
    metric=METRIC,
    higher_is_better=True,
    method="DAPO",
    baseline="outcomes",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding("DAPO reaches more than GRPO from about as many samples.", METRIC, "DAPO", "GRPO"),
    ),
    notes="",
)
