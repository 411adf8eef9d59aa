"""Verifiers of the library: each maker takes settings and gives a reward function."""

import json
import logging
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from postgrad.errors import MissingExtra, PostgradError, unknown
from postgrad.rewards import overlap
from postgrad.rewards.unit_tests import code

Rewards = list[float]
Function = Callable[..., Rewards]
AnswerKind = Literal["number", "tagged", "text"]

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w)])[-−])?(?<!\d)\.\d+"
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_THEN_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"


def exact(ignore_case: bool = False) -> Function:
    """1 where the completion is the answer, spaces around both aside, else 0."""

    def cleaned(text: Any) -> str:
        stripped = str(text).strip()
        return stripped.casefold() if ignore_case else stripped

    def score(completions: list[str], answer: list[Any]) -> Rewards:
        return [float(cleaned(c) == cleaned(a)) for c, a in zip(completions, answer, strict=True)]

    return score


def numeric(tolerance: float = 1e-6) -> Function:
    """1 where the completion's final number is the answer's, else 0.

    The final number is the one after `####`, or else in the last `\\boxed{}`, or else the last.
    Thousands separators, currency signs and units around it do not matter. Numbers are equal
    within `tolerance`, relative to the answer (absolute near 0).
    """
    if not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise PostgradError(f"reward 'numeric': tolerance must be at least 0, got {tolerance!r}")

    def score(completions: list[str], answer: list[Any]) -> Rewards:
        rewards = []
        for completion, true in zip(completions, answer, strict=True):
            expected, found = final_number(str(true)), final_number(completion)
            if expected is None:
                raise PostgradError(f"reward 'numeric': the answer {str(true)!r} holds no number")
            close = found is not None and math.isclose(
                found, expected, rel_tol=tolerance, abs_tol=tolerance
            )
            rewards.append(float(close))
        return rewards

    return score


def final_number(text: str) -> float | None:
    """The number that a solution ends in (see `numeric`), or None."""
    marked = re.search(r".*####(.*)", text, re.DOTALL)
    boxed = re.search(r".*\\boxed\s*\{([^{}]*)\}", text, re.DOTALL)
    for match in (marked, boxed):
        numbers = _NUMBER.findall(match[1].replace(r"\!", "")) if match else []
        if numbers:
            return _value(numbers[0] if match is marked else numbers[-1])
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def final_answer(text: str, kind: AnswerKind) -> float | str | None:
    """What a response ends in: its `final_number`, the text in its last `<answer>` tags (all of it
    without tags), or all of it. None where there is nothing.
    """
    if kind == "number":
        return final_number(text)
    return (_answer(text) if kind == "tagged" else text.strip()) or None


def math_verify() -> Function:
    """1 where math-verify finds the completion's mathematical answer equal to `answer`, else 0."""
    try:
        import math_verify as library
    except ImportError as error:
        raise MissingExtra("math-verify", "tasks") from error

    # Its own time limits need signals, which only the main thread may use; rewards have another,
    # so its warning that there is none does not apply.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> Any:
        return library.parse(text, parsing_timeout=None)

    def score(completions: list[str], answer: list[Any]) -> Rewards:
        rewards = []
        for completion, true in zip(completions, answer, strict=True):
            gold = parsed(str(true)) or parsed(f"${true}$")
            if not gold:
                raise PostgradError(
                    f"reward 'math-verify': the answer {str(true)!r} is no mathematical expression"
                )
            same = library.verify(gold, parsed(completion), timeout_seconds=None)
            rewards.append(float(same))
        return rewards

    return score


def reasoning_gym() -> Function:
    """The score, from 0 to 1, of the reasoning-gym task that the row comes from.

    What is scored is the text in the last `<answer>` tags of the completion, or all of it.
    """

    def score(
        completions: list[str],
        entry: list[dict[str, Any]],
        task: list[str],
        task_settings: list[dict[str, Any]],
    ) -> Rewards:
        rows = zip(completions, entry, task, task_settings, strict=True)
        return [
            float(_verifier(name, json.dumps(settings)).score_answer(_answer(completion), item))
            for completion, item, name, settings in rows
        ]

    return score


@cache
def _verifier(task: str, settings: str) -> Any:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise MissingExtra("reasoning-gym", "tasks") from error
    return create_dataset(task, **{**json.loads(settings), "size": 1, "seed": 0})


def _answer(completion: str) -> str:
    tagged = _ANSWER_TAG.findall(completion)
    return (tagged[-1] if tagged else completion).strip()


def addition() -> Function:
    """1 where the completion is the sum in the prompt: four digits, least significant first."""

    def score(prompts: list[Any], completions: list[str]) -> Rewards:
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            operands = re.fullmatch(r"(\d{3})\+(\d{3})=", str(prompt))
            if operands is None:
                raise PostgradError(
                    f"reward 'addition': expected a prompt such as '012+345=', got {str(prompt)!r}"
                )
            total = f"{int(operands[1]) + int(operands[2]):04d}"[::-1]
            rewards.append(float(completion.strip() == total))
        return rewards

    return score


def form(pattern: str = _THINK_THEN_ANSWER) -> Function:
    """1 where the whole completion matches the regular expression `pattern`, else 0.

    A dot matches line ends too. By default: `<think>…</think>` and then `<answer>…</answer>`.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise PostgradError(f"reward 'format': pattern {pattern!r} is invalid ({error})") from error

    def score(completions: list[str]) -> Rewards:
        return [float(compiled.fullmatch(completion) is not None) for completion in completions]

    return score


def length(
    target: int,
    form: Literal["beyond", "overlong"] = "beyond",
    buffer: int | None = None,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> Function:
    """A penalty from 0 to -1 for long completions.

    - `beyond`: 0 up to `target`, then -(n - target) / target, at least -1.
    - `overlong`: DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13):
      0 up to `target - buffer`, then falling linearly to -1 at `target` and beyond.
    """
    if form not in ("beyond", "overlong"):
        raise unknown("form of reward 'length':", str(form), ("beyond", "overlong"))
    if unit not in ("tokens", "words", "characters"):
        raise unknown("unit of reward 'length':", str(unit), ("tokens", "words", "characters"))
    if isinstance(target, bool) or not isinstance(target, int) or target < 1:
        raise PostgradError(f"reward 'length': target must be a positive integer, got {target!r}")
    width = target
    if form == "overlong":
        if isinstance(buffer, bool) or not isinstance(buffer, int) or not 0 < buffer <= target:
            raise PostgradError(
                f"reward 'length': form overlong needs a buffer from 1 to {target}, got {buffer!r}"
            )
        width = buffer
    free = target if form == "beyond" else target - width

    def penalty(n: int) -> float:
        return -min(1.0, max(0, n - free) / width)

    def of_tokens(completion_ids: list[Any]) -> Rewards:
        return [penalty(len(ids)) for ids in completion_ids]

    def of_text(completions: list[str]) -> Rewards:
        return [penalty(len(c.split() if unit == "words" else c)) for c in completions]

    return of_tokens if unit == "tokens" else of_text


def rouge(kind: Literal["mean", "rouge1", "rouge2", "rougeL"] = "mean") -> Function:
    """ROUGE of the completion with the answer: an F1 in [0, 1], or the mean of all three."""
    if kind not in ("mean", "rouge1", "rouge2", "rougeL"):
        raise unknown("kind of reward 'rouge':", str(kind), ("mean", "rouge1", "rouge2", "rougeL"))

    def score(completions: list[str], answer: list[Any]) -> Rewards:
        rewards = []
        for completion, reference in zip(completions, answer, strict=True):
            values = overlap.rouge(completion, str(reference))
            rewards.append(sum(values.values()) / 3 if kind == "mean" else values[kind])
        return rewards

    return score


def f1(tag: str = "answer", penalty: float = -2.0) -> Function:
    """F1 of the words of the answer given with those of `answer`, the best of them if it is a list.

    The answer given is the text in the last `<answer>` tags (or other ones: `tag`; the whole
    completion if that is empty). Words are compared as sets, in lower case and without punctuation.
    A completion without the tags, or with one that is not closed, is worth `penalty`.
    """
    if not isinstance(tag, str) or not re.fullmatch(r"\w*", tag):
        raise PostgradError(f"reward 'f1': tag must be a word such as answer, got {tag!r}")
    if isinstance(penalty, bool) or not isinstance(penalty, int | float):
        raise PostgradError(f"reward 'f1': penalty must be a number, got {penalty!r}")
    opening, closing = f"<{tag}>", f"</{tag}>"

    def given(completion: str) -> str | None:
        if not tag:
            return completion
        _, found, after = completion.rpartition(opening)
        balanced = completion.count(opening) == completion.count(closing)
        return after.partition(closing)[0] if found and balanced and closing in after else None

    def score(completions: list[str], answer: list[Any]) -> Rewards:
        rewards = []
        for completion, true in zip(completions, answer, strict=True):
            found = given(completion)
            forms = true if isinstance(true, list) else [true]
            if not forms:
                raise PostgradError("reward 'f1': the list of answers is empty")
            rewards.append(
                float(penalty)
                if found is None
                else max(overlap.word_f1(found, str(form)) for form in forms)
            )
        return rewards

    return score


VERIFIERS: dict[str, Callable[..., Function]] = {
    "exact": exact,
    "numeric": numeric,
    "math-verify": math_verify,
    "reasoning-gym": reasoning_gym,
    "addition": addition,
    "format": form,
    "length": length,
    "rouge": rouge,
    "f1": f1,
    "code": code,
}
