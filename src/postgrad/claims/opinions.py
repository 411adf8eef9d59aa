"""Short opinions with a known reward: the set-up of the preference claims.

An opinion is a subject and three describing words, `the soup was` → ` warm, old and bitter.` The
gold reward is the number of approving words in it minus the number of disapproving ones, so it
lies between -3 and 3 and anybody can check it. A tiny model learns to write opinions, draws four on
every subject, and Bradley-Terry labels with the gold reward make two pairs of them.
"""

import random
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgrad import __version__
from postgrad.claims.base import Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.models.cache import cached_folder
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.generation import Rollouts, SamplingSettings, generate
from postgrad.seeding import derive, generator

APPROVING = ("good", "lovely", "superb", "clever", "warm", "bright", "gentle", "fresh")
DISAPPROVING = ("bad", "dull", "awful", "rude", "cold", "dirty", "bitter", "stale")
NEUTRAL = ("long", "short", "old", "new", "large", "small", "red", "plain")
OWNERS = ("the", "our", "their", "this", "that", "my", "your", "her")
THINGS = (
    "film", "book", "soup", "hotel", "guide", "train", "speech", "garden", "house", "song", "play",
    "meal", "shop", "coat", "letter", "cake", "room", "street", "class", "market", "boat", "park",
    "dance", "picture", "town",
)  # fmt: skip

TOKENS = 40
BUDGETS = (0.25, 1.0, 3.0)
METRIC = "reward within 1 nat"
_SENTENCES, _STEPS, _BATCH, _RATE = 4000, 300, 64, 2e-3


def gold(text: str) -> float:
    """Approving words minus disapproving words."""
    words = re.findall("[a-z]+", text)
    return float(sum((w in APPROVING) - (w in DISAPPROVING) for w in words))


def tone(text: str) -> int:
    """0, 1 or 2: most words approve, disapprove or are neutral; the first of equals."""
    words = re.findall("[a-z]+", text)
    counts = [sum(w in tone for w in words) for tone in (APPROVING, DISAPPROVING, NEUTRAL)]
    return counts.index(max(counts))


def gold_preference(first: list[str], second: list[str]) -> list[float]:
    """P(first over second) = sigma(gold(first) - gold(second))."""
    gaps = [gold(one) - gold(other) for one, other in zip(first, second, strict=True)]
    return torch.sigmoid(torch.tensor(gaps)).tolist()


def cyclic_preference(first: list[str], second: list[str]) -> list[float]:
    """No reward has these: approving beats disapproving, that neutral, and that approving, at 0.9.

    The von Neumann winner mixes the three tones evenly.
    """
    ahead = [(tone(other) - tone(one)) % 3 for one, other in zip(first, second, strict=True)]
    return [(0.5, 0.9, 0.1)[steps] for steps in ahead]


def subjects() -> dict[str, list[str]]:
    """The prompts, `the soup was` and 199 more, to train on, to choose by and to report on."""
    every = [f"{owner} {thing} was" for owner in OWNERS for thing in THINGS]
    random.Random(0).shuffle(every)
    return {"training": every[:150], "validation": every[150:170], "test": every[170:]}


def reference_policy(
    seed: int, steps: int = _STEPS, *, tones: tuple[int, int, int] = (1, 1, 1)
) -> LanguagePolicy:
    """The model `tiny` after learning to write opinions; a cached function of its arguments.

    `tones` are the odds of approving, disapproving and neutral opinions among what it learns from.
    """
    key = {
        "seed": seed,
        "recipe": [steps, _SENTENCES, _BATCH, _RATE, *tones],
        "versions": [__version__, version("torch")],
    }

    def make(folder: Path) -> None:
        policy = load_policy("tiny", seed=seed)
        training = train_in_steps(
            "sft",
            seed,
            {"model": policy, "data": _written(seed, tones)},
            steps=steps,
            batch_size=_BATCH,
            learning_rate=_RATE,
            max_response_tokens=TOKENS,
        )
        for _ in training:
            pass
        policy.save(folder)

    return load_policy(str(cached_folder("opinions", key, make)))


def _written(seed: int, odds: tuple[int, int, int]) -> list[dict[str, str]]:
    """Demonstrations; two words in three are of the tone that the opinion has."""
    chance = random.Random(f"opinions {seed}")
    tones = (APPROVING, DISAPPROVING, NEUTRAL)
    hat = [tone for tone, tickets in zip(tones, odds, strict=True) for _ in range(tickets)]
    rows = []
    for _ in range(_SENTENCES):
        tone = chance.choice(hat)
        words: list[str] = []
        while len(words) < 3:
            word = chance.choice(tone if chance.random() < 0.5 else chance.choice(tones))
            if word not in words:
                words.append(word)
        subject = f"{chance.choice(OWNERS)} {chance.choice(THINGS)} was"
        rows.append({"prompt": subject, "completion": f" {words[0]}, {words[1]} and {words[2]}."})
    return rows


def sample(
    policy: LanguagePolicy,
    prompts: list[str],
    count: int,
    *stream: Any,
    temperature: float = 1.0,
) -> Rollouts:
    """`count` opinions on every prompt, with the draws of the stream so named."""
    ids = [policy.render(prompt) for prompt in prompts]
    seeds = [derive(0, *stream, i) for i in range(len(prompts) * count)]
    return generate(policy, ids, SamplingSettings(TOKENS, temperature), samples=count, seeds=seeds)


def preferences(
    policy: LanguagePolicy,
    seed: int,
    flip_rate: float = 0.0,
    temperature: float = 1.0,
    samples: int = 4,
) -> list[dict[str, str]]:
    """Pairs of different, not empty, opinions on the training subjects, labelled by Bradley-Terry.

    P(a over b) = sigma(gold(a) - gold(b)); each label is then flipped with `flip_rate`, once. Of
    `samples` opinions on every subject each two are a pair.
    The opinions are drawn at `temperature`: below 1 they cover less of what may be said.
    """
    prompts = subjects()["training"]
    texts = sample(policy, prompts, samples, "pairs", seed, temperature=temperature).texts
    chance = torch.rand(len(texts) // 2, 2, generator=generator(seed, "labels")).tolist()
    rows = []
    for i, (label, flip) in enumerate(chance):
        first, second = texts[2 * i], texts[2 * i + 1]
        if first == second or not (first.strip() and second.strip()):
            continue
        wins = torch.sigmoid(torch.tensor(gold(first) - gold(second))).item()
        if (label < wins) == (flip < flip_rate):
            first, second = second, first
        prompt = prompts[2 * i // samples]
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    return rows


def rankings(
    policy: LanguagePolicy, seed: int, size: int, noise: float = 1.0
) -> list[dict[str, Any]]:
    """A list of `size` opinions on every training subject, scored by gold reward plus noise.

    The noise is normal with that standard deviation. Empty and repeated opinions are left out.
    """
    prompts = subjects()["training"]
    texts = sample(policy, prompts, size, "lists", seed).texts
    errors = noise * torch.randn(len(texts), generator=generator(seed, "scores"))
    rows = []
    for i, prompt in enumerate(prompts):
        scores = {
            texts[j]: gold(texts[j]) + float(errors[j])
            for j in range(i * size, (i + 1) * size)
            if texts[j].strip()
        }
        if len(scores) > 1:
            rows.append(
                {"prompt": prompt, "responses": list(scores), "scores": list(scores.values())}
            )
    return rows


@dataclass(frozen=True)
class Measured:
    """Mean gold reward of fresh opinions, and KL to the reference estimated from the same."""

    reward: float
    divergence: float


def measure(policy: LanguagePolicy, split: str, count: int, *stream: Any) -> Measured:
    """`count` opinions on every subject of a split; KL = mean log pi(y)/pi_ref(y), in nats."""
    rollouts = sample(policy, subjects()[split], count, split, *stream)
    ratios = log_ratios(policy, rollouts.prompts, rollouts.responses)
    rewards = [gold(text) for text in rollouts.texts]
    return Measured(sum(rewards) / len(rewards), float(ratios.mean()))


@torch.no_grad()
def log_ratios(policy: LanguagePolicy, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
    """log pi/pi_ref `[N]` of responses to prompts."""
    now = policy.score(prompts, responses).logprobs.sum(1)
    with policy.reference():
        return now - policy.score(prompts, responses).logprobs.sum(1)


def log_ratios_of(policy: LanguagePolicy, rows: list[dict[str, str]], column: str) -> Tensor:
    """log pi/pi_ref `[N]` of what stands in one column of preference rows."""
    return log_ratios(
        policy,
        [policy.render(row["prompt"]) for row in rows],
        [policy.encode_response(row[column]) for row in rows],
    )


def best_of_four(policy: LanguagePolicy, seed: int) -> float:
    """Mean gold reward when the gold reward itself picks one of four; a KL of 0.64 nats."""
    texts = sample(policy, subjects()["test"], 4, "best of four", seed).texts
    best = [max(map(gold, texts[i : i + 4])) for i in range(0, len(texts), 4)]
    return sum(best) / len(best)


def trained(
    slug: str,
    settings: dict[str, Any],
    policy: LanguagePolicy,
    objects: dict[str, Any],
    seed: int,
    *,
    steps: int,
    every: int = 10,
    samples: int = 600,
) -> Outcome:
    """Train and follow reward and KL; values are the rewards within a budget of KL.

    `objects` are what the method takes from Python besides the model: `data`, perhaps `preference`.

    Of the steps whose KL on validation subjects is within a budget, the one with the best reward
    there counts (perhaps the start); its reward on test subjects is the value.
    """
    policy.freeze_reference()
    measured = [(0, *_both(policy, samples, seed, 0))]
    training = train_in_steps(
        slug,
        seed,
        {"model": policy, **objects},
        steps=steps,
        **{"batch_size": 32, "warmup_steps": 10, "schedule": "constant", **settings},
    )
    for step, _ in training:
        if step % every == 0:
            measured.append((step, *_both(policy, samples, seed, step)))
    values = {}
    for budget in BUDGETS:
        allowed = [point for point in measured if point[1].divergence <= budget]
        _, _, test = max(allowed, key=lambda point: point[1].reward)
        unit = "nat" if budget == 1 else "nats"
        values[f"reward within {budget:g} {unit}"] = test.reward
    values["reward at the end"] = measured[-1][2].reward
    values["KL at the end"] = measured[-1][2].divergence
    curves = {
        "reward": [(float(step), test.reward) for step, _, test in measured],
        "KL": [(float(step), test.divergence) for step, _, test in measured],
        "reward over KL": [(test.divergence, test.reward) for _, _, test in measured],
    }
    return Outcome(values, curves)


def _both(policy: LanguagePolicy, samples: int, seed: int, step: int) -> tuple[Measured, Measured]:
    """About `samples` opinions on the validation subjects, and as many on the test subjects."""
    return (
        measure(policy, "validation", samples // 20, seed, step),
        measure(policy, "test", samples // 30, seed, step),
    )
