"""REC's claim: on stale samples a mask does what importance sampling does not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.data_shaping import (
    balanced,
    centred_among_kept,
    exponentially_weighted,
)
from postgrad.advantages.group import group_mean_centred, group_standardised
from postgrad.claims.addition_training import task, trained_on_sums
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.objectives.estimator import one_side

METRIC = "accuracy"
STEPS, SYNC_EVERY, CLIP, TAU = 80, 20, 0.2, 0.1

# What each arm changes in `rec`, whose defaults are REC-OneSide-NoIS; learning rates: see the notes
ARMS: dict[str, dict[str, Any]] = {
    "REC-OneSide-NoIS": {},
    "REINFORCE": {"mask": "none"},
    "REC-OneSide-IS": {"denominator": "sampler"},
    "GRPO": {
        "denominator": "sampler",
        "advantage": {"name": "standardised", "std": "population", "eps": 1e-6},
    },
    "RED-Drop": {"mask": "none", "advantage": "red-drop"},
    "RED-Weight": {"mask": "none", "advantage": "red-weight"},
    "REP-OPMD": {
        "mask": "none",
        "kl_reference": "sampler",
        "kl_estimator": "k2",
        "kl_coefficient": 2 * TAU,
    },
    "REP-AsymRE": {"mask": "none", "advantage": {"name": "asymre", "tau": TAU}},
}
RATES = {arm: 3e-5 if settings.get("mask") == "none" else 3e-4 for arm, settings in ARMS.items()}


class ThreeArms:
    """The paper's bandit: samples of (0.3, 0.6, 0.1) for ever, and a policy that starts uniform.

    The samples are one group of ten, so that every advantage is the library's own.
    """

    drawn = torch.tensor([0] * 3 + [1] * 6 + [2])
    behaviour = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    reward = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64)
    rewards, group = reward[drawn], torch.zeros(10, dtype=torch.long)

    @property
    def centred(self) -> Tensor:
        return group_mean_centred(self.rewards, self.group)

    def converged(
        self, coefficients: Callable[[Tensor], Tensor] | Tensor, penalty: float = 0.0
    ) -> Tensor:
        """The policy `[3]` to which gradient ascent goes, on the mean over samples of

            c log pi - penalty (log pi - log 1/3)^2

        where c `[10]` is constant, or a function of pi / pi_b `[10]` that is held constant.
        """
        logits = torch.zeros(3, dtype=torch.float64)
        arms = torch.nn.functional.one_hot(self.drawn, 3).double() / len(self.drawn)
        for _ in range(20_000):
            policy = logits.softmax(0)
            if isinstance(coefficients, Tensor):
                weights = coefficients @ arms
            else:
                weights = coefficients((policy / self.behaviour)[self.drawn]) @ arms
            if penalty:
                weights = weights - 2 * penalty * self.behaviour * (3 * policy).log()
            step = 0.1 * (weights - weights.sum() * policy)
            logits = logits + step
            if float((logits.softmax(0) - policy).abs().max()) < 1e-9:
                break
        return logits.softmax(0)

    def on_policy(self) -> Tensor:
        """Where REINFORCE goes when the policy itself draws."""
        logits = torch.zeros(3, dtype=torch.float64)
        for _ in range(2_000):
            policy = logits.softmax(0)
            logits = logits + policy * (self.reward - policy @ self.reward)
        return logits.softmax(0)


def on_three_arms(arm: str) -> dict[str, float]:
    """Exact numbers of an arm: the policy's mean reward and probability of the best arm."""
    world = ThreeArms()

    def masked(advantages: Tensor, sampling: bool) -> Callable[[Tensor], Tensor]:
        def coefficients(ratio: Tensor) -> Tensor:
            weight = ratio if sampling else torch.ones_like(ratio)
            return one_side(ratio, advantages, CLIP, CLIP) * weight * advantages

        return coefficients

    rewards, group, centred = world.rewards, world.group, world.centred
    keep = balanced(rewards, group, torch.Generator().manual_seed(0))
    limits: dict[str, Callable[[], Tensor]] = {
        "REC-OneSide-NoIS": lambda: world.converged(masked(centred, sampling=False)),
        "REINFORCE": lambda: world.converged(centred),
        "REC-OneSide-IS": lambda: world.converged(masked(centred, sampling=True)),
        "GRPO": lambda: world.converged(
            masked(group_standardised(rewards, group, "population", 1e-6), sampling=True)
        ),
        "RED-Drop": lambda: world.converged(centred_among_kept(rewards, group, keep)),
        "RED-Weight": lambda: world.converged(exponentially_weighted(rewards, group, 1.0)),
        "REP-OPMD": lambda: world.converged(centred, penalty=TAU),
        "REP-AsymRE": lambda: world.converged(centred + TAU),
    }
    policy = limits[arm]()
    return {
        "three arms: mean reward": float(policy @ world.reward),
        "three arms: probability of the best": float(policy[2]),
    }


def run(arm: str, seed: int, quick: bool) -> Outcome:
    settings = {
        "slug": "rec",
        "sync_every": 2 if quick else SYNC_EVERY,
        "learning_rate": RATES[arm],
        **ARMS[arm],
    }
    found = trained_on_sums(settings, seed, quick, steps=STEPS)
    values = {
        METRIC: found.accuracy[-1][1],
        "accuracy before": found.accuracy[0][1],
        "entropy at the end": found.late("response/entropy"),
        **on_three_arms(arm),
    }
    curves = {
        METRIC: found.accuracy,
        "training reward": found.curve("reward"),
        "ratio to the sampler": found.curve("ratio/mean"),
        "tokens held by the mask": found.curve("ratio/clipped"),
    }
    return Outcome(values, curves)


CLAIM = Claim(
    slug="rec",
    statement="On samples of a policy that is brought up to date only every 20 steps, REINFORCE "
    "with a mean baseline learns more with a one-sided mask on the ratio than without any.",
    task=f"{task(STEPS)}; and the paper's three arms, exactly: samples of (0.3, 0.6, 0.1) for "
    "ever, rewards 0, 0.8 and 1, a policy that starts uniform",
    metric=METRIC,
    higher_is_better=True,
    method="REC-OneSide-NoIS",
    baseline="REINFORCE",
    arms=tuple(ARMS),
    findings=(
        Finding(
            "With the mask, importance sampling makes the result better still (the paper: it can "
            "be left out).",
            METRIC,
            "REC-OneSide-IS",
            "REC-OneSide-NoIS",
        ),
        Finding("Dropping surplus negatives beats GRPO.", METRIC, "RED-Drop", "GRPO"),
        Finding("Weighing responses by exp(A/T) beats GRPO.", METRIC, "RED-Weight", "GRPO"),
    ),
    run=run,
    notes="On the three arms, whose samples never change, REINFORCE goes to the second-best arm, "
    "(0, 1, 0), as do RED-Drop, which finds nothing to drop there, and AsymRE at tau 0.1; "
    "RED-Weight at T = 1 goes to (0, 0.884, 0.116), at T = 0.3 to (0, 0.624, 0.376) and only "
    "at T = 0.1 to (0, 0.298, 0.702); OPMD at tau 0.02, 0.1, 0.5 and 1 to (0, 0.726, 0.274), "
    "(0.018, 0.600, 0.383), (0.181, 0.402, 0.416) and (0.246, 0.368, 0.386); AsymRE at tau "
    "0.5 and 1 to (0, 0.840, 0.160) and (0.126, 0.732, 0.142). Samples of the policy itself "
    "lead REINFORCE to the best arm. So masks and penalties limit the damage; only data that "
    "are weighed strongly, or fresh, turn the winner. Learning rates were tried on seed 100, "
    "with other sums than those reported: 3e-4 for REC-OneSide-NoIS (0.85 there), 3e-4, 1e-4 "
    "and 3e-5 for REINFORCE (0.01, 0.10 and 0.50; with the first two it collapses within the "
    "first 20 steps). Arms with a mask have the one, the others 3e-5.",
)
