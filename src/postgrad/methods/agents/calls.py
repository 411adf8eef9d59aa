"""Calls that are written between two strings."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Calls:
    """A session in which what stands between two strings is answered by a function of it."""

    opening: str
    closing: str
    answer: Callable[[str], str]
    before: str = ""
    after: str = ""
    end: Callable[[], None] | None = None

    def reply(self, turn: str) -> str | None:
        asked = turn.rpartition(self.opening)[2] if self.opening in turn else None
        if asked is None:
            return None
        return self.before + self.answer(asked.partition(self.closing)[0]) + self.after

    def close(self) -> None:
        if self.end is not None:
            self.end()
