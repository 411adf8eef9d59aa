"""A reward for code: whether a completion's program passes its row's unit tests."""

import math
import re
from collections.abc import Sequence
from typing import Any

from postgrad.errors import PostgradError
from postgrad.rewards.sandbox import Limits, Sandbox

# blocks in fences; the last one may have been cut off
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)
_PYTHON = ("", "python", "python3", "py")
_COLUMNS = "test and entry_point, or tests, or inputs and outputs"


class UnitTests:
    """The reward function that `code` makes; called as reward functions are."""

    keeps_time = True  # every run has its own limit

    def __init__(self, sandbox: Sandbox, partial: bool):
        self._sandbox = sandbox
        self._partial = partial

    def __call__(
        self,
        prompts: list[Any],
        completions: list[str],
        test: list[Any] | None = None,
        entry_point: list[Any] | None = None,
        tests: list[Any] | None = None,
        setup: list[Any] | None = None,
        inputs: list[Any] | None = None,
        outputs: list[Any] | None = None,
    ) -> list[float]:
        columns = {
            "test": test,
            "entry_point": entry_point,
            "tests": tests,
            "setup": setup,
            "inputs": inputs,
            "outputs": outputs,
        }
        rows = [
            {"prompt": prompt, "completion": completion}
            | {name: values[i] for name, values in columns.items() if values is not None}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return self._sandbox.map(self._score, rows)

    def _score(self, row: dict[str, Any]) -> float:
        passed = self._passed(row)
        return sum(passed) / len(passed) if self._partial else float(all(passed))

    def _passed(self, row: dict[str, Any]) -> list[bool]:
        """Which of the row's tests its completion passes; at least one."""
        code = extract(row["completion"])
        name = _text(row, "entry_point")
        if row.get("inputs") is not None:
            return self._answers(code, _texts(row, "inputs"), _texts(row, "outputs"))
        before, program = _assembled(row["prompt"], code, name)
        if row.get("tests") is not None:
            tests = _texts(row, "tests")
        elif row.get("test") is not None and name is not None:
            tests = [f"{_text(row, 'test')}\n\ncheck({name})"]
        else:
            raise PostgradError(f"reward 'code' needs the columns {_COLUMNS} in every row")
        setup = f"{before}\n{_text(row, 'setup') or ''}"
        tested = [] if name is None else [name]
        return self._sandbox.test(program, tests, setup=setup, tested=tested)

    def _answers(self, program: str, inputs: list[str], outputs: list[str]) -> list[bool]:
        if len(inputs) != len(outputs):
            raise PostgradError(
                f"reward 'code': a row has {len(inputs)} inputs but {len(outputs)} outputs"
            )
        passed = []
        for given, expected in zip(inputs, outputs, strict=True):
            result = self._sandbox.run(program, given)
            right = result.exit == 0 and _lines(result.output) == _lines(expected)
            passed.append(right)
            if not (right or self._partial):
                break  # one is enough
        return passed


def code(
    time_limit: float = 5.0,
    partial: bool = False,
    memory: int = 512,
    isolation: str | None = None,
    parallel: int | None = None,
) -> UnitTests:
    """1 where the program in the completion passes all unit tests of its row, else 0.

    The program is the last block in a Python fence, or else the whole completion. It runs in a
    sandbox; `isolation` is `namespaces`, `bubblewrap` or, weaker, `process` (default: the first of
    the strong ones there is). With `partial` the reward is the share of tests that pass.
    `time_limit` are seconds of computing for a row's tests together, or for each input, and
    twice as many by the clock; `memory` is in MiB, and as many as `parallel` completions are tested
    at a time (default: the number of cores).

    Tests are in the columns `test` and `entry_point` (HumanEval's form; where the prompt begins
    that function, the completion may continue it), or `tests`, a list of assert statements, with
    perhaps `setup` to run before them and `entry_point`; or `inputs` and `outputs`, what the
    program reads and prints.
    """
    if not _positive(time_limit, int | float):
        raise PostgradError(f"reward 'code': time_limit must be above 0, got {time_limit!r}")
    for name, value in (("memory", memory), ("parallel", 1 if parallel is None else parallel)):
        if not _positive(value, int):
            raise PostgradError(
                f"reward 'code': {name} must be a positive whole number, got {value!r}"
            )
    if not isinstance(partial, bool):
        raise PostgradError(f"reward 'code': partial must be true or false, got {partial!r}")
    limits = Limits(cpu=math.ceil(time_limit), wall=2 * time_limit, memory=memory << 20)
    return UnitTests(Sandbox(isolation, limits, parallel), partial)


def _positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def extract(completion: str) -> str:
    """The program in a completion: its last Python block in fences, or else all of it."""
    blocks = [text for language, text in _BLOCK.findall(completion) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else completion


def _assembled(prompt: Any, code: str, name: str | None) -> tuple[str, str]:
    """What of a prompt that begins the function stands before it, and the whole program."""
    begun = _definition(name, prompt) if name is not None and isinstance(prompt, str) else None
    if begun is None:
        return "", code
    before = prompt[: begun.start()]
    own = _definition(name, code)
    return before, f"{before}\n{code}" if own else f"{prompt}{code}"


def _definition(name: str | None, text: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async +)?(?:def|class) +{re.escape(str(name))}\b", text, re.M)


def _lines(text: str) -> list[str]:
    """Lines without the spaces at their ends and the empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _text(row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise _odd(column, "a text", value)
    return value


def _texts(row: dict[str, Any], column: str) -> list[str]:
    value = row.get(column)
    texts = isinstance(value, Sequence) and not isinstance(value, str)
    if not texts or not value or not all(isinstance(item, str) for item in value):
        raise _odd(column, "a list of at least one text", value)
    return list(value)


def _odd(column: str, expected: str, found: Any) -> PostgradError:
    return PostgradError(
        f"reward 'code': column {column!r} must be {expected}, got {str(found)[:60]!r} "
        f"({type(found).__name__})"
    )
