"""Language models that say which of two responses is better."""

import re
from typing import Any

from postgrad.errors import PostgradError
from postgrad.rewards.annotations import Chat, filled

COMPARE = """\
Below are a request and two responses to it, A and B. Which response serves the request better?

Request:
{prompt}

Response A:
{first}

Response B:
{second}

Give your reason in one sentence. Then write, on a line of its own, "Better: A" or "Better: B".
"""
_VERDICT = re.compile(r"better\W*?\b([AB])\b", re.IGNORECASE)
_BARE = re.compile(r"\W*([AB])\W*", re.IGNORECASE)


class ModelJudge:
    """A preference by a language model, called as a preference function is.

    The probability that the first response is preferred is the share of `answers` that say so; an
    answer that names neither counts as one half. `instruction` holds {prompt}, {first} and
    {second}.

    Raises:
        PostgradError: more than `most_unread` of the answers to a call name neither.
    """

    def __init__(
        self,
        chat: Chat,
        instruction: str = COMPARE,
        *,
        answers: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 256,
        most_unread: float = 0.5,
    ):
        for name in ("{first}", "{second}"):
            if name not in instruction:
                raise PostgradError(f"judge_instruction: expected a text with {name} in it")
        self._chat = chat
        self._instruction = instruction
        self._answers = answers
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._most_unread = most_unread

    def __call__(self, prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        asked = [
            filled(self._instruction, prompt=prompt, first=one, second=other)
            for prompt, one, other in zip(prompts, first, second, strict=True)
        ]
        said = self._chat(
            asked, self._answers, max_tokens=self._max_tokens, temperature=self._temperature
        )
        verdicts = [[verdict(text) for text in texts] for texts in said]
        unread = sum(v is None for several in verdicts for v in several)
        if unread > self._most_unread * sum(map(len, verdicts)):
            example = " ".join(said[0][0].split())[:80]
            raise PostgradError(
                f"judge: {unread} of {sum(map(len, verdicts))} answers name neither A nor B, such "
                f"as {example!r}"
            )
        return [
            sum(0.5 if v is None else float(v) for v in several) / len(several)
            for several in verdicts
        ]


def verdict(text: str) -> bool | None:
    """Whether an answer prefers A; None if it names neither. Of several the last one counts."""
    named = _VERDICT.findall(text)
    if not named:
        bare = _BARE.fullmatch(text)
        named = [bare[1]] if bare else []
    return named[-1].upper() == "A" if named else None
