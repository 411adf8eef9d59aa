"""RTO's claim: with some of a DPO model's log-ratio at every token PPO gets on sooner."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.claims.symbols import (
    LETTERS,
    ROLLOUT,
    TOKENS,
    Measured,
    followed,
    hidden_score,
    made_once,
    measure,
    outcome,
    preferences,
    prompts,
    reference_policy,
    sample,
    score_by,
)
from postgrad.models.language import LanguagePolicy
from postgrad.seeding import derive

PAIRS, DPO_BETA, DPO_STEPS, DPO_RATE = 2000, 0.1, 100, 3e-4
STEPS, REPEATS, QUICK = 20, 2, 5
NOISE = 0.2
METRIC = "mean score over the run"
FROM_DPO = "PPO from the DPO model"
# the same for all arms
PPO: dict[str, Any] = {
    "rollout": ROLLOUT,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "critic_rate": 1.0,
    "epochs": 4,
    "minibatches": 1,
    "kl_coefficient": 0.01,
    "aggregation": "token-mean",
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "RTO": ("rto", {"dpo_reward_scale": 0.05, "dpo_reward_clip": 0.05}),
    "PPO": ("ppo-language", {}),
    "RTO, scale 1, not clipped": ("rto", {"dpo_reward_scale": 1.0, "dpo_reward_clip": 0.0}),
    FROM_DPO: ("ppo-language", {}),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    slug, settings = ARMS[arm]
    hidden = hidden_score(seed)
    reference = reference_policy(seed, *([QUICK] if quick else []))
    dpo_model = preferring(seed, quick)
    objects: dict[str, Any] = {"data": prompts(8), "reward": score_by(hidden, noise=NOISE)}
    values = {}
    if slug == "rto":
        objects["dpo_model"] = dpo_model
    if arm == "RTO":
        values = {
            "score of the DPO model": measure(dpo_model, reference, hidden, seed).score,
            "correlation of token rewards": correlation(
                *token_rewards(dpo_model, reference, seed), hidden
            ),
        }
    repeats = []
    for repeat in range(1 if quick else REPEATS):
        start = reference_policy(seed, *([QUICK] if quick else []))
        points = followed(
            slug,
            preferring(seed, quick) if arm == FROM_DPO else start,
            objects,
            hidden,
            derive(seed, "repeat", repeat),
            steps=2 if quick else STEPS,
            every=1 if quick else 4,
            reference=reference,
            count=2 if quick else 32,
            **{**PPO, **settings},
        )
        repeats.append(list(points))
    return outcome([averaged(points) for points in zip(*repeats, strict=True)], **values)


def averaged(points: tuple[tuple[int, Measured], ...]) -> tuple[int, Measured]:
    """The same step of several runs as one."""
    several = [point for _, point in points]
    score = sum(point.score for point in several) / len(several)
    divergence = sum(point.divergence for point in several) / len(several)
    return points[0][0], Measured(score, divergence)


def preferring(seed: int, quick: bool) -> LanguagePolicy:
    """What DPO makes of the reference policy, by pairs of its own strings."""
    steps, pairs = (QUICK, 100) if quick else (DPO_STEPS, PAIRS)

    def make() -> LanguagePolicy:
        policy = reference_policy(seed, *([QUICK] if quick else []))
        rows = preferences(policy, hidden_score(seed), pairs, seed)
        training = train_in_steps(
            "dpo",
            seed,
            {"model": policy, "data": rows},
            steps=steps,
            batch_size=64,
            beta=DPO_BETA,
            learning_rate=DPO_RATE,
            max_response_tokens=TOKENS,
        )
        for _ in training:
            pass
        return policy

    return made_once("dpo", make, seed=seed, recipe=[pairs, DPO_BETA, steps, DPO_RATE])


def correlation(ratios: Tensor, written: list[str], hidden: Tensor) -> float:
    """Of log-ratios `[N, T]` of letters with the hidden numbers of those and the ones before.

    `written` are N strings, each with its prompt in front.
    """
    found = []
    for row, letters in enumerate(written):
        places = [LETTERS.find(letter) for letter in letters]
        for place, (a, b) in enumerate(pairwise(places)):
            if a >= 0 and b >= 0:
                found.append([float(ratios[row, place]), float(hidden[a, b])])
    return float(torch.tensor(found).T.corrcoef()[0, 1])


@torch.no_grad()
def token_rewards(
    dpo_model: LanguagePolicy, reference: LanguagePolicy, seed: int
) -> tuple[Tensor, list[str]]:
    """log pi_dpo/pi_ref `[N, T]` of fresh strings of the reference, and the strings `[N]`."""
    drawn = sample(reference, 32, "token rewards", seed)
    said = dpo_model.score(drawn.prompts, drawn.responses).logprobs
    expected = reference.score(drawn.prompts, drawn.responses).logprobs
    written = [LETTERS[i // 32] + text for i, text in enumerate(drawn.texts)]
    return said - expected, written


CLAIM = Claim(
    slug="rto",
    statement="With a little of a DPO model's log-ratio paid at every token, PPO reaches higher "
    "scores from the same number of rollouts than with the reward at the last token alone.",
    task="a tiny language model writes strings of 12 letters; hidden numbers for pairs of "
    "neighbours add up to a score; the reward is a fifth of that with an error of deviation 0.2; "
    "DPO (beta 0.1) on 2000 pairs of the reference's strings gives the token rewards; 20 steps of "
    "16 rollouts, twice; the mean true score of 256 fresh strings, over every fourth step",
    metric=METRIC,
    higher_is_better=True,
    method="RTO",
    baseline="PPO",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable: RTO is ahead of PPO on two seeds (by 0.3 and 1.2) and behind on one; PPO "
    "started from the DPO model, which uses the pairs more simply, is ahead of both on every "
    "seed, and token rewards of scale 1 without a limit ruin the run, as the paper warns. All"
    " arms learn from the same number of rollouts, with one learning rate and 4 passes, which"
    " were best for PPO on seeds 100 and 101 (not reported): 5e-4, 1e-3 and 2e-3 with 2 "
    "passes, 1e-3 and 2e-3 with 4, and 1e-3 with 8 were tried for PPO and RTO. DPO's learning"
    " rate is the better of 1e-4 and 3e-4. The scale and limit of the token rewards are the "
    "paper's. RTO and the last arm also use the 2000 labelled pairs, PPO does not; the errors"
    " of the reward stand for those of a reward model. Where rewards have no error and a step"
    " has 64 rollouts PPO needs no help: on seed 100 both had the same mean score over 40 "
    "steps (6.61; at a third of the learning rate 5.38 and RTO 5.30).",
)
