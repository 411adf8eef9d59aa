"""Opinions that no reward orders: approving beats disapproving, that neutral, that approving.

The judge (`opinions.cyclic_preference`) sees nothing but the tone of an opinion, so the shares of
the three tones in a policy's opinions say how it fares against any other: shares p and q meet with
P(p > q) = p^T C q. Nobody can win against the even mixture; whoever only improves on the last
policy goes round.
"""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Outcome
from postgrad.claims.opinions import (
    TOKENS,
    cyclic_preference,
    measure,
    reference_policy,
    sample,
    subjects,
    tone,
)
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.game import exploitability

TONES = ("approving", "disapproving", "neutral")
CYCLE = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
_ODDS = (6, 1, 1)

# what claims of iterative methods share: four optimiser steps a round of 32 prompts
ROUNDS_OF_FOUR: dict[str, Any] = {
    "rollout": {"samples": 4, "max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0},
    "minibatches": 4,
    "warmup_steps": 0,
    "learning_rate": 2e-4,
    "beta": 0.5,
}


def approving_reference(seed: int, quick: bool) -> LanguagePolicy:
    """A reference that approves in two cases of three, and so loses to neutral opinions."""
    return reference_policy(seed, *([5] if quick else []), tones=_ODDS)


def tone_shares(policy: LanguagePolicy, count: int, *stream: Any) -> Tensor:
    """The shares `[3]` of the tones among `count` opinions on every test subject."""
    texts = sample(policy, subjects()["test"], count, "tones", *stream).texts
    return torch.bincount(torch.tensor([tone(text) for text in texts]), minlength=3) / len(texts)


def played(
    slug: str,
    settings: dict[str, Any],
    policy: LanguagePolicy,
    preference: Any,
    seed: int,
    *,
    steps: int,
    quick: bool,
    every: int = 10,
) -> Outcome:
    """Train against `preference`; how much the best answer by tone gains on the policy's opinions.

    Values are of the last policy and, as training may circle, means over its second half; that of
    the average is of the average of all policies looked at.
    """
    policy.freeze_reference()
    count = 2 if quick else 20
    curve = [(0.0, tone_shares(policy, count, seed))]
    rows = [{"prompt": prompt} for prompt in subjects()["training"]]
    training = train_in_steps(
        slug,
        seed,
        {"model": policy, "data": rows, "preference": preference},
        steps=steps,
        **{
            "batch_size": 4 if quick else 32, "warmup_steps": 10, "schedule": "constant",
            "rollout": {"max_new_tokens": TOKENS}, **settings,
        },
    )  # fmt: skip
    for step, _ in training:
        if step % every == 0:
            curve.append((float(step), tone_shares(policy, count, seed)))
    last = tone_shares(policy, 2 * count, seed, "last")
    gains = [(step, gained(shares)) for step, shares in curve]
    late = [gain for step, gain in gains if step > steps / 2] or [gained(last)]
    average = torch.stack([found for _, found in curve]).mean(0)
    values = {
        "opinions: exploitability at the end": gained(last),
        "opinions: exploitability in the second half": sum(late) / len(late),
        "opinions: exploitability of the average": gained(average),
        "opinions: win rate against the reference": float(
            last.double() @ CYCLE @ curve[0][1].double()
        ),
        "opinions: KL at the end": measure(policy, "test", count, seed, "last").divergence,
        **{f"opinions: {name}": float(share) for name, share in zip(TONES, last, strict=True)},
    }
    shares = {
        f"opinions: {name}": [(step, float(found[i])) for step, found in curve]
        for i, name in enumerate(TONES)
    }
    return Outcome(values, {"opinions: exploitability": gains, **shares})


def in_rounds(slug: str, settings: dict[str, Any], seed: int, quick: bool) -> Outcome:
    """Sixteen rounds of an iterative method from the reference that writes all tones evenly."""
    return played(
        slug,
        {**ROUNDS_OF_FOUR, **settings},
        # with fewer steps no opinion has a tone yet, and there is nothing to prefer
        reference_policy(seed, *([80] if quick else [])),
        cyclic_preference,
        seed,
        steps=2 if quick else 16,
        every=2,
        quick=quick,
    )


def gained(shares: Tensor) -> float:
    """How much more often than not the best tone is preferred to opinions of these shares."""
    return float(exploitability(CYCLE, shares.double()))
