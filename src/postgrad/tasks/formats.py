"""The shapes data comes in, and how a row of each is checked and brought to one form.

The names are those of TRL's dataset types and of sentence-transformers, so that their users' data
loads as it is. Whatever the input, prompts are a string or a list of messages
(`{"role": …, "content": …}`), and everything a policy is to say (completion, chosen, rejected,
responses) is the plain text of one assistant turn. Other columns are kept for rewards.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from postgrad.errors import PostgradError, unknown

Row = dict[str, Any]
Format = Literal[
    "preferences",
    "labelled",
    "demonstrations",
    "rankings",
    "triples",
    "pairs",
    "prompts",
    "text",
]
# In the order of recognition: a format comes before those whose columns it includes.
FORMATS: tuple[Format, ...] = get_args(Format)

REQUIRED: dict[Format, tuple[str, ...]] = {
    "preferences": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "demonstrations": ("prompt", "completion"),
    "rankings": ("prompt", "responses"),
    "triples": ("anchor", "positive", "negative"),
    "pairs": ("anchor", "positive"),
    "prompts": ("prompt",),
    "text": ("text",),
}
_RETRIEVAL = {
    "anchor": ("query",),
    "positive": ("pos",),
    "negative": ("neg", "negative_1", "negatives"),
}
SYNONYMS: dict[Format, dict[str, tuple[str, ...]]] = {
    "triples": _RETRIEVAL,
    "pairs": _RETRIEVAL,
    "text": {"text": ("messages", "conversations")},
}
# Names other projects use: not taken silently, but suggested.
_HINTS = {
    "prompt": ("question", "instruction", "input", "query", "problem", "user"),
    "completion": ("output", "response", "answer", "target", "assistant"),
    "chosen": ("preferred", "winner", "better"),
    "rejected": ("dispreferred", "loser", "worse"),
    "responses": ("completions", "candidates"),
    "anchor": ("question", "sentence1", "premise"),
    "positive": ("answer", "passage", "document", "sentence2", "hypothesis"),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def recognise(columns: Iterable[str], source: str) -> Format:
    """The format whose columns are all there, the richest one first."""
    names = list(columns)
    for format in FORMATS:
        if not missing(format, names):
            return format
    hints = [
        f"{ours}={theirs}"
        for ours in ("prompt", "chosen", "rejected", "completion")
        for theirs in _HINTS[ours][:5]
        if theirs in names
    ]
    hint = f"; perhaps columns.{hints[0]}" if hints else ""
    raise PostgradError(
        f"{source}: the columns {listed(names)} match no format (expected e.g. prompt, or prompt + "
        f"completion, or chosen + rejected, or anchor + positive){hint}"
    )


def missing(format: Format, columns: Iterable[str]) -> list[str]:
    """The columns that `format` needs and `columns` does not hold under any accepted name."""
    return [column for column, found in _sources(format, columns).items() if found is None]


def check_columns(format: Format, columns: Iterable[str], source: str) -> None:
    """Stop unless every column that `format` needs is there; suggests names of other projects."""
    names = list(columns)
    lacking = missing(format, names)
    if not lacking:
        return
    hints = [name for name in _HINTS.get(lacking[0], ()) if name in names]
    hint = f"; perhaps columns.{lacking[0]}={hints[0]}" if hints else ""
    raise PostgradError(
        f"{source}: {format} need the columns {listed(REQUIRED[format])}; missing: "
        f"{listed(lacking)}; found: {listed(names)}{hint}"
    )


def known(format: str) -> Format:
    """`format` if it is one, else the error with the nearest."""
    for name in FORMATS:
        if name == format:
            return name
    raise unknown("format", format, FORMATS)


def listed(columns: Iterable[str]) -> str:
    return ", ".join(map(str, columns)) or "none"


def normalise(format: Format, row: Row, where: str) -> list[Row]:
    """The checked rows that `row` holds: one, or one for each positive of a retrieval row.

    `row` has every column of its data set, with None where it says nothing. `where` names the row
    in errors. A normalised row is left as it is.
    """
    renamed = dict(row)
    for ours, theirs in _sources(format, row).items():
        if theirs is not None and theirs != ours:
            renamed[ours] = renamed.pop(theirs)
    return _NORMALISERS[format](renamed, where)


def is_messages(value: Any) -> bool:
    """Whether this is a conversation: a list of messages in either of the usual spellings."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
    )


def stated_answer(row: Mapping[str, Any]) -> str | None:
    """A row's answer; of a solution that ends by `#### answer`, as GSM8K's, what stands there."""
    answer = row.get("answer")
    return None if answer is None else str(answer).rpartition("####")[2].strip()


def edited(prompt: str | list[Row], change: Callable[[str], str]) -> str | list[Row]:
    """A prompt after a change of its text; of a conversation, of the user's last turn.

    Raises:
        PostgradError: no turn of a conversation is the user's.
    """
    if isinstance(prompt, str):
        return change(prompt)
    spoken = [i for i, turn in enumerate(prompt) if turn["role"] == "user"]
    if not spoken:
        raise PostgradError("a prompt has no turn of the user to add to")
    last = spoken[-1]
    turn = {**prompt[last], "content": change(prompt[last]["content"])}
    return [*prompt[:last], turn, *prompt[last + 1 :]]


def _sources(format: Format, columns: Iterable[str]) -> dict[str, str | None]:
    """For each column of the format, the column that holds it."""
    names = set(columns)
    synonyms = SYNONYMS.get(format, {})
    return {
        column: next((n for n in (column, *synonyms.get(column, ())) if n in names), None)
        for column in REQUIRED[format]
    }


def _needed(row: Row, column: str, where: str) -> Any:
    if row.get(column) is None:
        raise PostgradError(f"{where}: column {column!r} is missing or null")
    return row[column]


def _wrong_type(column: str, value: Any, expected: str, where: str) -> PostgradError:
    return PostgradError(
        f"{where}: column {column!r} holds {type(value).__name__}, expected {expected}"
    )


def _text(row: Row, column: str, where: str) -> str:
    value = _needed(row, column, where)
    if not isinstance(value, str):
        raise _wrong_type(column, value, "text", where)
    if not value.strip():
        raise PostgradError(f"{where}: column {column!r} is empty")
    return value


def _messages(value: list[dict[str, Any]], column: str, where: str) -> list[dict[str, Any]]:
    """A conversation as role and content (ShareGPT's from and value are renamed)."""
    turns = []
    for number, given in enumerate(value, start=1):
        message = {key: part for key, part in given.items() if part is not None}
        role = message.pop("from", None) or message.get("role")
        role = _SHAREGPT_ROLES.get(str(role), role)
        if role not in _ROLES:
            raise PostgradError(f"{where}: column {column!r}, {unknown('role', str(role), _ROLES)}")
        content = message.pop("value", None) or message.get("content")
        if isinstance(content, list):
            content = _parts(content, column, where)
        empty = not isinstance(content, str) or not content.strip()
        if empty and not (role == "assistant" and message.get("tool_calls")):
            raise PostgradError(f"{where}: column {column!r}, message {number} has no content")
        turns.append({**message, "role": role, "content": content or ""})
    return turns


def _parts(content: list[Any], column: str, where: str) -> str:
    """The text of a message given as parts; only text parts are understood."""
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise PostgradError(
                f"{where}: column {column!r} has a message part of type {kind!r}, expected text"
            )
    return "".join(part["text"] for part in content)


def _prompt(row: Row, column: str, where: str) -> str | list[dict[str, Any]]:
    value = _needed(row, column, where)
    if is_messages(value):
        return _messages(value, column, where)
    if value == []:
        raise PostgradError(f"{where}: column {column!r} is empty")
    if not isinstance(value, str):
        raise _wrong_type(column, value, "text or a list of messages", where)
    return _text(row, column, where)


def _response(value: Any, column: str, where: str) -> str:
    """The text of what the policy is to say: a string, or one message of the assistant."""
    if is_messages(value):
        turns = _messages(value, column, where)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = ", ".join(turn["role"] for turn in turns)
            raise PostgradError(
                f"{where}: column {column!r} continues the prompt with the turns {roles}; "
                "expected one turn of the assistant"
            )
        value = turns[0]["content"]
    return _text({column: value}, column, where)


def _prompts(row: Row, where: str) -> list[Row]:
    if "answer" in row:
        _needed(row, "answer", where)
    return [{**row, "prompt": _prompt(row, "prompt", where)}]


def _demonstrations(row: Row, where: str) -> list[Row]:
    completion = _response(_needed(row, "completion", where), "completion", where)
    return [{**row, "prompt": _prompt(row, "prompt", where), "completion": completion}]


def _labelled(row: Row, where: str) -> list[Row]:
    label = _needed(row, "label", where)
    spelled = {"true": True, "1": True, "false": False, "0": False}
    if str(label).lower() not in spelled:
        raise PostgradError(f"{where}: column 'label' is {label!r}, expected true or false")
    return [{**row, "label": spelled[str(label).lower()]} for row in _demonstrations(row, where)]


def _preferences(row: Row, where: str) -> list[Row]:
    chosen, rejected = _needed(row, "chosen", where), _needed(row, "rejected", where)
    prompt = _prompt(row, "prompt", where) if "prompt" in row else None
    if chosen == rejected:
        raise PostgradError(f"{where}: chosen and rejected are the same")
    if is_messages(chosen) != is_messages(rejected):
        raise PostgradError(f"{where}: one of chosen and rejected is a conversation, one is not")
    if is_messages(chosen):
        prompt, chosen, rejected = _split_conversations(
            prompt,
            _messages(chosen, "chosen", where),
            _messages(rejected, "rejected", where),
            where,
        )
    elif prompt is None:
        prompt, chosen, rejected = _split_texts(
            _text(row, "chosen", where), _text(row, "rejected", where), where
        )
    chosen = _response(chosen, "chosen", where)
    rejected = _response(rejected, "rejected", where)
    if chosen == rejected:
        raise PostgradError(f"{where}: chosen and rejected are the same")
    return [{**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}]


def _split_conversations(
    prompt: Any, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], where: str
) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompt and last turns. Both conversations may repeat the prompt, or hold it alone."""
    if isinstance(prompt, list):
        n = len(prompt)
        if chosen[:n] == prompt and rejected[:n] == prompt:
            return prompt, chosen[n:], rejected[n:]
        return prompt, chosen, rejected
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if shared:
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if prompt is None:
        raise PostgradError(f"{where}: chosen and rejected share no first turn to be the prompt")
    return [{"role": "user", "content": prompt}], chosen, rejected


def _split_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The common beginning as the prompt, ended before the space of the first word that differs.

    TRL cuts at the first differing character, which would split words that begin alike.
    """
    shortest = min(len(chosen), len(rejected)) - 1
    differ = (i for i in range(shortest) if chosen[i] != rejected[i])
    shared = chosen[: next(differ, shortest)]
    words = re.match(r"(.*\S)(?=\s)", shared, flags=re.DOTALL)
    if words is None:
        raise PostgradError(
            f"{where}: chosen and rejected share no beginning to be the prompt, and there is no "
            "column 'prompt'"
        )
    end = words.end()
    return chosen[:end], chosen[end:], rejected[end:]


def _list(row: Row, column: str, where: str) -> list[Any]:
    """A list, also as the JSON that a CSV cell holds."""
    value = _needed(row, column, where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise PostgradError(
                f"{where}: column {column!r} is not a list in JSON ({error.msg})"
            ) from error
    if not isinstance(value, list):
        raise _wrong_type(column, value, "a list", where)
    return value


def _rankings(row: Row, where: str) -> list[Row]:
    responses = [_response(r, "responses", where) for r in _list(row, "responses", where)]
    if len(responses) < 2:
        raise PostgradError(
            f"{where}: a ranking needs at least 2 responses, column 'responses' has "
            f"{len(responses)}"
        )
    ranked: Row = {**row, "prompt": _prompt(row, "prompt", where), "responses": responses}
    for column, best_first in (("scores", -1.0), ("ranks", 1.0)):
        if column in row:
            values = _numbers(row, column, len(responses), where)
            order = sorted(range(len(values)), key=lambda i: best_first * values[i])
            ranked["responses"] = [responses[i] for i in order]
            ranked[column] = [values[i] for i in order]
            break
    return [ranked]


def _numbers(row: Row, column: str, count: int, where: str) -> list[float]:
    values = _list(row, column, where)
    if len(values) != count:
        raise PostgradError(
            f"{where}: column {column!r} has {len(values)} values for {count} responses"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(column, value, "numbers", where)
        if not math.isfinite(value):
            raise PostgradError(f"{where}: column {column!r} holds {value}, expected a number")
    return [float(value) for value in values]


def _several(row: Row, column: str, where: str) -> list[str]:
    """One or more texts of a retrieval row."""
    value = _needed(row, column, where)
    if not isinstance(value, list):
        return [_text(row, column, where)]
    if not value:
        raise PostgradError(f"{where}: column {column!r} is empty")
    return [_text({column: text}, column, where) for text in value]


def _pairs(row: Row, where: str) -> list[Row]:
    anchor = _text(row, "anchor", where)
    return [
        {**row, "anchor": anchor, "positive": positive}
        for positive in _several(row, "positive", where)
    ]


def _triples(row: Row, where: str) -> list[Row]:
    negatives = _several(row, "negative", where)
    numbered = [c for c in row if re.fullmatch(r"negative_\d+", c) and row[c] is not None]
    negatives += [_text(row, column, where) for column in numbered]
    rest = {column: value for column, value in row.items() if column not in numbered}
    several = {"negatives": negatives} if len(negatives) > 1 else {}
    rows = [{**pair, "negative": negatives[0], **several} for pair in _pairs(rest, where)]
    for triple in rows:
        if triple["positive"] in negatives:
            raise PostgradError(f"{where}: a negative is the same as the positive")
    return rows


def _plain_text(row: Row, where: str) -> list[Row]:
    return [{**row, "text": _prompt(row, "text", where)}]


_NORMALISERS: dict[Format, Callable[[Row, str], list[Row]]] = {
    "preferences": _preferences,
    "labelled": _labelled,
    "demonstrations": _demonstrations,
    "rankings": _rankings,
    "triples": _triples,
    "pairs": _pairs,
    "prompts": _prompts,
    "text": _plain_text,
}
