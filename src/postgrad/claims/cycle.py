"""Opinions under a cyclic preference between their tones: approving, disapproving, neutral.

The preference sees tones alone, so the shares of the three tones are all of a policy's strategy and
its exploitability is exact but for sampling. The even mixture cannot be exploited; whoever only
improves on the last policy goes round.
"""

from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Outcome
from postgrad.claims.opinions import (
    TOKENS,
    cyclic_preference,
    sample,
    subjects,
    tone,
)
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.game import exploitability

TONES = (" good.", " bad.", " old.")  # one opinion of each tone, in the order of `tone`
CYCLE = torch.tensor([cyclic_preference([text] * 3, list(TONES)) for text in TONES]).double()

# what every arm has in common: four samples on each of 32 subjects, four optimiser steps a round
WORLD: dict[str, Any] = {
    "rollout": {"samples": 4, "max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0},
    "batch_size": 32,
    "minibatches": 4,
    "warmup_steps": 0,
    "learning_rate": 2e-4,
    "beta": 0.5,
}


def tones(policy: LanguagePolicy, count: int, *stream: Any) -> tuple[Tensor, float]:
    """Shares `[3]` of the tones of `count` opinions on every test subject, and KL in nats."""
    drawn = sample(policy, subjects()["test"], count, "tones", *stream)
    with torch.no_grad():
        now = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
        with policy.reference():
            before = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
    found = torch.tensor([tone(text) for text in drawn.texts])
    return torch.bincount(found, minlength=3).double() / len(found), float((now - before).mean())


def played(
    slug: str,
    settings: dict[str, Any],
    policy: LanguagePolicy,
    seed: int,
    *,
    quick: bool,
) -> Outcome:
    """Sixteen rounds of an online method under the cyclic preference.

    Every other one is followed by a look at 600 fresh opinions.

    Values: the mean exploitability over the second half of the rounds, that of the average of all
    policies measured, and the last one's win rate against the reference, tones and KL.
    """
    rounds, samples = (2, 1) if quick else (16, 20)
    policy.freeze_reference()
    followed = [(0, *tones(policy, samples, seed, 0))]
    training = train_in_steps(
        slug,
        seed,
        {
            "model": policy,
            "data": [{"prompt": subject} for subject in subjects()["training"]],
            "preference": cyclic_preference,
        },
        steps=rounds,
        **settings,
    )
    for step, _ in training:
        if step % 2 == 0:
            followed.append((step, *tones(policy, samples, seed, step)))
    exploited = [float(exploitability(CYCLE, shares)) for _, shares, _ in followed]
    average = torch.stack([shares for _, shares, _ in followed]).mean(0)
    _, last, divergence = followed[-1]
    late = exploited[len(exploited) // 2 :]
    return Outcome(
        {
            "exploitability of late rounds": sum(late) / len(late),
            "exploitability of the average": float(exploitability(CYCLE, average)),
            "win rate against the reference": float(last @ CYCLE @ followed[0][1]),
            "approving": float(last[0]),
            "disapproving": float(last[1]),
            "neutral": float(last[2]),
            "KL at the end": divergence,
        },
        {
            "exploitability": [
                (float(step), value)
                for (step, _, _), value in zip(followed, exploited, strict=True)
            ],
            "KL": [(float(step), nats) for step, _, nats in followed],
        },
    )
