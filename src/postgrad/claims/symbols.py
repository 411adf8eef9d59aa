"""Strings of letters with a hidden score: the set-up of the claims on learning from a reward.

A prompt is one of eight letters, a response twelve more, `c` → `adfhbbagcheb`. What a response is
worth is the sum of hidden numbers g(a, b) over its neighbouring letters, the prompt's first: every
letter counts, and which ones are good depends on the letter before. A tiny model learns to write
strings from a random chain, which is the reference. Policies are judged by the true score of fresh
strings and by their KL to that reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
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

LETTERS = "abcdefgh"
LENGTH = 12
TOKENS = LENGTH + 1  # and the end
ROLLOUT = {"samples": 1, "max_new_tokens": TOKENS}
_DEMONSTRATIONS, _STEPS, _BATCH, _RATE = 3000, 150, 64, 3e-3


def hidden_score(seed: int) -> Tensor:
    """g `[8, 8]`: what a letter is worth after another; normal with deviation 1/2."""
    return 0.5 * torch.randn(8, 8, generator=generator(seed, "hidden score"))


def worth(hidden: Tensor, prompt: str, text: str) -> float:
    """The sum of g over neighbours of prompt and text; what is no letter counts nothing."""
    table = hidden.tolist()
    places = [LETTERS.find(letter) for letter in prompt[-1] + text[:LENGTH]]
    neighbours = pairwise(places)
    return sum(table[a][b] for a, b in neighbours if a >= 0 and b >= 0)


def score_by(hidden: Tensor, scale: float = 0.2, noise: float = 0.0) -> Callable[..., list[float]]:
    """A reward function: `scale` times the score of a response, plus an error.

    The error is normal with deviation `noise` and always the same for a string, as that of a reward
    model is.
    """

    def error(string: str) -> float:
        if not noise:
            return 0.0
        return noise * float(torch.randn((), generator=generator(0, "error", string)))

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [scale * worth(hidden, a, text) + error(a + text) for a, text in pairs]

    return score


def prompts(copies: int = 1) -> list[dict[str, Any]]:
    """Every letter, `copies` times."""
    return [{"prompt": letter} for _ in range(copies) for letter in LETTERS]


def chain(seed: int, sharpness: float = 1.0) -> Tensor:
    """Probabilities `[8, 8]` of a random chain of letters."""
    return torch.softmax(sharpness * torch.randn(8, 8, generator=generator(seed, "chain")), -1)


def strings(table: Tensor, count: int, *stream: Any) -> list[dict[str, str]]:
    """Strings that the chain writes after evenly drawn prompts, as demonstrations."""
    random = generator(0, "strings", *stream)
    letters = torch.randint(8, (count, 1), generator=random)
    for _ in range(LENGTH):
        following = torch.multinomial(table[letters[:, -1]], 1, generator=random)
        letters = torch.cat([letters, following], 1)
    texts = ["".join(LETTERS[i] for i in row) for row in letters.tolist()]
    return [{"prompt": text[0], "completion": text[1:]} for text in texts]


def imitate(
    policy: LanguagePolicy, rows: list[dict[str, str]], seed: int, **settings: Any
) -> LanguagePolicy:
    """The policy after supervised training on demonstrations."""
    settings = {
        "steps": _STEPS,
        "batch_size": min(_BATCH, len(rows)),
        "learning_rate": _RATE,
        "max_response_tokens": TOKENS,
        **settings,
    }
    for _ in train_in_steps("sft", seed, {"model": policy, "data": rows}, **settings):
        pass
    return policy


def made_once(name: str, make: Callable[[], LanguagePolicy], **arguments: Any) -> LanguagePolicy:
    """The policy that `make` gives, loaded anew; it is kept, as a function of the `arguments`."""
    key = {**arguments, "versions": [__version__, version("torch")]}

    def fill(folder: Path) -> None:
        make().save(folder)

    return load_policy(str(cached_folder(f"symbols-{name}", key, fill)))


def reference_policy(seed: int, steps: int = _STEPS) -> LanguagePolicy:
    """The model `tiny` after learning to write strings of a chain; a cached function of `seed`."""

    def make() -> LanguagePolicy:
        rows = strings(chain(seed), _DEMONSTRATIONS, seed, "reference")
        return imitate(load_policy("tiny", seed=seed), rows, seed, steps=steps)

    return made_once("reference", make, seed=seed, recipe=[_DEMONSTRATIONS, steps, _BATCH, _RATE])


def sample(policy: LanguagePolicy, count: int, *stream: Any) -> Rollouts:
    """`count` strings for every prompt, with the draws of the stream so named."""
    ids = [policy.render(letter) for letter in LETTERS]
    seeds = [derive(0, *stream, i) for i in range(len(ids) * count)]
    with torch.no_grad():
        return generate(policy, ids, SamplingSettings(TOKENS), samples=count, seeds=seeds)


def preferences(
    policy: LanguagePolicy, hidden: Tensor, count: int, seed: int, temperature: float = 1.0
) -> list[dict[str, str]]:
    """About `count` pairs of the policy's strings, labelled by Bradley-Terry with the true score.

    P(a over b) = sigma((score(a) - score(b)) / temperature).
    """
    texts = sample(policy, -(-2 * count // 8), "pairs", seed).texts
    each = len(texts) // 8
    chance = torch.rand(len(texts), generator=generator(seed, "labels")).tolist()
    rows = []
    for i in range(0, len(texts) - 1, 2):
        letter, first, second = LETTERS[i // each], texts[i], texts[i + 1]
        if i // each != (i + 1) // each or first == second or not (first and second):
            continue
        gap = worth(hidden, letter, first) - worth(hidden, letter, second)
        if chance[i] >= torch.sigmoid(torch.tensor(gap / temperature)):
            first, second = second, first
        rows.append({"prompt": letter, "chosen": first, "rejected": second})
    return rows


@dataclass(frozen=True)
class Measured:
    """Mean true score of fresh strings, and KL to the reference in nats a string."""

    score: float
    divergence: float


def measure(
    policy: LanguagePolicy, reference: LanguagePolicy, hidden: Tensor, *stream: Any, count: int = 32
) -> Measured:
    """Of `count` strings for every prompt; KL = mean log pi(y)/pi_ref(y) of the same strings."""
    drawn = sample(policy, count, "measure", *stream)
    letters = [letter for letter in LETTERS for _ in range(count)]
    scores = [worth(hidden, a, text) for a, text in zip(letters, drawn.texts, strict=True)]
    with torch.no_grad():
        own = policy.score(drawn.prompts, drawn.responses).logprobs.sum(1)
        other = reference.score(drawn.prompts, drawn.responses).logprobs.sum(1)
    return Measured(sum(scores) / len(scores), float((own - other).mean()))


def followed(
    slug: str,
    policy: LanguagePolicy,
    objects: dict[str, Any],
    hidden: Tensor,
    seed: int,
    *,
    steps: int,
    every: int = 10,
    reference: LanguagePolicy | None = None,
    count: int = 32,
    **settings: Any,
) -> Iterator[tuple[int, Measured]]:
    """Train `policy` by a method; its true score and KL before and after every `every` steps.

    The KL is to `reference`, by default the reference policy of `seed`, whatever the method's own
    is; both are of `count` strings for every prompt. `objects` are what the method takes from
    Python besides the model: `data`, `reward` …
    """
    reference = reference or reference_policy(seed)
    yield 0, measure(policy, reference, hidden, seed, 0, count=count)
    training = train_in_steps(
        slug,
        seed,
        {"model": policy, **objects},
        steps=steps,
        **{"batch_size": 64, "warmup_steps": 0, "schedule": "constant", **settings},
    )
    for step, _ in training:
        if step % every == 0:
            yield step, measure(policy, reference, hidden, seed, step, count=count)


def outcome(points: list[tuple[int, Measured]], **values: float) -> Outcome:
    """Curves of score and KL, their ends, and the mean score over the run besides `values`."""
    ends = {
        "score at the end": points[-1][1].score,
        "KL at the end": points[-1][1].divergence,
        "mean score over the run": sum(point.score for _, point in points) / len(points),
    }
    curves = {
        "score": [(float(step), point.score) for step, point in points],
        "score over KL": [(point.divergence, point.score) for _, point in points],
    }
    return Outcome({**values, **ends}, curves)
