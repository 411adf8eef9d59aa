"""SALSA's claim: tied to the mean of two fine-tuned models, PPO goes further than tied to one."""

from typing import Any

import torch

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.symbols import (
    ROLLOUT,
    chain,
    followed,
    hidden_score,
    imitate,
    made_once,
    measure,
    prompts,
    reference_policy,
    score_by,
    strings,
)
from postgrad.models.language import LanguagePolicy
from postgrad.models.snapshots import Snapshot, soup

DEMONSTRATIONS, SFT_STEPS, SFT_BATCH, SFT_RATE = 60, 250, 32, 2e-3
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BETAS = (0.1, 0.2)
BUDGETS = (10, 15)
STEPS, QUICK = 20, 5
METRIC = f"score at the end, beta {BETAS[-1]:g}"
# the same for all arms
PPO: dict[str, Any] = {
    "rollout": ROLLOUT,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "critic_rate": 1.0,
    "epochs": 4,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SALSA": ("salsa", {}),
    "PPO": ("ppo-language", {}),
    "SALSA from the soup": ("salsa", {"start": "soup"}),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    slug, settings = ARMS[arm]
    hidden = hidden_score(seed)
    objects: dict[str, Any] = {"data": prompts(8), "reward": score_by(hidden)}
    if slug == "salsa":
        objects["second"] = fine_tuned(1, seed, quick)
    first = fine_tuned(0, seed, quick)
    values: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    everything = [(0, measure(first, first, hidden, seed, 0))]  # by staying there
    for beta in BETAS:
        points = list(
            followed(
                slug,
                fine_tuned(0, seed, quick),
                objects,
                hidden,
                seed,
                steps=2 if quick else STEPS,
                every=1 if quick else 4,
                reference=first,
                count=2 if quick else 32,
                kl_coefficient=beta,
                **{**PPO, **settings},
            )
        )
        last = points[-1][1]
        values[f"score at the end, beta {beta:g}"] = last.score
        values[f"KL to the first at the end, beta {beta:g}"] = last.divergence
        curves[f"score, beta {beta:g}"] = [(float(step), p.score) for step, p in points]
        curves[f"score over KL, beta {beta:g}"] = [(p.divergence, p.score) for _, p in points]
        everything += points
    for budget in BUDGETS:
        allowed = [point.score for _, point in everything if point.divergence <= budget]
        values[f"best score within {budget} nats of the first"] = max(allowed)
    if arm == "SALSA":
        curves |= along_the_line(seed, quick)
    return Outcome(values, curves)


def fine_tuned(which: int, seed: int, quick: bool) -> LanguagePolicy:
    """The first or the second model: the reference policy after half of the demonstrations.

    They are strings of the reference's chain tilted by the hidden score, few enough that each
    model learns its own half by heart.
    """
    steps = QUICK if quick else SFT_STEPS

    def make() -> LanguagePolicy:
        start = which * DEMONSTRATIONS
        return imitate(
            reference_policy(seed, *([QUICK] if quick else [])),
            demonstrations(seed)[start : start + DEMONSTRATIONS],
            seed,
            steps=steps,
            batch_size=SFT_BATCH,
            learning_rate=SFT_RATE,
        )

    recipe = [DEMONSTRATIONS, steps, SFT_BATCH, SFT_RATE]
    return made_once("fine-tuned", make, seed=seed, which=which, recipe=recipe)


def demonstrations(seed: int) -> list[dict[str, str]]:
    """The halves of both models, and as many strings again as a test."""
    tilted = (chain(seed).log() + hidden_score(seed)).softmax(-1)
    return strings(tilted, 3 * DEMONSTRATIONS, seed, "demonstrations")


@torch.no_grad()
def along_the_line(seed: int, quick: bool) -> dict[str, list[tuple[float, float]]]:
    """Score and loss on the test demonstrations of soups, over the share of the first model."""
    first, second = (fine_tuned(which, seed, quick) for which in (0, 1))
    policy = fine_tuned(0, seed, quick)
    tests = demonstrations(seed)[2 * DEMONSTRATIONS :]
    asked = [policy.render(row["prompt"]) for row in tests]
    wanted = [policy.encode_response(row["completion"]) for row in tests]
    weights = [Snapshot(model).weights for model in (first, second)]
    scores, losses = [], []
    for share in SHARES:
        policy.load_state_dict(soup(weights, [share, 1 - share]), strict=False)
        drawn = measure(policy, first, hidden_score(seed), seed, "line", count=4 if quick else 64)
        said = policy.score(asked, wanted)
        scores.append((share, drawn.score))
        losses.append((share, -float(said.logprobs[said.mask].mean())))
    return {"score over the share": scores, "loss over the share": losses}


CLAIM = Claim(
    slug="salsa",
    statement="With the mean of two fine-tuned models as the reference, PPO ends with a higher "
    "score than with the first model as the reference, at an equal weight of the KL.",
    task="a tiny language model writes strings of 12 letters; hidden numbers for pairs of "
    "neighbours add up to a score, a fifth of which is the reward; two models fine-tuned on 60 "
    "better strings each; PPO from the first, 20 steps of 32 rollouts, beta 0.1 and 0.2 "
    "(which decides); true score of 256 fresh strings",
    metric=METRIC,
    higher_is_better=True,
    method="SALSA",
    baseline="PPO",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable: with beta 0.2 SALSA is ahead on one seed of three, and with beta 0.1 on "
    "two; it goes further from the first model for what it gains, and within 10 or 15 nats of"
    " it PPO is ahead on two seeds. All arms have one learning rate: of 5e-4, 1e-3 and 2e-3, "
    "tried with beta 0.2 on seed 100 (not reported), 1e-3 was the best for PPO and 2e-3 for "
    "SALSA. Each model knows its 60 strings by heart (250 steps at 2e-3); after 100 steps at "
    "1e-3 the two were so alike that the score along the line between them was nearly flat. "
    "An equal weight of the KL is no equal freedom: KL is measured to the first model in all "
    "arms, and the best score within 10 and 15 nats of it, over all weights and steps, is "
    "what equal KL buys. The curves over the share are of soups before any reinforcement "
    "learning.",
)
