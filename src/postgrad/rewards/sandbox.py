"""Runs Python code that nobody has read: programs, conversations, and unit tests of programs.

Every run has a process of its own, a fresh one, with limits on time, memory, output and files, an
empty environment and none of this process's open files. How it is kept from everything else:

- `namespaces`: Linux namespaces put up by this library. There is no network, no other process and
  no file but Python's own, read-only, and an empty `/tmp` in memory that ends with the run. A
  filter refuses the system calls that start processes or programs, reach the network or are rarely
  needed doors into the kernel. Where this process is root, the code runs as nobody (but in a
  container whose root may not do that: there it stays root without any capability).
- `bubblewrap`: the same, with the namespaces put up by the program `bwrap`.
- `process`: weaker, for where neither is available, and only if asked for. The same limits and
  filter, in a temporary folder. Linux's Landlock, where the kernel has it, refuses the contents of
  all other files. The code still sees that files exist, shares the machine's processes and memory
  with everybody, and may fill the disk. Other than on Linux on x86_64 and aarch64 there are
  neither filter nor Landlock: nothing keeps the code from your files and the network.

What no isolation here guarantees: that the kernel has no hole, that hardware leaks nothing between
processes, and that code which runs beside others does not slow them.
"""

import contextlib
import errno
import functools
import json
import os
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from postgrad.errors import PostgradError, unknown
from postgrad.rewards.confined import messages, walls
from postgrad.rewards.confined.server import START

STRONG = ("namespaces", "bubblewrap")
ISOLATIONS = (*STRONG, "process")
_LONGEST_START = 60.0  # seconds until a sandbox stands, on however busy a machine
_LONGEST_ANSWER = 1 << 20  # bytes of a message from a sandbox
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    `cpu` are seconds of computing (whole ones; None: no limit), `wall` seconds by the clock,
    `memory` bytes of address space, `disk` bytes of a file and, but with `process`, of all files,
    `output` bytes of output and of errors each. Processes cannot be started, threads can.
    """

    cpu: int | None = 5
    wall: float = 10.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    output: int = 1 << 20


@dataclass(frozen=True)
class Result:
    """What came of a run or a snippet.

    `exit` is the status as shells give it: 128 and the signal where one ended it. `limit` names
    what ended it, if one of the limits did: time, cpu, memory, disk or output; `ended`: there was
    no interpreter any more.
    """

    output: str
    errors: str
    exit: int
    limit: str | None = None
    seconds: float = field(default=0.0, compare=False)


class Sandbox:
    """Up to `parallel` sandboxes at a time, of one isolation and with the same limits.

    Its methods may be called from several threads. Servers (see `confined.server`) start at first
    use and end with `close` or with this process.

    Raises:
        PostgradError: the isolation is not available here; without one asked for, no strong one.
    """

    def __init__(
        self,
        isolation: str | None = None,
        limits: Limits | None = None,
        parallel: int | None = None,
    ):
        self.isolation = choose(isolation)
        self.limits = limits or Limits()
        self.parallel = parallel or _cores()
        self._idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()
        self._at_the_end = weakref.finalize(self, _close_all, self._idle)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the idle servers; those at work end after their run."""
        _close_all(self._idle)

    def run(self, program: str, stdin: str = "") -> Result:
        """Run a program, as `python program.py` would, with text on its standard input."""
        with self._server() as server, server.begin("run", self.limits) as started:
            started.say(program)
            return started.finish(stdin)

    def test(
        self, program: str, tests: Sequence[str], *, setup: str = "", tested: Sequence[str] = ()
    ) -> list[bool]:
        """Which of the tests (Python statements) a program passes.

        The program runs in one sandbox, the tests in another; they call the program's functions
        across. `setup` is run before the tests, on their side. A global that tests look up is
        theirs, a built-in one, or else the program's; those named in `tested` are always the
        program's. A test passes if it ends without an error while the program still runs.

        So a program can do to a test what its return values can do, and nothing else: it cannot
        reach the tests' text, assert, built-in functions or expected values, and ending itself or
        writing anything anywhere is no verdict. What tests must not leave to it: comparing two of
        the program's own objects (instances of its classes), or expected values passed to its own
        functions, whose word then counts. Nor can it be kept from doing the right thing for the
        test's arguments alone. Tests can pass plain values, functions and iterators; other objects
        of their own classes cannot cross, and such a test fails.
        """
        ends = socket.socketpair()
        with (
            self._server() as one,
            self._server() as other,
            one.begin("judge", self.limits, ends[0]) as judge,
            other.begin("tested", self.limits, ends[1]) as runner,
        ):
            runner.say(program)
            judge.say({"tests": list(tests), "setup": setup, "tested": list(tested)})
            return [judge.hear() is True for _ in tests]

    def interpreter(self) -> "Interpreter":
        """A process in which the snippets of a conversation run one after another."""
        with self._server() as server:
            return Interpreter(self.isolation, self.limits, server.another())

    def map(self, function: Callable[[_Item], _Found], items: Sequence[_Item]) -> list[_Found]:
        """`function` of every item, as many at a time as this sandbox runs in parallel."""
        with ThreadPoolExecutor(max(1, min(self.parallel, len(items)))) as pool:
            try:
                return list(pool.map(function, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _server(self) -> Iterator["_Server"]:
        try:
            server = self._idle.get_nowait()
        except queue.Empty:
            server = _Server(self.isolation)
        try:
            yield server
        except BaseException:
            server.close()
            raise
        self._idle.put(server)


def _close_all(idle: "queue.SimpleQueue[_Server]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            idle.get_nowait().close()


class Interpreter:
    """Successive snippets in one sandbox: variables live on from one to the next.

    `limits.wall` is the time of each snippet: one that takes longer is interrupted, and where it
    resists that the interpreter ends. `limits.cpu` does not apply. The value of a snippet's last
    expression is printed, as at Python's prompt. How a snippet ended is its own word: it may lie
    about an error, but about nothing outside.
    """

    _GRACE = 1.0  # seconds that an interrupted snippet has to end

    def __init__(
        self,
        isolation: str | None = None,
        limits: Limits | None = None,
        server: "_Server | None" = None,
    ):
        """`server` is closed with this interpreter; one of its own is started if not given."""
        given = limits or Limits()
        self.limits = Limits(None, given.wall, given.memory, given.disk, given.output)
        self._server = server or _Server(choose(isolation))
        try:
            self._run = self._server.begin("interpret", self.limits)
        except BaseException:
            self._server.close()
            raise
        self._run.shut_input()
        self.alive = True

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, snippet: str) -> Result:
        """Run one more snippet; `ended` is the result's limit if there is no process any more."""
        if not self.alive:
            return Result("", "", 1, "ended")
        self._run.say([snippet, self.limits.wall])
        start = time.monotonic()
        answer = self._run.hear(start + self.limits.wall + self._GRACE)
        if answer is None or not _is_report(answer):
            result = self._run.stop("time" if answer is None else "output")
            self.close()
            return result
        output, errors = self._run.take()
        seconds = time.monotonic() - start
        limit = answer["limit"] or _limit_in(errors)
        return Result(output, errors, answer["exit"], limit, seconds)

    def close(self) -> None:
        """End the process."""
        if self.alive:
            self.alive = False
            self._run.close()
            self._server.close()


class _Server:
    """A process that starts sandboxes, one at a time (see `confined.server`).

    A fork of another server costs a hundredth of one that starts Python.
    """

    def __init__(self, isolation: str, fork_of: "_Server | None" = None):
        self.isolation = isolation
        self.connection, theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        with theirs:
            if fork_of is not None:
                try:
                    messages.send(fork_of.connection, {"task": "serve"}, [theirs.fileno()])
                except messages.Closed:
                    self.connection.close()
                    raise fork_of.lost() from None
                return
            options = ["-s", "-P", "-S", "-X", "utf8"]
            place = [str(Path(__file__).parent), str(theirs.fileno())]
            self._process = subprocess.Popen(
                [sys.executable, *options, "-c", START, *place],
                env={"PYTHONHASHSEED": "0"},  # sets of text have one order in every run
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer, which may finish its step
                cwd="/",
            )
        try:
            messages.receive(self.connection)  # no run waits for its imports
        except messages.Closed:
            raise self.lost() from None

    def begin(self, task: str, limits: Limits, partner: socket.socket | None = None) -> "_Run":
        """Start a sandbox; `partner` becomes its own, to talk to another one."""
        return _Run(self, task, limits, partner)

    def another(self) -> "_Server":
        """A server that is a fork of this one, which must not be at work."""
        return _Server(self.isolation, self)

    def lost(self) -> PostgradError:
        """The error for a server that has ended by itself."""
        self.close()
        stderr = self._process.stderr if self._process else None
        told = stderr.read().decode(errors="replace").split("\n") if stderr else []
        reason = next((line for line in reversed(told) if line.strip()), "no reason given")
        return PostgradError(f"sandbox {self.isolation!r}: its server ended ({reason})")

    def close(self) -> None:
        with self.connection, contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):  # until the server has gone
                pass
        if self._process is not None:
            self._process.wait()


class _Run:
    """One sandbox at work: what is said to it and what comes out of it, within its limits."""

    def __init__(self, server: _Server, task: str, limits: Limits, partner: socket.socket | None):
        self._server = server
        self._limits = limits
        self._start = time.monotonic()
        self._stands = False
        self._limit: str | None = None
        self._answer: dict[str, Any] | None = None  # the server's, when it has ended
        self._folder = tempfile.mkdtemp(prefix="postgrad-") if server.isolation == "process" else ""
        self._channel, channel = socket.socketpair()
        self._heard: list[Any] = []
        self._input, self._to_write = -1, b""
        self._read = {"output": bytearray(), "errors": bytearray(), "heard": bytearray()}
        self._files: dict[str, int] = {"heard": self._channel.fileno()}
        theirs, self._input = os.pipe()
        self._files["output"], output = os.pipe()
        self._files["errors"], errors = os.pipe()
        given = [theirs, output, errors, channel.detach()]
        if partner is not None:
            given.append(partner.detach())
        self._selector = selectors.DefaultSelector()
        for name, file in self._files.items():
            os.set_blocking(file, False)
            self._selector.register(file, selectors.EVENT_READ, functools.partial(self._get, name))
        self._selector.register(server.connection, selectors.EVENT_READ, self._end)
        job = {
            "task": task,
            "limits": asdict(limits),
            "isolation": server.isolation,
            "folder": self._folder,
            "bwrap": shutil.which("bwrap"),
        }
        try:
            messages.send(server.connection, job, given)
        except messages.Closed:
            raise server.lost() from None
        finally:
            for file in given:
                os.close(file)

    def _wait_for_the_start(self) -> None:
        """No walls, no run: what fails before the first word is not the program's fault."""
        if self.hear(self._start + _LONGEST_START) != "started":
            result = self.stop("time")
            told = " ".join(result.errors.split())[-200:] or f"it ended with {result.exit}"
            raise PostgradError(f"sandbox {self._server.isolation!r} did not start: {told}")
        self._start = time.monotonic()
        self._stands = True

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        return self._answer is not None

    def say(self, message: Any) -> None:
        """Send a message; one that is not taken in time, or by nobody, is lost.

        Time counts from the first one on: before it, the walls are waited for.
        """
        if not self._stands:
            self._wait_for_the_start()
        self._channel.settimeout(self._limits.wall)
        with contextlib.suppress(messages.Closed):
            messages.send(self._channel, message)
        self._channel.setblocking(False)

    def hear(self, deadline: float | None = None) -> Any:
        """The next message, or None if none comes before the end or the deadline."""
        self._pump(lambda: bool(self._heard), deadline)
        return self._heard.pop(0) if self._heard else None

    def finish(self, stdin: str = "") -> Result:
        """Wait for the end; what takes too long is ended."""
        self._to_write = stdin.encode(errors="surrogatepass")
        os.set_blocking(self._input, False)
        self._selector.register(self._input, selectors.EVENT_WRITE, self._put)
        self._pump(lambda: self.ended)
        return self.stop("time")

    def stop(self, limit: str) -> Result:
        """End the run, because of that limit unless it has ended by itself."""
        self._kill(limit)
        assert self._answer is not None
        code, (output, errors) = self._answer["exit"], self.take()
        if self._limit is None:
            self._limit = self._limit_of(code, errors)
        return Result(output, errors, code, self._limit, time.monotonic() - self._start)

    def take(self) -> tuple[str, str]:
        """Output and errors since the last call."""
        for name in self._files:
            self._get(name)
        taken = [self._read[name].decode(errors="replace") for name in ("output", "errors")]
        self._read["output"].clear()
        self._read["errors"].clear()
        return taken[0], taken[1]

    def close(self) -> None:
        """End the run if it has not ended, and forget everything it wrote."""
        self._kill("time")
        self._selector.close()
        self._channel.close()
        os.close(self._files["output"])
        os.close(self._files["errors"])
        self.shut_input()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _limit_of(self, code: int, errors: str) -> str | None:
        computed = self._answer["cpu"] if self._answer else 0.0
        killed = code == 128 + signal.SIGKILL
        out_of_time = self._limits.cpu is not None and killed and computed >= self._limits.cpu
        if code == 128 + signal.SIGXCPU or out_of_time:
            return "cpu"
        if code == 128 + signal.SIGXFSZ:
            return "disk"
        return _limit_in(errors) if code else None

    def _pump(self, done: Callable[[], bool], deadline: float | None = None) -> None:
        """Read and write until it is done, the run has ended, or the deadline has passed."""
        deadline = self._start + self._limits.wall if deadline is None else deadline
        while not done() and not self.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for key, _ in self._selector.select(left):
                if not self.ended:
                    key.data()

    def _get(self, name: str) -> None:
        """Read what there is of one stream."""
        kept = self._read[name]
        while True:
            try:
                part = os.read(self._files[name], 1 << 16)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            if not part:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(self._files[name])
                return
            kept += part
            if name == "heard":
                self._understand(kept)
            elif len(kept) > self._limits.output:
                del kept[self._limits.output :]
                self._kill("output")
                return

    def _understand(self, data: bytearray) -> None:
        """Take whole messages out of the data; what is none ends the run."""
        while len(data) >= 8:
            length = int.from_bytes(data[:8], "big")
            if length > _LONGEST_ANSWER:
                data.clear()
                self._kill("output")
            if len(data) < 8 + length:
                return
            try:
                self._heard.append(json.loads(data[8 : 8 + length]))
            except (ValueError, RecursionError):
                self._kill("output")
            del data[: 8 + length]

    def _put(self) -> None:
        """Write some more to the standard input, and close it after the last."""
        try:
            if self._to_write:
                self._to_write = self._to_write[os.write(self._input, self._to_write) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads it
            self._to_write = b""
        if not self._to_write:
            self._selector.unregister(self._input)
            self.shut_input()

    def shut_input(self) -> None:
        """End the standard input."""
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def _kill(self, limit: str) -> None:
        if self.ended:
            return
        self._limit = limit
        with contextlib.suppress(messages.Closed):
            messages.send(self._server.connection, "end")
        self._end()

    def _end(self) -> None:
        """Take the server's word that the run has ended."""
        try:
            self._answer = messages.receive(self._server.connection)
        except messages.Closed:
            raise self._server.lost() from None
        if self._answer["fault"]:
            what = f"sandbox {self._server.isolation!r} did not start"
            raise PostgradError(f"{what}: {self._answer['fault']}")


def _is_report(answer: Any) -> bool:
    """Whether a snippet's end is told as it should be: the snippet might have written it itself."""
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("exit"), int)
        and answer.get("limit") in (None, "time")
    )


def _limit_in(errors: str) -> str | None:
    """The limit that an uncaught exception tells of."""
    last = errors.rstrip().rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return "memory"
    full = (errno.EFBIG, errno.ENOSPC)
    return "disk" if any(last.startswith(f"OSError: [Errno {e}]") for e in full) else None


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose(isolation: str | None = None) -> str:
    """The isolation to use: the one asked for, or else the first strong one there is.

    Raises:
        PostgradError: it is not available, with the reason and what can be done.
    """
    if isolation is not None:
        if isolation not in ISOLATIONS:
            raise unknown("isolation", isolation, ISOLATIONS)
        reason = why_not(isolation)
        if reason is not None:
            raise PostgradError(f"isolation {isolation!r} is not available here: {reason}")
        return isolation
    reasons = {name: why_not(name) for name in STRONG}
    for name, reason in reasons.items():
        if reason is None:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise PostgradError(
        f"no strong isolation for foreign code here ({told}): allow user namespaces or install "
        "bubblewrap, or accept the weaker one with isolation=process"
    )


@functools.cache
def why_not(isolation: str) -> str | None:
    """Why an isolation is not available here, or None: it has been tried."""
    if not hasattr(os, "fork"):
        return "it needs a system with fork"
    if isolation in STRONG and not walls.can_filter():
        return "it needs Linux on x86_64 or aarch64"
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "the program bwrap is not installed"
    try:
        server = _Server(isolation)
        with contextlib.closing(server), server.begin("run", Limits(wall=60)) as trial:
            trial.say("import ctypes, math; print(6 * 7)")
            result = trial.finish()
    except (PostgradError, OSError) as error:
        return str(error).removeprefix(f"sandbox {isolation!r} did not start: ")
    if result.output != "42\n":
        return " ".join(result.errors.split())[-200:] or f"a trial ended with {result.exit}"
    return None
