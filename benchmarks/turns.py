"""A contender's side of a race: it works one turn at each word of the parent, and is measured.

Standard library only: this runs in the environments of all contenders.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_STATUS = Path("/proc/self/status")


class Turns:
    """What a contender is handed: it takes `count` turns, each between `begin` and `end`.

    turns.imported(model_bytes)
    …                          # load the model
    while turns.begin():
        …                      # the work that is measured
        turns.end(tokens=2048)
    """

    def __init__(self, orders: TextIO, answers: TextIO, count: int):
        self.count = count
        self._orders, self._answers = orders, answers
        self._taken = 0
        self._floor = _memory("VmRSS")
        self._started = 0.0

    def imported(self, model_bytes: int = 0) -> None:
        """To be called after the imports and before the model is loaded.

        Memory counts from here, beyond the `model_bytes` that weights, gradients and the
        optimiser's state are going to take.
        """
        floor = _memory("VmRSS")
        self._floor = None if floor is None else floor + model_bytes

    def begin(self) -> bool:
        """Wait for this turn and start the clock; False when there is none left."""
        if self._taken == self.count:
            return False
        self.tell(ready=True)
        if not self._orders.readline():
            return False
        _forget_peak()
        self._started = time.perf_counter()
        return True

    def end(self, **numbers: float) -> None:
        """Stop the clock; `numbers` are what else is to be remembered of the turn."""
        seconds = time.perf_counter() - self._started
        peak = _memory("VmHWM")
        above = None if peak is None or self._floor is None else peak - self._floor
        self._taken += 1
        self.tell(seconds=seconds, memory=above, numbers=numbers)

    def tell(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def _memory(name: str) -> int | None:
    """Bytes of this process: VmRSS now, VmHWM at most since the peak was forgotten."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # without it the peak is that since the start
        Path("/proc/self/clear_refs").write_text("5")


def _be_killed_first() -> None:
    """Where memory runs out, a contender is to die and not what else runs on the machine."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def compete(module: str, function: str, orders: int, answers: int) -> None:
    """Run `module.function(turns, **arguments)`; the first order says the turns and arguments."""
    _be_killed_first()
    with os.fdopen(orders) as incoming, os.fdopen(answers, "w") as outgoing:
        task = json.loads(incoming.readline())
        turns = Turns(incoming, outgoing, task["turns"])
        getattr(importlib.import_module(module), function)(turns, **task["arguments"])
        turns.tell(done=True)


if __name__ == "__main__":
    compete(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
