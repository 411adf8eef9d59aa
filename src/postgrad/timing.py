"""Where a step's time goes: named stretches, collected by the loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_spent: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the wall-clock seconds of this block to the stretch `name` of the current step."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _spent[name] = _spent.get(name, 0.0) + time.perf_counter() - start


def take() -> dict[str, float]:
    """The seconds collected since the last call, by name."""
    spent = dict(_spent)
    _spent.clear()
    return spent
