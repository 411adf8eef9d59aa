"""The one loop: it knows steps, optimisers, files and signals, and nothing of any method."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from postgrad import processes, timing
from postgrad.batch import Batch
from postgrad.config import LoopSettings
from postgrad.errors import NonFinite, PostgradError
from postgrad.methods.base import Method, Metrics, NothingToLearn
from postgrad.timing import timed
from postgrad.training.checkpoint import (
    load_latest,
    load_module_state,
    module_state,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from postgrad.training.console import Watcher
from postgrad.training.optimise import Optimisers, autocast, evaluated
from postgrad.training.profile import Profiler
from postgrad.training.record import RunFolder

_MOST_PASSED_OVER = 20  # steps in a row


@dataclass
class Finished:
    """How a run ended: after which step, with which last evaluation, and whether it was stopped."""

    step: int
    evaluation: Metrics
    interrupted: bool


class Loop:
    """Trains a method: `Loop(method, settings, folder, watcher).run()`."""

    def __init__(self, method: Method, settings: LoopSettings, folder: RunFolder, watcher: Watcher):
        self.method = method
        self.settings = settings
        self.folder = folder
        self.watcher = watcher
        self.step = 0
        self.rows: dict[str, int] = {}
        self.optimise = Optimisers(method.modules(), settings, method.place.device, method.rates())
        profiled = settings.profile and processes.first()
        self._profiler = Profiler(folder.path, method.place.device) if profiled else None
        self._stop = EarlyStop(settings)
        self._evaluation: Metrics = {}
        self._evaluated: int | None = None  # the step of the last evaluation
        self._stop_asked = False  # of this process, at any moment
        self._stopping = False  # of all processes, between steps
        self._passed_over = 0  # steps in a row

    def restore(self) -> None:
        """Continue from the newest good checkpoint of the folder, or from the start without one."""
        found = load_latest(self.folder.path / "checkpoints", self.watcher.say)
        if found is None:
            self.watcher.say(f"{self.folder.path} has no checkpoint yet: starting from step 0")
            return
        self.step, state = found
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
            self._train()
        if self._profiler:
            for line in self._profiler.lines():
                self.watcher.say(line)
        return Finished(self.step, self._evaluation, self._stopping)

    def _train(self) -> None:
        if self._evaluated is None:
            self._evaluate()
        while self.step < self.settings.steps and not self._to_stop():
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
        self.folder.metrics(self.step, {**metrics, **rates})
        self.watcher.step(self.step, {**metrics, **rates}, seconds)
        if self._due(self.settings.sample_every) or self.step == 1:
            rows = self.method.samples(batch)
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
            self.folder.metrics(self.step, named)
            self.folder.samples(self.step, self.method.evaluation_samples())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.watcher.say(f"evaluation after step {self.step}: {shown}")
        self._evaluation, self._evaluated = metrics, self.step
        return metrics

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        with self._between_steps("checkpoint"):
            state = {
                "modules": {n: module_state(m) for n, m in self.method.modules().items()},
                "optimisers": self.optimise.state_dict(),
                "method": self.method.state_dict(),
                "early_stop": self._stop.state_dict(),
                "evaluation": self._evaluation,
                "evaluated": self._evaluated,
                "rows": self.folder.rows,
                "random": random_states(),
            }
            where, keep = self.folder.path / "checkpoints", self.settings.keep_checkpoints
            processes.agreed(lambda: save_checkpoint(where, self.step, state, keep))

    @contextmanager
    def _keeping_what_was_learnt(self) -> Iterator[None]:
        """While no weight changes: an error that stops the run leaves a checkpoint behind."""
        try:
            yield
        except PostgradError as error:
            if self.step > 0:
                self.save()
            raise self._failed(error) from error

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
        (where / "samples.json").write_text(text, encoding="utf-8")
        return PostgradError(f"{message}; saved to {where}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step and save; a second one stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True
            self.watcher.say(f"stopping after step {self.step + 1}; press again to stop at once")

        try:
            old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's business
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PostgradError(f"device: {name!r} asked for, but torch sees no NVIDIA GPU")
    return device


def writable(path: Path) -> None:
    """Stop before any compute if a folder could not be made at `path`."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise PostgradError(f"output: cannot create a folder at {path}: {nearest} is not writable")
