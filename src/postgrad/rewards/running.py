"""Calling code of the user's: its errors, its hangs and its traceback in one line."""

import asyncio
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from postgrad.errors import PostgradError

Result = TypeVar("Result")
_LONGEST_MESSAGE = 300
_SLACK = 1.0  # seconds in which an event loop that is not blocked ends what ran out of time


class Attempt(Generic[Result]):
    """What came of one call: its value, or the exception that ended it, kept for the caller."""

    value: Result
    error: BaseException | None = None

    def run(self, call: Callable[[], Result]) -> None:
        with self:
            self.value = call()

    def __enter__(self) -> "Attempt[Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return True


def attempt(call: Callable[[], Result], what: str, *, own_file: str | None = None) -> Result:
    """The value of `call()`; an exception becomes one line that begins with `what`.

    `own_file` is the file of the called code: the line named is the last one inside it. Ctrl-C
    and errors that are already one line pass as they are.
    """
    tried: Attempt[Result] = Attempt()
    tried.run(call)
    return outcome(tried, what, own_file)


def attempt_within(
    seconds: float, call: Callable[[], Result], what: str, *, own_file: str | None = None
) -> Result:
    """As `attempt`, for at most `seconds`.

    The call runs in a thread of its own. Python cannot end a thread, so one that hangs is left
    behind; it does not keep the process from ending.
    """
    tried: Attempt[Result] = Attempt()
    thread = threading.Thread(target=tried.run, args=(call,), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _too_slow(what, seconds)
    return outcome(tried, what, own_file)


class Postponed(Generic[Result]):
    """A call that is made when its result is asked for."""

    background = False

    def __init__(self, call: Callable[[], Result]):
        self.result = call

    def cancel(self) -> None:
        """There is nothing to let go of."""


class Started(Generic[Result]):
    """An async call that goes on in the background while others are made.

    All run in one event loop in a thread of its own, so that a client which a user's functions
    share finds the same loop at every call. `seconds` is the limit of the call, None for one that
    limits itself.
    """

    background = True
    _loop: asyncio.AbstractEventLoop | None = None
    _starting = threading.Lock()

    def __init__(
        self,
        seconds: float | None,
        call: Callable[[], Awaitable[Result]],
        what: str,
        *,
        own_file: str | None = None,
    ):
        self._seconds, self._what, self._own_file = seconds, what, own_file
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._tried: Attempt[Result] = Attempt()
        self._late = False
        self._future: Future[None] = asyncio.run_coroutine_threadsafe(
            self._run(call), self._background()
        )

    async def _run(self, call: Callable[[], Awaitable[Result]]) -> None:
        with self._tried:
            scope = asyncio.timeout(self._seconds)
            try:
                async with scope:
                    self._tried.value = await call()
            finally:
                self._late = scope.expired()

    def result(self) -> Result:
        """What came of it, waiting for it; errors as those of `attempt_within`."""
        wait = None
        if self._deadline is not None:
            wait = max(0.0, self._deadline - time.monotonic()) + _SLACK
        try:
            self._future.result(wait)
        except TimeoutError:  # the function blocks the event loop: the next call gets another one
            Started._loop = None
            self._late = True
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        if self._late and self._seconds is not None:
            raise _too_slow(self._what, self._seconds)
        return outcome(self._tried, self._what, self._own_file)

    def cancel(self) -> None:
        """Let go of it, if it has not ended."""
        self._future.cancel()

    @classmethod
    def _background(cls) -> asyncio.AbstractEventLoop:
        with cls._starting:
            if cls._loop is None:
                cls._loop = asyncio.new_event_loop()
                threading.Thread(target=cls._loop.run_forever, daemon=True).start()
            return cls._loop


async def gathered(
    calls: Sequence[Callable[[], Awaitable[Result]]], concurrency: int
) -> list[Attempt[Result]]:
    """What came of every call, in their order; at most `concurrency` are awaited at a time."""
    room = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Result]]) -> Attempt[Result]:
        tried: Attempt[Result] = Attempt()
        async with room:
            with tried:
                tried.value = await call()
        if isinstance(tried.error, asyncio.CancelledError):
            raise tried.error  # a time limit that ends them all
        return tried

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    return await asyncio.gather(*tasks)


def _too_slow(what: str, seconds: float) -> PostgradError:
    return PostgradError(f"{what} did not return within its limit of {seconds:g} seconds")


def outcome(tried: Attempt[Result], what: str, own_file: str | None) -> Result:
    """The value of a call that was tried; its exception as one line that begins with `what`."""
    error = tried.error
    if error is None:
        return tried.value
    if isinstance(error, PostgradError | KeyboardInterrupt):
        raise error
    message = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    described = f"{type(error).__name__}: {message}" if message else type(error).__name__
    raise PostgradError(f"{what} raised {described}{_place(error, own_file)}") from error


def _place(error: BaseException, own_file: str | None) -> str:
    """Where it was raised: the last line in the user's file, or else the last line of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    own = [frame for frame in frames if frame.filename == own_file]
    for frame in reversed(own or frames):
        return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
