"""The one loop: it knows steps, optimisers, files and signals, and nothing of any method."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file

from postgrad import processes, timing
from postgrad.batch import Batch
from postgrad.config import LoopSettings
from postgrad.errors import NonFinite, PostgradError
from postgrad.methods.base import Method, Metrics, NothingToLearn
from postgrad.secrecy import blanked
from postgrad.timing import timed
from postgrad.training.checkpoint import (
    Flat,
    checkpoints,
    in_one_piece,
    load_latest,
    load_module_state,
    module_state,
    random_states,
    restore_random_states,
    write_checkpoint,
    write_checkpoint_in_shares,
)
from postgrad.training.console import Watcher
from postgrad.training.optimise import Optimisers, autocast, evaluated
from postgrad.training.profile import Profiler
from postgrad.training.record import RunFolder, Sources
from postgrad.training.tree import flatten, unflatten

_MOST_PASSED_OVER = 20  # steps in a row
_LARGEST_MEMORY = 16 * 2**20  # bytes of a method's own state that are copied before every step


@dataclass
class Finished:
    """How a run ended: after which step, with which last evaluation, and whether it was stopped.

    With `cut` it was in the middle of a step: weights are no longer those of `step`.
    """

    step: int
    evaluation: Metrics
    interrupted: bool
    cut: bool = False


@runtime_checkable
class CanBeSharded(Protocol):
    """A module that can split its weights over processes, and gather them for a while."""

    def shard(self) -> None: ...
    def whole(self) -> AbstractContextManager[None]: ...


class Loop:
    """Trains a method: `Loop(method, settings, folder, watcher).run()`."""

    def __init__(
        self,
        method: Method,
        settings: LoopSettings,
        folder: RunFolder,
        watcher: Watcher,
        sources: Sources | None = None,
    ):
        self.method = method
        self.settings = settings
        self.folder = folder
        self.watcher = watcher
        self.sources = sources or Sources({})
        self.step = 0
        self.rows: dict[str, int] = {}
        self._checkpoints = folder.path / "checkpoints"
        self._in_shares = settings.shard and processes.count() > 1
        if self._in_shares:
            self._shard()
        self.optimise = Optimisers(method.modules(), settings, method.place.device, method.rates())
        profiled = settings.profile and processes.first()
        self._profiler = Profiler(folder.path, method.place.device) if profiled else None
        self._stop = EarlyStop(settings)
        self._evaluation: Metrics = {}
        self._evaluated: int | None = None  # the step of the last evaluation
        self._stop_asked = False  # of this process, at any moment
        self._stopping = False  # of all processes, between steps
        self._passed_over = 0  # steps in a row
        self._saved: int | None = None  # the step of the newest checkpoint
        self._kept: tuple[int, Flat] | None = None  # the state before the present step
        self._saving = threading.Lock()
        self._cut = False
        self._remembers_much = False

    def _shard(self) -> None:
        for module in require_shardable(self.method):
            module.shard()

    def restore(self) -> None:
        """Continue from the newest good checkpoint of the folder, or from the start without one."""
        found = load_latest(self._checkpoints, self.watcher.say, in_shares=self._in_shares)
        if found is None:
            none = "no whole checkpoint" if checkpoints(self._checkpoints) else "no checkpoint yet"
            self.watcher.say(f"{self.folder.path} has {none}: starting from step 0")
            return
        self.step, state = found
        self._saved = self.step
        self.rows = state["rows"]
        for name, module in self.method.modules().items():
            load_module_state(module, state["modules"][name])
        self.optimise.load_state_dict(state["optimisers"])
        self.method.load_state_dict(state["method"])
        self._stop.load_state_dict(state["early_stop"])
        self._evaluation, self._evaluated = state["evaluation"], state["evaluated"]
        restore_random_states(state["random"])

    def run(self, config: dict[str, Any]) -> Finished:
        """Train from the present step to the end; `config` is what trackers show of the run."""
        self.folder.open(config, self.step, self.rows)
        with self._signals(), self._profiler or nullcontext():
            try:
                self._train()
            except KeyboardInterrupt:
                if not self._cut:
                    raise
                self.folder.stopped = True
                return Finished(self._saved or 0, self._evaluation, interrupted=True, cut=True)
        self.folder.stopped = self._stopping
        if self._profiler:
            for line in self._profiler.lines():
                self.watcher.say(line)
        return Finished(self.step, self._evaluation, self._stopping)

    def _train(self) -> None:
        if self._evaluated is None:
            self._evaluate()
        while self.step < self.settings.steps and not self._to_stop():
            if self.settings.notice is not None:
                self._keep()
            self._one_step()
            if self._due(self.settings.evaluate_every) and self._stop.reached(self._evaluate()):
                self.watcher.say(
                    f"stopping early after step {self.step}: {self.settings.stop_metric} has "
                    f"not improved for {self.settings.stop_patience} evaluations"
                )
                break
            if self._due(self.settings.save_every):
                self.save()
        if not self._stopping and self._evaluated != self.step:
            self._evaluate()
        self.save()

    def _to_stop(self) -> bool:
        self._stopping = processes.any_of(self._stop_asked)
        return self._stopping

    def _one_step(self) -> None:
        if self._profiler:
            self._profiler.begin_step(last=self.step + 1 == self.settings.steps)
        started = time.perf_counter()
        timing.take()
        self.optimise.set_step(self.step)
        trained = self.optimise.tokens
        with self._keeping_what_was_learnt():
            try:
                with timed("data"), autocast(self.settings.precision, self.method.place.device):
                    batch = self.method.collect(self.step)
            except NothingToLearn as reason:
                self._pass_over(reason, started)
                return
            self._passed_over = 0
            metrics = self.method.describe_batch(batch)
            self._require_finite(metrics, batch)
        try:
            with timed("update"):
                metrics |= self.method.update(batch, self.optimise)
            metrics |= self.method.engine_metrics()
            self._require_finite(metrics, batch)
        except NonFinite as error:
            error.samples = error.samples or self.method.samples(batch)
            raise self._failed(error) from error
        self.step += 1
        seconds = {**timing.take(), "step": time.perf_counter() - started}
        if self._profiler:
            trained = self.optimise.tokens - trained
            self._profiler.end_step(self.step, seconds, batch.tokens, trained)
        rates = {f"time/{name}": value for name, value in seconds.items()}
        if batch.tokens:
            rates["throughput/tokens_per_second"] = batch.tokens / seconds["step"]
        with self._resumable():
            self.folder.metrics(self.step, {**metrics, **rates})
        self.watcher.step(self.step, {**metrics, **rates}, seconds)
        if self._due(self.settings.sample_every) or self.step == 1:
            rows = self.method.samples(batch)
            with self._resumable():
                self.folder.samples(self.step, rows)
            self.watcher.samples(self.step, rows)

    def _pass_over(self, reason: NothingToLearn, started: float) -> None:
        """Count a step that had nothing to learn; too many in a row end the run."""
        self._passed_over += 1
        if self._passed_over > _MOST_PASSED_OVER:
            raise PostgradError(f"{reason}; so it was for {_MOST_PASSED_OVER} steps before")
        self.step += 1
        if self._profiler:
            seconds = {**timing.take(), "step": time.perf_counter() - started}
            self._profiler.end_step(self.step, seconds, 0, 0)
        with self._resumable():
            self.folder.metrics(self.step, {"passed_over": 1.0})
        self.watcher.say(f"step {self.step} is passed over: {reason}")

    @contextmanager
    def _between_steps(self, name: str) -> Iterator[None]:
        """A stretch that is no part of a step; it has the time of the stretches within it too."""
        timing.take()
        with timed(name):
            yield
        seconds = sum(timing.take().values())
        if self._profiler:
            self._profiler.between_steps(name, seconds)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _require_finite(self, metrics: Metrics, batch: Batch) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFinite(f"{name} is {value}", batch.fields(), self.method.samples(batch))

    def _evaluate(self) -> Metrics:
        states = random_states()
        with self._keeping_what_was_learnt(), self._between_steps("evaluate"):
            metrics = evaluated(self.method, self.settings.precision)
        restore_random_states(states)
        if metrics:
            named = {f"evaluation/{name}": value for name, value in metrics.items()}
            with self._resumable():
                self.folder.metrics(self.step, named)
                self.folder.samples(self.step, self.method.evaluation_samples())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.watcher.say(f"evaluation after step {self.step}: {shown}")
        self._evaluation, self._evaluated = metrics, self.step
        return metrics

    def save(self) -> None:
        """Write a checkpoint of the present step, and say which data have changed meanwhile."""
        self._save(self._state())

    def _save(self, state: dict[str, Any]) -> None:
        with self._between_steps("checkpoint"), self._resumable(), self._saving:
            if self._in_shares:
                processes.agreed(self.folder.flush)
                write_checkpoint_in_shares(
                    self._checkpoints, self.step, flatten(state), self.settings.keep_checkpoints
                )
            else:
                processes.agreed(lambda: self._write(self.step, flatten(state)))
            self._saved = self.step
        for line in self.sources.changed():
            self.watcher.say(line)

    def _state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "modules": {n: module_state(m) for n, m in self.method.modules().items()},
            "optimisers": self.optimise.state_dict(),
            "method": self.method.state_dict(),
            "early_stop": self._stop.state_dict(),
            "evaluation": self._evaluation,
            "evaluated": self._evaluated,
            "rows": self.folder.rows,
            "random": random_states(),
        }

    def _write(self, step: int, state: Flat) -> None:
        self.folder.flush()
        write_checkpoint(self._checkpoints, step, state, self.settings.keep_checkpoints)

    def _keep(self) -> None:
        """Copy the state, in case that the step to come cannot be finished."""
        with self._between_steps("checkpoint"):
            # one process alone will have to write it, whatever the others are at
            state = in_one_piece(self._state())
            kept = (self.step, flatten(state)) if processes.first() else None
        with self._saving:
            self._kept = kept

    def _give_up_step(self) -> None:
        """Save the start of the present step and stop; from another thread, as this one is busy."""
        with self._saving:
            if self._kept is None or (self._saved or 0) > self._kept[0]:
                return  # the step has ended after all, and is saved
            step, state = self._kept
            try:
                if self._saved != step:
                    self._write(step, state)
                    self._saved = step
            except PostgradError as error:
                self.watcher.say(str(error))
                return
            self._cut = True
        self.watcher.say(f"step {step + 1} takes too long: given up, and saved as it began")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """An error of the disk says from where the run can go on."""
        try:
            yield
        except PostgradError as error:
            raise PostgradError(
                f"step {self.step}: {error}; once mended, --resume {self.folder.path} continues "
                f"after step {self._saved or 0}"
            ) from error

    @contextmanager
    def _keeping_what_was_learnt(self) -> Iterator[None]:
        """While no weight changes: an error that stops the run leaves a checkpoint behind."""
        states, memory = random_states(), self._memory()
        try:
            yield
        except PostgradError as error:
            failed = self._failed(error)
            if self.step > 0 and memory is not None:
                restore_random_states(states)  # some may have been drawn before the error
                try:
                    state = self._state()
                    self._save({**state, "method": {**state["method"], **unflatten(*memory)}})
                except PostgradError as another:
                    raise PostgradError(f"{failed}; and {another}") from error
            raise failed from error

    def _memory(self) -> Flat | None:
        """A copy of what the method remembers, which half a step changes; None if it is large.

        Then an error in a step leaves the checkpoint before: the steps since are made again.
        """
        if self._remembers_much:
            return None
        memory = flatten(self.method.changing_state())
        self._remembers_much = sum(t.nbytes for t in memory[1].values()) > _LARGEST_MEMORY
        return memory

    def _failed(self, error: PostgradError) -> PostgradError:
        """The error with its step; the tensors and samples behind a non-finite value are saved."""
        message = f"step {self.step + 1}: {error}"
        if not isinstance(error, NonFinite):
            return PostgradError(
                f"{message}; once mended, continue with --resume {self.folder.path}"
            )
        where = self.folder.path / "failure" / f"step-{self.step + 1:08d}"
        where.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, values in error.tensors.items():
            if isinstance(values, torch.Tensor):
                tensors[name] = values.detach().cpu().contiguous().clone()
            elif all(isinstance(value, torch.Tensor) for value in values):
                for i, value in enumerate(values):
                    tensors[f"{name}.{i}"] = value.detach().cpu().contiguous().clone()
        save_file(tensors, where / "batch.safetensors")
        text = json.dumps(error.samples, ensure_ascii=False, indent=1)
        (where / "samples.json").write_text(blanked(text), encoding="utf-8")
        return PostgradError(f"{message}; saved to {where}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step and save; a second one stops at once.

        After SIGTERM a step has no longer than `notice` leaves it.
        """

        timers: list[threading.Timer] = []

        def ask(number: int, frame: Any) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True
            if number == signal.SIGTERM and self.settings.notice is not None:
                # half of the notice is left for writing
                timer = threading.Timer(self.settings.notice / 2, self._give_up_step)
                timer.daemon = True
                timer.start()
                timers.append(timer)
            self.watcher.say(f"stopping after step {self.step + 1}; press again to stop at once")

        try:
            old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's business
            old = {}
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            for number, handler in old.items():
                signal.signal(number, handler)


def require_shardable(method: Method) -> list[CanBeSharded]:
    """The method's trainable modules, all of which can be sharded; an error if they cannot."""
    reason = method.whole_weights()
    if reason is not None:
        raise PostgradError(f"shard: this method {reason}: expected false")
    found: list[CanBeSharded] = []
    for name, module in method.modules().items():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        if not isinstance(module, CanBeSharded):
            raise PostgradError(f"shard: the {name} of this method cannot be sharded")
        found.append(module)
    return found


class EarlyStop:
    """Watches one evaluation metric and says when it has stopped improving."""

    def __init__(self, settings: LoopSettings):
        self._metric = settings.stop_metric
        self._patience = settings.stop_patience
        self._sign = 1.0 if settings.stop_higher_is_better else -1.0
        self._best = -math.inf
        self._waited = 0

    def reached(self, metrics: Metrics) -> bool:
        if self._metric is None:
            return False
        if self._metric not in metrics:
            names = ", ".join(metrics) or "none"
            raise PostgradError(f"stop_metric {self._metric!r} is not evaluated: there is {names}")
        value = self._sign * metrics[self._metric]
        self._waited = 0 if value > self._best else self._waited + 1
        self._best = max(self._best, value)
        return self._waited >= self._patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._best, self._waited = state["best"], int(state["waited"])


def pick_device(name: str) -> torch.device:
    """`auto` is an NVIDIA GPU where there is one, each process's own, otherwise the CPU."""
    if name == "auto":
        own = torch.device("cuda", processes.local_rank())
        return own if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PostgradError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise PostgradError(f"device: expected auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PostgradError(f"device: {name!r} asked for, but torch sees no NVIDIA GPU")
    return device


def writable(path: Path) -> None:
    """Stop before any compute if a folder could not be made at `path`."""
    nearest = path
    try:
        while not nearest.exists():
            nearest = nearest.parent
    except (OSError, ValueError) as error:  # a name that is too long, or no name at all
        raise PostgradError(f"output: cannot create a folder at {path}: {error}") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise PostgradError(f"output: cannot create a folder at {path}: {nearest} is not writable")
