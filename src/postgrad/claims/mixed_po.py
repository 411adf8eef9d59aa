"""Mixed preference optimisation's claim: PPO from a DPO model of easy pairs beats PPO alone."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.selection import GapSplit, gap_split
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.claims.symbols import (
    LETTERS,
    TOKENS,
    Measured,
    followed,
    hidden_score,
    outcome,
    preferences,
    prompts,
    reference_policy,
    worth,
)
from postgrad.models.cache import cached_folder
from postgrad.models.language import LanguagePolicy
from postgrad.rewards.learned import learned_reward

PAIRS, LABEL_TEMPERATURE = 1500, 1.5  # half for the reward model, half for the policy
DPO_STEPS, PPO_STEPS = 40, 40
REWARD_STEPS, REWARD_RATE = 150, 1e-3
DPO_RATE, PPO_RATE = 1e-4, 1e-3
METRIC = "score at the end"
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
    dpo_steps, ppo_steps = (2, 2) if quick else (DPO_STEPS, PPO_STEPS)
    hidden = hidden_score(seed)
    policy = reference_policy(seed)
    rows = preferences(policy, hidden, 200 if quick else PAIRS, seed, LABEL_TEMPERATURE)
    half = len(rows) // 2
    folder = str(reward_model(policy, rows[half:], seed, 5 if quick else REWARD_STEPS))
    reward = learned_reward(folder, device="cpu")
    split = split_by(reward, rows[:half])
    points: list[tuple[int, Measured]] = []
    for slug, which in ARMS[arm]:
        begin = points[-1][0] if points else 0
        data = parts(rows[:half], split)[which]
        settings = SETTINGS[slug]
        steps = {"dpo": dpo_steps, "ppo-language": ppo_steps}.get(slug, dpo_steps + ppo_steps)
        if slug == "mixed-po":
            settings = {**settings, "dpo_steps": dpo_steps}
        objects: dict[str, Any] = {"data": data}
        if slug != "dpo":
            objects["reward"] = reward
        if slug == "ppo-language":
            objects["data"] = prompts()
        found = followed(slug, policy, objects, hidden, seed, steps=steps, **settings)
        points += [(begin + step, measured) for step, measured in found if step or not begin]
    labels = label_accuracy(hidden, rows[:half], split)
    return outcome(points, **labels)


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"batch_size": 32, "max_response_tokens": TOKENS, "learning_rate": DPO_RATE},
    "ppo-language": {
        "batch_size": len(LETTERS),
        "rollout": {"samples": 8, "max_new_tokens": TOKENS},
        "learning_rate": PPO_RATE,
        "critic_rate": 1.0,
        "kl_coefficient": 0.05,
    },
}
SETTINGS["mixed-po"] = {**SETTINGS["ppo-language"], "dpo_batch_size": 32}


def reward_model(policy: LanguagePolicy, rows: Rows, seed: int, steps: int) -> Path:
    """The folder of a reward model that has learnt from pairs; a cached function of these."""
    key = {
        "seed": seed,
        "recipe": [len(rows), LABEL_TEMPERATURE, steps, REWARD_RATE],
        "versions": [version("postgrad"), version("torch")],
    }

    def make(folder: Path) -> None:
        from postgrad.models.scalar import ScalarModel

        model = ScalarModel.on_body_of(policy)
        training = train_in_steps(
            "reward-modeling",
            seed,
            {"model": model, "data": rows},
            steps=steps,
            batch_size=min(32, len(rows)),
            learning_rate=REWARD_RATE,
            max_response_tokens=TOKENS,
        )
        for _ in training:
            pass
        model.save(folder)

    return cached_folder("symbols-reward", key, make)


def split_by(reward: Any, rows: Rows) -> GapSplit:
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


def label_accuracy(hidden: Tensor, rows: Rows, split: GapSplit) -> dict[str, float]:
    """The share of labels that agree with the true score, of every part."""
    values = {}
    for name, part in parts(rows, split).items():
        right = [
            worth(hidden, row["prompt"], row["chosen"])
            > worth(hidden, row["prompt"], row["rejected"])
            for row in part
        ]
        values[f"right labels, {name} pairs"] = sum(right) / len(right)
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
