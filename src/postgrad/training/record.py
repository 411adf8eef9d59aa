"""The run folder: configuration, metrics, samples, events; append-only and cut back on resume."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from postgrad.config import read_yaml
from postgrad.errors import MissingExtra, PostgradError

CONFIG, METRICS, SAMPLES, RUN = "config.yaml", "metrics.jsonl", "samples.jsonl", "run.json"
PROFILE, TRACE = "profile/profile.json", "profile/trace.json.gz"
OPERATORS = "profile/operators.txt"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of this library; a last line cut by a kill is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # every complete row ends in a newline, so what follows the last one is a torn write
    return [json.loads(line) for line in lines[:-1]]


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / RUN).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, its method included; an error if the folder is no run."""
    if not is_run(folder):
        raise PostgradError(f"{folder} is not a run folder: it has no {CONFIG} and {RUN}")
    return read_yaml(folder / CONFIG)


class RunFolder:
    """What a run leaves behind: rows are appended, and cut back to a checkpoint's on resume."""

    def __init__(self, path: Path, *, trackers: Iterable[str] = (), name: str = "postgrad"):
        self.path = path
        self._tracker_names = list(trackers)
        self._name = name
        self._trackers: list[Any] = []
        self.rows = {METRICS: 0, SAMPLES: 0}

    def create(self, config: dict[str, Any], run: dict[str, Any]) -> None:
        """Make the folder with its configuration; it must not hold another run."""
        if is_run(self.path):
            raise PostgradError(
                f"{self.path} already holds a run: continue it with --resume {self.path}, "
                "or choose another output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            (self.path / CONFIG).write_text(text, encoding="utf-8")
            (self.path / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PostgradError(
                f"cannot write the run folder {self.path}: {error.strerror}"
            ) from error

    def open(
        self, config: dict[str, Any], step: int = 0, rows: dict[str, int] | None = None
    ) -> None:
        """Be ready to append after `step`, keeping the `rows` that each file had then."""
        self.rows = {METRICS: 0, SAMPLES: 0} | (rows or {})
        for name, count in self.rows.items():
            path = self.path / name
            temporary = path.with_suffix(".rewriting")
            kept = read_rows(path)[:count]
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(path)
        make = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
        self._trackers = [
            make[tracker](self.path, self._name, config, step) for tracker in self._tracker_names
        ]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._append(METRICS, [{"step": step, **values}])
        for track in self._trackers:
            track(step, values)

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        self._append(SAMPLES, [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))
        except OSError as error:
            raise PostgradError(f"cannot write {self.path / name}: {error.strerror}") from error
        self.rows[name] += len(rows)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for track in self._trackers:
            track(None, {})


class NoFolder(RunFolder):
    """What a process writes that is not the first of several: nothing."""

    def create(self, config: dict[str, Any], run: dict[str, Any]) -> None:
        pass

    def open(
        self, config: dict[str, Any], step: int = 0, rows: dict[str, int] | None = None
    ) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        pass


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _tensorboard(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "tensorboard") from error
    writer = SummaryWriter(str(path / "events"), purge_step=step + 1)

    def track(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            writer.close()
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return track


def _wandb(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtra("wandb", "wandb") from error
    run = wandb.init(
        project="postgrad", name=name, dir=str(path), config=config, id=path.name, resume="allow"
    )
    return lambda step, values: run.finish() if step is None else run.log(values, step=step)


def _trackio(path: Path, name: str, config: dict[str, Any], step: int) -> Any:
    try:
        import trackio
    except ImportError as error:
        raise MissingExtra("trackio", "trackio") from error
    trackio.init(project="postgrad", name=path.name, config=config, resume="allow")
    return lambda step, values: trackio.finish() if step is None else trackio.log(values, step=step)
