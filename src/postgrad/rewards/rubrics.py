"""Language models that judge by a rubric, and that rewrite it: for `postgrad.rewards.evolving`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.rewards.annotations import Chat, filled, values_in
from postgrad.rewards.evolving import LABELS, Item, Record

JUDGE = """\
Below are a request and a response to it. Judge the response by one criterion alone:

{criterion}

Request:
{prompt}

Response:
{response}

Give your reason in one sentence. Then write, on a line of its own, "Score: " and a whole number \
from 0 to {points}.
"""
_RECORD = """\
A judge scores responses by this rubric:

{rubric}

Request:
{prompt}

Response:
{response}
{reference}
What the judge said of it:
{evaluation}

Total score: {reward}

"""
SCREEN = (
    _RECORD
    + """\
Was the response scored as it deserves? Answer with one word: good, ok or bad.
"""
)
ANALYSE = (
    _RECORD
    + """\
Look for weaknesses of the rubric in at most 1000 words: is the score too high for what the \
response is, what do the criteria miss, do their points tell such responses apart, what should \
cost points?
"""
)
REFINE = (
    _RECORD
    + """\
An analysis of the rubric's weaknesses:
{analysis}

Write a better rubric that mends them. Each criterion has fewer than 300 words and says what earns \
how many points, with examples. Answer with a JSON list and nothing after it:

[{"text": "what is judged, and what earns how many points", "points": 5}, ...]
"""
)
MERGE = """\
Below are several rubrics for the same kind of responses. Combine them into one: keep every \
criterion that is useful, and each only once. Answer with a JSON list and nothing after it:

[{"text": "what is judged, and what earns how many points", "points": 5}, ...]

{rubrics}
"""
_MOST_WORDS = 16_600  # of rubrics to be merged, as in the official code
_SCORE = re.compile(r"score\W*?(-?\d+)", re.IGNORECASE)


class RubricJudge:
    """A judge by a language model: asked for a reason and a number, item by item.

    `instruction` holds {criterion}, {points}, {prompt} and {response}.
    """

    def __init__(self, chat: Chat, instruction: str = JUDGE, max_tokens: int = 128):
        self._chat = chat
        self._instruction = instruction
        self._max_tokens = max_tokens

    def __call__(
        self, prompts: list[Any], completions: list[str], rubric: list[Item]
    ) -> list[dict[str, Any]]:
        asked = [
            filled(
                self._instruction,
                criterion=item.text,
                points=f"{item.points:g}",
                prompt=prompt,
                response=completion,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
            for item in rubric
        ]
        answers = [texts[0] for texts in self._chat(asked, max_tokens=self._max_tokens)]
        size = len(rubric)
        return [
            {
                "scores": [
                    score_in(answer, item.points)
                    for answer, item in zip(answers[i : i + size], rubric, strict=True)
                ],
                "evaluation": "\n".join(answer.strip() for answer in answers[i : i + size]),
            }
            for i in range(0, len(answers), size)
        ]


def score_in(text: str, points: float) -> float | None:
    """The last number after the word score, if it is one from 0 to `points`."""
    found = _SCORE.findall(text)
    if not found or not 0 <= int(found[-1]) <= points:
        return None
    return float(found[-1])


class RubricWriter:
    """A meta judge by a language model: analyses records, refines the rubric by each, and merges.

    Its methods are called as `EvolvingReward` calls the user's functions `refine` and `screen`.
    """

    def __init__(self, chat: Chat, max_tokens: int = 2048):
        self._chat = chat
        self._max_tokens = max_tokens

    def refine(self, rubric: list[Item], records: list[Record]) -> list[dict[str, Any]]:
        """The next rubric; empty if none could be read."""
        shown = [_shown(rubric, record) for record in records]
        analyses = self._ask([filled(ANALYSE, **fields) for fields in shown])
        asked = [
            filled(REFINE, **fields, analysis=analysis)
            for fields, analysis in zip(shown, analyses, strict=True)
        ]
        refined = [items for answer in self._ask(asked) if (items := items_in(answer))]
        if len(refined) < 2:
            return refined[0] if refined else []
        (merged,) = self._ask([filled(MERGE, rubrics=_joined(refined))])
        return items_in(merged)

    def screen(self, rubric: list[Item], records: list[Record]) -> list[str]:
        """How well each record was scored; ok where the answer is none of the labels."""
        asked = [filled(SCREEN, **_shown(rubric, record)) for record in records]
        return [_label(answer) for answer in self._ask(asked)]

    def _ask(self, prompts: list[str]) -> list[str]:
        return [texts[0] for texts in self._chat(prompts, max_tokens=self._max_tokens)]


def items_in(text: str) -> list[dict[str, Any]]:
    """The last list of items in what a language model wrote; empty if there is none."""
    found = [value for value in values_in(text) if _is_rubric(value)]
    return [{name: entry[name] for name in ("text", "points") if name in entry}
            for entry in (found[-1] if found else [])]  # fmt: skip


def _is_rubric(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_item, value))


def _is_item(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        return False
    points = entry.get("points", 5)
    number = isinstance(points, int | float) and not isinstance(points, bool)
    return bool(entry["text"].strip()) and number and 0 < points < float("inf")


def _shown(rubric: Sequence[Item], record: Record) -> dict[str, Any]:
    answer = record.get("answer")
    return {
        "rubric": _written(rubric),
        "prompt": record["prompt"],
        "response": record["completion"],
        "reference": "" if answer is None else f"\nReference:\n{answer}\n",
        "evaluation": record["evaluation"] or ", ".join(f"{x:g}" for x in record["scores"]),
        "reward": f"{record['reward']:g}",
    }


def _written(rubric: Sequence[Item]) -> str:
    return "\n\n".join(
        f"{number}. (0 to {item.points:g} points) {item.text}"
        for number, item in enumerate(rubric, 1)
    )


def _joined(rubrics: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Rubrics one below the other, as many as the limit of words allows."""
    texts: list[str] = []
    words = 0
    for number, items in enumerate(rubrics, 1):
        written = _written([Item(item["text"], item.get("points", 5)) for item in items])
        words += len(written.split())
        if words > _MOST_WORDS and texts:
            break
        texts.append(f"Rubric {number}:\n{written}")
    return "\n\n".join(texts)


def _label(answer: str) -> str:
    found = re.findall(r"[a-z]+", answer.lower())
    return next((word for word in found if word in LABELS), "ok")
