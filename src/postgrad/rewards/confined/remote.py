"""Calls between the two halves of a test, each in its own sandbox.

Plain values (numbers, text, lists, dictionaries …) are copied. Any other object stays where it is;
the other side holds a `Handle`, whose attributes, items and calls are asked for. A handle never
equals a plain value unless it is one of a subclass, and no operator sends a plain operand over, so
that what a test expects is not told to what it tests.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import operator
import socket
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from . import messages

_LONG = 10_000  # bits; longer numbers are not written in decimal
_SIMPLE = (type(None), bool, float, str)
_MUTABLE = (list, dict, set, bytearray)
# type, its tag, to what is coded further, and back
_CODERS: list[tuple[type, str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    (tuple, "tuple", list, tuple),
    (dict, "dict", lambda v: [list(pair) for pair in v.items()], dict),
    (set, "set", list, set),
    (frozenset, "frozenset", list, frozenset),
    (collections.deque, "deque", list, collections.deque),
    (bytes, "bytes", bytes.hex, bytes.fromhex),
    (bytearray, "bytearray", bytearray.hex, bytearray.fromhex),
    (complex, "complex", lambda v: [v.real, v.imag], lambda v: complex(*v)),
    (range, "range", lambda v: [v.start, v.stop, v.step], lambda v: range(*v)),
    (fractions.Fraction, "fraction", str, fractions.Fraction),
    (decimal.Decimal, "decimal", str, decimal.Decimal),
    (
        datetime.datetime,
        "datetime",
        datetime.datetime.isoformat,
        datetime.datetime.fromisoformat,
    ),
    (datetime.date, "date", datetime.date.isoformat, datetime.date.fromisoformat),
    (
        datetime.timedelta,
        "timedelta",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: datetime.timedelta(*v),
    ),
]
_ENCODERS = {kind: (tag, to) for kind, tag, to, _ in _CODERS}
_ENCODERS |= dict.fromkeys(
    (collections.OrderedDict, collections.Counter, collections.defaultdict), _ENCODERS[dict]
)
_DECODERS = {tag: back for _, tag, _, back in _CODERS}
_PLAIN = {*_SIMPLE, int, list, *_ENCODERS}
_BUILTIN_TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}


class Gone(BaseException):
    """The other side has ended."""


class Handle:
    """An object of the other side."""

    def __init__(self, side: "Side", number: int, value: Any):
        set_here = object.__setattr__
        set_here(self, "_side", side)
        set_here(self, "_number", number)
        set_here(self, "_value", value)  # a tuple with what a plain subclass's object equals

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._side.ask(self._number, "call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._side.ask(self._number, "attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._side.ask(self._number, "set attribute", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._side.ask(self._number, "item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._side.ask(self._number, "set item", key, value)

    def __delitem__(self, key: Any) -> None:
        self._side.ask(self._number, "delete item", key)

    def __len__(self) -> Any:
        return self._side.ask(self._number, "length")

    def __bool__(self) -> Any:
        return self._side.ask(self._number, "truth")

    def __iter__(self) -> Any:
        iterator = self._side.ask(self._number, "iterator")
        return iterator if isinstance(iterator, Handle) else iter(iterator)

    def __next__(self) -> Any:
        return self._side.ask(self._number, "next")

    def __repr__(self) -> Any:
        return self._side.ask(self._number, "representation")

    def __str__(self) -> Any:
        return self._side.ask(self._number, "text")

    def __enter__(self) -> Any:
        return self._side.ask(self._number, "enter")

    def __exit__(self, *_: Any) -> Any:
        return self._side.ask(self._number, "exit")

    def __instancecheck__(self, instance: Any) -> Any:
        return isinstance(instance, Handle) and self._side.ask(
            self._number, "has instance", instance
        )

    def __eq__(self, other: Any) -> Any:
        if isinstance(other, Handle):
            return self._side.ask(self._number, "==", other)
        return bool(self._value) and self._value[0] == other

    def __hash__(self) -> int:
        return hash(self._value[0]) if self._value else object.__hash__(self)


def _between_handles(sign: str) -> Callable[[Handle, Any], Any]:
    def operation(self: Handle, other: Any) -> Any:
        if isinstance(other, Handle):
            return self._side.ask(self._number, sign, other)
        return NotImplemented

    return operation


_OPERATORS = {
    "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "+": "add", "-": "sub", "*": "mul",
    "/": "truediv", "//": "floordiv", "%": "mod", "@": "matmul", "&": "and", "|": "or", "^": "xor",
}  # fmt: skip
for _sign, _name in _OPERATORS.items():
    setattr(Handle, f"__{_name}__", _between_handles(_sign))

# what may be asked of an object by the half that judges
_ANSWERS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "next": next,
    "attribute": getattr,
    "set attribute": setattr,
    "item": operator.getitem,
    "set item": operator.setitem,
    "delete item": operator.delitem,
    "length": len,
    "truth": bool,
    "iterator": iter,
    "representation": repr,
    "text": str,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "has instance": lambda target, instance: isinstance(instance, target),
    "==": operator.eq,
    **{sign: getattr(operator, f"__{name}__") for sign, name in _OPERATORS.items()},
}
# and by the half that is tested, of what a test has passed to it
_CALLBACKS = ("call", "next", "iterator")


class Side:
    """One end of the connection.

    `names` are the globals that the other side may look up; the half that judges gives none away
    and answers calls of functions and iterators that a test has passed, nothing else.
    """

    def __init__(self, connection: socket.socket, names: dict[str, Any] | None = None):
        self.gone = False
        self._connection = connection
        self._names = names
        self._mine: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._exceptions: dict[int, type[BaseException]] = {}

    # what is asked

    def ready(self) -> bool:
        """Whether the program on the other side has run to its end without an error."""
        return self._hear() == {"ready": True}

    def find(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the names that are globals over there, with their values."""
        wanted = sorted(names)
        self._tell({"find": wanted})
        found = dict(self._answer())
        return {name: found[name] for name in wanted if name in found}

    def ask(self, number: int, what: str, *arguments: Any, **named: Any) -> Any:
        coded = [self.encode(argument) for argument in arguments]
        given = {name: self.encode(value) for name, value in named.items()}
        self._tell({"ask": what, "of": number, "arguments": coded, "named": given})
        return self._answer(arguments)

    def _answer(self, arguments: tuple[Any, ...] = ()) -> Any:
        while True:
            answer = self._hear()
            if "ask" in answer or "find" in answer:
                self._serve(answer)
                continue
            for place, changed in answer.get("changed", {}).items():
                _become(arguments[int(place)], self.decode(changed))
            if "error" in answer:
                kind = self.decode(answer["error"])
                raise kind(*self.decode(answer["values"]))
            return self.decode(answer["value"])

    # what is answered

    def start(self, ready: bool) -> NoReturn:
        """Say whether the program ran to its end, then answer questions for good."""
        self._tell({"ready": ready})
        while True:
            self._serve(self._hear())

    def _serve(self, question: Any) -> None:
        before: list[Any] = []
        arguments: list[Any] = []
        answer: dict[str, Any]
        try:
            if "find" in question:
                found = self._found(question["find"])
            else:
                target, what = self._mine[question["of"]], question["ask"]
                if self._names is None and what not in _CALLBACKS:
                    raise TypeError(f"{what} cannot be asked of a test's object")
                before = question["arguments"]
                arguments = [self.decode(argument) for argument in before]
                named = {name: self.decode(value) for name, value in question["named"].items()}
                found = _ANSWERS[what](target, *arguments, **named)
            answer = {"value": self.encode(found)}
        except Gone:
            raise
        except BaseException as error:  # noqa: BLE001
            answer = {"error": self.encode(type(error)), "values": self._values(error)}
        answer["changed"] = {
            place: coded
            for place, (argument, old) in enumerate(zip(arguments, before, strict=False))
            if isinstance(argument, _MUTABLE) and (coded := self.encode(argument)) != old
        }
        self._tell(answer)

    def _found(self, names: list[str]) -> list[tuple[str, Any]]:
        known = self._names or {}
        return [(name, known[name]) for name in names if name in known]

    def _values(self, error: BaseException) -> Any:
        try:
            return self.encode(tuple(error.args))
        except Exception:  # noqa: BLE001
            return self.encode((str(error),))

    # values

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SIMPLE:
            return value
        if kind is int:
            return value if value.bit_length() < _LONG else {"int": hex(value)}
        if kind is list:
            return [self.encode(item) for item in value]
        if kind in _ENCODERS:
            tag, to = _ENCODERS[kind]
            return {tag: self.encode(to(value))}
        if isinstance(value, Handle) and value._side is self:
            return {"yours": value._number}
        if isinstance(value, type):
            return self._encode_type(value)
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        return self._keep(value)

    def _encode_type(self, kind: type) -> Any:
        if _BUILTIN_TYPES.get(kind.__name__) is kind:
            return {"type": kind.__name__}
        number = next((n for n, known in self._exceptions.items() if known is kind), None)
        if number is not None:
            return {"yours": number}
        if issubclass(kind, BaseException):
            base = next(b for b in kind.__mro__ if _BUILTIN_TYPES.get(b.__name__) is b)
            return {"exception": [self._number(kind), kind.__name__, base.__name__]}
        return self._keep(kind)

    def _keep(self, value: Any) -> Any:
        plain = next((kind for kind in type(value).__mro__ if kind in _PLAIN), None)
        coded = [] if plain is None else [self.encode(plain(value))]
        if self._names is None and coded:
            return coded[0]
        if self._names is None and not (callable(value) or hasattr(value, "__next__")):
            raise TypeError(f"a {type(value).__name__} of a test cannot be passed to what it tests")
        return {"object": [self._number(value), coded]}

    def _number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._mine))
        if number == len(self._mine):
            self._mine.append(value)  # kept for good, so that no other object gets its identity
        return number

    def decode(self, coded: Any) -> Any:
        if isinstance(coded, list):
            return [self.decode(item) for item in coded]
        if not isinstance(coded, dict):
            return coded
        ((tag, content),) = coded.items()
        if tag in _DECODERS:
            return _DECODERS[tag](self.decode(content))
        if tag == "int":
            return int(content, 16)
        if tag == "yours":
            return self._mine[content]
        if tag == "type":
            return _BUILTIN_TYPES[content]
        if tag == "module":
            top = content.partition(".")[0]
            if top not in sys.stdlib_module_names:
                raise ImportError(f"no module {content!r} in the standard library")
            return importlib.import_module(content)
        if tag == "exception":
            number, name, base = content
            if number not in self._exceptions:
                self._exceptions[number] = type(name, (_BUILTIN_TYPES[base],), {})
            return self._exceptions[number]
        number, value = content
        return Handle(self, number, tuple(self.decode(value)))

    def _tell(self, message: Any) -> None:
        try:
            messages.send(self._connection, message)
        except messages.Closed as error:
            self.gone = True
            raise Gone from error

    def _hear(self) -> Any:
        try:
            return messages.receive(self._connection)
        except messages.Closed as error:
            self.gone = True
            raise Gone from error


def _become(old: Any, new: Any) -> None:
    """Give a list, dictionary or set the contents of another."""
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
