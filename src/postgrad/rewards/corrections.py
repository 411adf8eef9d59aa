"""Critiques in words: what a policy is told of a response before it writes a better one.

A critique of the user's own is called as a reward function is, by keywords, and returns a text for
every completion, or None where it has nothing to say:

    def critique(prompts, completions, rewards, **columns) -> list[str | None]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.errors import PostgradError, unknown
from postgrad.rewards.functions import (
    RewardFunction,
    RewardSpec,
    Term,
    columns_of,
    described,
    expect_list,
    load_function,
    trial,
)
from postgrad.tasks.formats import stated_answer

SIMPLE, WITH_ANSWER = "simple", "simple-gt"
BUILT_IN = (SIMPLE, WITH_ANSWER)


class Corrections:
    """The critiques of responses: whether they are right, and perhaps more.

    `simple` says no more than that, `simple-gt` names the true answer besides. A function's text
    takes the place of both; where it returns None they are taken all the same.
    """

    def __init__(self, source: RewardSpec | RewardFunction, time_limit: float = 60.0):
        self.kind = source if source in BUILT_IN else "function"
        self._time_limit = time_limit
        self._function: Term | None = None
        if isinstance(source, str) and source not in BUILT_IN and ":" not in source:
            raise unknown("critique", source, (*BUILT_IN, "module:function", "file.py:function"))
        if source not in BUILT_IN:
            self._function = load_function(source, "critique")

    def of_rows(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: list[str],
        rewards: list[float],
        right: list[bool],
    ) -> list[str]:
        """A critique of each of N completions of the prompts of N rows.

        Raises:
            PostgradError: the function raised, took too long, or returned something else.
        """
        plain = [_said(row, fine, self.kind) for row, fine in zip(rows, right, strict=True)]
        if self._function is None:
            return plain
        available = {
            **columns_of(rows),
            "prompts": [row["prompt"] for row in rows],
            "completions": completions,
            "rewards": rewards,
        }
        title = self._function.title
        returned = self._function.call(available, self._time_limit)
        texts = expect_list(returned, len(completions), title, "texts")
        for number, text in enumerate(texts, 1):
            if text is not None and not isinstance(text, str):
                raise PostgradError(
                    f"{title} returned {described(text)} for completion {number}, expected text"
                )
        return [own if text is None else text for text, own in zip(texts, plain, strict=True)]

    def probe(self, row: Mapping[str, Any]) -> None:
        """Try it on one row, before any compute is spent."""
        if self.kind == WITH_ANSWER and row.get("answer") is None:
            raise PostgradError(
                "critique: simple-gt names the true answer, and the data has no column 'answer': "
                "take critique=simple, or your own critique=file.py:function"
            )
        _, completions, _ = trial(row)
        self.of_rows([row] * 2, completions, [0.0, 0.0], [False, False])


def _said(row: Mapping[str, Any], right: bool, kind: str) -> str:
    text = "This solution is correct." if right else "This solution is incorrect."
    answer = stated_answer(row)
    return text if kind == SIMPLE or not answer else f"{text} The correct answer is {answer}."
