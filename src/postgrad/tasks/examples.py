"""Examples: rows of one format, each of which can be named in an error."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from postgrad.errors import PostgradError, unknown
from postgrad.tasks.formats import Format, Row, check_columns, known, missing, normalise, recognise

EMBEDDED = ("docstrings", "addition", "stdlib-questions")
REASONING_GYM = "reasoning-gym/"
# From a normalised row and its place to rows that are normalised next.
Conversion = Callable[[Row, str], list[Row]]


@dataclass(frozen=True)
class Examples:
    """Normalised rows of one format (see `postgrad.tasks.formats`).

    All rows have the same keys. `numbers` are the rows' numbers in their source, from 1, so that
    an error names the row that its reader finds there. `chat` says that plain prompts are meant as
    a user's turn for models with a chat template. `verifier` names the reward that the task brings
    along. `views` are other formats that the task itself provides, row by row the same data.
    """

    name: str
    format: Format
    rows: list[Row]
    numbers: list[int]
    chat: bool = False
    verifier: str | None = None
    views: Mapping[Format, Callable[[], "Examples"]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_rows(
        cls,
        rows: list[Row],
        *,
        name: str = "rows",
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        numbers: list[int] | None = None,
        **fields: Any,
    ) -> "Examples":
        """Rows as a user has them, checked and normalised.

        `format` is recognised from the columns when None; `columns` maps our names to theirs;
        `numbers` are the rows' numbers in their source (default: 1, 2, …).
        """
        numbers = list(range(1, len(rows) + 1)) if numbers is None else numbers
        if not rows:
            raise PostgradError(f"{name}: no rows")
        for number, row in zip(numbers, rows, strict=True):
            if not isinstance(row, dict):
                raise PostgradError(
                    f"{name}, row {number}: expected an object with named columns, "
                    f"got {type(row).__name__}"
                )
        rows = _uniform(rows, columns or {}, name)
        if format is None:
            chosen = recognise(rows[0], name)
        else:
            chosen = known(format)
            rows = _by_position(chosen, rows)
            check_columns(chosen, rows[0], name)
        return cls(name, chosen, *_normalised(chosen, rows, numbers, name), **fields)

    @staticmethod
    def has_test_split(name: str) -> bool:
        """Whether the data called `name` is an embedded task, which brings unseen test rows."""
        return name in EMBEDDED or name.startswith(REASONING_GYM)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def where(self, index: int) -> str:
        """The place of row `index` (from 0) in its source, for errors."""
        return f"{self.name}, row {self.numbers[index]}"

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of format and rows: another value means other data."""
        digest = hashlib.sha256(self.format.encode())
        for row in self.rows:
            digest.update(json.dumps(row, default=_as_text).encode())
        return digest.hexdigest()

    def first(self, limit: int | None) -> "Examples":
        """At most `limit` rows from the beginning; all when None."""
        return self if limit is None else self.part(0, limit)

    def part(self, start: int, stop: int) -> "Examples":
        """Rows `start` up to `stop` (exclusive), as in a slice."""

        def cut(view: Callable[[], Examples]) -> Callable[[], Examples]:
            return lambda: view().part(start, stop)

        return replace(
            self,
            rows=self.rows[start:stop],
            numbers=self.numbers[start:stop],
            views={format: cut(view) for format, view in self.views.items()},
        )

    def require(self, *formats: str) -> "Examples":
        """The same examples in the first of `formats` that they have or can be converted to.

        Conversions keep the meaning: preferences are demonstrations of the chosen response, and
        labelled completions; a ranking is the preference of its best over its worst response, or
        the demonstration of its best; an answer demonstrates its prompt; whole texts join prompt
        and completion; and any format that holds another's columns can be read as that.

        Raises:
            PostgradError: the data lacks the columns; names them, and those that were found.
        """
        wanted = [known(format) for format in formats]
        if self.format in wanted:
            return self
        for format in wanted:
            if format in self.views:
                return self.views[format]()
            convert = self._conversion(format)
            if convert is not None:
                return self._converted(format, convert)
        check_columns(wanted[0], self.rows[0], f"{self.name} ({self.format})")
        raise PostgradError(f"{self.name}: {self.format} cannot be read as {wanted[0]}")

    def _conversion(self, format: Format) -> Conversion | None:
        row = self.rows[0]
        if (self.format, format) == ("prompts", "demonstrations") and "answer" not in row:
            return None
        if (self.format, format) == ("text", "demonstrations") and isinstance(row["text"], str):
            return None
        by_name = None if missing(format, row) else _as_it_is
        return _CONVERSIONS.get((self.format, format), by_name)

    def _converted(self, format: Format, convert: Conversion) -> "Examples":
        made = [
            (row, number)
            for i, number in enumerate(self.numbers)
            for row in convert(self.rows[i], self.where(i))
        ]
        if not made:
            raise PostgradError(f"{self.name}: no row of these {self.format} gives {format}")
        rows, numbers = [row for row, _ in made], [number for _, number in made]
        normalised = _normalised(format, rows, numbers, self.name)
        return Examples(self.name, format, *normalised, chat=self.chat, verifier=self.verifier)


def _uniform(rows: list[Row], mapping: Mapping[str, str], name: str) -> list[Row]:
    """Rows that all have every column, under our names; None where a row says nothing."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for theirs in mapping.values():
        if theirs not in columns:
            raise PostgradError(
                f"{name}: {unknown('column', theirs, columns)} (columns: {', '.join(columns)})"
            )
    renamed = set(mapping.values()) | set(mapping)
    kept = [column for column in columns if column not in renamed]
    names = {**mapping, **{column: column for column in kept}}
    return [{ours: row.get(theirs) for ours, theirs in names.items()} for row in rows]


def _by_position(format: Format, rows: list[Row]) -> list[Row]:
    """As sentence-transformers does: pairs and triples of other names are taken by their order."""
    expected = {"pairs": ["anchor", "positive"], "triples": ["anchor", "positive", "negative"]}
    names = expected.get(format, [])
    if len(missing(format, rows[0])) == len(names) == len(rows[0]):
        return [dict(zip(names, row.values(), strict=True)) for row in rows]
    return rows


def _normalised(
    format: Format, rows: list[Row], numbers: list[int], name: str
) -> tuple[list[Row], list[int]]:
    made = [
        (row, number)
        for source, number in zip(rows, numbers, strict=True)
        for row in normalise(format, source, f"{name}, row {number}")
    ]
    columns = dict.fromkeys(column for row, _ in made for column in row)
    return [{c: row.get(c) for c in columns} for row, _ in made], [number for _, number in made]


def _as_text(value: Any) -> Any:
    """A stable stand-in for values that JSON lacks."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _replaced(row: Row, *columns: str, **values: Any) -> Row:
    """The row without `columns` and with `values`."""
    return {**{c: value for c, value in row.items() if c not in columns}, **values}


def _as_it_is(row: Row, where: str) -> list[Row]:
    return [row]


def _chosen(row: Row, where: str) -> list[Row]:
    return [_replaced(row, "chosen", "rejected", completion=row["chosen"])]


def _labels(row: Row, where: str) -> list[Row]:
    return [
        _replaced(row, "chosen", "rejected", completion=row[column], label=column == "chosen")
        for column in ("chosen", "rejected")
    ]


def _ranked_pair(row: Row, where: str) -> list[Row]:
    responses = [row["chosen"], row["rejected"]]
    return [_replaced(row, "chosen", "rejected", responses=responses)]


def _best_and_worst(row: Row, where: str) -> list[Row]:
    for column in ("scores", "ranks"):
        if column in row and row[column][0] == row[column][-1]:
            raise PostgradError(f"{where}: all {column} are {row[column][0]}, so none is preferred")
    best, worst = row["responses"][0], row["responses"][-1]
    return [_replaced(row, "responses", "scores", "ranks", chosen=best, rejected=worst)]


def _best(row: Row, where: str) -> list[Row]:
    return [_replaced(row, "responses", "scores", "ranks", completion=row["responses"][0])]


def _answered(row: Row, where: str) -> list[Row]:
    answer = row["answer"]
    return [_replaced(row, completion=None if answer is None else str(answer))]


def _approved(row: Row, where: str) -> list[Row]:
    return [_replaced(row, "label")] if row["label"] else []


def _whole(row: Row, where: str) -> list[Row]:
    """Prompt and completion as one text or one conversation."""
    completion: Any = row["completion"]
    if isinstance(row["prompt"], list):
        completion = [{"role": "assistant", "content": completion}]
    return [_replaced(row, "prompt", "completion", text=row["prompt"] + completion)]


def _last_turn(row: Row, where: str) -> list[Row]:
    """The assistant's last turn of a conversation as the completion of all that comes before."""
    turns = row["text"] if isinstance(row["text"], list) else []
    spoken = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
    if not spoken:
        raise PostgradError(f"{where}: no turn of the assistant after a prompt")
    last = spoken[-1]
    return [_replaced(row, "text", prompt=turns[:last], completion=[turns[last]])]


_CONVERSIONS: dict[tuple[Format, Format], Conversion] = {
    ("preferences", "demonstrations"): _chosen,
    ("preferences", "labelled"): _labels,
    ("preferences", "rankings"): _ranked_pair,
    ("rankings", "preferences"): _best_and_worst,
    ("rankings", "demonstrations"): _best,
    ("prompts", "demonstrations"): _answered,
    ("labelled", "demonstrations"): _approved,
    ("demonstrations", "text"): _whole,
    ("text", "demonstrations"): _last_turn,
}
