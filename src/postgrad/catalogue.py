"""What exists: every method's slug, title, paper, family and status, without importing torch."""

import ast
import importlib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgrad.errors import PostgradError, unknown

if TYPE_CHECKING:
    from postgrad.methods.base import Method

_HERE = Path(__file__).parent
RESULTS = _HERE / "claims" / "results"


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue.

    `status` is `ready` (runs from one command and its claim has a committed result), `trains` (its
    claim has not been run yet), `planned`, or `baseline` (trains from one command; what the
    published methods are compared with). A study compares methods and is none itself: it has no
    class, and is ready once its result is committed.
    """

    slug: str
    title: str
    paper: str
    year: int
    family: str
    kind: str
    needs: str
    python: str | None
    status: str
    study: bool = False

    @property
    def claim_file(self) -> Path:
        """Where this method's claim is written, if it has one."""
        return _HERE / "claims" / f"{self.slug.replace('-', '_')}.py"

    @property
    def result_file(self) -> Path:
        """Where the committed result of this method's claim lies."""
        return RESULTS / f"{self.slug}.json"

    def result(self) -> dict[str, Any] | None:
        """The committed result of this method's claim, if it has been run."""
        if not self.result_file.is_file():
            return None
        found: dict[str, Any] = json.loads(self.result_file.read_text(encoding="utf-8"))
        return found

    def study_text(self) -> str:
        """What a study says of itself: the docstring of its claim's module, read and not run."""
        if not (self.study and self.claim_file.is_file()):
            return ""
        return ast.get_docstring(ast.parse(self.claim_file.read_text(encoding="utf-8"))) or ""


@cache
def entries() -> dict[str, Entry]:
    """All entries by slug: the published methods first, then the baselines."""
    listed = tomllib.loads((_HERE / "catalogue.toml").read_text(encoding="utf-8"))
    found = {}
    for row in listed["method"]:
        status = "trains" if "python" in row else "planned"
        if ("python" in row or row.get("study")) and (RESULTS / f"{row['slug']}.json").is_file():
            status = "ready"
        found[row["slug"]] = Entry(python=row.pop("python", None), status=status, **row)
    for row in listed["baseline"]:
        found[row["slug"]] = Entry(status="baseline", **row)
    return found


def entry(slug: str) -> Entry:
    """The entry called `slug`, or an error that suggests the nearest one."""
    if slug not in entries():
        raise unknown("method", slug, entries())
    return entries()[slug]


def require_implemented(slug: str) -> str:
    """Where the class of a method is, as `module:Class`, or an error that says why it has none."""
    found = entry(slug)
    if found.study:
        raise PostgradError(
            f"{slug} is a study, not a method to be trained: `postgrad reproduce {slug}` runs it"
        )
    if found.python is None:
        raise PostgradError(
            f"{slug} is planned, not yet implemented: `postgrad list --ready` shows what is"
        )
    return found.python


def method_class(slug: str) -> type["Method"]:
    """The class that implements a method."""
    module, name = require_implemented(slug).split(":")
    kind: type[Method] = getattr(importlib.import_module(module), name)
    return kind
