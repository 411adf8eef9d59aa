"""The start of the claims on `addition`: a small model that solves about half of the hard sums."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from postgrad import __version__
from postgrad.claims.stepping import train_in_steps
from postgrad.models.cache import cached_folder
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.tasks.addition import Addition
from postgrad.tasks.formats import Row

TOKENS = 6  # four digits, the end token, and one to spare
_BATCH, _RATE, _CORRUPTION = 128, 2e-3, 0.15
_DEMONSTRATIONS, _MOST_STEPS = 20_000, 1000
_FIRST_CHECK, _CHECK_EVERY, _CHECKED = 100, 10, 300


@dataclass(frozen=True)
class Form:
    """How the four digits of a sum are written down in a response.

    Attributes:
        name: distinguishes forms in the cache.
        write: the response from the digits, with what varies drawn from a random stream.
        read: the digits from a response; None where it has not this form.
        tokens: the longest response, its end included, and one to spare.
        digits: the warm-up is measured by sums of that many.
    """

    name: str
    write: Callable[[str, random.Random], str]
    read: Callable[[str], str | None]
    tokens: int = TOKENS
    digits: int = 3


PLAIN = Form("", lambda digits, chance: digits, lambda text: text)


def warmed_up(seed: int, target: float = 0.45, form: Form = PLAIN) -> LanguagePolicy:
    """A small GPT-2 after supervised training on sums of 1, 2 and 3 digits, some corrupted.

    Training stops at the first check at which greedy accuracy on 3-digit sums (of a validation
    stream) reaches `target`. The result is a function of the arguments and is cached.
    """
    key = {
        "seed": seed,
        "target": target,
        "recipe": [_BATCH, _RATE, _CORRUPTION, _DEMONSTRATIONS, _FIRST_CHECK, _CHECK_EVERY]
        + ([] if form is PLAIN else [form.name, form.digits]),
        "versions": [__version__, version("torch")],
    }

    def make(folder: Path) -> None:
        _train(seed, target, form).save(folder)

    return load_policy(str(cached_folder("addition-warm-up", key, make)))


def _train(seed: int, target: float, form: Form) -> LanguagePolicy:
    policy = untrained(seed)
    check = Addition(f"warm-up check {seed}").draw(_CHECKED, digits=form.digits)
    rows = Addition(f"warm-up {seed}").demonstrations(_DEMONSTRATIONS, corruption=_CORRUPTION)
    chance = random.Random(f"form {seed}")
    for row in rows:
        row["completion"] = form.write(row["completion"], chance)
    steps = train_in_steps(
        "sft",
        seed,
        {
            "model": policy,
            "data": rows,
        },
        steps=_MOST_STEPS,
        batch_size=_BATCH,
        learning_rate=_RATE,
        schedule="constant",
        max_response_tokens=form.tokens,
        clip_norm=0,
    )
    for step, _ in steps:
        due = step >= _FIRST_CHECK and step % _CHECK_EVERY == 0
        if due and greedy_accuracy(policy, check, form) >= target:
            break
    return policy


def untrained(seed: int, positions: int = 32, spread: float = 0.02) -> LanguagePolicy:
    """A GPT-2 of two layers of width 96, with learned positions and the vocabulary of `tiny`.

    Its weights are drawn with the standard deviation `spread`. The digits that belong together lie
    at distances that differ from digit to digit, so rotary positions, as in `tiny`, learn these
    sums many times more slowly.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=96,
        n_layer=2,
        n_head=4,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguagePolicy(GPT2LMHeadModel(config), tokenizer)


def greedy_accuracy(policy: LanguagePolicy, rows: list[Row], form: Form = PLAIN) -> float:
    """The share of sums that the likeliest response solves."""
    prompts = [policy.render(row["prompt"]) for row in rows]
    greedy = SamplingSettings(max_new_tokens=form.tokens, temperature=0.0)
    with torch.no_grad():
        texts = generate(policy, prompts, greedy, seeds=[0] * len(prompts)).texts
    right = [form.read(t) == row["answer"] for t, row in zip(texts, rows, strict=True)]
    return sum(right) / len(rows)
