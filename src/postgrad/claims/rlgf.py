"""RLGF's claim: begun by a guide, a policy finds what PPO does not, and passes the guide."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.group import group_mean_centred
from postgrad.advantages.roll_in import Scheme, roll_in_lengths, roll_in_masks
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.claims.symbols import (
    LETTERS,
    ROLLOUT,
    chain,
    hidden_score,
    imitate,
    made_once,
    prompts,
    reference_policy,
    sample,
    strings,
    worth,
)
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.objectives.policy_gradient import aggregate, reinforce
from postgrad.seeding import generator

METRIC = "success on the lock"
PLACES, ACTIONS, SKILL = 8, 4, 0.9  # the guide is right at each place with this probability
LOCKS, SAMPLES, ITERATIONS, RATE = 20, 64, 150, 0.1
SHARE, SWITCH = 0.8, 0.25  # of responses with a roll-in; of the steps before D2LOLS switches

# strings of letters: how much the guide leans to good ones; the share of its that earn the reward
INSIGHT, RARE = 2.0, 0.05
STEPS, LEARNING_RATE, IMITATION_RATE = 30, 1e-3, 1e-3

ARMS: dict[str, dict[str, Any]] = {
    "PPO++": {"scheme": "ppo++"},
    "AggreVaTeD": {"scheme": "aggrevated"},
    "D2LOLS": {"scheme": "d2lols"},
    "PPO": {"scheme": "ppo++", "roll_in": 0.0},
    "imitation of the guide": {},
    "guide": {},
}


def run(arm: str, seed: int, quick: bool) -> Outcome:
    exact = on_locks(arm, seed, *((2, 10) if quick else (LOCKS, ITERATIONS)))
    found = on_strings(arm, seed, quick)
    return Outcome(
        exact.values | {f"strings: {name}": value for name, value in found.values.items()},
        exact.curves | {f"strings: {name}": curve for name, curve in found.curves.items()},
    )


# A lock of eight places ---------------------------------------------------------------------


def on_locks(arm: str, seed: int, count: int, iterations: int) -> Outcome:
    """The mean over several locks, as one of them is a matter of luck."""
    curves = [on_lock(arm, iterations, seed, number) for number in range(count)]
    means = [sum(values) / count for values in zip(*curves, strict=True)]
    return Outcome({METRIC: means[-1]}, {METRIC: [(float(i), m) for i, m in enumerate(means)][::3]})


def on_lock(arm: str, iterations: int, *stream: int) -> list[float]:
    """The probability of success before and after every iteration.

    There are eight choices of four actions, and the reward is 1 if all are right. The policy is a
    table of logits [8, 4], trained by REINFORCE with the batch's mean as baseline; the guide is
    right at every place with probability `SKILL`.
    """
    random = generator(0, "lock", *stream)
    right = torch.randint(ACTIONS, (PLACES,), generator=random)
    guide = torch.full((PLACES, ACTIONS), (1 - SKILL) / (ACTIONS - 1))
    guide[torch.arange(PLACES), right] = SKILL
    if arm == "guide":
        return [SKILL**PLACES] * (iterations + 1)
    logits = torch.zeros(PLACES, ACTIONS, requires_grad=True)
    optimiser = torch.optim.Adam([logits], RATE)
    mask = torch.ones(SAMPLES, PLACES, dtype=torch.bool)
    together = torch.zeros(SAMPLES, dtype=torch.long)
    curve = [_success(logits, right)]
    for iteration in range(iterations):
        scheme = _scheme(ARMS[arm].get("scheme"), iteration, iterations)
        own = logits.detach().softmax(1)
        begins, ends = (guide, own) if scheme == "ppo++" else (own, guide)
        chance, uniforms = torch.rand(2, SAMPLES, generator=random)
        lengths = roll_in_lengths(torch.full((SAMPLES,), PLACES), uniforms)
        lengths = torch.where(chance < ARMS[arm].get("roll_in", SHARE), lengths, 0)
        first, second = (_drawn(table, random) for table in (begins, ends))
        actions = torch.where(torch.arange(PLACES) < lengths[:, None], first, second)
        learnt, _ = roll_in_masks(mask, lengths, scheme)
        if arm == "imitation of the guide":
            actions, learnt = _drawn(guide, random), mask
            advantages = torch.ones(SAMPLES)
        else:
            rewards = (actions == right).all(1).float()
            advantages = group_mean_centred(rewards, together)
        logprobs = logits.log_softmax(1)[torch.arange(PLACES), actions]
        loss = reinforce(logprobs, advantages[:, None].expand_as(logprobs), learnt)
        optimiser.zero_grad()
        aggregate(loss, learnt, "token-mean").backward()
        optimiser.step()
        curve.append(_success(logits, right))
    return curve


def _scheme(name: str | None, step: int, steps: int) -> Scheme:
    if name == "d2lols":
        return "aggrevated" if step < SWITCH * steps else "ppo++"
    return "aggrevated" if name == "aggrevated" else "ppo++"


def _drawn(table: Tensor, random: torch.Generator) -> Tensor:
    """Actions `[SAMPLES, PLACES]` by the probabilities of a table."""
    return torch.multinomial(table, SAMPLES, replacement=True, generator=random).t()


def _success(logits: Tensor, right: Tensor) -> float:
    """The probability that all of the policy's choices are right."""
    return float(logits.detach().softmax(1)[torch.arange(PLACES), right].prod())


# Strings of letters -------------------------------------------------------------------------


def on_strings(arm: str, seed: int, quick: bool) -> Outcome:
    """A tiny model that writes strings of twelve letters; next to none of its are good ones."""
    hidden = hidden_score(seed)
    guide = guide_policy(seed, hidden, *([5] if quick else []))
    least = threshold(guide, hidden, seed)
    steps, each = (3, 8) if quick else (STEPS, 64)

    def values(policy: LanguagePolicy) -> dict[str, float]:
        scores = _scores(policy, hidden, each, "measured", seed)
        reached = sum(score >= least for score in scores)
        return {"success": reached / len(scores), "score": sum(scores) / len(scores)}

    if arm == "guide":
        return Outcome(values(guide))
    policy = reference_policy(seed, *([5] if quick else []))
    if arm == "imitation of the guide":
        rows = _guided(guide, 64 * steps, seed)
        imitate(policy, rows, seed, steps=steps, learning_rate=IMITATION_RATE)
        return Outcome(values(policy))
    settings = {
        "roll_in": SHARE,
        "switch_step": round(SWITCH * steps),
        "guide_top_p": 1.0,
        "supervised_weight": 0.0,
        "learning_rate": LEARNING_RATE,
        "critic_rate": 3.0,
        "schedule": "constant",
        "batch_size": 8 if quick else 64,
        "epochs": 4,
        "minibatches": 2,
        "rollout": ROLLOUT,
        **ARMS[arm],
    }
    reward = passed(hidden, least)
    objects = {"model": policy, "guide": guide, "data": prompts(8), "reward": reward}
    curve = []
    for step, metrics in train_in_steps("rlgf", seed, objects, steps=steps, **settings):
        curve.append((float(step), metrics["reward"]))
    return Outcome(values(policy), {"reward of training": curve})


def guide_policy(seed: int, hidden: Tensor, steps: int = 150) -> LanguagePolicy:
    """A model that writes strings of a chain that leans to good neighbours."""
    table = chain(seed) * torch.exp(INSIGHT * hidden)
    table = table / table.sum(1, keepdim=True)

    def make() -> LanguagePolicy:
        rows = strings(table, 3000, seed, "guide")
        return imitate(load_policy("tiny", seed=seed), rows, seed, steps=steps)

    return made_once("guide", make, seed=seed, insight=INSIGHT, steps=steps)


def threshold(guide: LanguagePolicy, hidden: Tensor, seed: int) -> float:
    """The hidden score that one in twenty of the guide's strings reach."""
    scores = _scores(guide, hidden, 64, "threshold", seed)
    return sorted(scores, reverse=True)[int(RARE * len(scores))]


def passed(hidden: Tensor, least: float) -> Callable[..., list[float]]:
    """A reward function: 1 for strings whose hidden score is at least `least`, else 0."""

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [float(worth(hidden, prompt, text) >= least) for prompt, text in pairs]

    return score


def _scores(policy: LanguagePolicy, hidden: Tensor, each: int, *stream: Any) -> list[float]:
    texts = sample(policy, each, *stream).texts
    letters = [letter for letter in LETTERS for _ in range(each)]
    return [worth(hidden, a, text) for a, text in zip(letters, texts, strict=True)]


def _guided(guide: LanguagePolicy, count: int, seed: int) -> list[dict[str, str]]:
    each = -(-count // len(LETTERS))
    texts = sample(guide, each, "imitated", seed).texts
    letters = [letter for letter in LETTERS for _ in range(each)]
    pairs = zip(letters, texts, strict=True)
    return [{"prompt": a, "completion": text} for a, text in pairs if text]


CLAIM = Claim(
    slug="rlgf",
    statement="Begun by a guide, responses teach a policy what PPO alone never finds, until it is "
    "better than the guide and than what imitates it.",
    task="locks of eight choices of four actions, 20 a seed, a reward of 1 if all are right, a "
    "guide that is right at each with probability 0.9; beside it strings of twelve letters that a "
    "tiny model writes, with a reward of 1 for a high hidden score, and a guide that leans to it",
    metric=METRIC,
    higher_is_better=True,
    method="PPO++",
    baseline="PPO",
    arms=tuple(ARMS),
    run=run,
    notes="The verdict is on the locks. On strings it is not borne out: which arm finds the rare "
    "reward within 30 steps is a matter of the seed (PPO alone on two of three, PPO++ on one,"
    " D2LOLS on two), so roll-ins are no sure help there. On locks the rate, of 0.05, 0.1 and"
    " 0.2 for every arm, was chosen on seed 100, which is not reported; so was 1e-3, of 3e-4 "
    "and 1e-3, on strings, with four passes of two steps for all arms: there PPO++ found "
    "nothing with four passes of one step or two of four, while AggreVaTeD and D2LOLS needed "
    "no more than the first. AggreVaTeD never learns the last place, which no roll-in "
    "reaches, and stays at a quarter of what the others reach. PPO is PPO++ without roll-ins.",
)
