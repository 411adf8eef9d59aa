"""A method's facts, collected from catalogue, docstring, settings and claim, and shown as text."""

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from postgrad.catalogue import Entry, entry, method_class
from postgrad.config import Choice, LoopSettings, Settings
from postgrad.reports.claim import verdict_text

_BOUNDS = {
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Lt: ("lt", "<"),
    annotated_types.Le: ("le", "≤"),
}
# kinds of values that a default and a meaning say well enough
_PLAIN = ("text", "true or false")


@dataclass(frozen=True)
class SettingFact:
    """One key of a configuration: its dotted name, values, default, meaning, and source."""

    key: str
    values: str
    default: str
    meaning: str
    source: str


@dataclass(frozen=True)
class MethodFacts:
    """What there is to say about a method; a planned one has its catalogue entry only.

    A study has a description and a result, but nothing to set.

    `description` is the class's docstring, `equation` its indented part. `loop` holds the training
    loop's settings with this method's own defaults for them.
    """

    entry: Entry
    description: str = ""
    equation: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[SettingFact, ...] = ()
    loop: tuple[SettingFact, ...] = ()
    result: Mapping[str, Any] | None = None


def method_facts(slug: str) -> MethodFacts:
    """The facts of the method called `slug`; an unknown slug is an error that suggests another."""
    found = entry(slug)
    if found.python is None:
        text = found.study_text()
        return MethodFacts(found, text, equation(text), result=found.result())
    kind = method_class(slug)
    description = inspect.getdoc(kind) or ""
    known = set(LoopSettings.model_fields)
    own = {key: value for key, value in kind.recipe.items() if key not in known}
    loop = {key: value for key, value in kind.recipe.items() if key in known}
    return MethodFacts(
        entry=found,
        description=description,
        equation=equation(description),
        parts=asdict(parts) if (parts := kind.four_parts()) else {},
        settings=tuple(setting_facts(kind.Config, own)),
        loop=tuple(setting_facts(LoopSettings, loop)),
        result=found.result(),
    )


def equation(docstring: str) -> str:
    """The indented blocks of a docstring, which hold the equation as implemented."""
    blocks: list[list[str]] = [[]]
    for line in docstring.splitlines():
        if line.startswith("    "):
            blocks[-1].append(line)
        elif line.strip() and blocks[-1]:
            blocks.append([])
    return "\n\n".join(textwrap.dedent("\n".join(block)) for block in blocks if block)


def setting_facts(
    kind: type[Settings], recipe: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[SettingFact]:
    """Every key of a settings class, what is the class's own before what it inherits.

    Nested keys are dotted; `recipe` holds other defaults by name.
    """
    return _facts(kind, recipe or {}, prefix, None)


def _facts(
    kind: type[Settings], recipe: Mapping[str, Any], prefix: str, values: Settings | None
) -> list[SettingFact]:
    facts = []
    for name in sorted(kind.model_fields, key=lambda name: _declared(kind, name)):
        about = kind.model_fields[name]
        default = getattr(values, name) if values else about.get_default(call_default_factory=True)
        if isinstance(about.annotation, type) and issubclass(about.annotation, Choice):
            facts += _choice_facts(f"{prefix}{name}", about, recipe.get(name, default))
            continue
        if isinstance(default, Settings):
            inner = recipe.get(name, {})
            facts += _facts(type(default), inner, f"{prefix}{name}.", default)
            continue
        extra = about.json_schema_extra
        source = str(extra.get("source", "")) if isinstance(extra, dict) else ""
        if name in recipe:
            default, source = recipe[name], "this method's recipe"
        facts.append(
            SettingFact(
                prefix + name, _values(about), value_text(default), about.description or "", source
            )
        )
    return facts


def _choice_facts(key: str, about: FieldInfo, default: Any) -> list[SettingFact]:
    """A choice by name, and the settings of the one that is chosen by default."""
    kind: Any = about.annotation
    chosen: Choice = kind.model_validate(default)
    extra = about.json_schema_extra
    source = str(extra.get("source", "")) if isinstance(extra, dict) else ""
    names = " | ".join(kind.implementations)
    own = chosen.settings()
    return [
        SettingFact(key, names, chosen.name, about.description or "", source),
        *_facts(type(own), {}, f"{key}.", own),
    ]


def _declared(kind: type[Settings], name: str) -> int:
    """How far up its line of classes a setting is (last) declared."""
    owns = (name in vars(base).get("__annotations__", {}) for base in kind.__mro__)
    return next(i for i, own in enumerate(owns) if own)


def value_text(value: Any) -> str:
    """A default as one writes it in a configuration."""
    if value is None:
        return "empty"
    if isinstance(value, (bool, str)):
        return str(value).lower() if isinstance(value, bool) else value or "''"
    if isinstance(value, (int, float)):
        return f"{value:g}" if abs(value) < 1e6 and value == float(f"{value:g}") else str(value)
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip()


def _values(about: FieldInfo) -> str:
    """What values a key takes: its type in words, with bounds."""
    words = _kind_words(about.annotation)
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in about.metadata
        for kind, (name, sign) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    return " ".join([words, ", ".join(bounds)]).strip()


def _kind_words(kind: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if kind is type(None):
        return "empty"
    if kind in names:
        return names[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (list, tuple):
        inner = " | ".join(dict.fromkeys(_kind_words(part) for part in parts if part is not ...))
        return f"list of {inner}"
    if origin is dict:
        return "mapping"
    if parts:
        return " or ".join(_kind_words(part) for part in parts if part is not type(None))
    if isinstance(kind, type) and issubclass(kind, Settings):
        return "mapping: " + ", ".join(kind.model_fields)
    return "any value"


def method_text(slug: str, width: int = 100) -> str:
    """What `postgrad show` prints of a method."""
    facts = method_facts(slug)
    about = facts.entry
    year = f" ({about.year})" if about.year else ""
    blocks = [f"{about.slug}: {about.title}"]
    kind = "study" if about.study else ""
    where = " · ".join(filter(None, [about.paper + year, about.family, kind, about.status]))
    blocks[0] += f"\n{where}"
    if facts.description:
        blocks.append(facts.description)
    blocks.append(_columns([("kind", about.kind), ("needs", about.needs)], width))
    if facts.parts:
        blocks.append("Four parts\n" + _columns(facts.parts.items(), width, indent=2))
    if facts.settings:
        blocks.append("Settings\n" + _settings_text(facts.settings, width))
        blocks.append("Settings of the training loop\n" + _settings_text(facts.loop, width))
    blocks.append(_claim_text(facts, width))
    return "\n\n".join(blocks)


def _settings_text(settings: Iterable[SettingFact], width: int) -> str:
    rows = []
    for fact in settings:
        source = f" [{fact.source}]" if fact.source else ""
        values = "" if fact.values in _PLAIN else f" ({fact.values})"
        rows.append((f"{fact.key} = {fact.default}", f"{fact.meaning}{values}{source}"))
    return _columns(rows, width, indent=2)


def _claim_text(facts: MethodFacts, width: int) -> str:
    about = facts.entry
    if about.python is None and not about.study:
        return "Planned: not yet implemented."
    rerun = f"postgrad reproduce {about.slug}"
    if facts.result is None:
        return "Claim: no recorded result." + (f"\nRun it: {rerun}" if about.study else "")
    text = f"Claim: {facts.result['claim']}. {verdict_text(facts.result)}"
    findings = [
        textwrap.fill(f"- {found['statement']} [{found['holds']}]", width, subsequent_indent="  ")
        for found in facts.result.get("findings", ())
    ]
    listed = ["Findings, and whether each holds here", *findings] if findings else []
    return "\n".join([textwrap.fill(text, width), *listed, f"Run it again: {rerun}"])


def _columns(rows: Iterable[tuple[str, str]], width: int, indent: int = 0) -> str:
    """Names and texts in two columns; a name too wide for its column has a line of its own."""
    rows = list(rows)
    column = min(34, max(len(name) for name, _ in rows)) + 2
    lines = []
    for name, text in rows:
        left = " " * indent + name
        own_line = len(name) + 2 > column
        room = " " * (indent + column)
        first = room if own_line else left.ljust(indent + column)
        lines += [left] if own_line else []
        lines.append(
            textwrap.fill(text, width, initial_indent=first, subsequent_indent=room) or left
        )
    return "\n".join(lines)
