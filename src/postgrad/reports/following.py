"""A run while it goes on: its state, its curves so far, its newest samples.

Files are read piece by piece, forwards as they grow or backwards from their end, and never whole. A
row counts once its line has ended; links and anything that is no plain file are not opened.
"""

import json
import os
import platform
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from postgrad.config import parse_yaml
from postgrad.errors import PostgradError
from postgrad.reports.curves import Point, points_by_name, thin
from postgrad.training.record import CONFIG, METRICS, RUN, SAMPLES, STATUS

PIECE = 4_000_000  # bytes that are read and parsed at once; a longer row is not shown
_DESCRIPTION = 256_000  # bytes that run.json or config.yaml may have to be read
_MOST_POINTS = 4000  # a curve with more is thinned to half of them
ENDED = ("finished", "stopped", "failed", "killed")


@dataclass(frozen=True)
class State:
    """What a run is doing: `running`, one of `ENDED` with the reason, or `unknown`."""

    name: str
    why: str = ""


@dataclass(frozen=True)
class Description:
    """What a run is of, as far as its folder says it."""

    method: str
    model: str
    data: str
    steps: int
    started: str


def open_plain(path: Path) -> BinaryIO:
    """A plain file for reading; FileNotFoundError, or `PostgradError` for links and pipes."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PostgradError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise PostgradError(f"cannot read {path}: it is no plain file")
    return os.fdopen(number, "rb")


def state_of(folder: Path) -> State:
    """What a run is doing now; one whose process on this machine is gone was killed."""
    try:
        found = json.loads(_small(folder / STATUS))
        name, why = str(found["state"]), str(found["why"])
        host, process = found["host"], int(found["process"])
    except (PostgradError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return State("unknown")  # a run of before there was such a file, or none of ours
    if name == "running" and host == platform.node() and not _alive(process):
        return State("killed", "its process is gone")
    return State(name, why) if name in ("running", *ENDED) else State("unknown")


def description_of(folder: Path) -> Description:
    """What a run is of. Raises `PostgradError` if its descriptions cannot be read."""
    try:
        run = json.loads(_small(folder / RUN))
        config = parse_yaml(_small(folder / CONFIG))
        method, steps = str(run["method"]), int(config["steps"])
        return Description(
            method, _name(config, "model"), _name(config, "data"), steps, str(run["started"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise PostgradError(f"{folder} is not a readable run folder: {line}") from error


def _name(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    value = value.get("name") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""


def _small(path: Path) -> str:
    with open_plain(path) as file:
        text = file.read(_DESCRIPTION + 1)
    if len(text) > _DESCRIPTION:
        raise ValueError(f"{path} is longer than {_DESCRIPTION:,} bytes")
    return text.decode("utf-8")


def _alive(process: int) -> bool:
    if os.name != "posix" or process <= 0:
        return True  # not known
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row; None if it is not one that this library writes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    # numbers that no float holds
    if any(isinstance(value, int) and value.bit_length() > 1000 for value in row.values()):
        return None
    return row


class Tail:
    """The rows of a JSON Lines file as they are appended.

    Attributes:
        behind: bytes that were not read yet.
        damaged: complete lines that were no rows.
    """

    def __init__(self, path: Path):
        self.path = path
        self.behind = self.damaged = 0
        self._file: BinaryIO | None = None
        self._at = 0
        self._within = False  # the rest of a line that was too long

    def read(self, most: int = PIECE) -> tuple[list[dict[str, Any]], bool]:
        """The new rows, and whether the file was cut back, so that they begin anew.

        Reads at most `most` bytes. A file that is not there has no new rows.
        """
        restarted = self._reopened()
        if self._file is None:
            return [], restarted
        self._file.seek(self._at)
        piece = self._file.read(most)
        end = piece.rfind(b"\n") + 1
        if end == 0 and len(piece) == most:  # a line longer than a piece
            self.damaged += not self._within
            self._within, end = True, len(piece)
            piece = b""
        elif self._within and end:
            self._within, begin = False, piece.index(b"\n") + 1
            piece = b"\n" * begin + piece[begin:]
        self._at += end
        self.behind = max(0, os.fstat(self._file.fileno()).st_size - self._at)
        found = [_row(line) for line in piece[:end].split(b"\n") if line]
        rows = [row for row in found if row is not None]
        self.damaged += len(found) - len(rows)
        return rows, restarted

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopened(self) -> bool:
        """Open the file that has the name now; whether it is another than before."""
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        restarted = False
        if self._file is not None:
            # held open, so that no other file can get its number
            held = os.fstat(self._file.fileno())
            restarted = not os.path.samestat(held, now) or now.st_size < self._at
            if restarted:
                self.close()
        if self._file is None:
            self._file = open_plain(self.path)
            self._at = self.damaged = 0
            self._within = False
        return restarted


@dataclass(frozen=True)
class Found:
    """Rows from a file's end backwards, and where to go on (None: its beginning is reached)."""

    rows: list[dict[str, Any]]
    before: int | None


def newest(
    path: Path,
    limit: int,
    *,
    before: int | None = None,
    wanted: Callable[[dict[str, Any]], bool] = lambda row: True,
    least_step: int = 0,
    most: int = PIECE,
) -> Found:
    """At most `limit` rows that are `wanted`, the newest first, from the last `most` bytes.

    `before` is where an earlier call says to go on. Steps must not decrease in the file: the search
    ends below `least_step`. A file that is not there has no rows.
    """
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return Found([], None)
    with file:
        size = os.fstat(file.fileno()).st_size
        stop = size if before is None else max(0, min(before, size))
        start = max(0, stop - most)
        file.seek(start)
        piece = file.read(stop - start)
    # what stands before the first line's end may be part of a line; so may what follows the last
    begin = piece.find(b"\n") + 1 if start else 0
    end = piece.rfind(b"\n") + 1
    if begin >= end:  # nothing but a row longer than that, or what follows its end
        return Found([], (start + end if 0 < end < len(piece) else start) or None)
    rows: list[dict[str, Any]] = []
    while end > begin:
        at = max(begin, piece.rfind(b"\n", begin, end - 1) + 1)
        row = _row(piece[at:end])
        end = at
        if row is None:
            continue
        if row["step"] < least_step:
            return Found(rows, None)
        if wanted(row):
            rows.append(row)
            if len(rows) == limit:
                break
    return Found(rows, (start + end) or None)


@dataclass
class Followed:
    """A run that is read again and again.

    Attributes:
        curves: points by metric, thinned.
        step: the last step with metrics.
        behind: bytes of metrics not read yet.
    """

    folder: Path
    name: str
    curves: dict[str, list[Point]] = field(default_factory=dict)
    step: int = 0
    state: State = State("unknown")

    def __post_init__(self) -> None:
        self.description = description_of(self.folder)
        self._tail = Tail(self.folder / METRICS)

    @property
    def behind(self) -> int:
        return self._tail.behind

    @property
    def damaged(self) -> int:
        return self._tail.damaged

    def refresh(self) -> None:
        """Take in what was written since, up to a piece."""
        self.state = state_of(self.folder)
        rows, restarted = self._tail.read()
        if restarted:
            self.curves, self.step = {}, 0
        for name, points in points_by_name(rows).items():
            curve = self.curves.setdefault(name, [])
            curve += points
            if len(curve) > _MOST_POINTS:
                self.curves[name] = thin(curve, _MOST_POINTS // 2)
        self.step = max(self.step, *(row["step"] for row in rows), 0)

    def catch_up(self) -> None:
        """Take in everything that is there."""
        self.refresh()
        before = None
        # what stays behind is a line that has not ended
        while self.behind and self.behind != before:
            before = self.behind
            self.refresh()

    def samples(self, limit: int) -> list[dict[str, Any]]:
        """The newest samples of the newest sampled step, as they were written."""
        rows = newest(self.folder / SAMPLES, limit).rows
        return [row for row in reversed(rows) if row["step"] == rows[0]["step"]]

    def age(self) -> float | None:
        """Seconds since the last row of metrics; None if there is none."""
        return age(self.folder / METRICS)

    def close(self) -> None:
        self._tail.close()


def age(path: Path) -> float | None:
    """Seconds since a file was written to; None without the file."""
    try:
        return max(0.0, time.time() - os.stat(path, follow_symlinks=False).st_mtime)
    except FileNotFoundError:
        return None
