"""From what a critique says about stretches of a response to a score for each of its tokens.

A critique quotes: "warm and fresh" is good, "their their" is poor. Quotes are looked up in the text
of the response, and a token has the score of the stretch that it stands in.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Place = tuple[int, int]  # characters [start, end) of a text

_WORD = re.compile(r"[^\W_]")
_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Span:
    """A stretch of a response with its score: 1 is good, -1 poor, 0 neither.

    It is where `place` says, or else where the text says `quote`.
    """

    score: float
    quote: str = ""
    place: Place | None = None


def token_scores(
    text: str, spans: Sequence[Span], places: Sequence[Place | None], *, default: float = 0.0
) -> tuple[Tensor, int]:
    """delta `[T]` of the tokens that stand at `places` in the text, and how many spans have none.

    Every token that a span touches has the span's score, undivided; of several spans the lowest
    counts. Tokens without a letter or digit have 0, unless the span consists of such characters
    alone. A word that no span touches has the score `default`; so a tokenizer that splits a word
    otherwise changes nothing.
    """
    trimmed = [place and _trimmed(text, place) for place in places]
    wordy = [place is not None and _has_word(text, place) for place in trimmed]
    said: list[list[float]] = [[] for _ in places]
    skipped = 0
    for span, found in zip(spans, place_spans(text, spans), strict=True):
        touched = [] if found is None else _touched(text, found, trimmed, wordy)
        skipped += not touched
        for token in touched:
            said[token].append(span.score)
    scores = [
        min(several) if several else default * word
        for several, word in zip(said, wordy, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float32), skipped


def _touched(
    text: str, span: Place, places: Sequence[Place | None], wordy: Sequence[bool]
) -> list[int]:
    """The tokens at `places` that a span scores."""
    needs_word = _has_word(text, span)
    return [
        number
        for number, (place, word) in enumerate(zip(places, wordy, strict=True))
        if place is not None
        and max(place[0], span[0]) < min(place[1], span[1])
        and (word or not needs_word)
    ]


def place_spans(text: str, spans: Sequence[Span]) -> list[Place | None]:
    """Where each span stands in the text, without spaces around it; None where it does not.

    A quote that is given several times is found in several places, from the first on.
    """
    taken: dict[str, list[Place]] = {}
    found: list[Place | None] = []
    for span in spans:
        if span.place is not None:
            found.append(_trimmed(text, span.place))
            continue
        quote = span.quote.strip()
        used = taken.setdefault(quote.casefold(), [])
        free = (place for place in _occurrences(text, quote) if not _meets(place, used))
        place = next(free, None)
        found.append(place)
        if place is not None:
            used.append(place)
    return found


def _occurrences(text: str, quote: str) -> Iterator[Place]:
    """Where the text says it: to the letter, then in its words; else within other words."""
    if not quote:
        return
    literal = re.escape(quote)
    before = r"(?<!\w)" if re.match(r"\w", quote) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", quote) else ""
    patterns = [re.compile(before + literal + after)]
    words = re.findall(r"\w+", quote)
    if words:
        between = r"\W+".join(map(re.escape, words))
        patterns.append(re.compile(rf"(?<!\w){between}(?!\w)", re.IGNORECASE))
    whole = [match.span() for pattern in patterns for match in pattern.finditer(text)]
    within = re.finditer(literal, text) if not whole else ()
    yield from whole or (match.span() for match in within)


def _meets(place: Place, others: Sequence[Place]) -> bool:
    return any(max(place[0], start) < min(place[1], end) for start, end in others)


def _trimmed(text: str, place: Place) -> Place | None:
    """The place without the spaces around it; None if nothing is left."""
    inside = text[place[0] : place[1]]
    if not inside.strip():
        return None
    start = place[0] + len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


def _has_word(text: str, place: Place) -> bool:
    return _WORD.search(text, *place) is not None


def token_places(
    decode: Callable[[list[int]], str], ids: Sequence[int], text: str
) -> list[Place | None]:
    """Where each token stands in the text that they decode to; None where that is not known.

    `decode` leaves special tokens out. Sampled tokens need not be those that a tokenizer makes of
    the text, so places follow from decoding: of single tokens if their texts join to the whole,
    or of growing beginnings; where neither agrees with the text, from walking along its words.
    """
    pieces = [decode([token]) for token in ids]
    if "".join(pieces) == text:
        return list(pairwise(accumulate(map(len, pieces), initial=0)))
    ends = [0]
    for count in range(1, len(ids) + 1):
        beginning = decode(list(ids[:count])).rstrip("\ufffd")  # a character cut in its bytes
        if not text.startswith(beginning):
            return places_by_words(text, pieces)
        ends.append(max(len(beginning), ends[-1]))
    return list(pairwise(ends))


def places_by_words(text: str, tokens: Sequence[str]) -> list[Place | None]:
    """For tokens whose places are not known: that of the word which each belongs to, or None."""
    words = list(re.finditer(r"\S+", text))
    places: list[Place | None] = [None] * len(tokens)
    walked = walk_words(tokens, [word.group() for word in words])
    for word, found in zip(words, walked, strict=True):
        for token in found or ():
            if _WORD.search(tokens[token]):
                places[token] = word.span()
    return places


def walk_words(
    tokens: Sequence[str], words: Sequence[str], *, most: int = 9, starts: int = 5
) -> list[range | None]:
    """The tokens that write each of the words, which follow one another; None where a word is lost.

    Two pointers, as in Text2Grad's code (arXiv 2505.22338): letters are made small and punctuation
    is left out. Up to `most` tokens are joined until they are the word, first from the present
    token, then from the next ones, `starts` in all. A word without a match is skipped and the
    tokens stay where they were. Unlike there, the last token may be part of a match.
    """
    if most < 1 or starts < 1:
        raise ValueError(f"most and starts must be at least 1, got {most}, {starts}")
    plain = [_NO_WORD.sub("", token.lower()) for token in tokens]
    found: list[range | None] = []
    here = 0
    for word in words:
        wanted = _NO_WORD.sub("", word.lower())
        matches = (_match(plain, wanted, start, most) for start in range(here, here + starts))
        match = next((match for match in matches if match is not None), None)
        found.append(match)
        here = match.stop if match is not None else here
    return found


def _match(tokens: Sequence[str], word: str, start: int, most: int) -> range | None:
    joined = ""
    for stop in range(start, min(start + most, len(tokens))):
        joined += tokens[stop]
        if joined == word:
            return range(start, stop + 1)
        if len(joined) > len(word) + 2:
            return None
    return None


def fading(scores: Tensor, length: float, sharpness: float = 1.0) -> Tensor:
    """Weights `[N, T]` of scores `[N, T]` that fall from 1 to 0 behind `length` tokens.

    w = 1/(1 + exp(clip(sharpness (n - length) - 6, -10, 6))), n counting tokens from 1 at the
    response's first score that is not 0 (Text2Grad's code for summaries); 1 before it.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [N, T], got {list(scores.shape)}")
    begun = (scores != 0).cumsum(1) > 0
    count = begun.cumsum(1)
    weights = torch.sigmoid(-(sharpness * (count - length) - 6).clamp(-10, 6))
    return torch.where(begun, weights, 1.0)
