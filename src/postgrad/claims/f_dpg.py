"""f-DPG's claim: it meets a constraint and keeps the diversity that reward maximisation loses."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from postgrad.advantages.running_means import MovingMean, PartitionFunctions
from postgrad.claims.base import Claim, Outcome
from postgrad.claims.opinions import TOKENS, reference_policy, sample
from postgrad.claims.stepping import train_in_steps
from postgrad.models.language import LanguagePolicy
from postgrad.objectives.divergence import (
    DIVERGENCES,
    f_divergence,
    pseudo_rewards,
    weighted_reinforce,
)
from postgrad.objectives.pairwise import sequence_logprobs
from postgrad.sampling.generation import Rollouts
from postgrad.seeding import generator

STATES, BASE_RATE, STEPS, SAMPLES, FLOOR = 2000, 0.05, 200, 256, 5.0
METRIC = "KL(p || pi)"
NAMES = {"JS-DPG": "js", "KL-DPG": "forward-kl", "RKL-DPG": "reverse-kl", "TV-DPG": "tv"}
# learning rates in the table of 2000 states and of the language model
ARMS: dict[str, tuple[float, float]] = {
    "JS-DPG": (0.05, 1e-3),
    "KL-DPG": (0.1, 1e-3),
    "RKL-DPG": (0.1, 1e-3),
    "TV-DPG": (0.1, 1e-3),
    "REINFORCE": (0.02, 1e-3),
}

PROMPT, WORD = "the soup was", "lovely"
OPINION_STEPS, OPINION_SAMPLES, EVERY = 60, 96, 20
OF_BASE, OF_POLICY = 5000, 500


def run(arm: str, seed: int, quick: bool) -> Outcome:
    rate, opinion_rate = ARMS[arm]
    found = in_a_table(arm, seed, rate, 10 if quick else STEPS)
    if arm in NAMES:
        found.values["TV to the target of 20 states"] = exactly(arm, seed, 50 if quick else 3000)
    opinions = on_opinions(arm, seed, opinion_rate, quick)
    return Outcome(
        found.values | {f"opinions: {name}": value for name, value in opinions.values.items()},
        found.curves | {f"opinions: {name}": curve for name, curve in opinions.curves.items()},
    )


# Tables ---------------------------------------------------------------------------------------


def world(seed: int, states: int) -> tuple[Tensor, Tensor]:
    """log a `[states]` of a base of standard deviation 2 in logits; b of mass `BASE_RATE`, or so.

    b is 1 at states in random order until their mass reaches the base rate.
    """
    random = generator(seed, "f-dpg", states)
    log_base = (2 * torch.randn(states, generator=random, dtype=torch.float64)).log_softmax(0)
    order = torch.randperm(states, generator=random)
    within = log_base[order].exp().cumsum(0) <= BASE_RATE
    within[0] = True
    binary = torch.zeros(states, dtype=torch.bool)
    binary[order[within]] = True
    return log_base, binary


def exactly(arm: str, seed: int, steps: int) -> float:
    """TV between policy and target of 20 states after gradient descent on the divergence itself."""
    log_base, binary = world(seed, 20)
    target = (log_base + torch.where(binary, 0.0, -FLOOR)).softmax(0)
    logits = log_base.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.02)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimiser.zero_grad()
        f_divergence(DIVERGENCES[NAMES[arm]], logits.softmax(0), target).backward()
        optimiser.step()
    return float((logits.detach().softmax(0) - target).abs().sum() / 2)


def in_a_table(arm: str, seed: int, rate: float, steps: int) -> Outcome:
    """The deciding numbers: a policy with a logit a state, Adam on samples, exact measures."""
    log_base, binary = world(seed, STATES)
    log_target = log_base.masked_fill(~binary, -torch.inf)
    target = log_target.softmax(0)
    trained_on = log_target
    if arm == "RKL-DPG":
        trained_on = torch.where(binary, log_base, log_base - FLOOR)
    logits = log_base.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=rate)
    partition, baseline = PartitionFunctions(1), MovingMean(1024)
    random = generator(seed, "f-dpg samples")
    curves: dict[str, list[tuple[float, float]]] = {}
    values: dict[str, float] = {}
    for step in range(steps + 1):
        log_policy = logits.log_softmax(0)
        policy = log_policy.detach().exp()
        values = {
            METRIC: float(f_divergence(DIVERGENCES["forward-kl"], policy, target)),
            "E[b]": float(policy[binary].sum()),
            "KL(pi || a)": float((policy * (log_policy.detach() - log_base)).sum()),
            "entropy": float(-(policy * log_policy.detach()).sum()),
        }
        for name, value in values.items():
            curves.setdefault(name, []).append((float(step), value))
        if step == steps:
            break
        drawn = torch.multinomial(policy, SAMPLES, replacement=True, generator=random)
        logprobs = log_policy[drawn]
        if arm == "REINFORCE":
            rewards = binary[drawn].double()
        else:
            weights = trained_on[drawn] - logprobs.detach()
            partition.update(torch.zeros_like(drawn), weights)
            log_z = float(partition.log(torch.tensor([0])))
            rewards = pseudo_rewards(DIVERGENCES[NAMES[arm]], logprobs, trained_on[drawn], log_z)
        optimiser.zero_grad()
        weighted_reinforce(logprobs, rewards - baseline.value).mean().backward()
        baseline.update(rewards)
        optimiser.step()
    values["least KL(p || pi) on the way"] = min(kl for _, kl in curves[METRIC])
    values["entropy of the target"] = float(-torch.xlogy(target, target).sum())
    return Outcome(values, {name: curve[::5] for name, curve in curves.items()})


# Opinions -------------------------------------------------------------------------------------


def says(completions: list[str], word: str) -> list[float]:
    """1 where the word (or a part of one) appears."""
    return [float(word in text) for text in completions]


def of_target(policy: LanguagePolicy, word: str, count: int, seed: int) -> tuple[Rollouts, float]:
    """Samples of p, which are those of the initial policy that say the word, and their share Z."""
    drawn = sample(policy, [PROMPT], count, "base", seed)
    said = [i for i, value in enumerate(says(drawn.texts, word)) if value]
    kept = Rollouts(
        [drawn.prompts[i] for i in said],
        [drawn.responses[i] for i in said],
        [drawn.logprobs[i] for i in said],
        drawn.finished[said],
        [drawn.texts[i] for i in said],
    )
    return kept, len(said) / count


def on_opinions(arm: str, seed: int, rate: float, quick: bool) -> Outcome:
    """Opinions on one subject that are to say a word; p is known by rejection."""
    policy = reference_policy(seed, *([5] if quick else []))
    policy.freeze_reference()
    word = "e" if quick else WORD  # after a few steps the reference hardly says words
    target, share = of_target(policy, word, 200 if quick else OF_BASE, seed)
    settings: dict[str, Any] = {
        "steps": 4 if quick else OPINION_STEPS,
        "batch_size": 1,
        "rollout": {"samples": 16 if quick else OPINION_SAMPLES, "max_new_tokens": TOKENS},
        "learning_rate": rate,
        "schedule": "constant",
        "warmup_steps": 0,
        "precision": "fp32",
    }
    if arm == "REINFORCE":
        slug = "grpo"
        settings |= {"advantage": "centred", "aggregation": "sequence-sum-constant"}
    else:
        slug = "f-dpg"
        settings |= {"target": "binary", "divergence": NAMES[arm]}
        settings |= {"floor": FLOOR} if arm == "RKL-DPG" else {}
    objects = {"model": policy, "data": [{"prompt": PROMPT}], "reward": partial(says, word=word)}
    count = 50 if quick else OF_POLICY
    followed = [(0, _measured(policy, word, target, share, count, seed, 0))]
    for step, _ in train_in_steps(slug, seed, objects, **settings):
        if step % EVERY == 0 or step == settings["steps"]:
            followed.append((step, _measured(policy, word, target, share, count, seed, step)))
    names = followed[0][1].keys()
    return Outcome(
        {**followed[-1][1], "base rate": share},
        {name: [(float(step), found[name]) for step, found in followed] for name in names},
    )


@torch.no_grad()
def _measured(
    policy: LanguagePolicy,
    word: str,
    target: Rollouts,
    share: float,
    count: int,
    seed: int,
    step: int,
) -> dict[str, float]:
    """KL(p || pi) by samples of p, the rest by fresh samples of the policy."""

    def scored(found: Rollouts) -> Tensor:
        scores = policy.score(found.prompts, found.responses)
        return sequence_logprobs(scores.logprobs, scores.mask).double()

    own = sample(policy, [PROMPT], count, "policy", seed, step)
    now, now_of_target = scored(own), scored(target)
    with policy.reference():
        before, before_of_target = scored(own), scored(target)
    log_z = torch.tensor(share).double().log()
    said = says(own.texts, word)
    return {
        METRIC: float((before_of_target - log_z - now_of_target).mean()),
        "E[b]": sum(said) / len(said),
        "KL(pi || a)": float((now - before).mean()),
        "entropy": float(-now.mean()),
        "distinct-2": _distinct_pairs(own.texts),
    }


def _distinct_pairs(texts: list[str]) -> float:
    """Different pairs of neighbouring words over all of them."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


CLAIM = Claim(
    slug="f-dpg",
    statement="Made to satisfy a constraint, f-DPG ends closer to the target distribution, the "
    "initial policy where the constraint holds, and keeps more diversity than REINFORCE.",
    task="a policy with one logit for each of 2000 states (initial logits of deviation 2), a "
    "constraint that 5 % of the initial probability satisfies, 200 steps of 256 samples; exact "
    "KL(p || pi) at the end, p the initial policy where the constraint holds",
    metric=METRIC,
    higher_is_better=False,
    method="JS-DPG",
    baseline="REINFORCE",
    arms=tuple(ARMS),
    run=run,
    notes="All four divergences end closer to the target than REINFORCE on every seed, and satisfy "
    "the constraint as often or oftener (RKL-DPG less). Which divergence serves best does not"
    " follow the paper here: KL-DPG, whose loss the metric is, ends nearest, and JS-DPG, the "
    "paper's choice, behind TV-DPG. Each arm has a learning rate of its own, set before the "
    "reported seeds. Exactly fitted to a target of 20 states all reach it (distance 0.000). "
    "The values called opinions are those of the methods on a tiny language model that is to "
    "say a certain word: there REINFORCE always does, 50 to 70 nats from the initial policy, "
    "and the others in two cases of three or more within 2 to 4 nats.",
)
