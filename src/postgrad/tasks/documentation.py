"""The Python standard library's documentation: passages to search, and questions they answer.

Both come from the docstrings and signatures in its sources, which are parsed and never imported.
They are the same for the same Python version.
"""

import ast
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
from postgrad.tasks.docstrings import in_test_split, stdlib_sources
from postgrad.tasks.examples import Examples
from postgrad.tasks.formats import Row
from postgrad.tasks.settings import whole_number, with_defaults

NAME = "stdlib-questions"
DEFAULTS: dict[str, Any] = {"size": 2000}
PASSAGE_CHARACTERS = 600
INSTRUCTION = (
    "Answer the question with as few words as possible, as <answer>...</answer>. "
    "The documentation can be searched: <search>words</search>.\n\n"
)
_SENTENCE_WORDS = (5, 30)
_SHORT = re.compile(r"-?\d+(\.\d+)?|True|False|'[\w ./:-]{1,20}'")


@dataclass(frozen=True)
class Passage:
    """The documentation of one module, class or function."""

    title: str
    text: str


@dataclass(frozen=True)
class _Documented:
    """A documented object: where it is, how it is called, what it says of itself."""

    module: str
    name: str
    kind: str
    signature: str
    docstring: str
    defaults: tuple[tuple[str, str], ...] = ()
    base: str | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring."""
        paragraph = " ".join(self.docstring.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


@cache
def passages() -> tuple[Passage, ...]:
    """A passage for every documented public object, in the order of their modules' names."""
    return tuple(
        Passage(
            found.path,
            f"{found.kind} {found.path}{found.signature}\n{found.docstring}"[:PASSAGE_CHARACTERS],
        )
        for found in _everything()
    )


def load_questions(split: str, settings: dict[str, Any], seed: int) -> Examples:
    """Questions with short answers: names of functions, default values, and base classes.

    Modules are either in the training or in the test split; what is searched has all of them.
    """
    given = with_defaults(NAME, settings, DEFAULTS)
    size = whole_number(NAME, "size", given["size"], 1)
    test = split == "test"
    rows = [row for row in _questions() if in_test_split(row["module"]) == test]
    random.Random("test" if test else f"order {seed}").shuffle(rows)
    rows = rows[:size]
    numbers = list(range(1, len(rows) + 1))
    return Examples(NAME, "prompts", rows, numbers, chat=True, verifier="f1")


@cache
def _questions() -> tuple[Row, ...]:
    objects = _everything()
    sentences: dict[tuple[str, str], int] = {}
    for found in objects:
        key = (found.module, found.sentence.lower())
        sentences[key] = sentences.get(key, 0) + 1
    rows: list[Row] = []

    def ask(found: _Documented, question: str, *answer: str) -> None:
        prompt = f"{INSTRUCTION}{question}"
        rows.append(
            {
                "prompt": prompt,
                "answer": list(dict.fromkeys(answer)),
                "module": found.module,
                "about": found.path,
            }
        )

    for found in objects:
        if not found.name:
            continue
        own = found.name.rpartition(".")[2]
        told = found.sentence
        words = len(told.split())
        telling = (
            sentences[found.module, told.lower()] == 1
            and _SENTENCE_WORDS[0] <= words <= _SENTENCE_WORDS[1]
            and own.lower() not in told.lower()
        )
        what = f"{found.kind} of the module {found.module}"
        if telling:
            ask(found, f"Which {what} is documented by: {told!r}?", own, found.name, found.path)
        for parameter, value in found.defaults:
            question = f"What is the default of the parameter {parameter} of"
            ask(found, f"{question} {found.path}?", value)
            if telling:  # the function has to be found before its parameter
                ask(found, f"{question} the {what} that is documented by: {told!r}?", value)
        if found.base is not None:
            ask(found, f"Which class does {found.path} inherit from?", found.base)
    return tuple(rows)


@cache
def _everything() -> tuple[_Documented, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[_Documented] = []
    for path in sorted(stdlib_sources(root)):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        with tokenize.open(path) as file:
            found += _in_module(ast.parse(file.read()), module)
    if not found:
        raise PostgradError(f"{NAME}: no documented Python sources in {root}")
    return tuple(found)


def _in_module(tree: ast.Module, module: str) -> Iterator[_Documented]:
    if docstring := ast.get_docstring(tree):
        yield _Documented(module, "", "module", "", docstring)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, module, "", "function")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node)
            bases = [ast.unparse(base) for base in node.bases]
            base = bases[0] if len(bases) == 1 and bases[0] != "object" else None
            if docstring:
                yield _Documented(
                    module, node.name, "class", f"({', '.join(bases)})", docstring, base=base
                )
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _function(member, module, f"{node.name}.", "method")


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, scope: str, kind: str
) -> Iterator[_Documented]:
    docstring = ast.get_docstring(node)
    if not docstring or node.name.startswith("_"):
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    valued = [
        *zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults,
             strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]  # fmt: skip
    written = [(name.arg, ast.unparse(value)) for name, value in valued if value is not None]
    short = tuple((name, value) for name, value in written if _SHORT.fullmatch(value))
    yield _Documented(
        module, f"{scope}{node.name}", kind, f"({ast.unparse(node.args)})", docstring, short
    )
