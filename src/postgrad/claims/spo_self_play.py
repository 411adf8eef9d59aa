"""SPO's claim: self-play ends where no response beats it, a reward model does not."""

import math
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
from postgrad.seeding import generator

GAMES, RESPONSES, ROUNDS = 10, 10, 2000
STEPS, EVERY, SAMPLES, COUNT = 100, 5, 4, 5
METRIC = "exploitability of the average"
TONES = ("approving", "disapproving", "neutral")

STEP = math.sqrt(8 * math.log(RESPONSES) / ROUNDS)  # which bounds the regret best
# step size in tables and learning rate on the language model: see the notes
ARMS: dict[str, tuple[float, float | None]] = {
    "SPO": (3 * STEP, 1e-4),
    "reward model": (0.03 * STEP, 1e-4),
    "reward model, newest comparisons": (0.5 * STEP, 1e-4),
    "reward model, first comparisons": (0.03 * STEP, None),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    step, learning_rate = ARMS[arm]
    exact = in_tables(arm, step, seed, 50 if quick else ROUNDS)
    if learning_rate is None:
        return Outcome(exact)
    policy = reference_policy(seed, *([5] if quick else []))
    found = on_opinions(arm, learning_rate, policy, seed, 5 if quick else STEPS)
    return Outcome(
        exact | {f"opinions: {name}": value for name, value in found.values.items()},
        {f"opinions: {name}": curve for name, curve in found.curves.items()},
    )


# In tables ----------------------------------------------------------------------------------


def in_tables(arm: str, step: float, seed: int, rounds: int) -> dict[str, float]:
    """Means over random games of what the average policy and the last one lose to some response."""
    found = {METRIC: 0.0, "exploitability of the last": 0.0, "exploitability at the start": 0.0}
    start = torch.zeros(RESPONSES, dtype=torch.float64)
    for number in range(GAMES):
        game = random_game(RESPONSES, generator(seed, "game", number))
        if arm == "SPO":
            average, last = hedge_self_play(game, start, step, rounds)
        else:
            average, last = with_reward_model(game, start, step, rounds, arm)
        for name, policy in zip(found, (average, last, start.softmax(0)), strict=True):
            found[name] += float(exploitability(game, policy)) / GAMES
    return found


def with_reward_model(
    game: Tensor, logits: Tensor, step: float, rounds: int, arm: str
) -> tuple[Tensor, Tensor]:
    """The same steps on Bradley-Terry scores.

    They are fitted to the comparisons between samples of all policies so far, of the newest policy,
    or of the first policy, as the arm says.
    """
    wins, scores = torch.zeros_like(game), torch.zeros_like(logits)
    total, policy = torch.zeros_like(logits), logits.softmax(0)
    for number in range(rounds):
        policy = logits.softmax(0)
        total = total + policy
        if number == 0 or "first" not in arm:
            fresh = torch.outer(policy, policy) * game
            wins = fresh if "newest" in arm else wins + fresh
            scores = bradley_terry(wins, scores)
        logits = logits + step * scores
    return total / rounds, policy


def bradley_terry(wins: Tensor, scores: Tensor, ridge: float = 1e-3, steps: int = 20) -> Tensor:
    """Scores `[K]` of highest likelihood; `wins` `[K, K]` is how often each beat each.

    Newton's method from `scores`; the small ridge keeps what was never compared at 0.
    """
    wins = wins / wins.sum()
    compared = wins + wins.mT
    for _ in range(steps):
        likely = torch.sigmoid(scores[:, None] - scores[None, :])
        slope = (wins - compared * likely).sum(1) - ridge * scores
        pull = compared * likely * (1 - likely)
        curvature = pull.sum(1).diag() - pull + ridge * torch.eye(len(scores)).to(pull)
        change = torch.linalg.solve(curvature, slope).clamp(-1, 1)
        scores = scores + change
        if float(change.abs().max()) < 1e-9:
            break
    return scores


# On a language model ------------------------------------------------------------------------


class RewardModel:
    """Bradley-Terry scores of the three tones: of an opinion it sees all that the judge sees.

    Called as a reward it takes in the comparisons of each prompt's samples with each other and is
    fitted again: to all that it has seen, or with `newest` to these alone.
    """

    def __init__(self, newest: bool) -> None:
        self._newest = newest
        self._wins = torch.zeros(3, 3, dtype=torch.float64)
        self._scores = torch.zeros(3, dtype=torch.float64)

    def see(self, prompts: list[str], completions: list[str]) -> None:
        groups: dict[str, list[str]] = {}
        for prompt, text in zip(prompts, completions, strict=True):
            groups.setdefault(prompt, []).append(text)
        if self._newest:
            self._wins.zero_()
        for texts in groups.values():
            for i, one in enumerate(texts):
                said = cyclic_preference([one] * i, texts[:i])
                for other, wins in zip(texts[:i], said, strict=True):
                    self._wins[tone(one), tone(other)] += wins
                    self._wins[tone(other), tone(one)] += 1 - wins
        self._scores = bradley_terry(self._wins, self._scores)

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.see(prompts, completions)
        scores: list[float] = self._scores[[tone(text) for text in completions]].tolist()
        return scores


def approving(policy: LanguagePolicy, seed: int, steps: int) -> LanguagePolicy:
    """The policy after fine-tuning on its own approving opinions: it is easily beaten."""
    prompts = subjects()["training"]
    texts = sample(policy, prompts, SAMPLES, "approving", seed).texts
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    rows = [
        {"prompt": prompt, "completion": text}
        for prompt, text in zip(asked, texts, strict=True)
        if tone(text) == 0 and text.strip()
    ]
    training = train_in_steps(
        "sft",
        seed,
        {"model": policy, "data": rows},
        steps=steps,
        batch_size=32,
        learning_rate=3e-4,
        max_response_tokens=TOKENS,
    )
    for _ in training:
        pass
    return policy


def on_opinions(
    arm: str, learning_rate: float, policy: LanguagePolicy, seed: int, steps: int
) -> Outcome:
    """Train one arm from an approving policy under the cyclic judge, and follow its tones."""
    policy = approving(policy, seed, min(steps, 30))
    prompts = subjects()["training"]
    objects: dict[str, Any] = {"model": policy, "data": [{"prompt": p} for p in prompts]}
    settings: dict[str, Any] = {}
    if arm == "SPO":
        slug, objects["preference"] = "spo-self-play", cyclic_preference
    else:
        # the same policy gradient on the scores, less their mean in the group
        slug = "grpo"
        settings = {"advantage": "centred", "aggregation": "sequence-sum-constant"}
        objects["reward"] = RewardModel("newest" in arm)
    shares = [tones(policy, seed, 0)]
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
            shares.append(tones(policy, seed, step))
    every = torch.stack(shares)
    words = [" ".join(some) for some in (APPROVING, DISAPPROVING, NEUTRAL)]
    game = torch.tensor([cyclic_preference([one] * 3, words) for one in words]).double()
    mixture = every[1:].mean(0)
    return Outcome(
        {
            METRIC: float(exploitability(game, mixture)),
            "exploitability of the last": float(exploitability(game, every[-1])),
            "exploitability at the start": float(exploitability(game, every[0])),
            "largest share of a tone in the average": float(mixture.max()),
            "largest share of a tone in the last": float(every[-1].max()),
        },
        {
            "exploitability": [
                (float(EVERY * i), float(exploitability(game, now))) for i, now in enumerate(every)
            ],
            **{
                f"share of {name} opinions": [
                    (float(EVERY * i), float(now[which])) for i, now in enumerate(every)
                ]
                for which, name in enumerate(TONES)
            },
        },
    )


def tones(policy: LanguagePolicy, *stream: Any) -> Tensor:
    """How often the policy takes each tone on test subjects, `[3]` float64."""
    texts = sample(policy, subjects()["test"], COUNT, "tones", *stream).texts
    counts = torch.bincount(torch.tensor([tone(text) for text in texts]), minlength=3)
    return counts.double() / len(texts)


CLAIM = Claim(
    slug="spo-self-play",
    statement="The average policy of self-play is beaten by hardly any response; one that follows "
    "a reward model, fitted to the same comparisons, is.",
    task=f"{GAMES} random preference games of {RESPONSES} responses a seed, {ROUNDS} exact "
    "multiplicative-weights steps; exploitability = P(best response over the average policy) - 1/2",
    metric=METRIC,
    higher_is_better=False,
    method="SPO",
    baseline="reward model",
    arms=tuple(ARMS),
    run=run,
    notes="The deciding numbers are exact: the games are tables, and no response is sampled. Step "
    "sizes differ between arms and are multiples of the one that bounds the regret best. A "
    "reward model that is fitted anew in every round to the newest comparisons is nearly as "
    "good as self-play (0.006 to 0.004); one fitted to all comparisons so far, or to the "
    "first ones, is not. Self-play's last policy goes round in the cycles and is exploitable "
    "(0.21): the guarantee is for the average. The values called opinions are those of a tiny"
    " language model under a judge whose preferences go in a circle, for 100 steps: there no "
    "arm comes to the even mixture. The average of self-play (0.21) is not better than that "
    "of the newest reward model (0.19), and both end almost wholly in one tone.",
)
