"""Hints: how much of a solution is shown where a prompt is too hard without it."""

from typing import Literal

HintUnit = Literal["characters", "lines"]


def make_hint(
    solution: str, ratio: float, unit: HintUnit = "characters", answer: str | None = None
) -> str:
    """The first `ratio` of a solution, in characters or lines (with their ends), rounded.

    With an `answer` it ends before the last place where that stands in the solution.

    Raises:
        ValueError: `ratio` is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio of a hint must lie in [0, 1], got {ratio}")
    parts = solution.splitlines(keepends=True) if unit == "lines" else list(solution)
    hint = "".join(parts[: round(ratio * len(parts))])
    place = solution.rfind(answer) if answer else -1
    return hint if place < 0 else hint[:place]
