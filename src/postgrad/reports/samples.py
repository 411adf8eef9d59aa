"""Rows of samples.jsonl as the report's browser of samples wants them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.reports.page import plain_json
from postgrad.visible import shortened, visible

# a report stays a page that opens at once
_LARGEST = 4_000_000
_LONGEST_TEXT = 50_000
_MOST_TOKENS = 10_000
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
_FIRST = {"prompt": 0, "response": 1}


def browser(rows: Sequence[Mapping[str, Any]], largest: int = _LARGEST) -> dict[str, Any]:
    """Samples by step, and a note where some steps were left out to keep the page small.

    `largest` is the size in characters that the samples may take in the page.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(sample(row))
    steps = [{"step": step, "rows": found} for step, found in sorted(by_step.items())]
    kept = steps
    while len(kept) > 1 and len(json.dumps(kept)) > largest:
        # every other step, and always the last
        kept = kept[-1::-2][::-1]
    note = ""
    if len(kept) < len(steps):
        note = f"{len(kept)} of {len(steps)} sampled steps; samples.jsonl has all of them."
    return {"steps": kept, "note": note}


def sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row sorted by how its fields are shown: numbers, texts, before/after pairs, images, tokens.

    Only PNG images within the row are images; everything else is text. Of what is very long the
    beginning is shown.
    """
    shown: dict[str, Any] = {"numbers": [], "texts": [], "pairs": [], "images": [], "remark": ""}
    fields = {name: value for name, value in row.items() if name != "step"}
    tokens, advantages = fields.get("tokens"), fields.get("advantages")
    if isinstance(tokens, list) and isinstance(advantages, list):
        del fields["tokens"], fields["advantages"]
        shown["tokens"] = [_text(token) for token in tokens[:_MOST_TOKENS]]
        shown["advantages"] = plain_json(advantages[:_MOST_TOKENS])
        if len(tokens) != len(advantages):
            shown["remark"] = f"{len(tokens)} tokens came with {len(advantages)} advantages."
        elif len(tokens) > _MOST_TOKENS:
            shown["remark"] = f"The first {_MOST_TOKENS:,} of {len(tokens):,} tokens."
    for stem in [name.removesuffix("_before") for name in fields if name.endswith("_before")]:
        before, after = fields.get(f"{stem}_before"), fields.get(f"{stem}_after")
        if isinstance(before, str) and isinstance(after, str):
            shown["pairs"].append([visible(stem), _text(before), _text(after)])
            del fields[f"{stem}_before"], fields[f"{stem}_after"]
    for name in sorted(fields, key=lambda name: _FIRST.get(name, 2)):
        value, title = fields[name], visible(name)
        if isinstance(value, (bool, int, float)):
            shown["numbers"].append([title, plain_json(value)])
        elif isinstance(value, str) and _PNG.fullmatch(value):
            shown["images"].append([title, value])
        elif value is not None:
            shown["texts"].append([title, _text(value)])
    return shown


def _text(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value
    ):
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    else:
        text = json.dumps(plain_json(value), ensure_ascii=False, indent=1)
    return visible(shortened(text, _LONGEST_TEXT))
