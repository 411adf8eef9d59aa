"""DSP's claim: stimuli tuned by a black box's answers help it more than those of references."""

import itertools
import random
from typing import Any

from postgrad.claims.base import Claim, Outcome
from postgrad.claims.stepping import train_in_steps
from postgrad.claims.symbols import imitate, made_once
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.rewards.overlap import rouge
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.seeding import derive

LETTERS = "abcdefghij"
TOKENS = 20  # four keywords of three letters, what ends each, and the end
ANSWERS, HEARD, CHANCE = (
    4,
    2,
    0.9,
)  # answers a stimulus; keywords the black box heeds, and how often
STEPS, LEARNING_RATE, SFT_STEPS, ORDERS = 12, 3e-4, 150, 8
METRIC = "ROUGE-1 of the answers"

ARMS: dict[str, dict[str, Any]] = {
    "DSP": {},
    "DSP, rewards of the answers alone": {"step_reward": 0.0},
    "DSP, PPO in place of NLPO": {"top_mask": 1.0},
    "stimuli of references (SFT)": {},
    "no stimulus": {},
}


def world(seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """A usual and a special word for every letter."""
    chance = random.Random(f"words {seed}")
    words: set[str] = set()
    while len(words) < 2 * len(LETTERS):
        words.add("".join(chance.choices("klmnoprstu", k=3)))
    both = sorted(words)
    chance.shuffle(both)
    return dict(zip(LETTERS, both[::2], strict=True)), dict(zip(LETTERS, both[1::2], strict=True))


def tasks(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Prompts of two letters with their references, to train on and to test on.

    A reference holds the usual and the special words of both letters in any order.
    """
    usual, special = world(seed)
    chance = random.Random(f"tasks {seed}")
    rows = []
    for first, second in itertools.permutations(LETTERS, 2):
        words = [usual[first], usual[second], special[first], special[second]]
        chance.shuffle(words)
        rows.append({"prompt": f"{first}{second}: ", "answer": " ".join(words)})
    chance.shuffle(rows)
    return rows[:70], rows[70:]


class Filler:
    """A frozen black box that fills a template.

    It says the usual words of both letters by itself. Of a stimulus it heeds two keywords, each
    with probability 0.9; in place of others it says words at random.
    """

    def __init__(self, seed: int):
        self._usual, special = world(seed)
        self._every = [*self._usual.values(), *special.values()]

    def __call__(
        self, prompts: list[str], n: int = 1, *, seed: int = 0, **options: Any
    ) -> list[list[str]]:
        return [[self._answer(prompt, seed, i) for i in range(n)] for prompt in prompts]

    def _answer(self, prompt: str, seed: int, number: int) -> str:
        chance = random.Random(derive(seed, prompt, number))
        letters, _, stimulus = prompt.partition(": ")
        said = [self._usual[letter] for letter in letters]
        heard = [keyword.strip() for keyword in stimulus.split(";") if keyword.strip()][:HEARD]
        heeded = [keyword for keyword in heard if chance.random() < CHANCE]
        others = chance.choices(self._every, k=HEARD - len(heeded))
        return " ".join([*said, *heeded, *others])


def extracted(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Stimuli taken from references: their words, in several orders as several people might."""
    chance = random.Random(f"stimuli {seed}")
    made = []
    for row in rows:
        for _ in range(ORDERS):
            words = row["answer"].split()
            chance.shuffle(words)
            stimulus = "".join(f"{word};" for word in words)
            made.append({"prompt": row["prompt"], "completion": stimulus})
    return made


def writer(seed: int, steps: int = SFT_STEPS) -> LanguagePolicy:
    """The model `tiny` after supervised training on stimuli of references."""

    def make() -> LanguagePolicy:
        training, _ = tasks(seed)
        policy = load_policy("tiny", seed=seed)
        return imitate(
            policy, extracted(training, seed), seed, steps=steps, max_response_tokens=TOKENS
        )

    return made_once("stimuli", make, seed=seed, steps=steps, letters=LETTERS, orders=ORDERS)


def run(arm: str, seed: int, quick: bool) -> Outcome:
    black_box = Filler(seed)
    training, test = tasks(seed)
    if arm == "no stimulus":
        return Outcome(_values(black_box, test, [""] * len(test), 1))
    policy = writer(seed, *([5] if quick else []))
    curve = [(0.0, measured(policy, black_box, test, quick)[METRIC])]
    if arm.startswith("DSP"):
        steps = 3 if quick else STEPS
        settings = {
            "template": "{prompt}{stimulus}",
            "reward": {"name": "rouge", "kind": "rouge1"},
            "answers": ANSWERS,
            "least_tokens": 1,
            "learning_rate": LEARNING_RATE,
            "critic_rate": 10.0,
            "discount": 1.0,
            "gae_lambda": 1.0,
            "batch_size": 8 if quick else 64,
            "epochs": 2,
            "minibatches": 4,
            "rollout": {"samples": 1, "max_new_tokens": TOKENS, "top_k": 0},
            **ARMS[arm],
        }
        objects = {"model": policy, "data": training, "black_box": black_box}
        for step, _ in train_in_steps("dsp", seed, objects, steps=steps, **settings):
            if step % 4 == 0:
                curve.append((float(step), measured(policy, black_box, test, quick)[METRIC]))
    return Outcome(measured(policy, black_box, test, quick), {METRIC: curve})


def measured(
    policy: LanguagePolicy, black_box: Filler, rows: list[dict[str, str]], quick: bool
) -> dict[str, float]:
    """Of sampled stimuli for unseen prompts."""
    each = 1 if quick else 8
    prompts = [policy.render(row["prompt"]) for row in rows]
    seeds = [derive(0, "stimuli", i) for i in range(each * len(rows))]
    drawn = generate(policy, prompts, SamplingSettings(TOKENS), samples=each, seeds=seeds)
    return _values(black_box, rows, drawn.texts, each)


def _values(
    black_box: Filler, rows: list[dict[str, str]], stimuli: list[str], each: int
) -> dict[str, float]:
    rows = [row for row in rows for _ in range(each)]
    asked = [row["prompt"] + stimulus for row, stimulus in zip(rows, stimuli, strict=True)]
    answers = black_box(asked, ANSWERS, seed=1)
    scores = [
        rouge(text, row["answer"])["rouge1"]
        for row, texts in zip(rows, answers, strict=True)
        for text in texts
    ]
    keywords = [
        keyword in row["answer"].split()
        for row, stimulus in zip(rows, stimuli, strict=True)
        for keyword in stimulus.split(";")
        if keyword
    ]
    return {
        METRIC: sum(scores) / len(scores),
        "keywords that occur in the reference": sum(keywords) / max(1, len(keywords)),
    }


CLAIM = Claim(
    slug="dsp",
    statement="Tuned by the answers of a black box, the stimuli of a small policy raise their "
    "ROUGE above that of stimuli learnt from references.",
    task="keywords for a template-filling black box that says the usual words of a reference by "
    "itself and heeds two keywords; prompts of two letters, 20 of 90 unseen",
    metric=METRIC,
    higher_is_better=True,
    method="DSP",
    baseline="stimuli of references (SFT)",
    arms=tuple(ARMS),
    run=run,
    notes="Both sides start from the same policy, which learnt the reference's words in any order; "
    "the usual ones the black box says anyway. The learning rate, of 1e-4, 3e-4 and 1e-3, was"
    " chosen on seed 100, which is not reported, in a world with one order of the words for "
    "each reference: there DSP made held-out answers worse at every rate, as the policy had "
    "become certain of one order and the mask made it greedy. Hence the eight orders here. "
    "PPO in place of NLPO, whose mask is what distinguishes the paper's form, is ahead of it "
    "on every seed; both say fewer keywords that occur in the reference than the policy they "
    "start from, and better answers come of it.",
)
