"""A race: contenders, each a process of its own, that take turns on the same machine.

While one works the others wait, idle, so that all meet the same machine, and a change of its pace
falls on all alike. Standard library only.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = sys.executable
PEERS = os.environ.get("BENCH_PEERS", str(ROOT / ".bench/peers/bin/python"))
VLLM = os.environ.get("BENCH_VLLM", str(ROOT / ".bench/vllm/bin/python"))

WARM_UPS = 2  # turns that are not counted: allocators and the optimiser settle in the first two
LONGEST_WAIT = 1800  # seconds for loading, or for one turn

_TOO_FEW = "it did not take all of its turns"


@dataclass(frozen=True)
class Contender:
    """A function `work(turns, **arguments)` at the top of a module, and the Python that runs it.

    `environment` is added to that of the process.
    """

    name: str
    work: Callable[..., None]
    python: str = OURS
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """The counted turns of one contender, or why it could not run them."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)
    numbers: list[dict[str, float]] = field(default_factory=list)
    failure: str | None = None

    @property
    def time(self) -> float:
        """Median seconds of a turn."""
        return median(self.seconds)

    @property
    def peak(self) -> int | None:
        """The highest memory of any turn above imports and model, in bytes."""
        known = [value for value in self.memory if value is not None]
        return max(known, default=None)

    def rate(self, name: str) -> float:
        """Median of a turn's number over its seconds."""
        return median(n[name] / s for n, s in zip(self.numbers, self.seconds, strict=True))


def threads() -> int:
    """Cores that this process may use: all contenders compute with so many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def race(
    contenders: Sequence[Contender], repeats: int, warm_ups: int = WARM_UPS
) -> dict[str, Outcome]:
    """Let the contenders take turns, A B A B …, and return each one's outcome by its name.

    One that fails leaves the others to go on without it.
    """
    outcomes = {contender.name: Outcome() for contender in contenders}
    runners: list[_Runner] = []
    try:
        for contender in contenders:
            print(f"  {contender.name} …", file=sys.stderr, flush=True)
            runner = _Runner(contender, warm_ups + repeats, outcomes[contender.name])
            runners.append(runner)
            runner.wait_until_ready()
        for turn in range(warm_ups + repeats):
            for runner in runners:
                runner.take_turn(counted=turn >= warm_ups)
    finally:
        for runner in runners:
            runner.stop()
    return outcomes


class _Runner:
    """The process of one contender, and the pipes to it. All it says goes into its outcome."""

    def __init__(self, contender: Contender, turns: int, outcome: Outcome):
        self.outcome = outcome
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._unread = b""
        self._process: subprocess.Popen[bytes] | None = None
        work = contender.work
        try:
            self._process = subprocess.Popen(
                [
                    contender.python, "-m", "benchmarks.turns",
                    _module_name(work), work.__name__, str(orders), str(answers),
                ],
                env=_environment() | contender.environment,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(orders, answers),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            outcome.failure = f"{contender.python}: {error.strerror}"
        os.close(orders)
        os.close(answers)
        self._order(json.dumps({"turns": turns, "arguments": contender.arguments}))

    def wait_until_ready(self) -> None:
        """Wait for it to be ready for a turn, or to have ended after the last one."""
        self._answer()

    def take_turn(self, counted: bool) -> None:
        if self.outcome.failure is not None:
            return
        self._order("go")
        message = self._answer()
        if self.outcome.failure is None and "seconds" not in message:
            self.outcome.failure = _TOO_FEW
        if self.outcome.failure is not None:
            return
        if counted:
            self.outcome.seconds.append(message["seconds"])
            self.outcome.memory.append(message["memory"])
            self.outcome.numbers.append(message["numbers"])
        # what it does between two turns must not fall into the turn of another
        self.wait_until_ready()

    def stop(self) -> None:
        os.close(self._orders)
        os.close(self._answers)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _order(self, line: str) -> None:
        if self.outcome.failure is not None:
            return
        try:
            os.write(self._orders, (line + "\n").encode())
        except BrokenPipeError:
            self.outcome.failure = self._last_words()

    def _answer(self) -> dict[str, Any]:
        """Its next message; empty, with the outcome a failure, if it ended or hangs."""
        if self.outcome.failure is not None:
            return {}
        assert self._process is not None
        deadline = time.monotonic() + LONGEST_WAIT
        while b"\n" not in self._unread:
            # a process of its own making may keep the pipe open, so the end is asked for as well
            ended = self._process.poll() is not None
            if select.select([self._answers], [], [], 0.5)[0]:
                more = os.read(self._answers, 65536)
                self._unread += more
                ended = ended or not more
            elif time.monotonic() > deadline:
                self.outcome.failure = f"nothing was heard of it for {LONGEST_WAIT} seconds"
                return {}
            if ended and b"\n" not in self._unread:
                self.outcome.failure = self._last_words()
                return {}
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _last_words(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if code == 0:
            how = _TOO_FEW
        return "\n".join([how, *lines[-6:]])


def _environment() -> dict[str, str]:
    count = str(threads())
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _module_name(work: Callable[..., None]) -> str:
    """The name to import a function's module by, also where that is the main program."""
    if work.__module__ != "__main__":
        return work.__module__
    return f"benchmarks.{Path(work.__code__.co_filename).stem}"
