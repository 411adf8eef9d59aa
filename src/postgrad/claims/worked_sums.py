"""Sums of several terms with their workings: the set-up of the claims on guidance from outside.

A prompt is a sum of two to four digits in a fixed width, a response its partial sums, a line each:
`3+5+7+2  =` → `08`, `15`, `17`. A small transformer learns to work out short sums, and from poor
workings of long ones, in which most lines forget to add a term, their form. So it solves long sums
hardly ever, and could. A response is right if its last line is the answer.
"""

import random
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from postgrad import __version__
from postgrad.claims import addition_warm_up
from postgrad.claims.base import Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.models.cache import cached_folder
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks.formats import Row

SHORT, LONG = (2, 3), (4,)  # terms of easy and hard sums
WIDTH = 9  # of a sum without its equals sign
PROMPT_TOKENS = WIDTH + 2  # of a sum that the policy writes, its end included
LETTERS = "abcdefghij"
# what the policy is asked a second time, in this world's few words
REFINEMENT, REWRITE = "{prompt}{response}!{critique}=", "{prompt}~"
STEPS, PROMPTS, SAMPLES, EVERY, TESTED = 75, 32, 8, 15, 1000
CURVES = {
    "reward",
    "reward/degenerate_groups",
    "demonstrated",
    "hint/responses",
    "refinement/groups",
    "refinement/right",
    "rewrite/usable",
    "rewrite/rescued",
}
TOKENS = 3 * (LONG[-1] - 1)  # two digits and a line end or the end for each partial sum
_STEPS, _BATCH, _RATE, _LONG_SHARE, _FORGOTTEN = 450, 96, 3e-3, 0.4, 0.75


def row(chance: random.Random, terms: int) -> Row:
    """A sum of `terms` digits: prompt, answer, solution (its workings) and the digits."""
    digits = [chance.randint(0, 9) for _ in range(terms)]
    lines = [f"{total:02d}" for total in list(accumulate(digits))[1:]]
    return {
        "prompt": prompt(digits),
        "answer": lines[-1],
        "solution": "\n".join(lines),
        "terms": terms,
    }


def prompt(digits: Sequence[int]) -> str:
    return "+".join(map(str, digits)).ljust(WIDTH) + "="


def terms_of(prompt: str) -> list[int]:
    return [int(digit) for digit in prompt.rstrip(" =").split("+")]


def rows(count: int, terms: Sequence[int], *stream: Any) -> list[Row]:
    """`count` sums with as many terms as drawn from `terms`; a function of `stream`."""
    chance = random.Random(" ".join(map(str, stream)))
    return [row(chance, chance.choice(terms)) for _ in range(count)]


def right(completions: list[str], answer: list[str]) -> list[float]:
    """1 where the last line is the answer."""
    pairs = zip(completions, answer, strict=True)
    return [float(text.rpartition("\n")[2] == true) for text, true in pairs]


def forgetful(row: Row, chance: random.Random) -> str:
    """Workings of a sum, of which each line adds nothing with probability `_FORGOTTEN`."""
    digits = terms_of(row["prompt"])
    total, lines = digits[0], []
    for digit in digits[1:]:
        total += 0 if chance.random() < _FORGOTTEN else digit
        lines.append(f"{total:02d}")
    return "\n".join(lines)


def in_letters(prompt: str) -> str:
    """The same sum with `a` for 0, `b` for 1 …"""
    return prompt.translate(str.maketrans("0123456789", LETTERS))


def demonstration(chance: random.Random) -> Row:
    """A short sum worked out, or poor workings of a long one."""
    long = chance.random() < _LONG_SHARE
    made = row(chance, chance.choice(LONG if long else SHORT))
    completion = forgetful(made, chance) if long else made["solution"]
    return {"prompt": made["prompt"], "completion": completion}


def refinement(chance: random.Random) -> Row:
    """Workings mended by one who is told the answer (see `REFINEMENT`)."""
    made = row(chance, chance.choice((*SHORT, *LONG, *LONG)))
    asked = REFINEMENT.format(
        prompt=made["prompt"], response=forgetful(made, chance), critique=made["answer"]
    )
    return {"prompt": asked, "completion": made["solution"]}


def about_letters(chance: random.Random) -> Row:
    """A sum in letters put into digits, or in one case of four poorly worked out."""
    made = row(chance, chance.choice(SHORT))
    letters = in_letters(made["prompt"])
    if chance.random() < 0.25:
        return {"prompt": letters, "completion": forgetful(made, chance)}
    return {"prompt": REWRITE.format(prompt=letters), "completion": made["prompt"]}


SKILLS = {"none": None, "refinement": refinement, "letters": about_letters}


def warmed_up(seed: int, skill: str = "none") -> LanguagePolicy:
    """The policy that the claims start from; a cached function of its arguments.

    With a `skill` half of what it learns from is that, for half as many steps again.
    """
    steps = _STEPS if skill == "none" else _STEPS * 3 // 2
    key = {
        "seed": seed,
        "skill": skill,
        "recipe": [steps, _BATCH, _RATE, _LONG_SHARE, _FORGOTTEN, PROMPT_TOKENS],
        "versions": [__version__, version("torch")],
    }

    def make(folder: Path) -> None:
        chance = random.Random(f"worked sums {seed} {skill}")
        further = SKILLS[skill]
        data = [
            further(chance) if further and i % 2 else demonstration(chance)
            for i in range(steps * _BATCH)
        ]
        policy = untrained(seed)
        training = train_in_steps(
            "sft",
            seed,
            {"model": policy, "data": data},
            steps=steps,
            batch_size=_BATCH,
            learning_rate=_RATE,
            max_response_tokens=max(TOKENS, PROMPT_TOKENS),
        )
        for _ in training:
            pass
        policy.save(folder)

    return load_policy(str(cached_folder("worked-sums", key, make)))


def untrained(seed: int) -> LanguagePolicy:
    return addition_warm_up.untrained(seed, positions=64)


def started(seed: int, quick: bool, skill: str = "none") -> tuple[LanguagePolicy, int, int]:
    """What an arm begins with: the policy, its number of steps and of tests."""
    return (untrained(seed), 4, 50) if quick else (warmed_up(seed, skill), STEPS, TESTED)


def accuracy(policy: LanguagePolicy, tests: list[Row], temperature: float = 0.0) -> float:
    """The share of sums that a response solves: the likeliest one, or a sample."""
    prompts = [policy.render(test["prompt"]) for test in tests]
    settings = SamplingSettings(max_new_tokens=TOKENS, temperature=temperature)
    with torch.no_grad():
        texts = generate(policy, prompts, settings, seeds=range(len(prompts))).texts
    return sum(right(texts, [test["answer"] for test in tests])) / len(tests)


def trained(
    slug: str,
    policy: LanguagePolicy,
    seed: int,
    steps: int,
    tested: int,
    *,
    first: int = 0,
    letters: bool = False,
    **settings: Any,
) -> Outcome:
    """Train on fresh sums, half of them long; test greedy answers to unseen ones, without help.

    `first` is the number of steps whose sums are passed over. With `letters` all sums are short
    and in letters.
    """
    kinds = {"letters": SHORT} if letters else {"hard": LONG, "easy": SHORT}
    tests = {name: rows(tested, terms, "test", name) for name, terms in kinds.items()}
    data = rows(
        PROMPTS * (first + steps),
        SHORT if letters else [*SHORT, *LONG * len(SHORT)],
        "training",
        seed,
    )[PROMPTS * first :]
    if letters:
        for row in [*data, *tests["letters"]]:
            row["prompt"] = in_letters(row["prompt"])
    found = {name: [(0.0, accuracy(policy, some))] for name, some in tests.items()}
    curves: dict[str, list[tuple[float, float]]] = {}
    objects: dict[str, Any] = {"model": policy, "data": data}
    if slug == "sft":
        objects["data"] = [{**row, "completion": row["solution"]} for row in data]
        settings = {"max_response_tokens": TOKENS, **settings}
    else:
        objects["reward"] = right
        settings = {"rollout": {"samples": SAMPLES, "max_new_tokens": TOKENS}, **settings}
    if slug == "critique-grpo":
        objects["critique"] = the_answer
    settings = {"batch_size": PROMPTS, "warmup_steps": 0, **settings}
    for step, metrics in train_in_steps(slug, seed, objects, steps=steps, **settings):
        for name in CURVES & metrics.keys():
            curves.setdefault(name, []).append((float(step), metrics[name]))
        if step % EVERY == 0 and step < steps:
            for name, some in tests.items():
                found[name].append((float(step), accuracy(policy, some[: max(1, tested // 5)])))
    for name, some in tests.items():
        found[name].append((float(steps), accuracy(policy, some)))
    values = {f"accuracy on {name} sums": points[-1][1] for name, points in found.items()}
    values["accuracy"] = sum(values.values()) / len(values)
    means = {name: sum(y for _, y in points) / len(points) for name, points in curves.items()}
    return Outcome(
        {**values, **{f"mean {name}": mean for name, mean in means.items()}},
        {
            **{f"accuracy on {name} sums": points for name, points in found.items()},
            **{name: points[::5] for name, points in curves.items()},
        },
    )


def the_answer(answer: list[str]) -> list[str]:
    """A critique that names the answer, as `simple-gt` does."""
    return answer
