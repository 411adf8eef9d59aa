"""What a sandboxed process does: run a program, a conversation's snippets, or half of a test."""

import atexit
import builtins
import contextlib
import linecache
import os
import random
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn

from . import messages, remote

_HOST, _PARTNER = 3, 4  # sockets to the trainer's process and to the other half of a test
_NAME = "<code>"
_AS_TREE = 0x400


def run() -> NoReturn:
    """Run a program as Python would, and end with its exit status."""
    with _host() as host:
        program = messages.receive(host)
    names = _fresh_names("__main__")
    try:
        _execute(program, names)
        code = 0
    except BaseException as error:  # noqa: BLE001
        code = _status(error)
    _finish(code)


def interpret() -> None:
    """Run one snippet after another with the same variables; a last expression is shown."""
    host = _host()
    names = _fresh_names("__main__")
    signal.signal(signal.SIGALRM, _interrupt)
    while True:
        try:
            snippet, seconds = messages.receive(host)
        except messages.Closed:
            return
        limit = None
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                _execute_and_show(snippet, names)
                code = 0
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeIsUp:
            code, limit = 1, "time"
        except BaseException as error:  # noqa: BLE001
            code = _status(error)
        _flush()
        messages.send(host, {"exit": code, "limit": limit})


class _TimeIsUp(BaseException):
    """Raised in a snippet when its time is over; only code that catches all errors stops it."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _TimeIsUp


def tested() -> None:
    """The half of a test that is tested: run the program, then answer the other half."""
    _fall_silent()
    with _host() as host:
        program = messages.receive(host)
    names = _fresh_names("program")  # so that what runs as __main__ only does not
    side = remote.Side(socket.socket(fileno=_PARTNER), names)
    try:
        _execute(program, names)
    except BaseException:  # noqa: BLE001
        side.start(ready=False)
    side.start(ready=True)


def judge() -> None:
    """The half of a test that judges: tests run here, and what they test is on the other side.

    `setup` is run here before the tests: helpers of the tests are not the program's to change.
    """
    _fall_silent()
    host = _host()
    job = messages.receive(host)
    side = remote.Side(socket.socket(fileno=_PARTNER))
    names = _fresh_names("tests")
    with contextlib.suppress(SyntaxError):  # the beginning of a program may be no program
        _execute(job["setup"], names)
    if side.ready():
        names |= side.find(job["tested"])
        for test in job["tests"]:
            messages.send(host, _passes(test, names, side))


def _passes(test: str, names: dict[str, Any], side: remote.Side) -> bool:
    try:
        code = _compiled(test)
        names |= side.find(_names(code).difference(names, vars(builtins)))
        exec(code, names)
    except BaseException:  # noqa: BLE001
        return False
    return not side.gone


def _names(code: CodeType) -> set[str]:
    """Every name that the code, or a function in it, looks up."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _host() -> socket.socket:
    """The socket to the trainer's process, which is told that the walls stand."""
    host = socket.socket(fileno=_HOST)
    messages.send(host, "started")
    return host


def _fall_silent() -> None:
    """Read nothing and write nowhere from here on."""
    # this side's own device: one opened outside could be changed, by its owner, for all
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nothing, file)
    os.close(nothing)


def _fresh_names(module: str) -> dict[str, Any]:
    """The globals of a fresh module for the code, with the same random numbers every time."""
    sys.modules[module] = types.ModuleType(module)
    random.seed(0)
    return sys.modules[module].__dict__


def _compiled(program: str) -> CodeType:
    # tracebacks show the lines
    linecache.cache[_NAME] = (len(program), None, program.splitlines(keepends=True), _NAME)
    return compile(program, _NAME, "exec", dont_inherit=True)


def _execute(program: str, names: dict[str, Any]) -> None:
    exec(_compiled(program), names)


def _execute_and_show(snippet: str, names: dict[str, Any]) -> None:
    _compiled(snippet)
    tree: Any = compile(snippet, _NAME, "exec", _AS_TREE, dont_inherit=True)
    last = tree.body[-1:]
    shown = [tree.body.pop()] if last and type(last[0]).__name__ == "Expr" else []
    exec(compile(tree, _NAME, "exec", dont_inherit=True), names)
    if shown:
        import ast

        interactive = ast.Interactive(body=shown)
        exec(compile(interactive, _NAME, "single", dont_inherit=True), names)


def _status(error: BaseException) -> int:
    """The exit status that Python gives a program that ends so; prints what Python prints."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)  # noqa: T201
        return 1
    # the frames of these functions are nobody's business
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != _NAME:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001
            continue


def _finish(code: int) -> NoReturn:
    """End as Python ends: threads, then functions registered for the end, then output."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        code = code or 1
    _flush()
    os._exit(code)


TASKS: dict[str, Callable[[], None]] = {
    "run": run,
    "interpret": interpret,
    "tested": tested,
    "judge": judge,
}
