"""Checks of an embedded task's settings."""

from typing import Any

from postgrad.errors import PostgradError, unknown


def with_defaults(task: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`defaults` updated by `given`; a name that is not among them is an error with the nearest."""
    for name in given:
        if name not in defaults:
            raise unknown(f"setting of {task}", name, defaults)
    return {**defaults, **given}


def whole_number(task: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` if it is an integer of at least `low` and at most `high`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise PostgradError(
            f"{task}: setting {name} must be a whole number of at least {low}{upper}, got {value!r}"
        )
    return int(value)
