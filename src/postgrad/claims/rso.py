"""RSO's claim: pairs of the estimated optimal policy teach more than pairs of another policy."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.pairing import rejection_select
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    TOKENS,
    gold,
    preferences,
    reference_policy,
    sample,
    subjects,
    trained,
)
from postgrad.objectives.pairwise import logistic
from postgrad.seeding import generator

STEPS = 100
EARLY = 100  # steps of learning after which the policy that writes the data's pairs stopped
CANDIDATES, ACCEPTED = 32, 4
LEARNING_RATE = 1e-4
METRIC = "reward at the end"
ARMS: dict[str, dict[str, Any]] = {
    "RSO": {"source": "rso-sample-rank"},
    "RSO, best of the candidates": {"source": "rso-sample-rank", "beta": 0.0},
    "sft-sample-rank": {"source": "sft-sample-rank"},
    "direct": {"source": "direct"},
}


class Ranker:
    """P(first over second) by a logistic regression on the words of both, fitted to pairs."""

    def __init__(self, rows: list[dict[str, str]]):
        texts = [row[name] for row in rows for name in ("chosen", "rejected")]
        every = sorted({word for text in texts for word in _words(text)})
        self._columns = {word: i for i, word in enumerate(every)}
        self._weights = torch.zeros(len(every), dtype=torch.float64, requires_grad=True)
        chosen, rejected = (
            self._counts([row[name] for row in rows]) for name in ("chosen", "rejected")
        )
        optimiser = torch.optim.LBFGS([self._weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            likelihood = logistic((chosen - rejected) @ self._weights).sum()
            value = likelihood + 0.5 * self._weights.square().sum()  # a standard normal prior
            value.backward()
            return value

        optimiser.step(closure)

    def __call__(self, first: list[str], second: list[str]) -> list[float]:
        gaps = (self._counts(first) - self._counts(second)) @ self._weights.detach()
        values: list[float] = torch.sigmoid(gaps).tolist()
        return values

    def scores(self, completions: list[str]) -> list[float]:
        """The reward behind the probabilities."""
        values: list[float] = (self._counts(completions) @ self._weights.detach()).tolist()
        return values

    def accuracy(self, texts: list[str]) -> float:
        """How often it orders neighbours as the gold reward does, where that differs; else 1/2."""
        first, second = texts[::2], texts[1::2]
        gaps = torch.tensor([gold(a) - gold(b) for a, b in zip(first, second, strict=True)])
        said = torch.tensor(self(first, second)) - 0.5
        right = (said * gaps > 0)[gaps != 0]
        return float(right.float().mean()) if len(right) else 0.5

    def _counts(self, texts: list[str]) -> Tensor:
        counts = torch.zeros(len(texts), len(self._columns), dtype=torch.float64)
        for row, text in enumerate(texts):
            for word in _words(text):
                if word in self._columns:
                    counts[row, self._columns[word]] += 1
        return counts


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text)


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([5] if quick else []))
    rows = preferences(reference_policy(seed + 1000, 4 if quick else EARLY), seed)
    ranker = Ranker(rows)
    known = {"accuracy of the ranker": ranker.accuracy(
        sample(policy, subjects()["test"], 10, "ranker", seed).texts)}  # fmt: skip
    curves: dict[str, list[tuple[float, float]]] = {}
    if arm == "RSO":
        found, curves = on_a_table(seed, 200 if quick else 10_000)
        known |= found
    direct = arm == "direct"
    outcome = trained(
        "rso",
        {
            "batch_size": 32 if direct else 32 // (ACCEPTED // 2),
            "rollout": {
                "samples": 8 if quick else CANDIDATES,
                "max_new_tokens": TOKENS,
                "temperature": 1.0,
                "top_k": 0,
            },
            "accepted": ACCEPTED,
            "learning_rate": LEARNING_RATE,
            **ARMS[arm],
        },
        policy,
        {
            "data": rows if direct else [{"prompt": text} for text in subjects()["training"]],
            "preference": ranker,
        },
        seed,
        steps=2 if quick else STEPS,
        every=2 if quick else 20,
        samples=30 if quick else 300,
    )
    return Outcome({**outcome.values, **known}, {**outcome.curves, **curves})


def on_a_table(
    seed: int, draws: int, outcomes: int = 50, beta: float = 0.5
) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """How far the law of the first accepted sample is from pi_r, by the number of candidates.

    One prompt with known pi_sft and rewards; duplicates are not merged; total variation.
    """
    random = generator(seed, "table")
    rewards, logits = torch.randn(2, outcomes, generator=random, dtype=torch.float64)
    optimum = (logits + rewards / beta).softmax(0)
    curve = []
    for size in (1, 2, 4, 8, 16, 32, 64, 512):
        counts = torch.zeros(outcomes, dtype=torch.float64)
        for _ in range(draws):
            candidates = logits.softmax(0).multinomial(size, replacement=True, generator=random)
            accepted = rejection_select(rewards[candidates], 1, beta, random)
            counts[candidates[accepted]] += 1
        curve.append((float(size), 0.5 * float((counts / draws - optimum).abs().sum())))
    values = {f"distance to pi_r from {size:g} candidates": gap for size, gap in curve}
    # what the distance of as many draws from pi_r itself would be
    noise = (optimum * (1 - optimum) / (2 * math.pi * draws)).sqrt().sum()
    return {**values, "its sampling noise": float(noise)}, {"distance to pi_r": curve}


CLAIM = Claim(
    slug="rso",
    statement="From the same human labels, equal numbers of pairs teach more when they are drawn "
    "from the estimated optimal policy (RSO) than when another policy wrote them (direct, as in "
    "DPO).",
    task="a tiny language model writes opinions such as `the soup was warm, old and bitter.`; gold "
    "reward = approving words - disapproving words; 300 pairs with Bradley-Terry labels, written "
    "by another, half-trained model; a ranker (logistic regression on words) is fitted to them and "
    "ranks 32 candidates on each of 150 subjects, of which 4 make 2 pairs; measured on 30 other "
    "subjects",
    metric=METRIC,
    higher_is_better=True,
    method="RSO",
    baseline="direct",
    arms=tuple(ARMS),
    run=run,
    notes="The verdict is on the reward after 100 steps with one learning rate (1e-4) for all arms,"
    " not tuned arm by arm. By then RSO has gone further than direct training on the data's "
    "pairs: 15 to 17 nats against 3 to 6. Within 1 nat it is still ahead of direct training "
    "on each seed, but on each seed behind pairs of the reference's own samples without "
    "rejection (sft-sample-rank), which falls back only later. That more candidates bring the"
    " accepted ones nearer to the target is exact: the distances called pi_r.",
)
