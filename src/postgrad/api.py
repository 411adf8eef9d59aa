"""The library's commands as functions: what the command line calls, and Python users too."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from postgrad import processes
from postgrad.catalogue import method_class
from postgrad.config import LoopSettings, Settings, flat, read_yaml, resolve
from postgrad.errors import PostgradError
from postgrad.memory import keep_freed_memory
from postgrad.methods.base import Method, Place
from postgrad.notices import heard_by
from postgrad.secrecy import blanked_command, require_no_secrets
from postgrad.seeding import seed_everything
from postgrad.training.console import Silent, Terminal
from postgrad.training.loop import (
    CanBeSharded,
    Finished,
    Loop,
    pick_device,
    require_shardable,
    writable,
)
from postgrad.training.optimise import native_precision
from postgrad.training.record import (
    RUN,
    NoFolder,
    RunFolder,
    Sources,
    is_run,
    read_config,
    require_trackers,
)

# keys that may change from one part of a run to the next: results do not depend on them
_FREE = (
    "output:", "profile:", "notice:", "processes:", "nodes:", "rendezvous:", "shard:", "log:",
    "prometheus_", "rollout.workers:", "rollout.address:", "rollout.worker_patience:",
)  # fmt: skip


@dataclass
class Run:
    """A finished (or interrupted) run: its folder, the method as trained, how it ended."""

    folder: Path
    method: Method
    finished: Finished

    @property
    def evaluation(self) -> dict[str, float]:
        return self.finished.evaluation


def train(
    method: str,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    quiet: bool = True,
    **settings: Any,
) -> Run:
    """Train `method` and return the run: `train("dpo", model="smollm2", data="pairs.jsonl")`.

    `settings` are the keys that `postgrad show METHOD` lists, nested ones as dictionaries.
    `model`, `data` and `reward` also take objects: a policy, a list of rows, a function.
    Raises `PostgradError` for anything the caller can mend.
    """
    return _start(method, *_settings(method, config, settings), quiet)


def prepare(
    method: str, *, config: str | Path | Mapping[str, Any] | None = None, **settings: Any
) -> tuple[Method, LoopSettings]:
    """The method as `train` would start it, checked, and the loop's settings; nothing is written.

    For loops of one's own: `Optimisers(method.modules(), loop, method.place.device)` makes steps.
    """
    loop, own, objects = _settings(method, config, settings)
    return _built(method, loop, own, objects), loop


def resume(
    folder: str | Path,
    *,
    allow_changes: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Run:
    """Continue a run from its last good checkpoint; `settings` that differ are named and refused.

    Raises `PostgradError` if the folder is no run, the configuration or the data differ and
    `allow_changes` is off, or the run used objects that were passed from Python.
    """
    folder = Path(folder)
    saved = read_config(folder)
    method = str(saved.pop("method"))
    kind = method_class(method)
    old = _resolved(kind, saved)
    loop, own = _resolved(kind, saved, settings)
    changed = _differences({**flat(old[0]), **flat(old[1])}, {**flat(loop), **flat(own)})
    changed = [line for line in changed if not line.startswith(_FREE)]
    if changed and not allow_changes:
        raise PostgradError(
            f"the configuration differs from that of {folder}: {'; '.join(changed)} "
            "(--allow-changes continues all the same)"
        )
    loop = loop.model_copy(update={"output": str(folder)})
    return _start(method, loop, own, {}, quiet, resumed=True, allow_changes=allow_changes)


def _settings(
    slug: str, config: str | Path | Mapping[str, Any] | None, settings: dict[str, Any]
) -> tuple[LoopSettings, Settings, dict[str, Any]]:
    """The loop's and the method's settings, and the objects given in place of names."""
    kind = method_class(slug)
    base = read_yaml(config) if isinstance(config, (str, Path)) else dict(config or {})
    _require_method(base.pop("method", slug), slug)
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    objects = {name: value for name, value in settings.items() if not _plain(value)}
    named = {name: f"<{type(value).__name__} object>" for name, value in objects.items()}
    loop, own = _resolved(kind, base, {**settings, **named})
    return loop, own, objects


def _resolved(kind: type[Method], *layers: Mapping[str, Any]) -> tuple[LoopSettings, Settings]:
    """The settings, with the precision that `auto` means on this machine."""
    loop, own = resolve(kind.Config, kind.recipe, *layers)
    if loop.precision == "auto":
        native = native_precision(pick_device(loop.device))
        loop = loop.model_copy(update={"precision": native})
    return loop, own


def _built(slug: str, loop: LoopSettings, own: Settings, objects: dict[str, Any]) -> Method:
    """The method in its place, with the machine set up for it and all random states seeded."""
    if loop.threads is not None:
        torch.set_num_threads(loop.threads)
    device = pick_device(loop.device)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(loop.seed)
    method = build(slug, own, Place(loop.seed, device, loop.steps), objects)
    try:
        method.check()
        if loop.shard:
            require_shardable(method)
    except BaseException:
        method.close()
        raise
    seed_everything(loop.seed)
    return method


def _start(
    slug: str,
    loop: LoopSettings,
    own: Settings,
    objects: dict[str, Any],
    quiet: bool,
    *,
    resumed: bool = False,
    allow_changes: bool = False,
) -> Run:
    require_no_secrets({**own.model_dump(mode="json"), **loop.model_dump(mode="json")})
    with processes.joined():
        path = processes.agreed(lambda: _place_for(slug, loop, resumed))
        watch = Terminal(loop.steps, 0) if not quiet and processes.first() else Silent()
        with heard_by(watch.say):
            return _run(slug, loop, own, objects, path, watch, resumed, allow_changes)


def _place_for(slug: str, loop: LoopSettings, resumed: bool) -> Path:
    """The run folder; it must not hold another run, and can be made, as can its server."""
    path = Path(loop.output or Path("runs") / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not resumed:
        if loop.output is not None and is_run(path):
            raise PostgradError(
                f"output: {path} already holds a run: continue it with --resume {path}, "
                "or choose another folder"
            )
        writable(path)
    require_trackers(loop.log)
    if "prometheus" in loop.log:
        from postgrad.training import prometheus

        prometheus.Place.of(loop.model_dump()).check()
    return path


def _run(
    slug: str,
    loop: LoopSettings,
    own: Settings,
    objects: dict[str, Any],
    path: Path,
    watch: Silent | Terminal,
    resumed: bool,
    allow_changes: bool,
) -> Run:
    sources = Sources(_files(own))
    method = _built(slug, loop, own, objects)
    kind = RunFolder if processes.first() else NoFolder
    folder = kind(path, trackers=loop.log, name=slug)
    settings = {"method": slug, **own.model_dump(mode="json"), **loop.model_dump(mode="json")}
    prints = method.fingerprints()
    if resumed:
        _require_same_data(path, prints, sources.digests, allow_changes)
    else:
        about = _about(slug, prints, sources.digests)
        fresh = loop.output is None
        folder.path = processes.agreed(lambda: folder.create(settings, about, fresh=fresh))
    with closing(method), folder, watch:
        trainer = Loop(method, loop, folder, watch, sources)
        if resumed:
            trainer.restore()
        finished = trainer.run(settings)
        if not finished.cut:
            with ExitStack() as stack:
                for module in method.modules().values():
                    if isinstance(module, CanBeSharded):
                        stack.enter_context(module.whole())
                processes.agreed(lambda: _leave_behind(method, folder.path, loop))
    return Run(folder.path, method, finished)


def _save_model(method: Method, path: Path) -> None:
    """Write the final model, whole or not at all."""
    target, temporary = path / "model", path / ".model.writing"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        method.save(temporary)
        if temporary.exists():  # some methods have none
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise PostgradError(
            f"cannot write the final model {target}: {reason}; training is over and saved: "
            f"--resume {path} writes the model"
        ) from error


def _files(own: Settings) -> dict[str, Path]:
    """The local files that the settings name as data, by setting."""
    named = {key: getattr(own, key, None) for key in ("data", "eval_data")}
    files = {key: getattr(data, "name", None) for key, data in named.items()}
    return {key: Path(os.path.expanduser(name)) for key, name in files.items() if name}


def _leave_behind(method: Method, path: Path, loop: LoopSettings) -> None:
    """Write the final model and, if wanted, the report."""
    _save_model(method, path)
    if loop.report:
        from postgrad.reports.run import write_run_report

        write_run_report(path)


def build(slug: str, own: Settings, place: Place, objects: Mapping[str, Any]) -> Method:
    """The method as an object, with parts that a Python caller made put in place of named ones."""
    kind = method_class(slug)
    try:
        return kind(own, place, **objects)
    except TypeError as error:
        odd = [name for name in objects if f"'{name}'" in str(error)]
        if odd:
            raise PostgradError(f"{odd[0]}: {slug} takes no object here, only a name") from error
        raise


def _about(slug: str, prints: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    return {
        "method": slug,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": blanked_command(sys.argv),
        "data": prints,
        "files": files,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processes": processes.count(),
        "versions": {name: version(name) for name in ("postgrad", "torch", "transformers")},
    }


def _require_same_data(
    path: Path, prints: dict[str, str], files: dict[str, str], allow_changes: bool
) -> None:
    before = json.loads((path / RUN).read_text(encoding="utf-8"))
    # the rows in use tell more than the file, where a method says which they are
    before = {**before.get("files", {}), **before["data"]}
    now = {**files, **prints}
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed and not allow_changes:
        raise PostgradError(
            f"{changed[0]}: its content has changed since {path} was started "
            "(--allow-changes continues all the same)"
        )


def _require_method(written: str, asked: str) -> None:
    if written != asked:
        raise PostgradError(f"method: the configuration is for {written!r}, not {asked!r}")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _plain(value: Any) -> bool:
    """Whether a value can stand in a configuration file, so is no object of Python's."""
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        # rows of data are an object; lists of names and numbers are settings
        return all(_plain(item) and not isinstance(item, Mapping) for item in value) or all(
            isinstance(item, Mapping) and item.keys() & {"name", "url"} for item in value
        )
    return value is None or isinstance(value, (bool, int, float, str))
