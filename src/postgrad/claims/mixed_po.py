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
from postgrad.objectives.mixture import linear_reward

PAIRS, LABEL_TEMPERATURE = 1500, 1.5  # half for the reward model, half for the policy
DPO_STEPS, PPO_STEPS, EVERY = 40, 12, 4
FEW = 4  # steps of PPO at which arms are compared, of 64 rollouts each
METRIC = "score after at most 256 rollouts"
Rows = list[dict[str, str]]

# the stages of each arm, a method and the pairs that it learns from, and the learning rate
ARMS: dict[str, tuple[tuple[tuple[str, str], ...], float]] = {
    "MPO": ((("mixed-po", "all"),), 2e-3),
    "PPO": ((("ppo-language", "all"),), 2e-3),
    "PPO after DPO on all pairs": ((("dpo", "all"), ("ppo-language", "all")), 2e-3),
    "DPO": ((("dpo", "all"),), 2e-3),
    "DPO on easy pairs": ((("dpo", "easy"),), 1e-3),
    "DPO on hard pairs": ((("dpo", "hard"),), 1e-3),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    dpo_steps, ppo_steps = (4, 4) if quick else (DPO_STEPS, PPO_STEPS)
    hidden = hidden_score(seed)
    policy, reference = (reference_policy(seed, *([5] if quick else [])) for _ in range(2))
    every = preferences(policy, hidden, 200 if quick else PAIRS, seed, LABEL_TEMPERATURE)
    rows, others = every[::2], every[1::2]
    reward = score_by(reward_table(others), 1.0)
    named = parts(rows, split_by(reward, rows))
    stages, rate = ARMS[arm]
    taken, points = 0, [(0, measure(policy, reference, hidden, seed, 0))]
    for slug, which in stages:
        settings = {**SETTINGS[slug], "learning_rate": rate}
        objects: dict[str, Any] = {"data": named[which], "reward": reward}
        steps = ppo_steps
        if slug == "mixed-po":
            settings["dpo_steps"] = dpo_steps
            steps += dpo_steps
        elif slug == "dpo":
            del objects["reward"]
            steps = dpo_steps
        else:
            objects["data"] = prompts()
        found = followed(slug, policy, objects, hidden, seed, steps=steps, every=EVERY, **settings)
        points += [(taken + step, measured) for step, measured in found if step]
        taken += steps
    few = taken if stages[-1][0] == "dpo" else taken - ppo_steps + FEW
    value = next(measured.score for step, measured in points if step == few)
    return outcome(points, **{METRIC: value}, **label_accuracy(hidden, named))


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"batch_size": 32, "max_response_tokens": TOKENS},
    "ppo-language": {
        "batch_size": len(LETTERS),
        "rollout": {"samples": 8, "max_new_tokens": TOKENS},
        "critic_rate": 1.0,
        "kl_coefficient": 0.05,
    },
}
SETTINGS["mixed-po"] = {**SETTINGS["ppo-language"], "dpo_batch_size": 32}


def reward_table(rows: Rows) -> Tensor:
    """Scores of neighbours `[8, 8]` that make pairs likely: a reward model, linear in counts.

    Bradley-Terry with a normal prior of deviation 1/2.
    """
    differences = torch.stack(
        [
            neighbours(row["prompt"], row["chosen"]) - neighbours(row["prompt"], row["rejected"])
            for row in rows
        ]
    )
    table = linear_reward(differences, torch.ones(len(rows), dtype=torch.bool), decay=4.0)
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
    "others from there, reaches a higher true score than PPO from the initial policy with as "
    "few rollouts.",
    task="strings of 12 letters with a hidden score of neighbours; 1500 Bradley-Terry pairs of the "
    "reference's strings (temperature 1.5), half for a reward model (linear in neighbours), half "
    "for the policy; 40 steps of 32 pairs, then steps of 64 rollouts; mean true score of 256 "
    "fresh strings after 4 of these",
    metric=METRIC,
    higher_is_better=True,
    method="MPO",
    baseline="PPO",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable: MPO is ahead of PPO on two seeds; on the other DPO on easy pairs left a "
    "poor start. Selection adds nothing here: PPO after DPO on all pairs is level with MPO on"
    " one seed, far ahead on one and behind on one, and DPO on easy pairs, though 99 % of "
    "their labels are right against 71 to 75 % of all, is below DPO on all pairs on two "
    "seeds. Learning rates by arm, chosen on seed 100, which is not reported: 2e-3 for MPO "
    "and PPO (3e-4, 1e-3 and 4e-3 were tried), for DPO (1e-4, 3e-4, 1e-3, 4e-3) and for PPO "
    "after it (1e-3), 1e-3 for DPO on easy pairs (5e-4, 2e-3) and on hard pairs (2e-3); one "
    "rate serves both stages of MPO, which was less steady at 4e-3 (7.9 to 7.7 after 256 "
    "rollouts). A reward model of the language model's size learnt too little from 750 pairs "
    "(correlation of 0.35 with the true score; the linear one 0.9). Of the easy pairs 99 % "
    "have the right label on seed 100, of the hard ones 68 %. `PPO after DPO on all pairs` "
    "tells selection from a better start: most of the gain is the start's. MPO has had 40 "
    "steps of DPO besides, and with more rollouts PPO catches up (`score at the end`, after "
    "768); that 256 rollouts decide was chosen on seed 100, on which both are near 8 by 640. "
    "MPO is also further from the initial policy.",
)
