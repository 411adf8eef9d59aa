"""What the claims on tools share: a small model that is shown calls, and what it then answers."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from postgrad.claims.stepping import train_in_steps
from postgrad.models.cache import cached_folder
from postgrad.models.embedded import tiny_tokenizer
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.conversations import Conversations, Tool, converse
from postgrad.sampling.drawing import SamplingSettings
from postgrad.tasks.formats import Row

_BATCH, _RATE = 128, 5e-3


def shown(name: str, seed: int, rows: list[Row], steps: int) -> LanguagePolicy:
    """A small GPT-2 after supervised training on `rows`, which are a function of name and seed.

    Cached.
    """
    key = {
        "name": name,
        "seed": seed,
        "recipe": [_BATCH, _RATE, steps, len(rows)],
        "versions": [version("postgrad"), version("torch")],
    }

    def make(folder: Path) -> None:
        policy = untrained(seed)
        for _ in supervised(policy, seed, rows, steps):
            pass
        policy.save(folder)

    return load_policy(str(cached_folder(f"{name}-warm-up", key, make)))


def supervised(policy: LanguagePolicy, seed: int, rows: list[Row], steps: int) -> Any:
    """Supervised training, step by step."""
    return train_in_steps(
        "sft",
        seed,
        {"model": policy, "data": rows},
        steps=steps,
        batch_size=_BATCH,
        learning_rate=_RATE,
        schedule="cosine",
        warmup_steps=20,
        max_response_tokens=48,
    )


def untrained(seed: int) -> LanguagePolicy:
    """A GPT-2 of two layers of width 96, with the vocabulary of `tiny`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=96,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,  # of 96 ** -0.5, so that attention is sharp enough to learn soon
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguagePolicy(GPT2LMHeadModel(config), tokenizer)


def conversations(
    policy: LanguagePolicy,
    rows: list[Row],
    tool: Tool,
    *,
    tokens: int,
    turns: int,
    temperature: float = 0.0,
) -> Conversations:
    """A response to each row, the likeliest one unless there is a temperature."""
    return converse(
        policy,
        [policy.render(row["prompt"]) for row in rows],
        rows,
        tool,
        SamplingSettings(max_new_tokens=tokens, temperature=temperature),
        seeds=range(len(rows)),
        max_turns=turns,
    )


def right(completions: list[str], answer: list[str]) -> list[float]:
    """1 where a response ends in `=` and the answer, else 0."""
    return [
        float("=" in text and text.rpartition("=")[2] == true)
        for text, true in zip(completions, answer, strict=True)
    ]
