"""The run folder: configuration, metrics, samples, events; append-only and cut back on resume."""

import importlib.util
import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from postgrad.config import read_yaml
from postgrad.errors import MissingExtra, PostgradError
from postgrad.notices import say
from postgrad.secrecy import blanked
from postgrad.training.files import digest, flush, write_whole

CONFIG, METRICS, SAMPLES, RUN = "config.yaml", "metrics.jsonl", "samples.jsonl", "run.json"
STATUS = "status.json"
PROFILE, TRACE = "profile/profile.json", "profile/trace.json.gz"
OPERATORS = "profile/operators.txt"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of this library; a last line cut by a kill is dropped."""
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise PostgradError(f"{path}, row {number}: the file is damaged ({error})") from error
    return rows


def _whole_lines(path: Path) -> list[bytes]:
    """Every complete row ends in a newline, so what follows the last one is a torn write."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / RUN).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, its method included; an error if the folder is no run."""
    if not is_run(folder):
        raise PostgradError(f"{folder} is not a run folder: it has no {CONFIG} and {RUN}")
    return read_yaml(folder / CONFIG)


class RunFolder:
    """What a run leaves behind: rows are appended, and cut back to a checkpoint's on resume.

    While it is entered, `status.json` says that the run goes on, and afterwards how it ended.

    Attributes:
        stopped: whether the run was asked to stop before its last step.
    """

    def __init__(self, path: Path, *, trackers: Iterable[str] = (), name: str = "postgrad"):
        self.path = path
        self._tracker_names = list(trackers)
        self._name = name
        self._trackers: list[Any] = []
        self.rows = {METRICS: 0, SAMPLES: 0}
        self.stopped = False

    def create(self, config: dict[str, Any], run: dict[str, Any], *, fresh: bool = False) -> Path:
        """Make the folder with its configuration; it must not hold another run. Returns its path.

        With `fresh` it gets a number where there is such a folder already: names made of the time
        repeat when the clock is set back, or when two runs start in one second.
        """
        if not fresh and is_run(self.path):
            raise PostgradError(
                f"{self.path} already holds a run: continue it with --resume {self.path}, "
                "or choose another output"
            )
        try:
            if fresh:
                self.path = fresh_folder(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            write_whole(self.path / CONFIG, text)
            write_whole(self.path / RUN, json.dumps(run, indent=1) + "\n")
        except OSError as error:
            raise PostgradError(
                f"cannot write the run folder {self.path}: {error.strerror}"
            ) from error
        return self.path

    def open(
        self, config: dict[str, Any], step: int = 0, rows: dict[str, int] | None = None
    ) -> None:
        """Be ready to append after `step`, keeping the `rows` that each file had then."""
        self.rows = {METRICS: 0, SAMPLES: 0} | (rows or {})
        make = {
            "tensorboard": _tensorboard,
            "wandb": _wandb,
            "trackio": _trackio,
            "prometheus": _prometheus,
        }
        try:
            for name, count in self.rows.items():
                kept = _whole_lines(self.path / name)[:count]
                if len(kept) < count:
                    say(f"{self.path / name} has lost {count - len(kept)} of its {count} rows")
                    self.rows[name] = len(kept)
                write_whole(self.path / name, b"".join(line + b"\n" for line in kept).decode())
            self._trackers = [
                make[tracker](self.path, self._name, config, step)
                for tracker in self._tracker_names
            ]
        except OSError as error:
            raise PostgradError(f"cannot write into {self.path}: {error.strerror}") from error

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._append(METRICS, [{"step": step, **values}])
        try:
            for track in self._trackers:
                track(step, values)
        except OSError as error:
            raise PostgradError(
                f"cannot write metrics for {', '.join(self._tracker_names)}: {error.strerror}"
            ) from error

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        self._append(SAMPLES, [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))
        except OSError as error:
            raise PostgradError(f"cannot write {self.path / name}: {error.strerror}") from error
        self.rows[name] += len(rows)

    def flush(self) -> None:
        """See that the rows so far are on the disk: a checkpoint counts on them."""
        for name, count in self.rows.items():
            if count:
                flush(self.path / name)

    def _says(self, state: str, why: str = "") -> None:
        """Write what state the run is in, whole or not at all."""
        status = {"state": state, "why": why, "host": platform.node(), "process": os.getpid()}
        path = self.path / STATUS
        try:
            write_whole(path, json.dumps(status) + "\n")
        except OSError as error:
            raise PostgradError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> "RunFolder":
        self._says("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._says("stopped" if self.stopped else "finished")
        else:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            try:
                self._says(state, str(error) or type(error).__name__)
            except PostgradError as second:  # the disk may be full: the first error counts
                error.add_note(str(second))
        for track in self._trackers:
            try:
                track(None, {})
            except OSError as problem:
                if error is None:
                    raise PostgradError(
                        f"cannot write metrics for {', '.join(self._tracker_names)}: "
                        f"{problem.strerror}"
                    ) from problem


def fresh_folder(wanted: Path) -> Path:
    """A new folder at `wanted`, or with a number where that exists: of several processes each gets
    its own.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError  # numbers do not end


class Sources:
    """The files that a run has read its data from, by setting; it tells when they change.

    Data are read once, into memory, so a run goes on with what it read. But what cannot be read
    again cannot be resumed from.
    """

    def __init__(self, files: Mapping[str, Path]):
        self._files = {name: path for name, path in files.items() if os.path.isfile(path)}
        self.digests = {name: digest(path) for name, path in self._files.items()}
        self._stamps = {name: _stamp(path) for name, path in self._files.items()}

    def changed(self) -> list[str]:
        """A line for each file that has changed since it was last asked about."""
        lines = []
        for name, path in self._files.items():
            stamp = _stamp(path)
            if stamp == self._stamps[name]:
                continue
            self._stamps[name] = stamp
            if stamp is None:
                happened = "is gone"
            elif digest(path) != self.digests[name]:
                happened = "has changed"
            else:
                continue
            lines.append(
                f"{name}: {path} {happened} since the run has read it; the run goes on with what "
                "it read, but can only be resumed with the file as it was, or --allow-changes"
            )
        return lines


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class NoFolder(RunFolder):
    """What a process writes that is not the first of several: nothing."""

    def create(self, config: dict[str, Any], run: dict[str, Any], *, fresh: bool = False) -> Path:
        return self.path

    def open(
        self, config: dict[str, Any], step: int = 0, rows: dict[str, int] | None = None
    ) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        pass

    def _says(self, state: str, why: str = "") -> None:
        pass


def _line(row: dict[str, Any]) -> str:
    return blanked(json.dumps(row, ensure_ascii=False)) + "\n"


def require_trackers(names: Iterable[str]) -> None:
    """Stop before a run is begun if a package that its metrics go to is not there."""
    for name in names:
        if name in ("tensorboard", "wandb", "trackio") and importlib.util.find_spec(name) is None:
            raise MissingExtra(name, name)


def _tensorboard(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path / "events"), purge_step=step + 1)

    def track(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            writer.close()
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return track


def _wandb(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    import wandb

    run = wandb.init(
        project="postgrad", name=name, dir=str(path), config=config, id=path.name, resume="allow"
    )
    return lambda step, values: run.finish() if step is None else run.log(values, step=step)


def _trackio(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    import trackio

    trackio.init(project="postgrad", name=path.name, config=config, resume="allow")
    return lambda step, values: trackio.finish() if step is None else trackio.log(values, step=step)


def _prometheus(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    from postgrad.training.prometheus import Place, serve

    return serve(Place.of(config), path, name, step)
