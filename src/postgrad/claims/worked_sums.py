"""Sums of several terms with their workings: the set-up of the claims on guidance from outside.

A prompt is a sum of two to five digits in a fixed width, a response its partial sums, a line each:
`3+5+7+2  =` → `08`, `15`, `17`. A small transformer learns to work out short sums, and from poor
workings of long ones, in which most lines forget to add a term, their form. So it solves long sums
hardly ever, and could. A response is right if its last line is the answer.
"""

import random
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from postgrad.claims.base import Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.models.cache import cached_folder
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks.formats import Row

SHORT, LONG = (2, 3), (5,)  # terms of easy and hard sums
MOST = LONG[-1]
STEPS, PROMPTS, SAMPLES, EVERY, TESTED = 60, 32, 8, 15, 1000
CURVES = {"reward", "reward/degenerate_groups", "demonstrated", "hint/responses"}
TOKENS = 3 * (MOST - 1)  # two digits and a line end or the end for each partial sum
_STEPS, _BATCH, _RATE, _LONG_SHARE, _FORGOTTEN = 300, 96, 3e-3, 0.4, 0.7


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
    return "+".join(map(str, digits)).ljust(2 * MOST - 1) + "="


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
    digits = [int(digit) for digit in row["prompt"].rstrip(" =").split("+")]
    total, lines = digits[0], []
    for digit in digits[1:]:
        total += 0 if chance.random() < _FORGOTTEN else digit
        lines.append(f"{total:02d}")
    return "\n".join(lines)


def warm_up_rows(count: int, seed: int) -> Iterator[Row]:
    chance = random.Random(f"worked sums {seed}")
    for _ in range(count):
        long = chance.random() < _LONG_SHARE
        made = row(chance, chance.choice(LONG if long else SHORT))
        completion = forgetful(made, chance) if long else made["solution"]
        yield {"prompt": made["prompt"], "completion": completion}


def warmed_up(seed: int) -> LanguagePolicy:
    """The policy that the claims start from; a cached function of `seed`."""
    key = {
        "seed": seed,
        "recipe": [_STEPS, _BATCH, _RATE, _LONG_SHARE, _FORGOTTEN],
        "versions": [version("postgrad"), version("torch")],
    }

    def make(folder: Path) -> None:
        policy = untrained(seed)
        steps = train_in_steps(
            "sft",
            seed,
            {"model": policy, "data": list(warm_up_rows(_STEPS * _BATCH, seed))},
            steps=_STEPS,
            batch_size=_BATCH,
            learning_rate=_RATE,
            max_response_tokens=TOKENS,
        )
        for _ in steps:
            pass
        policy.save(folder)

    return load_policy(str(cached_folder("worked-sums", key, make)))


def untrained(seed: int) -> LanguagePolicy:
    """A GPT-2 of two layers of width 96 with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguagePolicy(GPT2LMHeadModel(config), tokenizer)


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
    prompts: int = PROMPTS,
    **settings: Any,
) -> Outcome:
    """Train on fresh sums, half of them long; test greedy answers to unseen ones, without help."""
    tests = {
        "hard": rows(tested, LONG, "test", "hard"),
        "easy": rows(tested, SHORT, "test", "easy"),
    }
    found = {name: [(0.0, accuracy(policy, some))] for name, some in tests.items()}
    curves: dict[str, list[tuple[float, float]]] = {}
    data = rows(prompts * steps, [*SHORT, *LONG * len(SHORT)], "training", seed)
    objects: dict[str, Any] = {"model": policy, "data": data}
    if slug == "sft":
        objects["data"] = [{**row, "completion": row["solution"]} for row in data]
        settings = {"max_response_tokens": TOKENS, **settings}
    else:
        objects["reward"] = right
        settings = {"rollout": {"samples": SAMPLES, "max_new_tokens": TOKENS}, **settings}
    settings = {"batch_size": prompts, "warmup_steps": 0, "schedule": "constant", **settings}
    for step, metrics in train_in_steps(slug, seed, objects, steps=steps, **settings):
        for name in CURVES & metrics.keys():
            curves.setdefault(name, []).append((float(step), metrics[name]))
        if step % EVERY == 0 or step == steps:
            for name, some in tests.items():
                part = some if step == steps else some[: max(1, tested // 5)]
                found[name].append((float(step), accuracy(policy, part)))
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
