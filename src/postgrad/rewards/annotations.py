"""Critiques written by a language model, and the spans in what it wrote."""

import ast
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Quote = tuple[str, float]
# asked as `postgrad.sampling.chat` defines it: prompts and settings to texts of each prompt
Chat = Callable[..., list[list[str]]]

INSTRUCTION = """\
Below are a request and a response to it. First consider how well the response serves the request, \
step by step. Then write one JSON object, and nothing after it:

{"feedback": "one paragraph", "good_spans": ["..."], "poor_spans": ["..."]}

good_spans are at most two short passages of the response that make it good, poor_spans at most \
two that make it worse. Quote them exactly as they stand in the response; leave a list empty if \
there is nothing to quote.

Request:
{prompt}

Response:
{response}
"""

# lists of quotes by the name under which a model gives them, with the score of what they quote
_NAMED = {
    "good_spans": 1.0,
    "poor_spans": -1.0,
    "wrong_code": -1.0,
    "improvement_code": 0.0,
}
_SCORED = ("spans", "word_scores", "scores")  # lists of quotes, each with its own score


class Annotator:
    """A critique by a language model: an object that is called as a critique function is.

    `instruction` holds {prompt} and {response}. An answer without spans in it, as where its JSON is
    broken, is no critique: None.
    """

    def __init__(self, chat: Chat, instruction: str = INSTRUCTION, max_tokens: int = 512):
        self._chat = chat
        self._instruction = instruction
        self._max_tokens = max_tokens

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[list[Quote] | None]:
        pairs = zip(prompts, completions, strict=True)
        asked = [filled(self._instruction, prompt=p, response=c) for p, c in pairs]
        answers = self._chat(asked, max_tokens=self._max_tokens)
        return [quotes_in(texts[0]) for texts in answers]


def filled(template: str, **values: Any) -> str:
    """The template with each `{name}` replaced by its value; other braces stay.

    Messages are written out with their roles.
    """
    # in one pass from the left, so that a value that holds another's name stays as it is
    pieces: list[str] = []
    rest = template
    while True:
        places = {name: rest.find("{" + name + "}") for name in values}
        found = {name: place for name, place in places.items() if place >= 0}
        if not found:
            return "".join([*pieces, rest])
        name = min(found, key=found.__getitem__)
        pieces += [rest[: found[name]], _as_text(values[name])]
        rest = rest[found[name] + len(name) + 2 :]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in value)


def quotes_in(text: str) -> list[Quote] | None:
    """The quotes with their scores in what a language model wrote; None if it holds none.

    It may hold an object with lists of quotes (`good_spans` 1, `poor_spans` -1, `wrong_code` -1,
    `improvement_code` 0), or a list of words with scores, `["warm", 1]` or `("warm", 1)`, by itself
    or under `spans`, `word_scores` or `scores`. Of several the last one counts: models think aloud
    before they answer.
    """
    found = [quotes for value in values_in(text) if (quotes := _quotes(value)) is not None]
    return found[-1] if found and found[-1] else None


def values_in(text: str) -> Iterator[Any]:
    """What a text holds in brackets, as JSON or as Python writes it; not what is within those."""
    start = 0
    while True:
        opened = [place for bracket in "{[" if (place := text.find(bracket, start)) >= 0]
        if not opened:
            return
        start = min(opened)
        value, end = _value(text, start)
        if end > start:
            yield value
        start = max(end, start + 1)


def _value(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends: at `start` if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        pass
    end = text.rfind("}" if text[start] == "{" else "]") + 1
    try:
        return ast.literal_eval(text[start:end]), end
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None, start


def _quotes(value: Any) -> list[Quote] | None:
    """The quotes of one value; None if it is no annotation."""
    if isinstance(value, dict):
        named = {name: value[name] for name in _NAMED if isinstance(value.get(name), list)}
        if named:
            return [
                (quote, _NAMED[name])
                for name, quotes in named.items()
                for quote in quotes
                if isinstance(quote, str)
            ]
        value = next((value[name] for name in _SCORED if name in value), None)
    if not (isinstance(value, list) and value and all(map(_is_scored, value))):
        return None
    return [(word, float(score)) for word, score in value]


def _is_scored(entry: Any) -> bool:
    return (
        isinstance(entry, Sequence)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], int | float)
        and -1 <= entry[1] <= 1
    )
