"""Reward functions by name, from the user's code, or both with weights; called and checked.

A reward function is called as TRL's users know it, by keywords:

    def score(prompts, completions, **columns) -> list[float]

`prompts` are as in the data (text or messages), `completions` are always plain strings, and every
other column of the data (`answer` …) is a list of the same length. A function may name just the
ones it wants; methods add `completion_ids` (token ids of each completion). It returns one finite
number per completion.

An `async def` of the same form goes on in the background while the other functions are called. One
that names `completion` (and perhaps `prompt`) gets one item a call, and its calls are awaited
together:

    async def score(prompt, completion, **columns) -> float
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from postgrad import processes
from postgrad.errors import NonFinite, PostgradError, unknown
from postgrad.rewards.remote import RewardServer, is_server
from postgrad.rewards.running import Postponed, Started, attempt, attempt_within, gathered, outcome
from postgrad.rewards.verifiers import VERIFIERS

RewardFunction = Callable[..., Any]
# A name, `module:function`, `file.py:function`, the folder of a reward model or the address of a
# reward server, each also with `*weight`; or a mapping with `name` (of a server `url`), perhaps
# `weight`, and settings of that function.
RewardSpec = str | dict[str, Any]

_WEIGHTED = re.compile(r"(.+?)\s*\*\s*([-+\w.]+)")
_LEARNED = "reward-model"
_TOGETHER = 64  # calls of an async function for one item that are awaited at a time


@dataclass(frozen=True)
class Term:
    """One function with its name and weight; `kind` is what errors call it."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    kind: str = "reward"

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name!r}"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.function).parameters
        except (TypeError, ValueError) as error:
            raise PostgradError(
                f"{self.title}: a Python function is expected, and this has no signature"
            ) from error

    @property
    def file(self) -> str | None:
        """The file of the function's code, so that an error can name the line in it."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        function = inspect.unwrap(function)
        code = getattr(function, "__code__", None)
        if code is None:
            code = getattr(type(function).__call__, "__code__", None)
        return code.co_filename if code else None

    @property
    def is_async(self) -> bool:
        function: Any = self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )

    @property
    def takes_one(self) -> bool:
        """Whether it is an async function of one item."""
        names = self.parameters
        return self.is_async and "completion" in names and "completions" not in names

    def arguments(self, available: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The keywords this function is called with; an error if it needs one that is not there."""
        parameters = self.parameters
        kinds = inspect.Parameter
        for name, parameter in parameters.items():
            variable = parameter.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
            if not variable and parameter.default is kinds.empty and name not in available:
                own = ("prompts", "completions", "prompt", "completion")
                columns = ", ".join(c for c in available if c not in own)
                raise PostgradError(
                    f"{self.title} needs the column {name!r}; the data has the columns "
                    f"{columns or 'prompt only'}"
                )
        if any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
            return dict(available)
        return {name: values for name, values in available.items() if name in parameters}

    def call(self, available: Mapping[str, list[Any]], time_limit: float) -> Any:
        """What the function returns, called with those keywords that it takes.

        Of several processes one calls it and tells the others.
        One that `keeps_time` (a verifier that limits the time of every completion) has no limit.

        Raises:
            PostgradError: it raised, did not return in time, or needs a column that is not there.
        """
        return processes.agreed(lambda: self.begin(available, time_limit).result())

    def begin(
        self, available: Mapping[str, list[Any]], time_limit: float
    ) -> Postponed[Any] | Started[Any]:
        """As `call`: an async function starts now, any other when its result is asked for."""
        keeps_time = getattr(self.function, "keeps_time", False)
        limit = None if keeps_time else time_limit
        title, file = self.title, self.file
        if self.takes_one:
            return self._begin_each(available, limit)
        call = functools.partial(self.function, **self.arguments(available))
        if self.is_async:
            return Started(limit, call, title, own_file=file)
        if limit is None:
            return Postponed(lambda: attempt(call, title, own_file=file))
        return Postponed(lambda: attempt_within(limit, call, title, own_file=file))

    def _begin_each(
        self, available: Mapping[str, list[Any]], limit: float | None
    ) -> Started[list[Any]]:
        singular = {"prompts": "prompt", "completions": "completion"}
        arguments = self.arguments({singular.get(k, k): v for k, v in available.items()})
        calls = [
            functools.partial(self.function, **dict(zip(arguments, values, strict=True)))
            for values in zip(*arguments.values(), strict=True)
        ]

        async def every() -> list[Any]:
            tried = await gathered(calls, _TOGETHER)
            return [
                outcome(one, f"{self.title}, completion {i},", self.file)
                for i, one in enumerate(tried, 1)
            ]

        return Started(limit, every, self.title, own_file=self.file)


class RewardSet:
    """Several reward functions with weights, called together and checked at every call."""

    def __init__(self, terms: Sequence[Term], time_limit: float = 60.0):
        names = [term.name for term in terms]
        for name in names:
            if names.count(name) > 1:
                raise PostgradError(f"reward {name!r} is listed {names.count(name)} times")
        self.terms = list(terms)
        self.time_limit = time_limit

    def __call__(
        self, prompts: list[Any], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The weighted sums `[N]`, and each function's own values `[N]` by its name.

        Async functions and reward servers work side by side, and meanwhile the others in turn.

        Raises:
            PostgradError: a function raised, did not return within the time limit, or returned
                something else than one number per completion; or a column is missing.
            NonFinite: a reward is NaN or infinite.
        """
        available = {**columns, "prompts": prompts, "completions": completions}
        terms = processes.agreed(lambda: self._terms(available))
        total = [
            math.fsum(term.weight * terms[term.name][i] for term in self.terms)
            for i in range(len(completions))
        ]
        return total, terms

    def _terms(self, available: Mapping[str, list[Any]]) -> dict[str, list[float]]:
        running = {}
        try:
            for term in self.terms:
                running[term.name] = term.begin(available, self.time_limit)
            # what is in the background is waited for after the rest
            order = sorted(self.terms, key=lambda term: running[term.name].background)
            values = {
                term.name: self._checked(term, running[term.name].result(), available)
                for term in order
            }
        finally:
            for one in running.values():
                one.cancel()
        return {term.name: values[term.name] for term in self.terms}

    def of_rows(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: list[str],
        completion_ids: list[list[int]] | None = None,
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The same for completions `[N]` of the prompts of N rows of data."""
        columns = columns_of(rows)
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        return self([row["prompt"] for row in rows], completions, columns)

    def probe(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Call every function on one example (see `trial`), before any compute is spent.

        Returns each function's value for it.
        """
        prompts, completions, columns = trial(row)
        servers = [t.function for t in self.terms if isinstance(t.function, RewardServer)]
        with ExitStack() as stack:
            for server in servers:
                stack.enter_context(server.briefly())
            _, terms = self(prompts, completions, {**columns, "completion_ids": [[0], [0]]})
        return {name: values[0] for name, values in terms.items()}

    def _checked(
        self, term: Term, returned: Any, available: Mapping[str, list[Any]]
    ) -> list[float]:
        what = term.title
        listed = expect_list(returned, len(available["completions"]), what, "numbers")
        values = [_number(value, i, what) for i, value in enumerate(listed)]
        odd = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if odd is not None:
            raise NonFinite(
                f"{what} returned {values[odd]} for completion {odd + 1}, expected a finite number",
                samples=_samples(available, values),
            )
        return values


def trial(row: Mapping[str, Any]) -> tuple[list[Any], list[str], dict[str, list[Any]]]:
    """Prompts, completions and columns to try a function on: one row, twice in a batch.

    The completion is the row's own `completion` or `answer` where it has one.
    """
    own = next((row[c] for c in ("completion", "answer") if row.get(c) is not None), "")
    columns = {name: [value, value] for name, value in row.items() if name != "prompt"}
    return [row.get("prompt")] * 2, [str(own)] * 2, columns


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What rows of data hold besides their prompts, by column."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def load_rewards(
    specs: RewardSpec | RewardFunction | Sequence[RewardSpec | RewardFunction],
    *,
    time_limit: float = 60.0,
) -> RewardSet:
    """The rewards that `specs` name.

    Args:
        specs: one or several of: a verifier of the library (`numeric`), `module:function`,
            `path/to/file.py:function`, the folder of a reward model, the address of a reward server
            (`http://host:port/path`), each also as `name*0.5`; a mapping
            `{"name": …, "weight": …, **settings}`, whose settings go to the verifier's maker or
            with every call to the function (`reward-model` has the setting `model`, a folder or a
            Hub id; a reward server those of `postgrad.rewards.remote.ServerSettings`); or, in
            Python, a function.
        time_limit: seconds that one call of one function may take; a server has a limit of its own.

    Raises:
        PostgradError: unknown name, file, module, function or setting; code that fails on import;
            a reward model that cannot be loaded.
    """
    several = [specs] if isinstance(specs, str | Mapping) or callable(specs) else list(specs)
    if not several:
        raise PostgradError("reward: no reward function given")
    if not time_limit > 0:
        raise PostgradError(f"reward: the time limit must be above 0 seconds, got {time_limit}")
    return RewardSet([_term(spec) for spec in several], time_limit)


def load_function(spec: RewardSpec | RewardFunction, kind: str) -> Term:
    """A function that returns something else than numbers, named as rewards are.

    `kind` is what errors call it ("critique", "judge" …); the library has none of its own.

    Raises:
        PostgradError: unknown file, module, function or setting; code that fails on import.
    """
    term = _term(spec, kind)
    if term.weight != 1:
        raise PostgradError(f"{term.title} takes no weight, got {term.weight:g}")
    return term


def _term(spec: RewardSpec | RewardFunction, kind: str = "reward") -> Term:
    if callable(spec):
        return Term(getattr(spec, "__name__", type(spec).__name__), spec, kind=kind)
    if kind == "reward" and is_server(spec):
        return _server_term(spec)
    if isinstance(spec, str):
        weighted = _WEIGHTED.fullmatch(spec)
        name, weight = (weighted[1], weighted[2]) if weighted else (spec, 1.0)
        settings: dict[str, Any] = {}
    elif isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        name, weight = spec["name"], spec.get("weight", 1.0)
        settings = {key: value for key, value in spec.items() if key not in ("name", "weight")}
    else:
        raise PostgradError(f"{kind}: expected a name or a mapping with a name, got {spec!r}")
    function = _function(name, settings, kind)
    if name == _LEARNED:
        name = str(settings["model"])  # there may be several
    return Term(name, function, _weight(f"{kind} {name!r}", weight), kind)


def _server_term(spec: RewardSpec) -> Term:
    if isinstance(spec, str):
        weighted = _WEIGHTED.fullmatch(spec)
        spec = {"url": weighted[1], "weight": weighted[2]} if weighted else {"url": spec}
    settings = dict(spec)
    name, weight = settings.pop("name", None), settings.pop("weight", 1.0)
    if "url" not in settings:
        settings["url"], name = name, None
    server = RewardServer(name, settings)
    return Term(server.name, server, _weight(f"reward {server.name!r}", weight))


def _weight(what: str, given: Any) -> float:
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise PostgradError(f"{what}: the weight must be a finite number, got {given!r}")
    return weight


def _function(name: str, settings: dict[str, Any], kind: str) -> RewardFunction:
    what = f"{kind} {name!r}"
    if kind == "reward":
        made = _of_the_library(name, settings, what)
        if made is not None:
            return made
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        if kind == "reward" and "/" in name and not name.endswith(".py"):
            raise _no_reward_model(name)
        library = (*VERIFIERS, _LEARNED) if kind == "reward" else ()
        raise unknown(kind, name, (*library, "module:function", "file.py:function"))
    module = _import_file(what, place) if place.endswith(".py") else _import_module(what, place)
    function: Any = getattr(module, attribute, None)
    if function is None:
        callables = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise unknown(f"function of {place}", attribute, callables)
    if not callable(function):
        raise PostgradError(
            f"{what}: {attribute} is of type {type(function).__name__}, not a function"
        )
    if not settings:
        return cast(RewardFunction, function)
    _check_settings(what, settings, Term(name, function, kind=kind).parameters)
    return functools.partial(function, **settings)


def _of_the_library(name: str, settings: dict[str, Any], what: str) -> RewardFunction | None:
    """A verifier, or the reward model in a folder; None if the name is neither."""
    if name in VERIFIERS:
        return _made(what, VERIFIERS[name], settings)
    folder = os.path.isdir(os.path.expanduser(name))
    if not folder and name != _LEARNED:
        return None
    from postgrad.rewards.learned import learned_reward  # imports transformers

    maker = functools.partial(learned_reward, name) if folder else learned_reward
    return _made(what, maker, settings)


def _made(
    what: str, maker: Callable[..., RewardFunction], settings: dict[str, Any]
) -> RewardFunction:
    """The function that a maker makes of settings."""
    parameters = inspect.signature(maker).parameters
    _check_settings(what, settings, parameters)
    for setting, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and setting not in settings:
            raise PostgradError(f"{what} needs the setting {setting!r}")
    return maker(**settings)


def _no_reward_model(name: str) -> PostgradError:
    """The error for a folder that is not there, suggesting the nearest model."""
    missing = Path(os.path.expanduser(name))
    nearest = next(parent for parent in missing.parents if parent.is_dir())
    patterns = ("config.json", "*/config.json", "*/model/config.json")
    there = [str(file.parent) for pattern in patterns for file in nearest.glob(pattern)]
    close = difflib.get_close_matches(str(missing), there, n=1, cutoff=0.5)
    elsewhere = "one of the Hub is {name: reward-model, model: ID}"
    hint = f"did you mean {close[0]!r}?" if close else elsewhere
    return PostgradError(f"reward {name!r}: there is no such folder of a reward model; {hint}")


def _check_settings(
    what: str, settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for setting in settings:
        if setting not in parameters:
            raise unknown(f"setting of {what}:", setting, ("weight", *parameters))


def _import_file(what: str, place: str) -> Any:
    path = Path(os.path.expanduser(place))
    if not os.path.isfile(path):
        raise PostgradError(f"{what}: no such file {place}")
    path = path.resolve()
    _importable(path.parent)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise PostgradError(f"{what}: {place} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    execute = functools.partial(specification.loader.exec_module, module)
    attempt(execute, f"{what}: importing {place}", own_file=str(path))
    return module


def _import_module(what: str, place: str) -> Any:
    _importable(Path.cwd())
    top = place.partition(".")[0]
    if not top or importlib.util.find_spec(top) is None:
        raise PostgradError(f"{what}: no module {place} here or among those installed")
    return attempt(lambda: importlib.import_module(place), f"{what}: importing {place}")


def _importable(folder: Path) -> None:
    """Let the user's code import what lies beside it, as `python file.py` would."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _samples(available: Mapping[str, list[Any]], values: list[float]) -> list[dict[str, Any]]:
    """What was rewarded and how, for people to read; images and the like are left out."""
    plain = {
        name: column
        for name, column in available.items()
        if all(isinstance(value, str | int | float | list) for value in column)
    }
    return [
        {name: column[i] for name, column in plain.items()} | {"reward": str(value)}
        for i, value in enumerate(values)
    ]


def expect_list(returned: Any, count: int, what: str, of: str) -> list[Any]:
    """What was returned, one entry per completion; or an error that says what came instead."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise PostgradError(f"{what} returned {described(values)}, expected a list of {count} {of}")
    if len(values) != count:
        raise PostgradError(
            f"{what} returned {len(values)} values for {count} completions, expected one each"
        )
    return list(values)


def _number(value: Any, position: int, what: str) -> float:
    # Anything that says of itself that it is a number: int, bool, NumPy and torch scalars.
    value = value.tolist() if hasattr(value, "tolist") else value
    if not hasattr(type(value), "__float__"):
        raise PostgradError(
            f"{what} returned {described(value)} for completion {position + 1}, expected a "
            "finite number"
        )
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def described(value: Any) -> str:
    """A value as an error shows it: short, and with its type."""
    if value is None or isinstance(value, float):
        return str(value)
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:39] + '…'} ({type(value).__name__})"
