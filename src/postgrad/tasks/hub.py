"""Reading rows from the Hugging Face Hub."""

import re
from typing import Any

from postgrad.errors import MissingExtra, PostgradError
from postgrad.tasks.formats import Row

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form `owner/name` or `owner/name:config`."""
    return _NAME.fullmatch(name) is not None


def read_hub(name: str, split: str) -> list[Row]:
    """The rows of a data set on the Hub; `split` as in `datasets`, e.g. `train[:1000]`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    repository, _, config = name.partition(":")
    try:
        loaded: Any = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PostgradError(f"{name}: cannot be loaded from the Hugging Face Hub ({reason})") from (
            error
        )
    rows: list[Row] = loaded.to_list()
    return rows
