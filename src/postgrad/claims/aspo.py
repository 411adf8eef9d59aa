"""ASPO's claim: calls come earlier at the same accuracy; a bonus in the reward costs accuracy."""

import random
from typing import Any

import torch

from postgrad.advantages.shaping import shaped_rewards
from postgrad.claims.base import Claim, Finding, Outcome
from postgrad.claims.calling_tools import World, conversations, right, trained
from postgrad.methods.agents.tools import Calculator, CalculatorSettings, calculated
from postgrad.models.language import LanguagePolicy
from postgrad.sampling.conversations import first_replies
from postgrad.tasks.formats import Row

TOKENS, TURNS, FILLER = 36, 3, 20
WITHOUT_CALL, WRONG_CALL = 0.2, 0.3
ACCURACY, FIRST = "accuracy", "tokens before the first call's result"


def asked(count: int, stream: str) -> list[Row]:
    """Small sums to be computed, `7*8+5=`, whose values have two digits."""
    choose = random.Random(stream)
    rows: list[Row] = []
    for _ in range(count):
        what = f"{choose.randint(3, 9)}*{choose.randint(3, 9)}+{choose.randint(1, 9)}"
        rows.append({"prompt": f"{what}=", "answer": calculated(what)})
    return rows


def demonstrations(count: int, stream: str) -> list[Row]:
    """0 to 20 dots, then mostly a call, some of them wrong, and what the calculator says."""
    choose = random.Random(f"{stream} responses")
    rows: list[Row] = []
    for row in asked(count, stream):
        what = row["prompt"].removesuffix("=")
        text = "." * choose.randint(0, FILLER)
        if choose.random() < WITHOUT_CALL:
            text += f"={choose.randint(10, 90)}"
        else:
            if choose.random() < WRONG_CALL:
                place = choose.choice((0, 2, 4))
                what = what[:place] + choose.choice("3456789") + what[place + 1 :]
            text += f"[{what}]{calculated(what)}={calculated(what)}"
        rows.append({"prompt": row["prompt"], "completion": text})
    return rows


def rewarded_when_early(
    prompts: list[str], completions: list[str], answer: list[str]
) -> list[float]:
    """The paper's equation 1: correct responses with an early call have a bonus in the reward."""
    correct = torch.tensor(right(completions, answer))
    place = torch.tensor([float(text.find("]") + 1) for text in completions])
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([numbers[prompt] for prompt in prompts])
    shaped: list[float] = shaped_rewards(
        correct, (correct == 1) & (place > 0), place, group
    ).tolist()
    return shaped


# learning rates: see the notes
ARMS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ASPO": ("aspo", right, {"learning_rate": 3e-4}),
    "DAPO": ("dapo", right, {"learning_rate": 3e-4}),
    "DAPO, bonus in the reward": ("dapo", rewarded_when_early, {"learning_rate": 3e-4}),
}


def measured(policy: LanguagePolicy, rows: list[Row]) -> dict[str, float]:
    """Of sampled responses: how many are right, how many call, and when."""
    tool = Calculator(CalculatorSettings())
    made = conversations(policy, rows, tool, tokens=TOKENS, turns=TURNS, temperature=1.0)
    places = torch.cat([
        first_replies(written[None], turns[None], torch.tensor([len(turns)]))
        for written, turns in zip(made.written, made.turns, strict=True)
    ])  # fmt: skip
    called = places >= 0
    correct = right(made.texts, [row["answer"] for row in rows])
    return {
        ACCURACY: sum(correct) / len(rows),
        # without any call the limit stands for its place
        FIRST: float(torch.where(called, places, TOKENS).float().mean()),
        "share with a call": float(called.float().mean()),
    }


WORLD = World(
    name="aspo",
    tool="calculator",
    asked=asked,
    demonstrations=demonstrations,
    warm_up=(150, 20_000),
    tokens=TOKENS,
    turns=TURNS,
    measured=measured,
    every=10,
)


def run(arm: str, seed: int, quick: bool) -> Outcome:
    slug, reward, settings = ARMS[arm]
    done = trained(WORLD, slug, reward, seed, quick, most_rounds=2, **settings)
    return Outcome(done.looks[-1][1], {name: done.curve(name) for name in (ACCURACY, FIRST)})


CLAIM = Claim(
    slug="aspo",
    statement="Shaping the advantage makes the policy call its tool earlier than DAPO does.",
    task="sums such as 7*8+5 with a calculator: a small transformer, shown responses that begin "
    "with 0 to 20 dots, a fifth of them without a call and three tenths of the calls wrong; 30 "
    "steps of 16 prompts with 8 samples; 1000 sampled responses to other draws of the same sums; a "
    "response without a call counts as one at the limit of 36 tokens",
    metric=FIRST,
    higher_is_better=False,
    method="ASPO",
    baseline="DAPO",
    arms=tuple(ARMS),
    run=run,
    findings=(
        Finding(
            "ASPO is more accurate than DAPO with the same preference as a bonus in the reward.",
            ACCURACY,
            "ASPO",
            "DAPO, bonus in the reward",
        ),
    ),
    notes="Learning rate 3e-4 for all arms; no other was compared. In 15 steps on seed 100, which "
    "is not reported, ASPO came to an accuracy of 0.94 with its first call answered at "
    "token 8, DAPO to 0.90 and token 10, from 0.51 and token 21.",
)
