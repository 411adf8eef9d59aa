"""Starting a command in several processes, on this machine or as one of several machines."""

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError

_KEYS = ("processes", "nodes", "rendezvous")
_NAME = "postgrad"
INTERRUPTED = 130  # a run that was stopped and can go on
_PATIENCE = 600  # seconds in which all machines have to be there


@dataclass(frozen=True)
class Layout:
    """How many processes on how many machines, and where they meet (`host:port`)."""

    processes: int = 1
    nodes: int = 1
    rendezvous: str | None = None

    @property
    def several(self) -> bool:
        return self.processes * self.nodes > 1


def layout(settings: Mapping[str, Any]) -> Layout:
    """What settings say of processes; the rest of them is not looked at."""
    loop = validated(LoopSettings, {key: settings[key] for key in _KEYS if key in settings})
    if loop.nodes > 1:
        _require_address(loop.rendezvous or "")
    return Layout(loop.processes, loop.nodes, loop.rendezvous)


def _require_address(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise PostgradError(
            "rendezvous: with nodes above 1, expected host:port of the first machine, the same on "
            f"all of them, got {text!r}"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise PostgradError(f"rendezvous: there is no machine {host!r}: {error.strerror}") from None


def launch(wanted: Layout, arguments: Sequence[str]) -> int:
    """Run `postgrad` with `arguments` in as many processes; the exit code of what went wrong, or 0.

    Torch's own launcher starts and watches them: if one ends with an error, so do all. Ctrl-C and
    SIGTERM are passed on to them.

    Raises:
        PostgradError: the machines do not find each other.
    """
    # processes say themselves what went wrong
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // wanted.processes)))
    config = LaunchConfig(
        min_nodes=wanted.nodes,
        max_nodes=wanted.nodes,
        nproc_per_node=wanted.processes,
        run_id=_NAME,
        rdzv_backend="c10d",
        rdzv_endpoint=wanted.rendezvous or "localhost:0",
        rdzv_configs={"join_timeout": _PATIENCE},
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "postgrad", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1  # below 0: killed by a signal
    except SignalException:
        return INTERRUPTED
    except RendezvousError as error:
        raise PostgradError(
            f"rendezvous: {wanted.nodes} machines have not met at {wanted.rendezvous} within "
            f"{_PATIENCE} s: the same command has to run on each, and the first be reached there"
        ) from error
    return 0
