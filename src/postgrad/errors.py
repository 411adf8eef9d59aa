"""Errors that a user can mend: one line each, shown without a traceback, exit code 2."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class PostgradError(Exception):
    """A mistake in configuration, data, model or environment that the user can mend.

    The message is one line: it names the file, row or key, what was expected, and the nearest
    valid choice where there is one. The command line prints it and exits with code 2.
    """


class NonFinite(PostgradError):
    """A NaN or infinite loss, gradient or reward, with what produced it: the loop saves both.

    Attributes:
        tensors: by name; values are tensors or lists of them.
        samples: rows for people to read.
    """

    def __init__(
        self,
        message: str,
        tensors: Mapping[str, Any] | None = None,
        samples: Sequence[dict[str, Any]] = (),
    ):
        super().__init__(message)
        self.tensors = dict(tensors or {})
        self.samples = list(samples)


class MissingExtra(PostgradError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"this needs the package {package!r}, which is not installed: "
            f"pip install 'postgrad[{extra}]'"
        )


def shown(value: Any) -> str:
    """What was found, for a message: a long or nested value is cut to what fits a line."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def unknown(kind: str, word: str, options: Iterable[str]) -> PostgradError:
    """The error for a name that is not among `options`, suggesting the nearest one."""
    names = sorted(options)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif len(names) <= 12:
        hint = "expected one of " + ", ".join(names)
    else:
        hint = "expected one of " + ", ".join(names[:12]) + ", …"
    return PostgradError(f"unknown {kind} {shown(word)}: {hint}")
