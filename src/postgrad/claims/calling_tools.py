"""What the claims on tools share: a small model that is shown calls, and what it then answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from postgrad import __version__
from postgrad.claims import addition_warm_up
from postgrad.claims.stepping import train_in_steps
from postgrad.methods.base import Metrics
from postgrad.models.cache import cached_folder
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.sampling.conversations import Conversations, Tool, converse
from postgrad.sampling.drawing import SamplingSettings
from postgrad.tasks.formats import Row

STEPS, PROMPTS, SAMPLES, TESTED = 30, 16, 8, 1000
_BATCH, _RATE = 128, 5e-3


@dataclass(frozen=True)
class World:
    """Questions with a tool.

    Attributes:
        name: of the claim and of the test questions' random stream.
        tool: its name.
        asked: so many questions, a function of the name of a random stream.
        demonstrations: so many rows to warm up with, likewise.
        warm_up: how many steps with how many rows.
        tokens, turns: the most that a response has.
        measured: what is found of a policy on questions; its values are the claim's.
        every: steps between two looks at the policy.
    """

    name: str
    tool: str
    asked: Callable[[int, str], list[Row]]
    demonstrations: Callable[[int, str], list[Row]]
    warm_up: tuple[int, int]
    tokens: int
    turns: int
    measured: Callable[[LanguagePolicy, list[Row]], dict[str, float]]
    every: int


@dataclass
class Training:
    """What was found at each look, the last one at the end, and every step's metrics."""

    looks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)

    def curve(self, name: str) -> list[tuple[float, float]]:
        return [(step, found[name]) for step, found in self.looks]


def trained(
    world: World, slug: str, reward: Any, seed: int, quick: bool, **settings: Any
) -> Training:
    """Train on fresh questions; look at sampled responses to others."""
    steps, tested = (3, 40) if quick else (STEPS, TESTED)
    policy = untrained(seed) if quick else warmed_up(world, seed)
    test = world.asked(tested, f"{world.name} claim")
    data = world.asked(PROMPTS * steps, f"claim {seed}")
    training = train_in_steps(
        slug,
        seed,
        {"model": policy, "data": data, "reward": reward},
        steps=steps,
        batch_size=PROMPTS,
        rollout={"samples": SAMPLES, "max_new_tokens": world.tokens},
        tool=world.tool,
        max_turns=world.turns,
        **settings,
    )
    done = Training([(0, world.measured(policy, test))])
    for step, metrics in training:
        done.metrics.append(metrics)
        if step % world.every == 0 and step < steps:
            done.looks.append((step, world.measured(policy, test[:200])))
    done.looks.append((steps, world.measured(policy, test)))
    return done


def warmed_up(world: World, seed: int) -> LanguagePolicy:
    """A small GPT-2 after supervised training on the demonstrations. Cached."""
    steps, count = world.warm_up
    rows = world.demonstrations(count, f"warm-up {seed}")
    key = {
        "name": world.tool,
        "seed": seed,
        "recipe": [_BATCH, _RATE, steps, len(rows)],
        "versions": [__version__, version("torch")],
    }

    def make(folder: Path) -> None:
        policy = untrained(seed)
        training = train_in_steps(
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
        for _ in training:
            pass
        policy.save(folder)

    return load_policy(str(cached_folder(f"{world.tool}-warm-up", key, make)))


def untrained(seed: int) -> LanguagePolicy:
    """As for sums, but with weights of 96 ** -0.5, so that attention is sharp from the start."""
    return addition_warm_up.untrained(seed, positions=64, spread=0.1)


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
