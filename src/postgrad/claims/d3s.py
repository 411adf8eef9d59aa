"""D3S's claim: few responses and tokens of large |advantage| teach as much as all, for less."""

from typing import Any

import torch

from postgrad.batch import Batch
from postgrad.claims.addition_training import task, trained_on_sums
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.stepping import own_batch
from postgrad.seeding import generator

METRIC, TRAINED = "trained tokens", "tokens trained in all"
THRESHOLD, EVALUATE_EVERY = 0.8, 10
SHARE = 0.25  # of the responses, where it does not grow

_SAME = {"slug": "policy-gradient", "advantage": "standardised"}
ARMS: dict[str, dict[str, Any]] = {
    "D3S": {"slug": "d3s", "mask": {"name": "d3s", "tokens_initial": 0.5}},
    "GRPO": _SAME,
    "random quarter": _SAME,
    "D1S-Cross": {
        "slug": "d3s",
        "mask": {
            "name": "d3s",
            "responses_final": SHARE,
            "tokens_initial": 1.0,
        },
    },
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    tokens, spread, silent = [0.0], [], []

    def collect(method: Any, step: int) -> Batch:
        batch = own_batch(method, step)
        if arm == "random quarter":
            chance = generator(seed, "random quarter", step)
            kept = torch.randperm(len(batch), generator=chance)[: round(SHARE * len(batch))]
            batch = batch.select(kept.sort().values)
        tokens.append(tokens[-1] + batch.tokens)
        spread.append(float(batch.advantages.var()))
        silent.append(float((batch.advantages == 0).float().mean()))
        return batch

    settings = {"learning_rate": 3e-4, **ARMS[arm]}
    training = trained_on_sums(
        settings, seed, quick, collect=collect, evaluate_every=EVALUATE_EVERY
    )
    curve = [(tokens[int(step)], accuracy) for step, accuracy in training.accuracy]
    values = {
        METRIC: until(curve, THRESHOLD),
        TRAINED: tokens[-1],
        "accuracy": curve[-1][1],
        "accuracy before": curve[0][1],
        "variance of advantages": sum(spread) / len(spread),
        "responses without an advantage": sum(silent) / len(silent),
    }
    return Outcome(
        values,
        {
            "accuracy": training.accuracy,
            "accuracy over trained tokens": curve,
            "training reward": training.curve("reward"),
        },
    )


def until(curve: list[tuple[float, float]], threshold: float) -> float:
    """Where a curve first reaches a threshold, in a straight line between its points.

    Its end where it never does.
    """
    before, low = curve[0]
    for x, y in curve:
        if y >= threshold:
            return x if y <= low else before + (x - before) * (threshold - low) / (y - low)
        before, low = x, y
    return before


CLAIM = Claim(
    slug="d3s",
    statement="The responses of the most extreme advantages and their tokens of the largest "
    "|A| entropy, more of both as training goes on, reach a given accuracy with fewer trained "
    "tokens than all of them.",
    task=f"{task()}; tokens in the loss until accuracy, measured every {EVALUATE_EVERY} steps, is "
    f"{THRESHOLD}, or all where it never is",
    metric=METRIC,
    higher_is_better=False,
    method="D3S",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "Fewer too than a random quarter of the responses",
            METRIC,
            "D3S",
            "random quarter",
            higher_is_better=False,
        ),
        Finding(
            "More of what is chosen at random has no advantage",
            "responses without an advantage",
            "random quarter",
            "D3S",
        ),
        Finding(
            "All responses end at a higher accuracy than a fixed quarter",
            "accuracy",
            "GRPO",
            "D1S-Cross",
        ),
    ),
    notes="Tuned on seed 100, with other sums than those reported. Learning rates 1e-4 and 3e-4 "
    "were tried for GRPO over 20 steps: 0.73 and 0.77 of 300 sums; 1e-4 gave D3S 0.74. All "
    "arms have 3e-4. At the end of a whole run D3S was at 0.88 after 76 thousand tokens, "
    "GRPO at 0.87 after 153 thousand; both pass 0.55 within ten steps, so the threshold is "
    "0.8. D3S's share of responses grows from a quarter, that of tokens from a half, both "
    "to all.",
)
