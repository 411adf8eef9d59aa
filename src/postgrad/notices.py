"""One-line notices from deep inside a run (a server asked again …) to whoever watches it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def say(line: str) -> None:
    """Tell those who listen; nobody, outside a run."""
    for listener in list(_listeners):
        listener(line)


@contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, `listener` hears every notice, perhaps from another thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
