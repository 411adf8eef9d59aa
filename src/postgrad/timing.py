"""Where the time of a run goes: named stretches, collected by the loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Wait = Callable[[], None]
Label = Callable[[str], AbstractContextManager[object]]


def _wait_for_nothing() -> None:
    pass


def _no_label(name: str) -> AbstractContextManager[object]:
    return nullcontext()


_spent: dict[str, float] = {}
_inner: list[float] = []  # of every open stretch, the seconds of the stretches within it
_wait: Wait = _wait_for_nothing
_label: Label = _no_label


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add this block's wall-clock seconds to the stretch `name`, less those of stretches within it.

    On a GPU they are the seconds until the work is handed over, unless `observed` waits for it.
    """
    with _label(name):
        _wait()
        start = time.perf_counter()
        _inner.append(0.0)
        try:
            yield
        finally:
            _wait()
            seconds = time.perf_counter() - start
            _spent[name] = _spent.get(name, 0.0) + seconds - _inner.pop()
            if _inner:
                _inner[-1] += seconds


def take() -> dict[str, float]:
    """The seconds collected since the last call, by name; together the time within stretches."""
    spent = dict(_spent)
    _spent.clear()
    return spent


@contextmanager
def observed(wait: Wait, label: Label) -> Iterator[None]:
    """Within this block a stretch lies in `label(name)`, and `wait()` is called at its two ends.

    With a `wait` for the GPU a stretch has the time of its own work, neither less nor more.
    """
    global _wait, _label
    before = _wait, _label
    _wait, _label = wait, label
    try:
        yield
    finally:
        _wait, _label = before
