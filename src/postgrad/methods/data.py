"""The data that a method learns from and is tested on: their settings, and how they are found."""

import random
from dataclasses import replace
from typing import Any, Protocol

from pydantic import model_validator

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.seeding import derive
from postgrad.tasks import Examples, load
from postgrad.tasks.formats import listed

_READ_PAIRS = {"preferences", "rankings", "labelled"}


class DataSettings(Settings):
    """A data set by name, and how to read it; a plain string is its name."""

    name: str = setting("", "embedded task, local file, or Hugging Face data set", min_length=1)
    split: str | None = setting(None, "train or test; the task's own choice when empty")
    format: str | None = setting(None, "data format; recognised from the columns when empty")
    columns: dict[str, str] = setting({}, "our column name: the name in the data")
    settings: dict[str, Any] = setting({}, "settings of an embedded task, e.g. its difficulty")
    limit: int | None = setting(None, "use only so many rows", gt=0)
    chat: bool | None = setting(
        None, "wrap plain prompts as a user's turn; empty: embedded tasks yes, own data no"
    )
    flip_rate: float = setting(
        0.0, "noise: the probability with which a pair's label, or the verdict on two samples, is "
        "turned round", ge=0, lt=0.5,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class _NamesData(Protocol):
    """Settings with training data and perhaps held-out data."""

    @property
    def data(self) -> DataSettings: ...

    @property
    def eval_data(self) -> DataSettings | None: ...


def find_data(
    config: DataSettings,
    place: Place,
    formats: str | tuple[str, ...],
    rows: Examples | list[dict[str, Any]] | None = None,
) -> Examples:
    """The examples that `config` names, or those passed from Python, in (one of) the formats."""
    if isinstance(rows, list):
        rows = Examples.from_rows(rows, columns=config.columns)
    if rows is None:
        rows = load(
            config.name,
            split=config.split or "train",
            format=config.format,
            columns=config.columns,
            settings=config.settings,
            seed=place.seed,
        )
    formats = (formats,) if isinstance(formats, str) else formats
    if config.flip_rate:
        rows = _flipped(rows, formats, config.flip_rate, place.seed)
    found = rows.require(*formats)
    found = found.first(config.limit)
    return found if config.chat is None else replace(found, chat=config.chat)


def find_held_out(
    config: _NamesData,
    place: Place,
    formats: str | tuple[str, ...],
    rows: Examples | list[dict[str, Any]] | None = None,
) -> Examples | None:
    """Held-out examples: `eval_data`, or the test split of an embedded task, or none.

    `rows` are training data that were passed from Python in place of `data`: without test split.
    """
    if config.eval_data is not None:
        return find_data(config.eval_data, place, formats)
    if rows is not None or not Examples.has_test_split(config.data.name):
        return None
    unspoilt = config.data.model_copy(update={"split": "test", "flip_rate": 0.0})
    return find_data(unspoilt, place, formats)


def column_texts(data: Examples, key: str, column: str) -> list[str]:
    """The text in `column` of every row; `key` is the setting that names the column.

    Raises:
        PostgradError: there is no such column, or a row has no text in it.
    """
    if column not in data.columns:
        raise PostgradError(
            f"{key}: {data.name} has no column {column!r}; its columns are {listed(data.columns)}"
        )
    for number, row in enumerate(data.rows):
        value = row[column]
        if not isinstance(value, str) or not value.strip():
            found = (
                "is empty"
                if value in (None, "") or isinstance(value, str)
                else (f"holds {type(value).__name__}, expected text")
            )
            raise PostgradError(f"{data.where(number)}: column {column!r} ({key}) {found}")
    return [row[column] for row in data.rows]


def _flipped(examples: Examples, formats: tuple[str, ...], rate: float, seed: int) -> Examples:
    """The pairs of `examples`, each turned round with probability `rate`; `flipped` says which.

    Other columns stay: where the chosen response had the higher score, what takes its place has it.
    """
    if not set(formats) & _READ_PAIRS:
        raise PostgradError(
            "data.flip_rate: only labels of pairs can be flipped, and this method reads "
            f"{formats[0]}"
        )
    if examples.format != "preferences":
        if "preferences" not in examples.views:
            raise PostgradError(
                f"data.flip_rate: only pairs (chosen, rejected) can be flipped, and "
                f"{examples.name} holds {examples.format}"
            )
        examples = examples.views["preferences"]()
    rows = []
    for number, row in enumerate(examples.rows):
        flipped = random.Random(derive(seed, "flip", number)).random() < rate
        if flipped:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        rows.append({**row, "flipped": flipped})
    return replace(examples, rows=rows, views={})
