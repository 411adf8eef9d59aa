"""Tools that a policy can call while it writes."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from postgrad.config import Choice, Settings, setting
from postgrad.sampling.conversations import Session


class ToolChoice(Choice):
    kind = "tool"
    implementations = {
        "none": "postgrad.methods.agents.tools:NoTool",
        "calculator": "postgrad.methods.agents.tools:Calculator",
    }


class NoTool:
    """none: every response is one turn"""

    Config = Settings

    def __init__(self, config: Settings):
        del config


@dataclass
class Calls:
    """A session in which what stands between two strings is answered by a function of it."""

    opening: str
    closing: str
    answer: Callable[[str], str]
    before: str = ""
    after: str = ""

    def reply(self, turn: str) -> str | None:
        asked = turn.rpartition(self.opening)[2] if self.opening in turn else None
        if asked is None:
            return None
        return self.before + self.answer(asked.partition(self.closing)[0]) + self.after

    def close(self) -> None:
        pass


class CalculatorSettings(Settings):
    opening: str = setting("[", "opens a call", min_length=1)
    closing: str = setting("]", "closes a call", min_length=1)


class Calculator:
    """arithmetic: `[12*3+4]` is answered by its value"""

    Config = CalculatorSettings

    def __init__(self, config: CalculatorSettings):
        self.stop = (config.closing,)
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


def made_tool(choice: ToolChoice) -> Any | None:
    """The tool that is chosen; None where it is none."""
    kind = choice.implementation(choice.name)
    return None if kind is NoTool else kind(choice.settings())
