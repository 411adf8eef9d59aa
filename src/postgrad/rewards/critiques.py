"""Critiques of text: functions that say which stretches of a response are good or poor.

A critique is called as a reward function is, by keywords:

    def critique(prompts, completions, **columns) -> list

and returns for every completion a list of spans: `("what it quotes", score)`, or
`(start, end, score)` for the characters from `start` up to `end`, or the same as a mapping with
`text` or `start` and `end`, and `score`. A score is 1 for good, -1 for poor, 0 for neither. None in
place of a list says that this completion could not be judged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.errors import PostgradError
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
from postgrad.rewards.spans import Place, Span

Judged = list[Span] | None


class Critique:
    """A critique of the user's, called and checked.

    Scores other than -1, 0 and 1 are errors unless `real_scores`.
    """

    def __init__(self, function: Term, time_limit: float = 60.0, *, real_scores: bool = False):
        self._function = function
        self._time_limit = time_limit
        self._real_scores = real_scores

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, list[Any]]
    ) -> list[Judged]:
        """The spans of every completion, or None where it could not be judged.

        Raises:
            PostgradError: the function raised, took too long, or returned something else.
        """
        available = {**columns, "prompts": list(prompts), "completions": list(completions)}
        returned = self._function.call(available, self._time_limit)
        judged = expect_list(returned, len(completions), self._function.title, "lists of spans")
        return [
            self._spans(said, text, f"{self._function.title} gave for completion {number}")
            for number, (said, text) in enumerate(zip(judged, completions, strict=True), 1)
        ]

    def of_rows(
        self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> list[Judged]:
        """The same for completions `[N]` of the prompts of N rows of data."""
        return self([row["prompt"] for row in rows], completions, columns_of(rows))

    def probe(self, row: Mapping[str, Any]) -> None:
        """Try it on one row, before any compute is spent."""
        self(*trial(row))

    def balance(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[float]:
        """As a reward function: the sum of a completion's span scores; 0 where there are none."""
        judged = self(prompts, completions, columns)
        return [math.fsum(span.score for span in said or ()) for said in judged]

    def _spans(self, said: Any, text: str, what: str) -> Judged:
        if said is None:
            return None
        if not isinstance(said, list | tuple):
            raise PostgradError(f"{what} {described(said)}: expected a list of spans, or None")
        return [self._span(given, text, what) for given in said]

    def _span(self, given: Any, text: str, what: str) -> Span:
        if isinstance(given, Mapping):
            keys = ("text", "score") if "text" in given else ("start", "end", "score")
            given = tuple(given.get(key) for key in keys)
        span = _span_of(given) if isinstance(given, list | tuple) else None
        if span is None:
            raise PostgradError(
                f"{what} the span {described(given)}: expected (quote, score) or "
                "(start, end, score)"
            )
        if span.place is not None and not 0 <= span.place[0] <= span.place[1] <= len(text):
            raise PostgradError(
                f"{what} the characters {span.place[0]} to {span.place[1]} of a text that has "
                f"{len(text)}"
            )
        if not (math.isfinite(span.score) if self._real_scores else span.score in (-1, 0, 1)):
            expected = "a finite number" if self._real_scores else "-1, 0 or 1"
            raise PostgradError(f"{what} the score {span.score:g}: expected {expected}")
        return span


def _span_of(given: Sequence[Any]) -> Span | None:
    *where, score = given if given else (None,)
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    if len(where) == 1 and isinstance(where[0], str):
        return Span(float(score), where[0])
    if len(where) == 2 and all(type(x) is int for x in where):
        place: Place = (where[0], where[1])
        return Span(float(score), place=place)
    return None


def load_critique(
    spec: RewardSpec | RewardFunction, *, time_limit: float = 60.0, real_scores: bool = False
) -> Critique:
    """The critique that `spec` names, as `load_rewards` finds rewards.

    Raises:
        PostgradError: unknown file, module, function or setting; code that fails on import.
    """
    return Critique(load_function(spec, "critique"), time_limit, real_scores=real_scores)
