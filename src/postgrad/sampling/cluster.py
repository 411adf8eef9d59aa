"""Responses drawn by workers on a Ray cluster: handed out in chunks, and again when one is lost."""

import copy
import importlib.util
import logging
import os
import signal
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread, current_thread, main_thread
from typing import Any

import numpy
import torch
from torch import Tensor

from postgrad.errors import MissingExtra, PostgradError
from postgrad.memory import keep_freed_memory
from postgrad.models.policy import LanguagePolicy
from postgrad.notices import say
from postgrad.sampling.engines import Drawn, Engine, Wanted
from postgrad.sampling.generation import draw_here

EngineOf = Callable[[], Engine | None]

# read by Ray when it is imported, and by the processes that it starts
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # it warns of this change
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # what it prints of lost workers: the metrics count them
    # workers do what the run waits for: by default they have what others leave of the cores
    "RAY_worker_niceness": "0",
}
_TRIES = 3  # workers that may be lost over one chunk, or in a row while they come up


@dataclass(frozen=True)
class ClusterSettings:
    """Where workers run, and what each is given.

    Attributes:
        workers: how many there are.
        address: of a Ray cluster; None: `RAY_ADDRESS`, or a cluster on this machine alone, which
            ends with the engine.
        cpus: cores of a worker, which are its threads.
        gpus: GPUs of a worker.
        chunk: responses that a worker draws at a time, at least; those to one prompt are never
            parted, for their prompt is computed once.
        patience: seconds in which a worker has to come up when there is no other left, and a
            cluster of others to have room for all at the start.
    """

    workers: int
    address: str | None = None
    cpus: int = 1
    gpus: float = 0
    chunk: int = 8
    patience: float = 600.0


@dataclass(frozen=True)
class _Precision:
    """Autocast as it is where responses are asked for."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, policy: LanguagePolicy) -> "_Precision":
        kind = policy.device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, self.enabled)


class Weights:
    """Trainable weights in the cluster's object store, where every worker reads them."""

    def __init__(self, policy: LanguagePolicy, version: int):
        import ray

        self.version = version
        self.reference = ray.put({name: _bytes(p) for name, p in _trainable(policy)})
        # what comes back lies in the store itself: no second copy
        self._stored: dict[str, numpy.ndarray] = ray.get(self.reference)

    def are_those_of(self, policy: LanguagePolicy) -> bool:
        return all(numpy.array_equal(_bytes(p), self._stored[n]) for n, p in _trainable(policy))

    def policy_of(self, policy: LanguagePolicy) -> LanguagePolicy:
        """A copy of the policy with these weights."""
        network, tokenizer = copy.deepcopy(policy.portable())
        copied = LanguagePolicy(network.to(policy.device), tokenizer)
        _put(self._stored, copied)
        return copied


@dataclass(eq=False)
class _Chunk:
    """A part of what was asked for in one go."""

    asked: "Asked"
    start: int
    part: Wanted
    tries: int = 0


class Asked:
    """Responses that workers are drawing, by the weights that the policy had when it was asked."""

    def __init__(self, wanted: Wanted, precision: _Precision, weights: Weights, chunk: int):
        self.wanted, self.precision, self.weights = wanted, precision, weights
        self.chunks = [
            _Chunk(self, start, wanted.part(start, stop))
            for start, stop in _cuts(wanted.prompts, chunk)
        ]
        self._drawn: list[Drawn | None] = [None] * len(wanted.prompts)
        self._left = len(self.chunks)
        self._done: Future[None] = Future()

    def take(self, chunk: _Chunk, drawn: Sequence[Drawn]) -> None:
        self._drawn[chunk.start : chunk.start + len(drawn)] = drawn
        self._left -= 1
        if self._left == 0 and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    @property
    def over(self) -> bool:
        return self._done.done()

    def drawn(self) -> list[Drawn]:
        """The responses, once all are there.

        Raises:
            PostgradError: they cannot be drawn on the cluster any more.
        """
        self._done.result()
        return [one for one in self._drawn if one is not None]

    def drawn_anyhow(self, policy: LanguagePolicy) -> list[Drawn]:
        """The responses; where workers are lost for good, this process draws what is missing."""
        with suppress(PostgradError):
            return self.drawn()
        with torch.no_grad(), self.precision.autocast():
            copied = self.weights.policy_of(policy)
            for chunk in self.chunks:
                if self._drawn[chunk.start] is None:
                    self.take(chunk, draw_here(copied, chunk.part))
        return [one for one in self._drawn if one is not None]


class ClusterEngine:
    """An engine whose responses are drawn by workers, each with a copy of the policy.

    What a response is does not depend on which worker draws it, nor on how many there are: chunks
    are cut without regard to them, a sample draws from a stream of its own, and every chunk names
    the weights that it is drawn by. So a chunk whose worker is lost is drawn by another one as if
    nothing had happened; a new worker takes the place of the lost one.

    Args:
        policy: what is copied to the workers.
        settings: how many workers, and where.
        engine_of: makes the engine within a worker; None from it: the policy draws itself.
        exact: whether a worker draws what this process would draw.

    Raises:
        PostgradError: the cluster cannot be reached, or has no room for the workers in time.
        MissingExtra: Ray is not installed.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        settings: ClusterSettings,
        engine_of: EngineOf = lambda: None,
        *,
        exact: bool = True,
    ):
        self.exact = exact
        owned = _connect(settings)
        self._chunk = settings.chunk
        self._crew = _Crew(policy, settings, engine_of)
        self._weights: Weights | None = None
        self._pushed = 0
        self._end = weakref.finalize(self, _end, self._crew, owned)

    def ask(self, policy: LanguagePolicy, wanted: Wanted) -> Asked:
        """Have responses drawn by the policy's present weights while this process goes on."""
        if not self._end.alive:
            raise PostgradError("rollout.workers: the engine is closed")
        last = self._weights
        if last is None or not last.are_those_of(policy):
            self._weights = Weights(policy, 0 if last is None else last.version + 1)
            self._pushed += 1
        assert self._weights is not None
        asked = Asked(wanted, _Precision.of(policy), self._weights, self._chunk)
        self._crew.do(partial(self._crew.enqueue, asked))
        return asked

    def draw(self, policy: LanguagePolicy, wanted: Wanted) -> list[Drawn]:
        return self.ask(policy, wanted).drawn()

    def metrics(self) -> dict[str, float]:
        """Of the time since the last call.

        `rollout/workers` are up, `rollout/restarts` have taken the place of lost ones, and
        `rollout/pushes` is how often weights went out; the rest is about the clock.
        """
        found: Future[dict[str, float]] = Future()
        self._crew.do(lambda: found.set_result(self._crew.report()))
        pushed, self._pushed = self._pushed, 0
        return {**found.result(), "rollout/pushes": float(pushed)}

    def close(self) -> None:
        self._end()


def _end(crew: "_Crew", owned: bool) -> None:
    import ray

    crew.stop()
    if owned and ray.is_initialized():
        ray.shutdown()


@dataclass(eq=False)
class _Worker:
    """One actor. `chunk` is what it draws at present."""

    actor: Any
    up: bool = False
    chunk: _Chunk | None = None


@dataclass
class _Tally:
    """What happened since `since`."""

    since: float = field(default_factory=time.perf_counter)
    drawing: float = 0.0  # seconds of all workers
    tokens: int = 0
    restarts: int = 0


class _Crew:
    """The workers, and a thread that hands chunks to those which are free.

    All that happens (work, an answer, a loss) is a call in the thread's queue, so that nothing is
    touched by two threads and nobody looks again and again whether something has happened.
    """

    def __init__(self, policy: LanguagePolicy, settings: ClusterSettings, engine_of: EngineOf):
        import ray

        self._settings = settings
        portable = ray.put(policy.portable())
        kind: Any = ray.remote(
            num_cpus=settings.cpus, num_gpus=settings.gpus, scheduling_strategy="SPREAD"
        )(Drawer)
        self._start = lambda: kind.remote([portable], engine_of, policy.device.type, settings.cpus)
        self._workers: list[_Worker] = []
        self._queue: deque[_Chunk] = deque()
        self._tally = _Tally()
        self._failed_starts = 0  # in a row
        self._nobody_since: float | None = None  # work waits, and no worker is up
        self._broken: BaseException | None = None
        self._stopping = False
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for _ in range(settings.workers):
            self._hire()
        self._thread = Thread(target=self._run, name="rollout-workers", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], None]) -> None:
        """Let the thread make the call after those before."""
        self._calls.put(call)

    def stop(self) -> None:
        def stop() -> None:
            self._stopping = True

        self.do(stop)
        self._thread.join()

    def _run(self) -> None:
        import ray

        while not self._stopping:
            try:
                self._next_call()()
                self._hand_out()
            except Exception as error:  # noqa: BLE001  every waiting caller gets it
                self._give_up(error)
        self._give_up(PostgradError("rollout.workers: the engine is closed"))
        if ray.is_initialized():  # at the end of the process Ray may have ended first
            for worker in self._workers:
                ray.kill(worker.actor)

    def _next_call(self) -> Callable[[], None]:
        """The next call; that of giving up where nobody has come up in time."""
        if self._nobody_since is None:
            return self._calls.get()
        left = self._nobody_since + self._settings.patience - time.monotonic()
        try:
            return self._calls.get(timeout=max(left, 0.01))
        except Empty:
            what = (
                f"rollout.workers: none of {self._settings.workers} workers has come up for "
                f"{self._settings.patience:g} s (rollout.worker_patience)"
            )
            return partial(self._give_up, PostgradError(what))

    # What can happen ------------------------------------------------------------------------

    def enqueue(self, asked: Asked) -> None:
        if self._broken is not None:
            asked.fail(self._broken)
            return
        self._failed_starts = 0
        while len(self._workers) < self._settings.workers:
            self._hire()
        self._queue.extend(asked.chunks)

    def report(self) -> dict[str, float]:
        tally, self._tally = self._tally, _Tally()
        elapsed = max(self._tally.since - tally.since, 1e-9)
        return {
            "rollout/workers": float(sum(worker.up for worker in self._workers)),
            "rollout/restarts": float(tally.restarts),
            "throughput/workers_busy": tally.drawing / elapsed / self._settings.workers,
            "throughput/worker_tokens_per_second": tally.tokens / max(tally.drawing, 1e-9),
        }

    def _hire(self) -> None:
        worker = _Worker(self._start())
        self._workers.append(worker)
        self._when(worker.actor.prepare.remote(), self._came_up, worker)

    def _came_up(self, worker: _Worker, result: Any, error: BaseException | None) -> None:
        if error is None:
            worker.up = True
            self._failed_starts = 0
            return
        self._failed_starts += 1
        alone = not any(other.up for other in self._workers)
        if _mendable(error) or (alone and self._failed_starts >= _TRIES):
            self._give_up(_in_one_line("a worker does not start", error))
        # where others are up they go on without it, until more is asked for
        self._replace(worker, hire=self._failed_starts < _TRIES)

    def _answered(self, worker: _Worker, result: Any, error: BaseException | None) -> None:
        chunk, worker.chunk = worker.chunk, None
        assert chunk is not None
        if error is None:
            drawn, seconds = result
            self._tally.drawing += seconds
            self._tally.tokens += sum(len(tokens) for tokens, _, _ in drawn)
            chunk.asked.take(
                chunk,
                [Drawn(torch.tensor(t), torch.tensor(numbers), over) for t, numbers, over in drawn],
            )
            return
        chunk.tries += 1
        if _mendable(error) or chunk.tries >= _TRIES:
            problem = f"{len(chunk.part.prompts)} responses could not be drawn"
            chunk.asked.fail(_in_one_line(problem, error))
        else:
            self._queue.appendleft(chunk)
        self._replace(worker)

    def _replace(self, worker: _Worker, hire: bool = True) -> None:
        """Let another worker take the place of one that is lost, or no longer trusted."""
        import ray

        if not ray.is_initialized():  # the process ends, and Ray with it
            self._give_up(PostgradError("rollout.workers: the engine is closed"))
            return
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if hire and self._broken is None:
            self._tally.restarts += 1
            self._hire()

    def _give_up(self, error: BaseException) -> None:
        """Fail all that waits, and all that is asked for from now on."""
        self._broken, self._nobody_since = error, None
        waiting = [*self._queue, *(w.chunk for w in self._workers if w.chunk is not None)]
        self._queue.clear()
        for chunk in waiting:
            chunk.asked.fail(error)

    # Work -----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        free = [worker for worker in self._workers if worker.up and worker.chunk is None]
        for worker in free:
            while self._queue and self._queue[0].asked.over:
                self._queue.popleft()  # of what has failed
            if not self._queue:
                break
            chunk = worker.chunk = self._queue.popleft()
            weights = chunk.asked.weights
            answer = worker.actor.draw.remote(
                chunk.part, chunk.asked.precision, weights.version, [weights.reference]
            )
            self._when(answer, self._answered, worker)
        if not self._queue or any(worker.up for worker in self._workers):
            self._nobody_since = None
        elif self._nobody_since is None:
            self._nobody_since = time.monotonic()

    def _when(self, answer: Any, call: Callable[..., None], worker: _Worker) -> None:
        """Make the call with the worker's answer, or with the error in place of it."""

        def arrived(future: "Future[Any]") -> None:
            error = future.exception()
            result = None if error is not None else future.result()
            self.do(partial(call, worker, result, error))

        answer.future().add_done_callback(arrived)


class Drawer:
    """What runs in a worker: a copy of the policy, brought up to date when a chunk asks for it."""

    def __init__(self, portable: list[Any], engine_of: EngineOf, device: str, threads: int):
        self._made_of = portable, engine_of, device
        torch.set_num_threads(threads)
        self._version = -1

    def prepare(self) -> None:
        import ray

        portable, engine_of, device = self._made_of
        if device == "cpu":
            keep_freed_memory()
        network, tokenizer = ray.get(portable[0])
        self._policy = LanguagePolicy(network.to(device), tokenizer)
        self._policy.engine = engine_of()

    def draw(
        self, wanted: Wanted, precision: _Precision, version: int, weights: list[Any]
    ) -> tuple[list[tuple[numpy.ndarray, numpy.ndarray, bool]], float]:
        """The responses as arrays, and the seconds that they took."""
        started = time.perf_counter()
        policy = self._policy
        if version != self._version:
            import ray

            _put(ray.get(weights[0]), policy)
            self._version = version
        with torch.no_grad(), precision.autocast():
            if policy.engine is None:
                drawn = draw_here(policy, wanted)
            else:
                drawn = policy.engine.draw(policy, wanted)
        arrays = [
            (one.tokens.cpu().numpy(), one.logprobs.float().cpu().numpy(), one.finished)
            for one in drawn
        ]
        return arrays, time.perf_counter() - started


def _connect(settings: ClusterSettings) -> bool:
    """Be connected to a Ray cluster with room for the workers; whether it was started here."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", "ray")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "configure_logging": False,
        "logging_level": logging.ERROR,
    }
    address = settings.address or os.environ.get("RAY_ADDRESS")
    owned = not ray.is_initialized()
    with _signals_kept():
        if owned and address is None:
            cores = max(settings.workers * settings.cpus, os.cpu_count() or 1)
            ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
        elif owned:
            try:
                ray.init(address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as problem:
                raise PostgradError(
                    f"rollout.address: there is no Ray cluster at {address!r}: "
                    f"{_first_line(problem)} (if it wants a token, RAY_AUTH_MODE=token sends it)"
                ) from problem
    here = owned and address is None
    _require_room(settings, 0 if here else settings.patience)
    return owned


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, in the main thread; it stays what it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, before)


def _require_room(settings: ClusterSettings, patience: float) -> None:
    """Wait so many seconds for nodes that are still to come up, then refuse."""
    deadline = time.monotonic() + patience
    told = False
    while problem := _lack_of_room(settings):
        if time.monotonic() > deadline:
            raise PostgradError(problem)
        if not told:
            say(f"{problem}: waiting for nodes at most {patience:g} s (rollout.worker_patience)")
            told = True
        time.sleep(0.5)


def _lack_of_room(settings: ClusterSettings) -> str | None:
    import ray

    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        needed, found = settings.workers * each, there.get(name, 0)
        if needed > found:
            return (
                f"rollout.workers: {settings.workers} workers need {needed:g} {name}s, and the "
                f"Ray cluster has {found:g}"
            )
    return None


def _cuts(prompts: Sequence[Tensor], size: int) -> list[tuple[int, int]]:
    """Where to cut: parts of at least `size`, but for the last, that part no equal prompts."""
    cuts, start = [], 0
    for stop in range(1, len(prompts) + 1):
        last = stop == len(prompts)
        if last or (stop - start >= size and not torch.equal(prompts[stop - 1], prompts[stop])):
            cuts.append((start, stop))
            start = stop
    return cuts


def _trainable(policy: LanguagePolicy) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in policy.whole_network.named_parameters() if p.requires_grad]


@torch.no_grad()
def _put(stored: Mapping[str, numpy.ndarray], policy: LanguagePolicy) -> None:
    """Give the policy the weights that are in the store."""
    for name, parameter in _trainable(policy):
        parameter.copy_(_like(stored[name], parameter))


def _bytes(tensor: Tensor) -> numpy.ndarray:
    """Its bytes as an array, since NumPy has not all of torch's types."""
    found: numpy.ndarray = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return found


def _like(array: numpy.ndarray, tensor: Tensor) -> Tensor:
    """The array's bytes as a tensor of that type and shape, to be read only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that what is in the store is read-only
        return torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)


def _mendable(error: BaseException) -> bool:
    """Whether it is a mistake of the user's, which another worker would find just the same."""
    return isinstance(getattr(error, "cause", None), PostgradError)


def _in_one_line(problem: str, error: BaseException) -> PostgradError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, PostgradError):
        return PostgradError(str(cause))
    found = error if cause is None else cause
    return PostgradError(
        f"rollout.workers: {problem}, {_TRIES} times over: {type(found).__name__}: "
        f"{_first_line(found)}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
