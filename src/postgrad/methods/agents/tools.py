"""Tools that a policy can call while it writes."""

import ast
import operator
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

from postgrad.config import Choice, Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.agents.calls import Calls
from postgrad.rewards.sandbox import Interpreter, Limits, Sandbox
from postgrad.sampling.conversations import Session


class ToolChoice(Choice):
    kind = "tool"
    implementations = {
        "none": "postgrad.methods.agents.tools:NoTool",
        "calculator": "postgrad.methods.agents.tools:Calculator",
        "python": "postgrad.methods.agents.tools:Python",
        "lookup": "postgrad.methods.agents.tools:Lookup",
        "search": "postgrad.methods.agents.search:Search",
    }


class NoTool:
    """none: every response is one turn"""

    Config = Settings

    def __init__(self, config: Settings):
        del config


class CalculatorSettings(Settings):
    opening: str = setting("[", "opens a call", min_length=1)
    closing: str = setting("]", "closes a call", min_length=1)


class Calculator:
    """arithmetic: `[12*3+4]` is answered by its value"""

    Config = CalculatorSettings
    parallel = 1

    def __init__(self, config: CalculatorSettings):
        self.stop: tuple[str, ...] = (config.closing,)
        self._config = config

    def session(self, row: Mapping[str, Any]) -> Session:
        return Calls(self._config.opening, self._config.closing, calculated)


_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
_LONGEST_EXPRESSION = 200


def calculated(expression: str) -> str:
    """The value of sums, differences, products and quotients; `error` of anything else."""
    text = expression.strip()
    # leading zeros are no Python; people and small models write them
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    try:
        if len(text) > _LONGEST_EXPRESSION:
            return "error"
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return "error"
    return f"{value:g}" if isinstance(value, float) and not value.is_integer() else str(int(value))


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


class LookupSettings(Settings):
    opening: str = setting("[", "opens a call", min_length=1)
    closing: str = setting("]", "closes a call", min_length=1)
    column: str = setting("table", "of the data, with a table for each row", min_length=1)
    missing: str = setting("?", "the answer where there is no such key")


class Lookup:
    """a table that comes with each row of data: `[key]` is answered by the key's value"""

    Config = LookupSettings
    parallel = 1

    def __init__(self, config: LookupSettings):
        self.stop: tuple[str, ...] = (config.closing,)
        self._config = config

    def session(self, row: Mapping[str, Any]) -> Session:
        config, table = self._config, row.get(self._config.column)
        if not isinstance(table, Mapping):
            raise PostgradError(
                f"tool.column: expected a table of keys and values in the column "
                f"{config.column!r} of the data, found {type(table).__name__}"
            )
        return Calls(
            config.opening, config.closing, lambda key: str(table.get(key, config.missing))
        )


class PythonSettings(Settings):
    opening: str = setting("<python>", "opens a call", min_length=1)
    closing: str = setting("</python>", "closes a call", min_length=1)
    before: str = setting("<output>", "before what was printed")
    after: str = setting("</output>", "after what was printed")
    characters: int = setting(2000, "of the output that are shown", gt=0)
    time_limit: float = setting(10.0, "seconds a call may take", gt=0)
    memory: int = setting(512, "megabytes a session may use", ge=64)
    isolation: Literal["namespaces", "bubblewrap", "process"] | None = setting(
        None, "how it is kept from everything else; the first strong one there is when empty"
    )
    parallel: int = setting(8, "calls that run at a time", gt=0)


class Python:
    """a Python interpreter: `<python>print(6 * 7)</python>` is answered by `<output>42</output>`

    The code runs in a sandbox (see `postgrad.rewards.sandbox`), its variables live on to the end of
    the response. A last expression is printed; of an error the last line of its traceback is.
    """

    Config = PythonSettings

    def __init__(self, config: PythonSettings):
        self.stop: tuple[str, ...] = (config.closing,)
        self.parallel = config.parallel
        self._config = config
        limits = Limits(wall=config.time_limit, memory=config.memory << 20)
        self._sandbox = Sandbox(config.isolation, limits)

    def session(self, row: Mapping[str, Any]) -> Session:
        config = self._config
        talk = _Snippets(self._sandbox, config.characters)
        return Calls(
            config.opening, config.closing, talk.answer, config.before, config.after, talk.close
        )

    def close(self) -> None:
        """End what sessions share; it starts anew where it is asked again."""
        self._sandbox.close()


class _Snippets:
    """A conversation with an interpreter, which starts at the first call."""

    def __init__(self, sandbox: Sandbox, characters: int):
        self._sandbox = sandbox
        self._characters = characters
        self._interpreter: Interpreter | None = None

    def answer(self, code: str) -> str:
        """What the code printed, and the last line of the traceback if there was an error."""
        if self._interpreter is None or not self._interpreter.alive:
            self._interpreter = self._sandbox.interpreter()
        result = self._interpreter.run(textwrap.dedent(code).strip("\n"))
        errors = result.errors.rstrip().rpartition("\n")[2]
        if result.limit in _TOLD:
            errors = _TOLD[result.limit]
        elif not self._interpreter.alive:
            errors = "error: the interpreter has ended, and its variables with it"
        told = "\n".join(part for part in (result.output.rstrip("\n"), errors) if part)
        if len(told) <= self._characters:
            return told
        return told[: self._characters] + "..."

    def close(self) -> None:
        if self._interpreter is not None:
            self._interpreter.close()


_TOLD = {"time": "error: it took too long", "output": "error: too much output"}


def require_tool(choice: ToolChoice, why: str) -> None:
    """Stop if there is nothing to call."""
    if choice.name == "none":
        named = [name for name in choice.implementations if name != "none"]
        raise PostgradError(f"tool: {why}, so expected one of {', '.join(named)}, got 'none'")


def made_tool(choice: ToolChoice) -> Any | None:
    """The tool that is chosen; None where it is none."""
    kind = choice.implementation(choice.name)
    return None if kind is NoTool else kind(choice.settings())
