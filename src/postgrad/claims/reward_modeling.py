"""Reward modelling's claim: an ensemble finds wrong labels, and what it finds mends the reward."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.noisy_pairs import NoisyPairs, Reward, share_right
from postgrad.claims.opinions import TOKENS, gold, reference_policy, sample, subjects
from postgrad.claims.stepping import train_in_steps
from postgrad.evaluation.statistics import separation
from postgrad.methods.language.rlhf.preference_strength import (
    Treatment,
    parse_remedies,
    treated,
    untreated,
)
from postgrad.models.language import LanguagePolicy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.reward_modeling import weakest
from postgrad.rewards.learned import LearnedReward
from postgrad.seeding import generator

FLIP_RATE, SHARE = 0.2, 0.2
PAIRS, MODELS, ENSEMBLE_EPOCHS, EPOCHS, ETA = 4000, 10, 2, 12, 0.1
METRIC = "accuracy on clean pairs"

# arms by name: the remedies, and the constant of label smoothing
ARMS: dict[str, tuple[str, float]] = {
    "flip and margin": ("flip+margin", 0.0),
    "plain": ("none", 0.0),
    "flip": ("flip", 0.0),
    "margin": ("margin", 0.0),
    "soft labels": ("soft", 0.0),
    "drop": ("drop", 0.0),
    "smoothing 0.1": ("none", 0.1),
    "MetaRM": ("none", 0.0),
}
MEAN = "mean of the ensemble"
ALONE = ("weakest 20 % alone", "strongest 20 % alone")
ON_OPINIONS = ("flip and margin", "plain")
EACH, STEPS, RATE, OPINION_MODELS = 5, 60, 5e-4, 5


def run(arm: str, seed: int, quick: bool) -> Outcome:
    exact = on_points(arm, seed, quick)
    if arm not in ON_OPINIONS:
        return exact
    found = on_opinions(arm, seed, quick)
    return Outcome(
        exact.values | {f"opinions: {name}": value for name, value in found.values.items()},
        exact.curves | {f"opinions: {name}": curve for name, curve in found.curves.items()},
    )


@cache
def _world(seed: int, quick: bool) -> tuple[NoisyPairs, list[Reward]]:
    """The pairs and the ensemble, which are the same for all arms."""
    pairs = NoisyPairs.draw(seed, PAIRS // (10 if quick else 1), FLIP_RATE)
    return pairs, pairs.ensemble(2 if quick else MODELS, ENSEMBLE_EPOCHS, seed)


def on_points(arm: str, seed: int, quick: bool) -> Outcome:
    """The deciding numbers: rewards of points, fitted to labels of which some are flipped."""
    pairs, ensemble = _world(seed, quick)
    strength = pairs.strength(ensemble)
    if arm == MEAN:
        training = iter([lambda points: torch.stack([model(points) for model in ensemble]).mean(0)])
    else:
        training = pairs.train(
            1 if quick else EPOCHS,
            seed,
            "final",
            treatment=_treatment(arm, strength),
            eta=ETA if arm == "MetaRM" else 0.0,
        )
    followed = [
        [share_right(model, held) for held in (pairs.validation, pairs.clean, pairs.shifted)]
        for model in training
    ]
    _, clean, shifted = max(followed)  # that of the best epoch by pairs that are noisy themselves
    found = separation((-strength[pairs.flipped]).tolist(), (-strength[~pairs.flipped]).tolist())
    values = {
        METRIC: clean,
        "accuracy on shifted pairs": shifted,
        "accuracy on clean pairs at the end": followed[-1][1],
        "flips found (AUC)": found,
    }
    tenths = strength.argsort().tensor_split(10)
    right = [float(pairs.right[part].float().mean()) for part in tenths]
    curves = {
        "accuracy over epochs": _numbered([clean for _, clean, _ in followed]),
        "right labels over tenth of strength": _numbered(right),
    }
    return Outcome(values, curves)


def _treatment(arm: str, strength: torch.Tensor) -> Treatment:
    count = len(strength)
    if arm in ALONE:
        chosen = weakest(strength if arm == ALONE[0] else -strength, SHARE)
        return replace(untreated(count, 0.0), kept=chosen.nonzero().squeeze(1))
    remedies, smoothing = ARMS[arm]
    return treated(strength, parse_remedies(remedies), SHARE, smoothing)


def _numbered(values: list[float]) -> list[tuple[float, float]]:
    return [(float(number), value) for number, value in enumerate(values, start=1)]


def on_opinions(arm: str, seed: int, quick: bool) -> Outcome:
    """The method on a language model: how it orders opinions by their gold reward."""
    policy = reference_policy(seed, *([5] if quick else []))
    models = 2 if quick else OPINION_MODELS
    remedies, _ = ARMS[arm]
    settings: dict[str, Any] = {}
    if remedies != "none":
        settings = {
            "strength": remedies,
            "flip_share": SHARE,
            "ensemble": models,
            "ensemble_epochs": ENSEMBLE_EPOCHS,
        }
    rows = labelled(policy, seed, 1 if quick else EACH, keep_ties=quick)
    model = ScalarModel.on_body_of(policy)
    training = train_in_steps(
        "reward-modeling",
        seed,
        {"model": model, "data": rows},
        data={"name": "opinions", "flip_rate": FLIP_RATE},
        steps=(10 if quick else STEPS) + (models if remedies != "none" else 0),
        batch_size=32,
        learning_rate=RATE,
        schedule="linear",
        max_response_tokens=TOKENS,
        **settings,
    )
    values, tenths = {}, []
    for _, metrics in training:
        if "strength/detection" in metrics:
            values["flips found (AUC)"] = metrics["strength/detection"]
            tenths = [metrics[f"strength/right_in_decile_{i}"] for i in range(1, 11)]
    reward = LearnedReward(model)
    for name, best_of in (("accuracy on clean pairs", 1), ("accuracy on shifted pairs", 4)):
        values[name] = accuracy(reward, policy, seed, best_of)
    curves = {"unflipped labels over tenth of strength": _numbered(tenths)} if tenths else {}
    return Outcome(values, curves)


def labelled(
    policy: LanguagePolicy, seed: int, each: int, *, keep_ties: bool
) -> list[dict[str, str]]:
    """At most `each` pairs of unlike worth on a training subject, P = sigma(3 times the gap)."""
    chance = generator(seed, "reward labels")
    rows = []
    for prompt, first, second in _couples(policy, "training", 2 * each, 1, seed):
        gap = gold(first) - gold(second)
        wins = torch.sigmoid(torch.tensor(3 * gap))
        if gap == 0 and not keep_ties:
            continue
        if torch.rand((), generator=chance) >= wins:
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    return rows


def accuracy(reward: LearnedReward, policy: LanguagePolicy, seed: int, best_of: int) -> float:
    """The share of pairs on test subjects that a reward orders as the gold reward does."""
    couples = _couples(policy, "test", 40 // best_of, best_of, seed)
    ordered = [
        (prompt, *sorted((one, other), key=gold))
        for prompt, one, other in couples
        if gold(one) != gold(other)
    ]
    if not ordered:
        return 0.5
    prompts, worse, better = (list(column) for column in zip(*ordered, strict=True))
    gaps = zip(reward(prompts, better), reward(prompts, worse), strict=True)
    return sum(high > low for high, low in gaps) / len(ordered)


def _couples(
    policy: LanguagePolicy, split: str, count: int, best_of: int, seed: int
) -> list[tuple[str, str, str]]:
    """Prompts with two different opinions each, of `count` drawn on every subject."""
    return [
        (prompt, texts[i], texts[i + 1])
        for prompt, texts in _opinions(policy, split, count, best_of, seed)
        for i in range(0, count, 2)
        if texts[i] != texts[i + 1]
    ]


def _opinions(
    policy: LanguagePolicy, split: str, count: int, best_of: int, seed: int
) -> list[tuple[str, list[str]]]:
    """`count` opinions on every subject, each the best of so many: a policy that has moved on."""
    prompts = subjects()[split]
    drawn = sample(policy, prompts, count * best_of, "rewards", split, seed, best_of).texts
    texts = [text if text.strip() else " -" for text in drawn]
    best = [max(texts[i : i + best_of], key=gold) for i in range(0, len(texts), best_of)]
    return [(prompt, best[i * count : (i + 1) * count]) for i, prompt in enumerate(prompts)]


CLAIM = Claim(
    slug="reward-modeling",
    statement="With a fifth of the labels flipped, an ensemble of reward models on the same labels "
    "tells which: the right labels rise with the strength, and turning the weakest fifth round, "
    "with the strength as a margin, gives a better reward than the labels as they are.",
    task="4000 pairs of points with 32 features, labelled by Bradley-Terry with a random network's "
    "reward and 20 % flipped; 10 networks of 2 epochs give the strength, one of 12 epochs is the "
    "reward; share of 4000 clean pairs that it orders right",
    metric=METRIC,
    higher_is_better=True,
    method="flip and margin",
    baseline="plain",
    arms=(*ARMS, MEAN, *ALONE),
    run=run,
    notes="Not separable from a plain reward that is stopped early; without early stopping flip and"
    " margin keeps its accuracy where the plain reward's falls to 0.78. Flips are found with "
    "an AUC of 0.90, the weakest 20 % alone teach less than chance, and soft labels, which "
    "need no threshold, are the best remedy on two seeds of three. MetaRM shows no effect. ",
)
