"""Rewritten problems: what of a policy's output is the problem, and whether it can be used."""

import re

SHORTEST, LONGEST = 10, 2000
_FENCED = re.compile(r"```(?:\w*\n)?(.*?)```", re.DOTALL)


def extract_rewrite(output: str) -> str | None:
    """The text in the first fenced block, or else all of it; None beyond 10 to 2000 characters."""
    found = _FENCED.search(output)
    text = (found[1] if found else output.replace("```", "")).strip()
    return text if SHORTEST <= len(text) <= LONGEST else None


def reveals(rewrite: str, original: str, answer: str) -> bool:
    """Whether a rewrite holds the answer, as a word or number of its own, and the original not."""
    alone = re.compile(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)")
    return bool(answer) and bool(alone.search(rewrite)) and not alone.search(original)
