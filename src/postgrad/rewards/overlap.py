"""How much of a reference's words a text holds: ROUGE, and the keywords of a stimulus."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rouge(text: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L as F1 (Lin 2004), of lower-case words without stemming."""
    found, wanted = (_WORD.findall(part.lower()) for part in (text, reference))
    shared = {
        "rouge1": _shared(found, wanted, 1),
        "rouge2": _shared(found, wanted, 2),
        "rougeL": _longest_common(found, wanted),
    }
    sizes = {"rouge1": 0, "rouge2": 1, "rougeL": 0}  # fewer n-grams than words by so many
    return {
        name: _f1(count, len(found) - sizes[name], len(wanted) - sizes[name])
        for name, count in shared.items()
    }


def _shared(found: Sequence[str], wanted: Sequence[str], n: int) -> int:
    first, second = (
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for words in (found, wanted)
    )
    return (first & second).total()


def _longest_common(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Length of the longest common subsequence of words."""
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        above = 0  # the entry of the row before, one column to the left
        for j, other in enumerate(wanted, start=1):
            above, lengths[j] = (
                lengths[j],
                above + 1 if word == other else max(lengths[j], lengths[j - 1]),
            )
    return lengths[-1]


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0


def word_f1(text: str, reference: str) -> float:
    """F1 of two sets of words, in lower case, with punctuation taken for spaces."""
    found, wanted = (set(re.sub(r"[^\w\s]|_", " ", t.lower()).split()) for t in (text, reference))
    return _f1(len(found & wanted), len(found), len(wanted))


def keyword_rewards(
    keywords: Iterable[str],
    reference: str,
    *,
    miss: float = 0.2,
    stop_words: Iterable[str] = (),
    whole_words: bool = True,
) -> list[float]:
    """What each finished keyword of a stimulus is worth (directional stimuli, arXiv 2302.11520).

    +1 if it occurs in the reference, in lower case, else -`miss`; also -`miss` if it is empty, a
    stop word, or has been said before. Without `whole_words` "art" occurs in "start".
    """
    if not miss >= 0:
        raise ValueError(f"miss must be at least 0, got {miss}")
    text, seen = reference.lower(), {word.lower() for word in stop_words}
    rewards = []
    for keyword in keywords:
        word = keyword.strip().lower()
        hit = bool(word) and word not in seen
        if hit and whole_words:
            hit = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
        elif hit:
            hit = word in text
        rewards.append(1.0 if hit else -miss)
        seen.add(word)
    return rewards
