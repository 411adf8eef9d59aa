"""Reading rows from local files: JSON Lines, JSON, CSV and Parquet, plain or gzipped."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from postgrad.errors import MissingExtra, PostgradError, shown, unknown
from postgrad.tasks.formats import Row, is_messages

Numbered = tuple[list[Row], list[int]]


def read_file(path: Path, name: str) -> Numbered:
    """The rows of a file and their numbers in it; `name` is what errors call it.

    Numbers count lines in JSON Lines and records elsewhere, both from 1.
    """
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or no name at all
        raise PostgradError(f"{shown(name)}: cannot be read ({error})") from error
    if not exists:
        raise PostgradError(f"{name}: no such file{_nearest(path)}")
    if not path.is_file():
        raise PostgradError(f"{name}: is not a file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    if kind not in _READERS:
        raise unknown("file type", kind or path.name, _READERS)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if zipped else data
    except (OSError, EOFError, zlib.error) as error:
        raise PostgradError(f"{name}: cannot be read ({error})") from error
    if not data.strip():
        raise PostgradError(f"{name}: the file is empty")
    rows, numbers = _READERS[kind](data, name)
    if not rows:
        raise PostgradError(f"{name}: the file holds no rows")
    return rows, numbers


def is_file_name(name: str) -> bool:
    """Whether `name` means a local file: it exists, or it ends or begins as only files do."""
    path = Path(os.path.expanduser(name))
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    return kind in _READERS or name[0] in "./~" or os.path.isfile(path)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = get_close_matches(path.name, names, n=1)
    return f": did you mean {path.parent / close[0]}?" if close else ""


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PostgradError(f"{name}, row {line}: not UTF-8 ({error.reason})") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PostgradError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno})"
        ) from error
    except (RecursionError, ValueError) as error:  # nested or numbers beyond Python's limits
        raise PostgradError(f"{where}: not valid JSON (too deep or too long a number)") from error


def _json_lines(data: bytes, name: str) -> Numbered:
    numbered = [
        (_parse(line, f"{name}, row {number}"), number)
        for number, line in enumerate(_decode(data, name).split("\n"), start=1)
        if line.strip()
    ]
    return [row for row, _ in numbered], [number for _, number in numbered]


def _json(data: bytes, name: str) -> Numbered:
    """A list of objects, or one object a line as many `.json` files hold."""
    text = _decode(data, name)
    if not text.lstrip().startswith("["):
        return _json_lines(data, name)
    rows = _parse(text, name)
    return rows, list(range(1, len(rows) + 1))


def _csv(data: bytes, name: str) -> Numbered:
    reader = csv.reader(io.StringIO(_decode(data, name), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader)
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                raise PostgradError(
                    f"{name}, row {number}: {len(cells)} fields, the header has {len(header)}"
                )
            rows.append({c: _cell(v) for c, v in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise PostgradError(f"{name}, row {len(rows) + 1}: not valid CSV ({error})") from error
    return rows, list(range(1, len(rows) + 1))


def _cell(text: str) -> Any:
    """A cell: nothing, text, or a conversation in JSON."""
    if text.lstrip().startswith("[{"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            return text
        return value if is_messages(value) else text
    return text or None


def _parquet(data: bytes, name: str) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data") from error
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        raise PostgradError(f"{name}: not a valid Parquet file ({message})") from error
    return rows, list(range(1, len(rows) + 1))


_READERS: dict[str, Callable[[bytes, str], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
