"""MPO's claim: a rubric that grows cannot be exploited as a short one is."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.claims.symbols import LENGTH, LETTERS, ROLLOUT, prompts, reference_policy, sample
from postgrad.models.language import LanguagePolicy
from postgrad.rewards.evolving import Item

STEPS, INTERVAL, EVERY = 30, 5, 10
LEARNING_RATE = 3e-3
FOUND, USELESS = (
    0.8,
    0.1,
)  # chances that a broken criterion is seen, and that a useless one is added
METRIC = "gold score at the end"
FIRST = "says the prompt's letter"


def neighbours(text: str) -> list[str]:
    """Letters that follow one another."""
    return [text[i : i + 2] for i in range(len(text) - 1)]


def share(found: int, whole: int) -> float:
    return found / whole if whole else 0.0


# What a string may be judged by, each from 0 to 1 and by anybody's counting.
LIBRARY: dict[str, Callable[[str, str], float]] = {
    FIRST: lambda letter, text: min(text.count(letter), 10) / 10,
    "has twelve letters": lambda letter, text: max(0.0, 1 - abs(len(text) - LENGTH) / LENGTH),
    "says no letter twice in a row": lambda letter, text: share(
        sum(pair[0] != pair[1] for pair in neighbours(text)), len(text) - 1
    ),
    "uses many letters": lambda letter, text: len(set(text) & set(LETTERS)) / len(LETTERS),
    "repeats no pair": lambda letter, text: share(len(set(neighbours(text))), len(text) - 1),
    "ends with another letter": lambda letter, text: float(text[-1:] not in ("", letter)),
    "rises as often as it falls": lambda letter, text: (
        1 - abs(2 * share(sum(pair[0] < pair[1] for pair in neighbours(text)), len(text) - 1) - 1)
    ),
    "is half of early letters": lambda letter, text: (
        1 - abs(2 * share(sum(x in LETTERS[:4] for x in text), len(text)) - 1)
    ),
}
NOTHING = "is a string"  # a useless criterion: the same for all


def points(name: str, letter: str, text: str) -> float:
    """0 to 5 whole points of one criterion."""
    return float(round(5 * LIBRARY[name](letter, text))) if name in LIBRARY else 5.0


def judge(prompts: list[str], completions: list[str], rubric: list[Item]) -> list[list[float]]:
    """Every item is the name of a criterion of the library."""
    pairs = zip(prompts, completions, strict=True)
    return [[points(item.text, letter, text) for item in rubric] for letter, text in pairs]


def gold(letter: str, text: str) -> float:
    """The mean share of points over the whole library."""
    return sum(points(name, letter, text) for name in LIBRARY) / (5 * len(LIBRARY))


def refined(rubric: list[Item], records: list[dict[str, Any]]) -> list[str]:
    """The rubric with two criteria more: those that the better half of the records breaks most.

    The meta judge overlooks some and now and then adds one that says nothing.
    """
    named = [item.text for item in rubric]
    chance = random.Random(repr([record["completion"] for record in records]))
    ranked = sorted(records, key=lambda record: -float(record["reward"]))
    praised = ranked[: max(1, len(ranked) // 2)]
    missed = {
        name: 5 - sum(points(name, r["prompt"], r["completion"]) for r in praised) / len(praised)
        for name in LIBRARY
        if name not in named and chance.random() < FOUND
    }
    worst = sorted((name for name in missed if missed[name] > 0), key=lambda name: -missed[name])
    useless = [NOTHING] if chance.random() < USELESS else []
    return [*named, *worst[:2], *useless]


class Once:
    """The same meta judge, which works a single time."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, rubric: list[Item], records: list[dict[str, Any]]) -> list[Any]:
        done, self._done = self._done, True
        return list(rubric) if done else refined(rubric, records)


def by(names: list[str]) -> Callable[..., list[float]]:
    """A fixed rubric as a reward function: the mean share of points."""
    rubric = [Item(name) for name in names]

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        return [sum(s) / (5 * len(s)) for s in judge(prompts, completions, rubric)]

    return score


def objects(arm: str) -> tuple[str, dict[str, Any]]:
    """The method of an arm and what it takes from Python."""
    if arm in FIXED:
        return "ppo-language", {"reward": by(FIXED[arm])}
    refine = refined if arm == "MPO" else Once()
    return "meta-po", {"judge": judge, "refine": refine, "rubric": [FIRST]}


FIXED = {"first rubric": [FIRST], "full rubric": list(LIBRARY)}
ARMS = ("MPO", "first rubric", "refined once", "full rubric")
SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "rollout": ROLLOUT,
    "epochs": 2,
    "minibatches": 1,
    "critic_rate": 1.0,
    "kl_coefficient": 0.02,
    "missing_end_penalty": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
}


def measured(policy: LanguagePolicy, seed: int, step: int, count: int) -> dict[str, float]:
    """Of `count` strings for every letter: gold score, that of the first rubric, and exploits.

    A string exploits the first rubric where that gives it all points and gold less than half.
    """
    texts = sample(policy, count, "measure", seed, step).texts
    pairs = list(zip((x for x in LETTERS for _ in range(count)), texts, strict=True))
    proxy = [points(FIRST, *pair) / 5 for pair in pairs]
    golden = [gold(*pair) for pair in pairs]
    exploits = [p == 1 and g < 0.5 for p, g in zip(proxy, golden, strict=True)]
    return {
        "gold score": sum(golden) / len(pairs),
        "first rubric's score": sum(proxy) / len(pairs),
        "exploits": sum(exploits) / len(pairs),
    }


def run(arm: str, seed: int, quick: bool) -> Outcome:
    policy = reference_policy(seed, *([10] if quick else []))
    steps = 4 if quick else STEPS
    found = list(followed(arm, policy, seed, steps=steps, quick=quick))
    last = found[-1][1]
    values = {METRIC: last["gold score"], "gold score at the start": found[0][1]["gold score"]}
    values |= {f"{name} at the end": last[name] for name in last if name != "gold score"}
    values["items at the end"] = last["items"]
    curves = {
        name: [(float(step), point[name]) for step, point in found]
        for name in ("gold score", "first rubric's score", "exploits", "items")
    }
    return Outcome(values, curves)


def followed(
    arm: str,
    policy: LanguagePolicy,
    seed: int,
    *,
    steps: int,
    quick: bool = False,
    rate: float = LEARNING_RATE,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train `policy` by an arm; what it writes before and after every few steps."""
    slug, given = objects(arm)
    count, every = (2, 2) if quick else (32, EVERY)
    own = {"interval": 2 if quick else INTERVAL, "normalise": "mean-of-fraction"}
    items = float(len(FIXED.get(arm, [FIRST])))
    yield 0, {**measured(policy, seed, 0, count), "items": items}
    training = train_in_steps(
        slug,
        seed,
        {"model": policy, "data": prompts(copies=8), **given},
        steps=steps,
        **{**SETTINGS, "learning_rate": rate, **(own if slug == "meta-po" else {})},
    )
    for step, metrics in training:
        if step % every == 0:
            items = metrics.get("rubric/items", items)
            yield step, {**measured(policy, seed, step, count), "items": items}


CLAIM = Claim(
    slug="meta-po",
    statement="A policy rewarded by one criterion exploits it and loses what nobody asked for; "
    "with a meta judge that adds the criteria which well-scored responses break, it ends near a "
    "policy that was rewarded by all of them from the start.",
    task="strings of twelve letters after a first one, by a tiny language model; a library of "
    "eight criteria that can be counted, gold = the mean of all, the first rubric = how often the "
    "prompt's letter is said; 30 steps of 64 strings, a meta step after every 5 reads 16 of them",
    metric=METRIC,
    higher_is_better=True,
    method="MPO",
    baseline="first rubric",
    arms=ARMS,
    run=run,
    notes="All arms have the same start, prompts, numbers of samples and settings: 64 strings a "
    "step, two passes, KL 0.02, rewards as the mean share of an item's points. The learning "
    "rate, 3e-3, is the same for all: on seed 100 the first rubric alone was also tried with "
    "1e-3 (and four passes) and lost as much of the gold score. Judge and meta judge are "
    "programs: the judge counts, the meta judge sees a broken criterion with probability 0.8 "
    "and adds a useless one with 0.1. There is little to be gained here: the full rubric ends"
    " 0.03 above the start, MPO level with it; what the evolving rubric prevents is the loss "
    "of 0.13 under the first one alone. Refining it once does nearly as well.",
)
