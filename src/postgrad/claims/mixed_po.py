"""Mixed preference optimisation's claim: PPO from a DPO model of easy pairs beats PPO alone."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.selection import GapSplit, gap_split
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.symbols import (
    LENGTH,
    LETTERS,
    TOKENS,
    Measured,
    followed,
    hidden_score,
    measure,
    outcome,
    preferences,
    prompts,
    reference_policy,
    score_by,
    worth,
)

PAIRS, LABEL_TEMPERATURE = 1500, 1.5  # half for the reward model, half for the policy
DPO_STEPS, PPO_STEPS, EVERY = 40, 10, 2
RATE = 2e-3
FEW = 4  # steps of PPO at which arms are compared, of 64 rollouts each
METRIC = "score after at most 256 rollouts"
Rows = list[dict[str, str]]

# the stages of each arm: a method, and the pairs that it learns from
ARMS: dict[str, tuple[tuple[str, str], ...]] = {
    "MPO": (("mixed-po", "all"),),
    "PPO": (("ppo-language", "all"),),
    "DPO": (("dpo", "all"),),
    "DPO on easy pairs": (("dpo", "easy"),),
    "DPO on hard pairs": (("dpo", "hard"),),
    "PPO after DPO on all pairs": (("dpo", "all"), ("ppo-language", "all")),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    dpo_steps, ppo_steps = (2, 4) if quick else (DPO_STEPS, PPO_STEPS)
    hidden = hidden_score(seed)
    policy = reference_policy(seed, *([5] if quick else []))
    every = preferences(policy, hidden, 200 if quick else PAIRS, seed, LABEL_TEMPERATURE)
    rows, others = every[::2], every[1::2]
    reward = score_by(reward_table(others), 1.0)
    named = parts(rows, split_by(reward, rows))
    taken, points = 0, [(0, measure(policy, policy, hidden, seed, 0))]
    values = {}
    for slug, which in ARMS[arm]:
        steps = {"dpo": dpo_steps, "ppo-language": ppo_steps}.get(slug, dpo_steps + ppo_steps)
        found = followed(
            slug,
            policy,
            {"data": prompts() if slug == "ppo-language" else named[which]}
            | ({} if slug == "dpo" else {"reward": reward}),
            hidden,
            seed,
            steps=steps,
            every=EVERY,
            **SETTINGS[slug] | ({"dpo_steps": dpo_steps} if slug == "mixed-po" else {}),
        )
        points += [(taken + step, measured) for step, measured in found if step]
        taken += steps
    before = taken - ppo_steps if ARMS[arm][-1][0] != "dpo" else taken
    few = min(before + FEW, taken)
    values[METRIC] = next(measured.score for step, measured in points if step == few)
    return outcome(points, **values, **label_accuracy(hidden, named))


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"batch_size": 32, "max_response_tokens": TOKENS, "learning_rate": RATE},
    "ppo-language": {
        "batch_size": len(LETTERS),
        "rollout": {"samples": 8, "max_new_tokens": TOKENS},
        "learning_rate": RATE,
        "critic_rate": 1.0,
        "kl_coefficient": 0.05,
    },
}
SETTINGS["mixed-po"] = {**SETTINGS["ppo-language"], "dpo_batch_size": 32}


def reward_table(rows: Rows) -> Tensor:
    """The scores of neighbours `[8, 8]` that make pairs likeliest: a reward model, linear in counts.

    Bradley-Terry with a normal prior of deviation 1/2, by Newton's method.
    """
    differences = torch.stack(
        [
            neighbours(row["prompt"], row["chosen"]) - neighbours(row["prompt"], row["rejected"])
            for row in rows
        ]
    )
    prior = 4 * torch.eye(differences.shape[1], dtype=torch.float64)
    table = torch.zeros(differences.shape[1], dtype=torch.float64)
    for _ in range(10):
        wrong = torch.sigmoid(-(differences @ table))
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + prior
        table = table + torch.linalg.solve(curvature, differences.T @ wrong - prior @ table)
    return table.view(len(LETTERS), len(LETTERS))


def neighbours(prompt: str, text: str) -> Tensor:
    """How often each letter follows each, `[64]`, in prompt and text."""
    counts = torch.zeros(len(LETTERS), len(LETTERS), dtype=torch.float64)
    for a, b in pairwise(LETTERS.find(letter) for letter in prompt + text[:LENGTH]):
        if a >= 0 and b >= 0:
            counts[a, b] += 1
    return counts.flatten()


def split_by(reward: Callable[..., list[float]], rows: Rows) -> GapSplit:
    """The pairs as the method splits them: at the median gap."""
    letters = [row["prompt"] for row in rows]
    chosen, rejected = (
        torch.tensor(reward(letters, [row[column] for row in rows]), dtype=torch.float64)
        for column in ("chosen", "rejected")
    )
    return gap_split(chosen, rejected)


def parts(rows: Rows, split: GapSplit) -> dict[str, Rows]:
    """The pairs by name."""

    def of(index: Tensor) -> Rows:
        return [rows[i] for i in index.tolist()]

    return {"all": rows, "easy": of(split.easy), "hard": of(split.hard)}


def label_accuracy(hidden: Tensor, named: dict[str, Rows]) -> dict[str, float]:
    """The share of labels that agree with the true score, of every part of the pairs."""
    values = {}
    for name, rows in named.items():
        gaps = [
            worth(hidden, row["prompt"], row["chosen"])
            - worth(hidden, row["prompt"], row["rejected"])
            for row in rows
        ]
        values[f"right labels, {name} pairs"] = sum(gap > 0 for gap in gaps) / len(gaps)
    return values


CLAIM = Claim(
    slug="mixed-po",
    statement="DPO on the pairs that a reward model finds easy, and then PPO on the prompts of the "
    "others from there, ends with a higher true score than PPO from the initial policy with as "
    "many rollouts.",
    task="strings of 12 letters with a hidden score of neighbours; 1500 Bradley-Terry pairs of the "
    "reference's strings (temperature 1.5), half of them for a reward model of the tiny language "
    "model's size, half for the policy; 40 steps of 32 pairs, 40 steps of 64 rollouts; mean true "
    "score of 256 fresh strings at the end",
    metric=METRIC,
    higher_is_better=True,
    method="MPO",
    baseline="PPO",
    arms=tuple(ARMS),
    run=run,
    notes="",
)
