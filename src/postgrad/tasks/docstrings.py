"""Docstrings and sources of the functions in the installed Python standard library.

Sources are read and parsed, never imported. The data are the same for the same Python version.
"""

import ast
import hashlib
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from postgrad.errors import PostgradError
from postgrad.tasks.examples import Examples
from postgrad.tasks.formats import Row
from postgrad.tasks.settings import whole_number, with_defaults

DEFAULTS: dict[str, Any] = {"characters": 300}
TEXT_CHARACTERS = 1200
TEST_SHARE = 0.2
INSTRUCTION = "Write the first sentence of the docstring of this function:\n\n"

_SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages",
    "dist-packages", "turtledemo", "pydoc_data", "__pycache__", "__phello__",
}  # fmt: skip
_MINIMUM_WORDS, _MAXIMUM_WORDS = 3, 40


@dataclass(frozen=True)
class Function:
    """A documented function: its docstring's first sentence, and its source lines."""

    module: str
    name: str
    sentence: str
    documented: tuple[str, ...]
    undocumented: tuple[str, ...]


def load_docstrings(split: str, settings: dict[str, Any], seed: int) -> Examples:
    """Triples (sentence, its function's source, the source of another function of its module).

    The same rows as preferences (asked for the sentence of a source: the true one against the
    other function's), as prompts (judged by ROUGE with the true sentence) and as text (sources with
    their docstrings). Modules are either in the
    training or in the test split. The setting `characters` cuts sources, at the end of a line.
    """
    given = with_defaults("docstrings", settings, DEFAULTS)
    limit = whole_number("docstrings", "characters", given["characters"], 40)
    rows = _triples(split == "test", limit, "test" if split == "test" else str(seed))
    numbers = list(range(1, len(rows) + 1))

    def preferences() -> Examples:
        pairs = [
            {
                "prompt": INSTRUCTION + row["positive"],
                "chosen": row["anchor"],
                "answer": row["anchor"],
                "rejected": row["negative_anchor"],
                "module": row["module"],
                "function": row["function"],
            }
            for row in rows
        ]
        return Examples("docstrings", "preferences", pairs, numbers, chat=True, verifier="rouge")

    def text() -> Examples:
        texts = [{key: row[key] for key in ("text", "module", "function")} for row in rows]
        return Examples("docstrings", "text", texts, numbers)

    return Examples(
        "docstrings",
        "triples",
        rows,
        numbers,
        verifier="rouge",
        views={
            "preferences": preferences,
            "text": text,
            "demonstrations": lambda: preferences().require("demonstrations"),
            "prompts": lambda: preferences().require("prompts"),
            "rankings": lambda: preferences().require("rankings"),
            "labelled": lambda: preferences().require("labelled"),
        },
    )


def _triples(test: bool, limit: int, stream: str) -> list[Row]:
    modules: dict[str, list[Function]] = {}
    for function in _functions():
        if in_test_split(function.module) == test:
            modules.setdefault(function.module, []).append(function)
    rows = []
    for module, functions in modules.items():
        sources = [_cut(function.undocumented, limit) for function in functions]
        choose = random.Random(f"{stream} {module}")
        for i, function in enumerate(functions):
            others = [j for j in range(len(functions)) if sources[j] != sources[i]]
            if not others:
                continue
            other = choose.choice(others)
            rows.append(
                {
                    "anchor": function.sentence,
                    "positive": sources[i],
                    "negative": sources[other],
                    "negative_anchor": functions[other].sentence,
                    "text": _cut(function.documented, TEXT_CHARACTERS),
                    "module": module,
                    "function": function.name,
                }
            )
    # modules mixed, so that the first rows are a fair sample of all
    random.Random("order").shuffle(rows)
    return rows


def in_test_split(module: str) -> bool:
    digest = hashlib.blake2b(module.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < TEST_SHARE * 2**64


@cache
def _functions() -> tuple[Function, ...]:
    """The usable functions of the standard library, in the order of their modules' names.

    A sentence that begins several functions' docstrings belongs to the first of them only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(stdlib_sources(root))
    if not paths:
        raise PostgradError(f"docstrings: no Python sources in the standard library at {root}")
    unique: dict[str, Function] = {}
    for path in paths:
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        with tokenize.open(path) as file:
            source = file.read()
        for function in _documented(source, module):
            unique.setdefault(function.sentence.lower(), function)
    return tuple(unique.values())


def stdlib_sources(folder: Path) -> Iterator[Path]:
    """The Python files below `folder`, without tests, tables and installed packages."""
    for entry in folder.iterdir():
        if entry.name in _SKIPPED or entry.name.startswith(("test_", "_sysconfigdata")):
            continue
        if entry.is_dir():
            yield from stdlib_sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _documented(source: str, module: str) -> Iterator[Function]:
    lines = source.splitlines()
    for scope, node in _definitions(ast.parse(source)):
        sentence = _first_sentence(ast.get_docstring(node) or "", node.name)
        if sentence is None or _trivial(node.body[1:]):
            continue
        docstring, end = node.body[0], node.end_lineno
        if docstring.lineno == node.lineno:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        yield Function(
            module,
            f"{scope}{node.name}",
            sentence,
            _dedented(lines[first:end]),
            _dedented(lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : end]),
        )


def _definitions(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of a module and methods of its classes, with the class's name and a dot."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.", member


def _first_sentence(docstring: str, name: str) -> str | None:
    """The first sentence of a docstring, if it says something in words."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0].strip()
    words = sentence.split()
    signature = any(f"{name}(" in word for word in words[:1])
    if not _MINIMUM_WORDS <= len(words) <= _MAXIMUM_WORDS or signature:
        return None
    return None if "->" in sentence or ">>>" in sentence else sentence


def _trivial(body: list[ast.stmt]) -> bool:
    """Whether nothing follows the docstring but `pass`, `...` or `raise`: no source to tell."""
    return all(
        isinstance(s, ast.Pass | ast.Raise)
        or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in body
    )


def _dedented(lines: list[str]) -> tuple[str, ...]:
    indent = len(lines[0]) - len(lines[0].lstrip())
    kept = [line[indent:].rstrip() if not line[:indent].strip() else line for line in lines]
    return tuple(line for line in kept if line)


def _cut(lines: tuple[str, ...], limit: int) -> str:
    """As many whole lines as fit into `limit` characters, at least the first."""
    text = "\n".join(lines)
    if len(text) <= limit:
        return text
    end = text.rfind("\n", 0, limit + 1)
    return text[:end] if end > 0 else lines[0][:limit]
