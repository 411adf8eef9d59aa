"""Starts one sandbox after another, each as a fork of this process.

The server runs no foreign code. It has imported what programs use most, so that a sandbox costs a
fork and its walls, not the start of Python. It holds nothing of the trainer's but one socket.
"""

import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from . import messages, tasks, walls

_COMMON = (
    "array", "bisect", "collections", "copy", "ctypes", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "heapq", "itertools", "json", "linecache", "math", "operator",
    "random", "re", "statistics", "string", "traceback", "typing",
)  # fmt: skip

# run by `python -c` with the folder above this one as its first argument
START = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
from confined import server
del sys.path[0]
server.main()
"""


def main() -> None:
    """Serve until the other side closes the socket, which is the first argument.

    With further arguments this process is itself the sandbox, put up by bubblewrap.
    """
    arguments = sys.argv[1:]
    sys.argv = ["code.py"]
    os.environ.clear()
    if arguments[0] == "inside":
        _run(json.loads(arguments[1]))
    connection = socket.socket(fileno=int(arguments[0]))
    connection.set_inheritable(False)
    for name in _COMMON:
        importlib.import_module(name)
    messages.send(connection, "ready")
    while True:
        files: list[int] = []
        try:
            job = messages.receive(connection, files)
        except messages.Closed:
            return
        if not files:  # an order to end a run that came after its end
            continue
        if job["task"] == "serve":
            connection = _another(connection, files[0])
            continue
        fault, told = os.pipe()
        child = os.fork()
        if child == 0:
            connection.close()
            os.close(fault)
            _become(job, files, told)
        for file in (*files, told):
            os.close(file)
        code, seconds = _end(child, connection)
        with open(fault, errors="replace") as reason:
            answer = {"exit": code, "cpu": seconds, "fault": reason.read(2000)}
        try:
            messages.send(connection, answer)
        except messages.Closed:
            return


def _another(connection: socket.socket, file: int) -> socket.socket:
    """Fork a server for another connection; returns, in each of the two, the one that it serves."""
    child = os.fork()
    if child == 0:
        if os.fork():
            os._exit(0)  # so that the new server is not this one's to wait for
        connection.close()
        other = socket.socket(fileno=file)
        other.set_inheritable(False)
        return other
    os.close(file)
    os.waitpid(child, 0)
    return connection


def _end(child: int, connection: socket.socket) -> tuple[int, float]:
    """Wait for the child; any word on the connection, or its end, means to kill it first."""
    waits = [connection.fileno()]
    if hasattr(os, "pidfd_open"):
        waits.append(os.pidfd_open(child))
    poll = select.poll()
    for file in waits:
        poll.register(file, select.POLLIN)
    ended = 0
    while not ended:
        ready = poll.poll(None if len(waits) > 1 else 10)
        if any(file == waits[0] for file, _ in ready):
            try:
                messages.receive(connection)
            except messages.Closed:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                sys.exit()
            os.kill(child, signal.SIGKILL)
            poll.unregister(waits[0])
        ended, status, usage = os.wait4(child, os.WNOHANG)
    for file in waits[1:]:
        os.close(file)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), usage.ru_utime + usage.ru_stime


def _become(job: dict[str, Any], files: list[int], told: int) -> NoReturn:
    """Turn this fork into the sandbox; what keeps it from that is written to `told`."""
    try:
        os.setsid()
        os.umask(0o022)
        told = _only_these_open([*files, told])
        if job["isolation"] == "process":
            os.chdir(job["folder"])
            _run(job, told)
        os.set_inheritable(told, False)
        job["real_root"] = walls.is_real_root()
        walls.die_with(os.getppid())
        if job["isolation"] == "bubblewrap":
            command = walls.bubblewrap(job, os.path.dirname(__file__), START)
            os.execv(command[0], command)
        walls.separate(job["limits"]["disk"], real_root=job["real_root"])
        _first_process(job, told)
    except BaseException as error:  # noqa: BLE001
        os.write(told, _in_words(error))
    os._exit(125)


def _in_words(error: BaseException) -> bytes:
    return str(getattr(error, "strerror", None) or error).encode(errors="replace")


def _only_these_open(files: list[int]) -> int:
    """Give the files the numbers from 0 on and close all others; returns the last number."""
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 128) for file in files]
    for place, file in enumerate(high):
        os.dup2(file, place)
    os.closerange(len(files), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return len(files) - 1


def _first_process(job: dict[str, Any], told: int) -> None:
    """Start the first process of the namespaces, and wait for it.

    The kernel spares a first process most signals, so the code runs in a second one. When the first
    ends, the kernel ends all others of its namespace.
    """
    outside = os.getpid()
    if os.fork() == 0:
        walls.die_with(outside)
        if os.fork() == 0:
            _run(job, told)
        os.closerange(0, told + 1)
    else:
        os.closerange(0, told + 1)
    _, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _run(job: dict[str, Any], told: int | None = None) -> NoReturn:
    """Put up the last walls and do the task; `told` stays open until it begins."""
    try:
        walls.restrict(job["limits"])
        alone = job["isolation"] == "process"
        if sys.platform == "linux":
            walls.give_up_privileges(become_nobody=not alone and job["real_root"])
        if walls.can_filter():
            if alone:
                walls.files_only_in(job["folder"])
            walls.filter_calls(also_changes=job["isolation"] != "namespaces")
        sys.path.insert(0, os.getcwd())
        if told is not None:
            os.close(told)
    except BaseException as error:  # noqa: BLE001
        os.write(2 if told is None else told, _in_words(error))
        os._exit(125)
    try:
        tasks.TASKS[job["task"]]()
    except BaseException:  # noqa: BLE001
        os._exit(1)
    os._exit(0)
