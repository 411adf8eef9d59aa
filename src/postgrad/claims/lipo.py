"""LiPO's claim: lists teach more by LiPO-lambda than by DPO on all of their pairs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.log_linear_bandit import ACTIONS, Bandit
from postgrad.claims.opinions import METRIC, TOKENS, rankings, reference_policy, trained
from postgrad.objectives.listwise import (
    lambda_loss,
    list_mle,
    pair_hinge,
    pair_logistic,
    softmax_cross_entropy,
    squared_error,
    win_rate_labels,
)
from postgrad.objectives.pairwise import logistic

SIZE, BETA, STEPS = 8, 0.05, 100
LEARNING_RATE = 3e-5
LISTS, SIZES = 100, (2, 4, 8)  # on the bandit

ListLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _best_and_worst(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """DPO's loss of a list's best and worst response."""
    best, worst = labels.argmax(1, keepdim=True), labels.argmin(1, keepdim=True)
    return logistic(scores.gather(1, best) - scores.gather(1, worst)).squeeze(1)


# method, settings, and lists (or pairs) a step: all arms see 64 responses a step
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "LiPO-lambda": ("lipo", {"learning_rate": LEARNING_RATE}, 8),
    "DPO, all pairs": ("lipo", {"learning_rate": LEARNING_RATE, "loss": "pair-logistic"}, 8),
    "DPO, best and worst": ("dpo", {"learning_rate": LEARNING_RATE}, 32),
    "list-MLE": ("lipo", {"learning_rate": LEARNING_RATE, "loss": "list-mle"}, 8),
}
# what is fitted on the bandit in each arm's runs: the arm's own loss first
LOSSES: dict[str, dict[str, ListLoss]] = {
    "LiPO-lambda": {
        "LiPO-lambda": lambda_loss,
        "label weights": partial(lambda_loss, weights="label"),
        "position weights": partial(lambda_loss, weights="position"),
        "softmax": softmax_cross_entropy,
        "pair-hinge": pair_hinge,
        "point-wise error": squared_error,
    },
    "DPO, all pairs": {"DPO, all pairs": pair_logistic},
    "DPO, best and worst": {"DPO, best and worst": _best_and_worst},
    "list-MLE": {"list-MLE": list_mle},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([5] if quick else []))
    slug, settings, batch_size = ARMS[arm]
    found = trained(
        slug,
        {"max_response_tokens": TOKENS, "beta": BETA, "batch_size": batch_size, **settings},
        policy,
        {"data": rankings(policy, seed, SIZE)},
        seed,
        steps=10 if quick else STEPS,
        samples=30 if quick else 600,
    )
    exact = on_the_bandit(arm, seed, quick)
    return Outcome(found.values | exact.values, found.curves | exact.curves)


def on_the_bandit(arm: str, seed: int, quick: bool) -> Outcome:
    """How much reward is lost against the optimum at 1 nat, after lists of several sizes."""
    bandit = Bandit.draw(seed, 0, 0.0)
    best = bandit.reward_at(bandit.weights, 1.0)
    values, curves = {}, {}
    for name, loss in LOSSES[arm].items():
        lost = []
        for size in SIZES:
            lists = bandit.lists(seed, LISTS, size, noise=1.0)
            theta = fitted(bandit, lists, loss, steps=20 if quick else 300)
            lost.append((float(size), best - bandit.reward_at(theta, 1.0)))
        values[f"bandit, reward lost: {name}"] = lost[-1][1]
        curves[f"bandit, reward lost over list size: {name}"] = lost
    return Outcome(values, curves)


def fitted(bandit: Bandit, lists: tuple[Tensor, ...], loss: ListLoss, steps: int) -> Tensor:
    """theta `[d]` after full-batch steps of Adam: lambda's loss has jumps, so no line search."""
    prompt, actions, values = lists
    present = torch.ones_like(values, dtype=torch.bool)
    labels = win_rate_labels(values, present)
    theta = torch.zeros(bandit.features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        # log-ratios to the uniform reference, at beta 1
        scores = (bandit.features @ theta).log_softmax(-1) + math.log(ACTIONS)
        loss(scores[prompt].gather(1, actions), labels, present).mean().backward()
        optimiser.step()
    return theta.detach()


CLAIM = Claim(
    slug="lipo",
    statement="Trained on lists of 8 scored responses, LiPO-lambda reaches more reward within 1 "
    "nat than DPO's loss on all of their pairs.",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; gold "
    "reward = approving words - disapproving words (8 words each, -3 to 3); 8 opinions drawn from "
    "the reference on each of 150 subjects, scored by gold reward plus noise of deviation 1; "
    "measured on 30 other subjects",
    metric=METRIC,
    higher_is_better=True,
    method="LiPO-lambda",
    baseline="DPO, all pairs",
    arms=tuple(ARMS),
    run=run,
    notes="Not separable: LiPO-lambda is not ahead of DPO on all pairs of the same lists of eight, "
    "which is ahead of it on each seed; both are ahead of DPO on the best and worst response "
    "alone where what was given up is exact, on the bandit. There every loss of whole lists "
    "loses less than 0.025 of the optimum and the best-and-worst pair 0.04 to 0.06, so that "
    "the whole list is worth something and how its pairs are weighted is not, at this size. "
    "One learning rate and beta for all arms, not tuned arm by arm; a step has 64 responses "
    "in every arm, 8 lists or 32 pairs.",
)
