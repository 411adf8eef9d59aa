"""IGPO's claim: paid for what each turn finds out, a policy learns to look things up sooner."""

import random
import string
from typing import Any

from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.calling_tools import World, conversations, right, trained
from postgrad.methods.agents.tools import Lookup, LookupSettings
from postgrad.models.language import LanguagePolicy
from postgrad.tasks.formats import Row

TOKENS, TURNS = 24, 4
USEFUL = 0.25, 0.8
KEYS, FURTHER, FOUND = (
    string.ascii_lowercase[:10],
    string.ascii_lowercase[10:20],
    string.ascii_uppercase[:10],
)
ACCURACY, SILENT = "accuracy", "groups without any advantage"


def asked(count: int, stream: str) -> list[Row]:
    """Questions `c?`, answered in two steps by a random table of each row's own.

    `[c]` gives a large letter, D, and the key that goes with it, `[n]`, a digit, 7; all other keys
    give `?`. The answer is the number of the letter and the digit, 37: each step tells half of it.
    """
    choose = random.Random(stream)
    rows: list[Row] = []
    for _ in range(count):
        key, number, digit = choose.choice(KEYS), choose.randint(0, 9), str(choose.randint(0, 9))
        table = {key: FOUND[number], FURTHER[number]: digit}
        rows.append({"prompt": f"{key}?", "answer": f"{number}{digit}", "table": table})
    return rows


def demonstrations(count: int, stream: str) -> list[Row]:
    """What the warm-up shows: how to look things up, mostly wrong ones, and how to read replies.

    Every second row is a whole response: one to three look-ups, a quarter of them on purpose, and
    the right answer whatever they found. In the others mostly useful look-ups stand in the prompt.
    """
    choose = random.Random(f"{stream} responses")
    rows: list[Row] = []
    for number, row in enumerate(asked(count, stream)):
        table, text = row["table"], ""
        wanted = list(table)  # the keys of the two steps, in their order
        on_purpose = USEFUL[number % 2]
        for _ in range(choose.randint((number + 1) % 2, TURNS - 1)):
            useful = wanted and choose.random() < on_purpose
            key = wanted[0] if useful else choose.choice(KEYS + FURTHER)
            text += f"[{key}]{table.get(key, '?')}"
            if wanted and key == wanted[0]:
                del wanted[0]
        read, said = ("", text) if number % 2 == 0 else (text, "")
        rows.append({"prompt": row["prompt"] + read, "completion": f"{said}={row['answer']}"})
    return rows


def nothing(completions: list[str]) -> list[float]:
    """No outcome at all: gains alone."""
    return [0.0] * len(completions)


# learning rates: see the notes
ARMS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "IGPO": ("igpo-information-gain", right, {"learning_rate": 3e-4}),
    "IGPO, later version": (
        "igpo-information-gain",
        right,
        {
            "learning_rate": 3e-4,
            "gain": "logprob",
            "advantage": {"name": "turns", "normalise": "separate"},
        },
    ),
    "gains alone": ("igpo-information-gain", nothing, {"learning_rate": 3e-4}),
    "GRPO": ("grpo", right, {"learning_rate": 3e-4}),
}


def measured(policy: LanguagePolicy, rows: list[Row]) -> dict[str, float]:
    """How many of sampled responses are right."""
    tool = Lookup(LookupSettings())
    made = conversations(policy, rows, tool, tokens=TOKENS, turns=TURNS, temperature=1.0)
    return {ACCURACY: sum(right(made.texts, [row["answer"] for row in rows])) / len(rows)}


WORLD = World(
    name="igpo",
    tool="lookup",
    asked=asked,
    demonstrations=demonstrations,
    warm_up=(140, 18_000),
    tokens=TOKENS,
    turns=TURNS,
    measured=measured,
    every=5,
)


def run(arm: str, seed: int, quick: bool) -> Outcome:
    slug, reward, settings = ARMS[arm]
    wrapper = {"answer_opening": "=", "answer_closing": ""} if slug != "grpo" else {}
    done = trained(
        WORLD,
        slug,
        reward,
        seed,
        quick,
        kl_coefficient=0.001,
        entropy_coefficient=0.001,
        **wrapper,
        **settings,
    )
    silent = [
        metrics.get("advantage/silent_groups", metrics["reward/degenerate_groups"])
        for metrics in done.metrics
    ]
    early = silent[: max(1, len(silent) // 4)]
    values = {
        ACCURACY: done.looks[-1][1][ACCURACY],
        "accuracy before": done.looks[0][1][ACCURACY],
        SILENT: sum(early) / len(early),
    }
    steps = [(step + 1.0, share) for step, share in enumerate(silent)]
    return Outcome(values, {ACCURACY: done.curve(ACCURACY), SILENT: steps})


CLAIM = Claim(
    slug="igpo-information-gain",
    statement="From the same number of samples IGPO learns to answer more questions than GRPO, "
    "whose groups often earn the same.",
    task="the value of the value of a key in a random table, which can be looked up: a small "
    "transformer, shown how to read what was found, and responses with one to three look-ups "
    "of which a quarter are on purpose; 30 steps "
    "of 16 questions with 8 samples in at most 4 turns; 1000 sampled responses to other questions",
    metric=ACCURACY,
    higher_is_better=True,
    method="IGPO",
    baseline="GRPO",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "In the first quarter of the steps groups without any advantage are rarer with IGPO.",
            SILENT,
            "IGPO",
            "GRPO",
            higher_is_better=False,
        ),
        Finding("Gains and outcome together teach more than gains alone.", ACCURACY, "IGPO",
                "gains alone"),
    ),
    notes="Learning rate 3e-4 for all arms. On seed 100, which is not reported, in a world whose "
    "warm-up has 35 % of look-ups on purpose, 25 steps brought IGPO to 0.90, its later "
    "version to 0.86 and GRPO to 0.85, from 0.10. In a sparser world, of 20 % and no table "
    "where a key is missing, IGPO learnt the first look-up and then answered at once (0.05 "
    "after 40 steps), and at 1e-3 collapsed: normalised together with the outcomes, a "
    "further turn without a gain counts against a response.",
)  # fmt: skip
