"""One name in, examples out: embedded tasks, local files and the Hugging Face Hub."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgrad.errors import PostgradError, unknown
from postgrad.tasks import addition, docstrings, documentation, reasoning
from postgrad.tasks.examples import EMBEDDED, REASONING_GYM, Examples
from postgrad.tasks.files import is_file_name, read_file
from postgrad.tasks.hub import is_hub_name, read_hub

_SPLIT = re.compile(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?")


def load(
    name: str,
    *,
    split: str = "train",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Examples:
    """Examples by name.

    Args:
        name: an embedded task (`docstrings`, `addition`, `stdlib-questions`,
            `reasoning-gym/TASK`), a local `.jsonl`, `.json`, `.csv` or `.parquet` file (the first
            three also gzipped), or a data set on the Hugging Face Hub, `owner/name` or
            `owner/name:config`.
        split: `train` or `test` of an embedded task, any split of a data set on the Hub; a file
            has one, `train`. A part in brackets: `train[:90%]`, `train[90%:]`, `train[:500]`.
        format: one of `postgrad.tasks.FORMATS`; recognised from the columns when None.
        columns: our column name to theirs, e.g. `{"prompt": "question"}`.
        settings: an embedded task's settings, e.g. its size and difficulty.
        seed: of an embedded task's random choices in its training split. Test splits are the same
            for every seed.

    Raises:
        PostgradError: one line that names the file, row or column at fault.
    """
    if not name:
        raise PostgradError("data: the name is empty")
    base, start, stop = _parse_split(split)
    if Examples.has_test_split(name):
        if base not in ("train", "test"):
            raise unknown(f"split of {name}", base, ("train", "test"))
        if columns:
            raise PostgradError(f"{name}: an embedded task takes no column mapping")
        examples = _embedded(name, base, dict(settings or {}), seed)
        if format is not None:
            examples = examples.require(format)
    elif not is_file_name(name) and not is_hub_name(name):
        raise unknown("task or data set", name, (*EMBEDDED, REASONING_GYM + "TASK"))
    elif settings:
        raise PostgradError(f"{name}: only embedded tasks take settings, got {', '.join(settings)}")
    elif is_file_name(name):
        if base != "train":
            raise PostgradError(
                f"{name}: a file has one split, train; got {base!r} (to hold a part out, use "
                "train[:90%] and train[90%:])"
            )
        rows, numbers = read_file(Path(os.path.expanduser(name)), name)
        examples = Examples.from_rows(
            rows, name=name, format=format, columns=columns, numbers=numbers
        )
    else:
        rows = read_hub(name, split)
        return Examples.from_rows(rows, name=name, format=format, columns=columns)
    part = examples.part(_position(start, 0, examples), _position(stop, len(examples), examples))
    if not len(part):
        raise PostgradError(f"{name}: the split {split} is empty ({len(examples)} rows in all)")
    return part


def _embedded(name: str, split: str, settings: dict[str, Any], seed: int) -> Examples:
    if name == "docstrings":
        return docstrings.load_docstrings(split, settings, seed)
    if name == "addition":
        return addition.load_addition(split, settings, seed)
    if name == documentation.NAME:
        return documentation.load_questions(split, settings, seed)
    return reasoning.load_reasoning(name.removeprefix(REASONING_GYM), split, settings, seed)


def _parse_split(split: str) -> tuple[str, str | None, str | None]:
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise PostgradError(
            f"split: expected a name or a part such as train[:90%] or train[100:200], got {split!r}"
        )
    return match[1], match[2], match[3]


def _position(given: str | None, default: int, examples: Examples) -> int:
    if given is None:
        return default
    if given.endswith("%"):
        return round(int(given[:-1]) / 100 * len(examples))
    return int(given)
