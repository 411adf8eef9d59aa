"""Texts that a model wrote, as people may see them: characters that act are named instead."""

import re

# Control characters but line feed and tab: a terminal obeys them. Line and paragraph separators.
# Embeddings, overrides and isolates of direction, which make a text read as another than it is.
# Tags, which no font shows. Halves of characters, which no file can hold.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""`text` with characters that act instead of being seen as escapes: ESC becomes `\x1b`."""
    return _ODD.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, longest: int) -> str:
    """At most `longest` characters of `text`, and how many there were if that is not all."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text):,} characters)"
