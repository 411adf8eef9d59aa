"""The data that a method learns from and is tested on: their settings, and how they are found."""

from dataclasses import replace
from typing import Any, Protocol

from pydantic import model_validator

from postgrad.config import Settings, setting
from postgrad.methods.base import Place
from postgrad.tasks import Examples, load


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
    found = rows.require(*((formats,) if isinstance(formats, str) else formats))
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
    return find_data(config.data.model_copy(update={"split": "test"}), place, formats)
