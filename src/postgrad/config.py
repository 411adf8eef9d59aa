"""Typed settings: one source for defaults, YAML, dotted overrides, errors that name the key."""

import difflib
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict

from postgrad.errors import PostgradError, shown, unknown

S = TypeVar("S", bound="Settings")


def setting(default: Any, meaning: str, *, source: str = "", **bounds: Any) -> Any:
    """A field of a settings class: its default, what it means, and where the default comes from.

    `bounds` are pydantic's (`gt`, `ge`, `lt`, `le`, `min_length`, …).
    """
    extra: JsonDict | None = {"source": source} if source else None
    if isinstance(default, (list, dict, BaseModel)):
        return Field(
            default_factory=lambda: _copy(default),
            description=meaning,
            json_schema_extra=extra,
            **bounds,
        )
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


def _copy(value: Any) -> Any:
    return value.model_copy(deep=True) if isinstance(value, BaseModel) else type(value)(value)


class Settings(BaseModel):
    """Base of all settings classes: unknown keys, wrong types and bad values are errors."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, coerce_numbers_to_str=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_or_infinities_as_numbers(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if field is None:
                    continue
                kinds = {field.annotation, *get_args(field.annotation)}
                if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
                    raise ValueError(f"{name}: expected a number, got {value}")
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name}: expected a finite number, got {value}")
        return values


class Choice(Settings):
    """One of several implementations by its name, with the settings of that one.

    In a configuration `mask=ppo`, or `mask.clip_high=0.28` of the one that is the default, or both.
    A subclass says what the choice is of (`kind`) and where each implementation is; that is a class
    with its own settings as `Config`, imported when it is chosen.
    """

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]
    implementations: ClassVar[Mapping[str, str]]

    name: str

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_a_name(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _settings_of_the_chosen(self) -> "Choice":
        try:
            own = validated(self.implementation(self.name).Config, self.model_extra or {})
        except PostgradError as error:
            place = ": " if str(error).startswith("unknown") else "."  # of one of its settings
            raise ValueError(f"{self.kind}{place}{error}") from None
        self.__pydantic_extra__ = own.model_dump()
        return self

    @classmethod
    def implementation(cls, name: str) -> Any:
        """The class of that name, or an error that suggests the nearest one."""
        if name not in cls.implementations:
            raise unknown(cls.kind, name, cls.implementations)
        module, _, found = cls.implementations[name].partition(":")
        return getattr(importlib.import_module(module), found)

    def settings(self) -> Any:
        """The settings of the chosen implementation."""
        return self.implementation(self.name).Config(**(self.model_extra or {}))


class LoopSettings(Settings):
    """What the training loop needs to know, whatever the method."""

    steps: int = setting(100, "number of collected batches", gt=0)
    seed: int = setting(0, "every random choice derives from it", ge=0)
    output: str | None = setting(None, "run folder; a fresh one under runs/ when empty")
    learning_rate: float = setting(1e-5, "AdamW's peak step size", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "shape of the learning rate after the warm-up"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", ge=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's moment decays")
    adam_epsilon: float = setting(1e-8, "AdamW's denominator floor", gt=0)
    clip_norm: float = setting(1.0, "largest global gradient norm; 0 switches clipping off", ge=0)
    token_budget: int | None = setting(
        2048, "tokens in one micro-batch, a group's prompt counted once; gradients accumulate", gt=0
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "fp32", "bf16 computes under autocast; auto: bf16 where the hardware multiplies it natively"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 …")
    processes: int = setting(1, "processes on each machine that share the work", gt=0, le=4096)
    shard: bool = setting(
        False, "split weights, gradients and optimiser state over the processes (FSDP2)"
    )
    nodes: int = setting(1, "machines; the same command is given on each of them", gt=0, le=4096)
    rendezvous: str | None = setting(None, "host:port of the first machine, with nodes above 1")
    threads: int | None = setting(None, "CPU threads; torch's choice when empty", gt=0, le=4096)
    evaluate_every: int = setting(0, "steps between evaluations; 0: before and after only", ge=0)
    save_every: int = setting(100, "steps between checkpoints; 0: only at the end", ge=0)
    notice: float | None = setting(
        None,
        "seconds from SIGTERM to the machine's end: a step that takes longer than half of them is "
        "given up and its start saved, from a copy in memory; empty: every step is finished",
        gt=0,
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay", gt=0)
    sample_every: int = setting(10, "steps between rows of samples.jsonl and sample tables", gt=0)
    stop_metric: str | None = setting(None, "evaluation metric watched for an early stop")
    stop_patience: int = setting(3, "evaluations without improvement before stopping", gt=0)
    stop_higher_is_better: bool = setting(True, "direction of stop_metric")
    log: list[Literal["tensorboard", "wandb", "trackio", "prometheus"]] = setting(
        ["tensorboard"], "where metrics go besides metrics.jsonl"
    )
    prometheus_port: int = setting(9464, "port of log=prometheus", ge=1, le=65535)
    prometheus_host: str = setting("127.0.0.1", "where log=prometheus listens")
    prometheus_token_env: str | None = setting(
        None, "environment variable with the bearer token of log=prometheus"
    )
    report: bool = setting(True, "write report.html at the end")
    profile: bool = setting(False, "measure where a step's time and memory go; writes profile/")


class _Yaml(yaml.SafeLoader):
    """YAML as people expect it: `1e-6` is a number; yes, no, on and off are words, not booleans.

    A key that stands twice is an error, as is a value that does not fit the tag it is given.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # of PyYAML's own conversions
            problem = f"not a value of the type {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(
                problem=problem, problem_mark=node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML text as plain data."""
    try:
        values = yaml.load(text, Loader=_Yaml)  # a SafeLoader: plain data only
        json.dumps(values, default=str)  # finds what contains itself, by an anchor
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, TypeError) as error:
        raise yaml.YAMLError(str(error)) from error
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file as a dictionary. Loads safely: no Python objects."""
    path = Path(path)
    if not path.is_file():
        raise PostgradError(f"configuration file {path} does not exist")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise PostgradError(f"configuration file {path} is not valid YAML: {line}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise PostgradError(f"configuration file {path} must hold keys and values, one per line")
    return values


def parse_value(text: str) -> Any:
    """A command-line value read as YAML."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise PostgradError(f"cannot read the value {shown(text)}: not valid YAML") from error


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["beta=0.2", "data.columns.prompt=question"]` as a nested dictionary."""
    values: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise PostgradError(f"expected key=value, got {word!r}")
        values = merge(values, nest(key, parse_value(text)))
    return values


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """`nest("a.b", 1)` is `{"a": {"b": 1}}`."""
    first, *inner = dotted.split(".")
    for part in reversed(inner):
        value = {part: value}
    return {first: value}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, descending into dictionaries.

    A string below a dictionary (or above one) is read as that dictionary's `name`, so that
    `data: file.jsonl` and `data.columns.prompt=question` go together.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        elif isinstance(old, str) and isinstance(value, Mapping):
            merged[key] = merge({"name": old}, value)
        elif isinstance(old, Mapping) and isinstance(value, str) and "name" not in old:
            merged[key] = {**old, "name": value}
        else:
            merged[key] = value
    return merged


def dotted_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """Every key of a settings class, nested ones dotted."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Settings):
                keys += dotted_keys(part, prefix + name + ".")
    return keys


def unknown_key(key: str, known: Iterable[str]) -> PostgradError:
    """The error for a key that no settings class has, suggesting the nearest one."""
    known = list(known)
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, known, 1, 0.6) or [
        by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.5)
    ]
    hint = f"did you mean {close[0]!r}?" if close else "see `postgrad show METHOD` for its keys"
    return PostgradError(f"unknown key {shown(key)}: {hint}")


def validated(kind: type[S], values: Mapping[str, Any]) -> S:
    """`values` as an object of the settings class, or one line that names the first wrong key."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic names the branch of a union in the location; a user never wrote it
        path = [str(part) for part in first["loc"]]
        key = ".".join(part for part in path if part.isidentifier() or part.isdigit())
        if first["type"] == "extra_forbidden":
            raise unknown_key(key, dotted_keys(kind)) from None
        message = first["msg"].removeprefix("Value error, ")
        if message.startswith((f"{key}:", f"{key}.")) or not key:
            raise PostgradError(message) from None
        raise PostgradError(
            f"{key}: {message[0].lower()}{message[1:]}, got {shown(first['input'])}"
        ) from None


def resolve(
    kind: type[S], recipe: Mapping[str, Any], *layers: Mapping[str, Any]
) -> tuple[LoopSettings, S]:
    """The loop's and the method's settings from layers of values, later layers winning.

    `kind` is the method's settings class and `recipe` its own defaults for the loop. All keys live
    in one flat file; which of the two classes a key belongs to follows from its name.
    """
    # a part given in part keeps this method's defaults for the rest of it
    values = {
        name: default.model_dump()
        for name, field in kind.model_fields.items()
        if isinstance(default := field.get_default(call_default_factory=True), Settings)
    }
    choices: dict[str, Any] = {
        name: default if isinstance(default, Mapping) else {"name": default}
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Choice)
        and (default := field.get_default(call_default_factory=True)) is not None
    }
    values |= choices
    for layer in (recipe, *layers):
        # another implementation brings its own settings
        other = [name for name in choices if _names_another(values[name], layer.get(name))]
        values = merge({k: v for k, v in values.items() if k not in other}, layer)
    loop_names = set(LoopSettings.model_fields)
    known = [*dotted_keys(kind), *dotted_keys(LoopSettings)]
    for key in values:
        if key not in loop_names and key not in kind.model_fields:
            raise unknown_key(key, known)
    loop = validated(LoopSettings, {k: v for k, v in values.items() if k in loop_names})
    own = validated(kind, {k: v for k, v in values.items() if k not in loop_names})
    return loop, own


def _names_another(chosen: Any, value: Any) -> bool:
    """Whether a layer's value for a choice is of another implementation than the one so far."""
    now = chosen["name"] if isinstance(chosen, Mapping) else chosen
    named = value.get("name", now) if isinstance(value, Mapping) else value
    return value is not None and named != now


def flat(settings: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, for comparison and display."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
