"""GCPO's claim: a behaviour that is rewarded where it helps is learnt there, and only there."""

from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.group import group_standardised
from postgrad.advantages.group_contrast import group_contrast_mask
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.seeding import generator

FEATURES, STEPS, PROBLEMS, RESPONSES, TESTED = 32, 150, 16, 16, 3000
TOLERANCE, WEIGHT = 0.1, 0.5
KINDS = {"helps": (0.7, 0.4), "hurts": (0.4, 0.7), "does not matter": (0.55, 0.55)}
METRIC, HURT = "success over training", "success at the end, where it hurts"

# learning rates: see the notes
ARMS: dict[str, dict[str, Any]] = {
    "GCPO, partition": {"learning_rate": 200.0, "mask": "partition"},
    "GCPO, prompted": {"learning_rate": 100.0, "mask": "prompted"},
    "GRPO": {"learning_rate": 200.0, "mask": "nothing"},
    "always rewarded": {"learning_rate": 3.0, "mask": "always"},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    """A logistic policy of showing the behaviour; its success on test problems is exact."""
    mask, steps = ARMS[arm]["mask"], 5 if quick else STEPS
    direction = torch.randn(FEATURES, generator=generator(seed, "direction"))
    weights = torch.zeros(FEATURES + 1, requires_grad=True)
    tested, kinds, rates = problems(direction, TESTED, generator(seed, "test"))
    curve, share = [], []
    for step in range(steps + 1):
        with torch.no_grad():
            shown = (tested @ weights).sigmoid()
            success = rates[:, 0] * (1 - shown) + rates[:, 1] * shown
            curve.append([float(success[kinds == k].mean()) for k in range(len(KINDS))])
            share.append([float(shown[kinds == k].mean()) for k in range(len(KINDS))])
        random = generator(seed, "step", step)
        found, _, its_rates = problems(direction, PROBLEMS, random)
        loss = surrogate(found @ weights, its_rates, mask, random)
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= ARMS[arm]["learning_rate"] * gradient
    means = [sum(of_kind) / len(KINDS) for of_kind in curve]
    values = {METRIC: sum(means) / len(means), "success at the end": means[-1]}
    for k, kind in enumerate(KINDS):
        values[f"success at the end, where it {kind}"] = curve[-1][k]
        values[f"share that shows it at the end, where it {kind}"] = share[-1][k]
    curves = {"success": [(float(i), mean) for i, mean in enumerate(means)][::3]}
    for k, kind in enumerate(KINDS):
        points = [(float(i), of_kind[k]) for i, of_kind in enumerate(share)]
        curves[f"share that shows it, where it {kind}"] = points[::3]
    return Outcome(values, curves)


def problems(
    direction: Tensor, count: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Features `[P, d + 1]`, kinds `[P]`, and success `[P, 2]` without and with the behaviour.

    The kind depends on the features' component along `direction`, a third of them each; the last
    feature is constant.
    """
    features = torch.randn(count, FEATURES, generator=random) / FEATURES**0.5
    along = features @ direction / direction.norm() * FEATURES**0.5
    kinds = torch.where(along > 0.43, 0, torch.where(along < -0.43, 1, 2))
    by_kind = torch.tensor([[plain, shown] for shown, plain in KINDS.values()])
    features = torch.cat([features, torch.full((count, 1), FEATURES**-0.5)], 1)
    return features, kinds, by_kind[kinds]


def surrogate(logits: Tensor, rates: Tensor, mask: str, random: torch.Generator) -> Tensor:
    """GRPO's loss, of `RESPONSES` responses to each problem in all."""
    responses = RESPONSES // 2 if mask == "prompted" else RESPONSES
    shows, correct = sampled(logits.detach().sigmoid(), rates, responses, random)
    if mask == "prompted":
        asked = torch.arange(RESPONSES // 2) < RESPONSES // 4
        asked = asked.float().expand(len(rates), -1)
        contrast = group_contrast_mask(_succeeds(asked, rates, random), asked.bool(), TOLERANCE)
    elif mask == "partition":
        contrast = group_contrast_mask(correct, shows.bool(), TOLERANCE)
    else:
        contrast = torch.full((len(rates),), float(mask == "always"))
    reward = correct + WEIGHT * contrast[:, None] * shows
    group = torch.arange(len(rates)).repeat_interleave(responses)
    advantages = group_standardised(reward.flatten(), group, eps=1e-6).view_as(reward)
    likelihood = torch.where(
        shows.bool(),
        torch.nn.functional.logsigmoid(logits)[:, None],
        torch.nn.functional.logsigmoid(-logits)[:, None],
    )
    return -(advantages * likelihood).mean()


def sampled(
    shown: Tensor, rates: Tensor, responses: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Whether responses `[P, G]` show the behaviour, with probabilities `[P]`, and succeed."""
    shows = (torch.rand(len(rates), responses, generator=random) < shown[:, None]).float()
    return shows, _succeeds(shows, rates, random)


def _succeeds(shows: Tensor, rates: Tensor, random: torch.Generator) -> Tensor:
    chance = torch.where(shows.bool(), rates[:, 1:], rates[:, :1])
    return (torch.rand(shows.shape, generator=random) < chance).float()


CLAIM = Claim(
    slug="gcpo",
    statement="A behaviour that is rewarded where responses with it are more accurate than those "
    "without, and penalised where they are less, brings more success than one that is always "
    "rewarded.",
    task="problems with an optional behaviour that helps with a third of them (success 0.7 with "
    "it, 0.4 without), hurts with a third (0.4 to 0.7) and does not matter for a third, which "
    f"their {FEATURES} features tell; a logistic policy of the behaviour, {STEPS} steps of "
    f"{PROBLEMS} fresh problems with {RESPONSES} responses each; exact success on {TESTED} unseen "
    "problems, the mean over training",
    metric=METRIC,
    higher_is_better=True,
    method="GCPO, partition",
    baseline="always rewarded",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "It brings more success than rewarding accuracy alone",
            METRIC,
            "GCPO, partition",
            "GRPO",
        ),
        Finding(
            "Half of the responses are well spent on groups that are asked for the behaviour and "
            "asked not to",
            METRIC,
            "GCPO, prompted",
            "GCPO, partition",
        ),
        Finding(
            "Where the behaviour hurts, it is unlearnt",
            HURT,
            "GCPO, partition",
            "always rewarded",
        ),
    ),
    notes="Learning rates of gradient descent from 1 to 800 were tried for every arm on seed 100. "
    "At one small rate GCPO learns faster than GRPO, as its mask adds to the advantage; with "
    "each arm's best rate the difference is gone. The reason: the mask is a threshold of the "
    "same difference of accuracies that GRPO's advantages already follow, so it adds size and"
    " no information. Large models, whose rate is bounded by all else that they learn, may "
    "profit from the size. Length and format are left out: no response here has any. A first "
    "bandit, with a table of logits for every problem, favoured GCPO at every rate, but its "
    "score only rose with the rate; a logistic policy on fresh problems took its place. The "
    "unconditional reward was made the baseline after GRPO had proved inseparable, which is a"
    " finding. No language model is trained here.",
)
