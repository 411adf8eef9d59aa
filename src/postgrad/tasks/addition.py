"""Sums of two numbers, written digit by digit: a task that a tiny model learns in seconds."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from postgrad.errors import PostgradError
from postgrad.tasks.examples import Examples
from postgrad.tasks.formats import Row
from postgrad.tasks.settings import whole_number, with_defaults

DEFAULTS: dict[str, Any] = {
    "size": 1000,
    "digits": None,
    "weights": [0.5, 0.35, 0.15],
    "corruption": 0.0,
}


class Addition:
    """An endless stream of sums; row `i` depends on `seed` and `i` only.

    A row's prompt is `ddd+ddd=`, two operands of `digits` significant digits each, padded with
    zeros to three; its answer has the four digits of the sum, least significant first, so that
    each digit can be told from the operands' digits and a carry: `043+075=` is answered `8110`.

    Args:
        seed: names the stream; any integer or string.
        weights: how often sums have 1, 2 and 3 significant digits when not asked for a number.
    """

    def __init__(self, seed: int | str = 0, weights: Sequence[float] = (0.5, 0.35, 0.15)):
        valid = len(weights) == 3 and all(
            isinstance(w, int | float) and 0 <= w < float("inf") for w in weights
        )
        if not valid or sum(weights) == 0:
            raise PostgradError(
                "addition: setting weights must be 3 numbers of at least 0, for 1, 2 and 3 "
                f"digits, got {list(weights)}"
            )
        self.seed = seed
        self.weights = list(weights)

    def draw(self, n: int, *, digits: int | None = None, start: int = 0) -> list[Row]:
        """Rows `start` … `start + n - 1` of the stream: prompt, answer, digits.

        `digits` (1, 2 or 3) asks for sums of one difficulty; None mixes them by `weights`.
        """
        return [self._row(chance, digits) for chance in self._randoms("sum", n, start)]

    def demonstrations(
        self, n: int, *, digits: int | None = None, corruption: float = 0.15, start: int = 0
    ) -> list[Row]:
        """The rows of `draw` with a completion: the answer, in which a share `corruption` of the
        rows has one digit replaced by another, so that what learns from them leaves errors to mend.
        """
        if not 0 <= corruption <= 1:
            raise PostgradError(
                f"addition: setting corruption must be between 0 and 1, got {corruption!r}"
            )
        rows = self.draw(n, digits=digits, start=start)
        for row, chance in zip(rows, self._randoms("corruption", n, start), strict=True):
            wrong = chance.random() < corruption
            row["completion"] = _corrupted(row["answer"], chance) if wrong else row["answer"]
        return rows

    def _randoms(self, purpose: str, n: int, start: int) -> Iterator[random.Random]:
        for index in range(start, start + n):
            yield random.Random(f"{self.seed} {purpose} {index}")

    def _row(self, chance: random.Random, digits: int | None) -> Row:
        d = chance.choices((1, 2, 3), self.weights)[0] if digits is None else digits
        low, high = 10 ** (d - 1), 10**d - 1
        a, b = chance.randint(low, high), chance.randint(low, high)
        return {"prompt": f"{a:03d}+{b:03d}=", "answer": f"{a + b:04d}"[::-1], "digits": d}


def _corrupted(answer: str, chance: random.Random) -> str:
    place = chance.randrange(len(answer))
    digit = chance.choice([d for d in "0123456789" if d != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def load_addition(split: str, settings: dict[str, Any], seed: int) -> Examples:
    """`size` sums as prompts with answers, and as demonstrations with the given `corruption`."""
    given = with_defaults("addition", settings, DEFAULTS)
    size = whole_number("addition", "size", given["size"], 1)
    digits = given["digits"]
    if digits is not None:
        whole_number("addition", "digits", digits, 1, 3)
    stream = Addition("test" if split == "test" else seed, given["weights"])
    numbers = list(range(1, size + 1))

    def demonstrations() -> Examples:
        rows = stream.demonstrations(size, digits=digits, corruption=given["corruption"])
        return Examples("addition", "demonstrations", rows, numbers, verifier="addition")

    return Examples(
        "addition",
        "prompts",
        stream.draw(size, digits=digits),
        numbers,
        verifier="addition",
        views={"demonstrations": demonstrations},
    )
