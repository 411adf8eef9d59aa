"""SPO's claim: where preferences are cyclic, self-play ends where a reward model is beaten."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import (
    APPROVING,
    DISAPPROVING,
    NEUTRAL,
    TOKENS,
    cyclic_preference,
    reference_policy,
    sample,
    subjects,
    tone,
)
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.game import exploitability, hedge_self_play, random_game

STEPS, EVERY, SAMPLES = 100, 5, 4
METRIC = "exploitability"
TONES = (APPROVING, DISAPPROVING, NEUTRAL)
STRENGTHS = 4  # 0 to 3 words of one tone
BETTER = 0.9

# learning rates: see the notes
ARMS: dict[str, float] = {
    "SPO": 1e-4,
    "reward model, refitted": 1e-4,
    "reward model, fitted once": 1e-4,
}


def kind_of(text: str) -> int:
    """Which tone most words have, and how many (at most three): `tone * 4 + words`."""
    which = tone(text)
    words = sum(word in TONES[which] for word in re.findall("[a-z]+", text))
    return which * STRENGTHS + min(words, STRENGTHS - 1)


def judge(first: list[str], second: list[str]) -> list[float]:
    """P(first over second): 0.9 for the more uniform tone; of equals, the tones beat in a cycle."""
    strengths = [
        (kind_of(one) % STRENGTHS, kind_of(other) % STRENGTHS)
        for one, other in zip(first, second, strict=True)
    ]
    return [
        cycle if one == other else BETTER if one > other else 1 - BETTER
        for (one, other), cycle in zip(strengths, cyclic_preference(first, second), strict=True)
    ]


def game() -> Tensor:
    """P `[12, 12]` float64: the judge, of kinds of opinions."""
    texts = [
        " ".join(TONES[which][:strength]) or "-"
        for which in range(len(TONES))
        for strength in range(STRENGTHS)
    ]
    return torch.tensor([judge([one] * len(texts), texts) for one in texts], dtype=torch.float64)


class RewardModel:
    """Bradley-Terry scores of the kinds of opinions, by maximum likelihood.

    It sees of an opinion all that the judge sees, and nothing that would mislead it. Called as a
    reward, it first takes in the comparisons of each prompt's samples with each other, unless
    `fixed`, and is fitted again to all that it has seen.
    """

    def __init__(self, fixed: bool = False):
        self.fixed = fixed
        self._game = game()
        self._wins = torch.zeros_like(self._game)
        self._scores = torch.zeros(len(self._game), dtype=torch.float64)

    def see(self, prompts: Iterable[str], completions: Iterable[str]) -> None:
        groups: dict[str, list[int]] = {}
        for prompt, text in zip(prompts, completions, strict=True):
            groups.setdefault(prompt, []).append(kind_of(text))
        for kinds in groups.values():
            for i, one in enumerate(kinds):
                for other in kinds[:i]:
                    self._wins[one, other] += self._game[one, other]
                    self._wins[other, one] += self._game[other, one]
        self._fit()

    def _fit(self, ridge: float = 0.01) -> None:
        scores = self._scores.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([scores], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            gaps = scores[:, None] - scores[None, :]
            value = -(self._wins * torch.nn.functional.logsigmoid(gaps)).sum()
            value = value / self._wins.sum().clamp(min=1) + ridge * scores.square().mean()
            value.backward()
            return value

        optimiser.step(closure)
        self._scores = scores.detach()

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        if not self.fixed:
            self.see(prompts, completions)
        scores: list[float] = self._scores[[kind_of(text) for text in completions]].tolist()
        return scores


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([5] if quick else []))
    found = trained(arm, ARMS[arm], policy, seed, 10 if quick else STEPS, 2 if quick else 20)
    if arm != "SPO":
        return found
    return Outcome(found.values | in_tables(seed, 1000 if quick else 20_000), found.curves)


def trained(
    arm: str, learning_rate: float, policy: LanguagePolicy, seed: int, steps: int, count: int
) -> Outcome:
    """Train one arm and follow the kinds of `count` opinions on every test subject."""
    prompts = subjects()["training"]
    objects: dict[str, Any] = {"model": policy, "data": [{"prompt": p} for p in prompts]}
    settings: dict[str, Any] = {}
    if arm == "SPO":
        slug, objects["preference"] = "spo-self-play", judge
    else:
        # the same policy gradient on the scores, less their mean in the group
        slug = "grpo"
        settings = {"normalise": "none", "aggregation": "sequence-sum-constant"}
        model = RewardModel()
        if arm == "reward model, fitted once":
            texts = sample(policy, prompts, SAMPLES, "comparisons", seed).texts
            model.see([p for p in prompts for _ in range(SAMPLES)], texts)
            model.fixed = True
        objects["reward"] = model
    measured = [kinds(policy, count, seed, 0)]
    training = train_in_steps(
        slug,
        seed,
        objects,
        steps=steps,
        batch_size=32,
        warmup_steps=10,
        schedule="constant",
        learning_rate=learning_rate,
        rollout={"samples": SAMPLES, "max_new_tokens": TOKENS},
        **settings,
    )
    for step, _ in training:
        if step % EVERY == 0:
            measured.append(kinds(policy, count, seed, step))
    table = game()
    start, last = measured[0], measured[-1]
    mixture = torch.stack(measured[len(measured) // 2 :]).mean(0)
    by_tone = mixture.view(len(TONES), STRENGTHS)
    whole_tone = [3 + STRENGTHS * which for which in range(len(TONES))]
    beats = [float(policy_ @ table @ start) for policy_ in measured]
    return Outcome(
        {
            METRIC: float(exploitability(table, mixture)),
            "exploitability of the last policy": float(exploitability(table, last)),
            "exploitability at the start": float(exploitability(table, start)),
            "win rate against the start": float(mixture @ table @ start),
            "win rate of the last policy against the start": beats[-1],
            "share of opinions of one tone alone": float(mixture[whole_tone].sum()),
            "largest share of a tone": float(by_tone.sum(1).max()),
            "largest share of a tone, last policy": float(
                last.view(len(TONES), STRENGTHS).sum(1).max()
            ),
        },
        {
            "exploitability": [
                (EVERY * i, float(exploitability(table, now))) for i, now in enumerate(measured)
            ],
            "win rate against the start": [(EVERY * i, value) for i, value in enumerate(beats)],
            **{
                f"share of {name} opinions": [
                    (EVERY * i, float(now.view(len(TONES), STRENGTHS)[which].sum()))
                    for i, now in enumerate(measured)
                ]
                for which, name in enumerate(("approving", "disapproving", "neutral"))
            },
        },
    )


def kinds(policy: LanguagePolicy, count: int, *stream: Any) -> Tensor:
    """How often the policy writes each kind of opinion on test subjects, `[12]` float64."""
    texts = sample(policy, subjects()["test"], count, "kinds", *stream).texts
    counts = torch.bincount(
        torch.tensor([kind_of(text) for text in texts]), minlength=len(TONES) * STRENGTHS
    )
    return counts.double() / len(texts)


def in_tables(seed: int, steps: int, size: int = 10) -> dict[str, float]:
    """Exact self-play: the average policy nears the winner, the last one goes round it.

    In the game of three whose winner is (0.3, 0.3, 0.4), and in a random one.
    """
    cycle = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
    games = {
        "a cycle of three": (cycle, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)),
        f"{size} random responses": (
            random_game(size, torch.Generator().manual_seed(seed)),
            torch.zeros(size, dtype=torch.float64),
        ),
    }
    found = {}
    for name, (table, start) in games.items():
        step = math.sqrt(8 * math.log(len(table)) / steps)
        average, last = hedge_self_play(table, start, step, steps)
        found[f"{name}: exploitability of the average"] = float(exploitability(table, average))
        found[f"{name}: exploitability of the last"] = float(exploitability(table, last))
    return found


CLAIM = Claim(
    slug="spo-self-play",
    statement="Under cyclic preferences self-play reaches a policy that hardly any response beats, "
    "where the same policy gradient on a reward model fitted to the same comparisons is beaten.",
    task="a tiny language model writes opinions; the judge prefers (0.9) the opinion with more "
    "words of one tone, and of equals approving over disapproving over neutral over approving; "
    "exploitability = P(best kind of opinion over the policy) - 1/2, of the uniform mixture of the "
    "policies of the second half of training, on 30 other subjects",
    metric=METRIC,
    higher_is_better=False,
    method="SPO",
    baseline="reward model, refitted",
    arms=tuple(ARMS),
    run=run,
    notes="",
)
