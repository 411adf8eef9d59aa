"""Contenders for the test of the race; they run in processes of their own."""

import sys
from pathlib import Path

from benchmarks.turns import Turns


def writer(turns: Turns, *, name: str, file: str) -> None:
    """Writes down when its turns begin and end, and what it does in between."""
    with Path(file).open("a") as notes:
        while turns.begin():
            notes.write(f"{name} begins\n")
            notes.flush()
            sum(range(100_000))
            notes.write(f"{name} ends\n")
            notes.flush()
            turns.end(length=len(name))


def holder(turns: Turns, *, sizes: list[int], model_bytes: int) -> None:
    """Holds so many bytes in its first turn, its second …"""
    turns.imported(model_bytes)
    for size in sizes:
        turns.begin()
        held = b"x" * size
        turns.end(size=len(held))
        del held


def quitter(turns: Turns) -> None:
    """Takes one turn, prints a lot, and fails."""
    turns.begin()
    turns.end()
    sys.stderr.write("chatter\n" * 1000)
    raise RuntimeError("out of luck")


def lazy(turns: Turns) -> None:
    """Takes no turn."""
