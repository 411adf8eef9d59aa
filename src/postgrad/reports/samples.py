"""Rows of samples.jsonl as the report's browser of samples wants them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.reports.page import plain_json

# a report stays a page that opens at once
_LARGEST = 4_000_000
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

    Only PNG images within the row are images; everything else is text.
    """
    shown: dict[str, Any] = {"numbers": [], "texts": [], "pairs": [], "images": [], "remark": ""}
    fields = {name: value for name, value in row.items() if name != "step"}
    tokens, advantages = fields.get("tokens"), fields.get("advantages")
    if isinstance(tokens, list) and isinstance(advantages, list):
        del fields["tokens"], fields["advantages"]
        shown["tokens"] = [str(token) for token in tokens]
        shown["advantages"] = plain_json(advantages)
        if len(tokens) != len(advantages):
            shown["remark"] = f"{len(tokens)} tokens came with {len(advantages)} advantages."
    for stem in [name.removesuffix("_before") for name in fields if name.endswith("_before")]:
        before, after = fields.get(f"{stem}_before"), fields.get(f"{stem}_after")
        if isinstance(before, str) and isinstance(after, str):
            shown["pairs"].append([stem, before, after])
            del fields[f"{stem}_before"], fields[f"{stem}_after"]
    for name in sorted(fields, key=lambda name: _FIRST.get(name, 2)):
        value = fields[name]
        if isinstance(value, (bool, int, float)):
            shown["numbers"].append([name, plain_json(value)])
        elif isinstance(value, str) and _PNG.fullmatch(value):
            shown["images"].append([name, value])
        elif value is not None:
            shown["texts"].append([name, _text(value)])
    return shown


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value
    ):
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return json.dumps(plain_json(value), ensure_ascii=False, indent=1)
