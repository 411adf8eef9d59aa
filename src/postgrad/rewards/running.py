"""Calling code of the user's: its errors, its hangs and its traceback in one line."""

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from postgrad.errors import PostgradError

Result = TypeVar("Result")
_LONGEST_MESSAGE = 300


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
    return _outcome(tried, what, own_file)


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
        raise PostgradError(f"{what} did not return within its limit of {seconds:g} seconds")
    return _outcome(tried, what, own_file)


def _outcome(tried: Attempt[Result], what: str, own_file: str | None) -> Result:
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
