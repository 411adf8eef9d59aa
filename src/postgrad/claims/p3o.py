"""P3O's claim: rewards shifted prompt by prompt change nothing for it, and hold REINFORCE back."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.group import leave_one_out
from postgrad.advantages.penalties import kl_penalised
from postgrad.advantages.running_means import MovingMean
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import TOKENS, gold, reference_policy, subjects, trained
from postgrad.objectives.trajectory import Clipping, clipped_responses, p3o_loss
from postgrad.seeding import generator

PROMPTS, ACTIONS, WORLDS, ROUNDS, BATCH, EPOCHS, RATE = 16, 8, 3, 300, 64, 2, 0.5
BETA, EPS, SCALES = 0.02, 0.2, (0, 3, 10)
METRIC = "share of the best reward, shifts of 10"
STEPS, SHIFT, WINDOW = 48, 5.0, 640

# what prompts `[B]` and rewards `[B, 2]` are turned into: what the responses are learnt by
Credit = Callable[[Tensor, Tensor], Tensor]
ARMS = (
    "P3O",
    "P3O, joint clipping",
    "RLOO",
    "moving-average baseline",
    "value of each prompt",
)
# on the opinions; learning rates: see the notes
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "P3O": ("p3o", {"learning_rate": 3e-5}),
    "RLOO": ("rloo", {"learning_rate": 3e-5}),
    "moving-average baseline": (
        "rloo",
        {"baseline": "moving-average", "baseline_window": WINDOW, "learning_rate": 3e-5},
    ),
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    found = on_the_bandit(arm, seed, 10 if quick else ROUNDS)
    values, curves = dict(found.values), dict(found.curves)
    shifts = {"shifted opinions": SHIFT} if arm in METHODS else {}
    if arm == "moving-average baseline":  # the only one to which the shift makes a difference
        shifts["opinions"] = 0.0
    for name, shift in shifts.items():
        on_text = on_opinions(arm, seed, quick, shift)
        values |= {f"{name}: {key}": value for key, value in on_text.values.items()}
        curves |= {f"{name}: {key}": curve for key, curve in on_text.curves.items()}
    return Outcome(values, curves)


# On the bandit ------------------------------------------------------------------------------


def on_the_bandit(arm: str, seed: int, rounds: int) -> Outcome:
    """Means over bandits; tables of logits learn from r(x, y) + s delta(x), for each scale s."""
    values, curves = {}, {}
    for scale in SCALES:
        several = [learnt(arm, seed, world, rounds, float(scale)) for world in range(WORLDS)]
        mean = torch.tensor(several, dtype=torch.float64).mean(0).tolist()
        name = f"share of the best reward, shifts of {scale}"
        values[name] = mean[-1]
        curves[name] = [(float(i), mean[i]) for i in range(0, rounds + 1, max(1, rounds // 30))]
    return Outcome(values, curves)


def learnt(arm: str, seed: int, world: int, rounds: int, scale: float) -> list[float]:
    """Expected true reward over that of the best actions, after each round, by exact sums."""
    table = generator(seed, "bandit", world)
    reward = torch.randn(PROMPTS, ACTIONS, generator=table, dtype=torch.float64)
    observed = reward + scale * torch.randn(PROMPTS, 1, generator=table, dtype=torch.float64)
    logits = torch.zeros(PROMPTS, ACTIONS, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=RATE)
    uniform = torch.zeros(PROMPTS, ACTIONS).double().log_softmax(-1)
    credit = credits(arm)
    draws = generator(seed, "draws", world)
    best = float(reward.amax(1).mean())
    curve = [float(reward.mean()) / best]
    for _ in range(rounds):
        prompts = torch.randint(PROMPTS, (BATCH,), generator=draws)
        before = logits.detach().log_softmax(-1)
        actions = before.exp()[prompts].multinomial(2, replacement=True, generator=draws)
        old, reference, found = (
            values[prompts].gather(1, actions) for values in (before, uniform, observed)
        )
        worth = credit(prompts, kl_penalised(found, old, reference, BETA))
        for _ in range(EPOCHS):
            now = logits.log_softmax(-1)[prompts].gather(1, actions)
            if arm.startswith("P3O"):
                clipping: Clipping = "joint" if "joint" in arm else "separate"
                losses = p3o_loss(now, old, worth, EPS, clipping)
            else:
                losses = clipped_responses(now, old, worth, EPS)
            optimiser.zero_grad()
            losses.mean().backward()
            optimiser.step()
        policy = logits.detach().softmax(-1)
        curve.append(float((policy * reward).sum(1).mean()) / best)
    return curve


def credits(arm: str) -> Credit:
    """What an arm learns its pairs by."""
    if arm.startswith("P3O"):
        return lambda prompts, rewards: rewards
    if arm == "RLOO":
        return lambda prompts, rewards: leave_one_out(
            rewards.flatten(), torch.arange(len(rewards)).repeat_interleave(2)
        ).view_as(rewards)
    if arm == "moving-average baseline":
        recent = MovingMean(10 * 2 * BATCH)

        def over_all(prompts: Tensor, rewards: Tensor) -> Tensor:
            recent.update(rewards.flatten())
            return rewards - recent.value

        return over_all
    values = [MovingMean(10 * 2 * BATCH // PROMPTS) for _ in range(PROMPTS)]

    def of_each(prompts: Tensor, rewards: Tensor) -> Tensor:
        for prompt in prompts.unique().tolist():
            values[prompt].update(rewards[prompts == prompt].flatten())
        return rewards - torch.tensor([[values[p].value] for p in prompts.tolist()])

    return of_each


# On a language model ------------------------------------------------------------------------


def shift_of(prompt: str) -> float:
    """A number in [-1, 1] for every prompt, in quarters."""
    return random.Random(f"shift of {prompt}").randint(-4, 4) / 4


def on_opinions(arm: str, seed: int, quick: bool, shift: float) -> Outcome:
    """Learn from gold reward + shift delta(x); the gold reward alone is measured."""

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [gold(text) + shift * shift_of(prompt) for prompt, text in pairs]

    policy = reference_policy(seed, *([5] if quick else []))
    slug, settings = METHODS[arm]
    return trained(
        slug,
        {
            "beta": 0.05,
            "batch_size": 4 if quick else 32,
            "epochs": EPOCHS,
            "rollout": {"samples": 2, "max_new_tokens": TOKENS},
            **settings,
        },
        policy,
        {"data": [{"prompt": text} for text in subjects()["training"]], "reward": reward},
        seed,
        steps=2 if quick else STEPS,
        every=2 if quick else 12,
        samples=30 if quick else 240,
    )


CLAIM = Claim(
    slug="p3o",
    statement="Numbers that are added to the reward prompt by prompt change nothing for P3O; they "
    "hold back a policy gradient whose baseline is the same for all prompts.",
    task="contextual bandit: 16 prompts, 8 actions, true rewards ~ N(0, 1), 300 rounds of 64 "
    "prompts with two responses and two steps on a table of logits, beta 0.02, eps 0.2; what is "
    "learnt from is the reward + s delta(x), delta ~ N(0, 1) of each prompt, s = 0, 3 and 10; "
    "expected true reward over that of the best actions",
    metric=METRIC,
    higher_is_better=True,
    method="P3O",
    baseline="moving-average baseline",
    arms=ARMS,
    run=run,
    notes="",
)
