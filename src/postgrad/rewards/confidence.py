"""How sure a policy is of an answer that it is shown."""

from collections.abc import Sequence

import torch
from torch import Tensor

from postgrad.models.policy import LanguagePolicy
from postgrad.rewards.spans import token_places

_TOKENS_AT_ONCE = 1 << 13


def enclosed(
    policy: LanguagePolicy, answer: str, opening: str = "", closing: str = ""
) -> tuple[Tensor, slice]:
    """Token ids `[L]` of an answer between two strings, and which of them are the answer's.

    All is tokenised together, as the policy would write it; a token across a border is counted
    with the answer.

    Raises:
        ValueError: no token is the answer's.
    """
    ids = policy.encode_response(opening + answer + closing, end=False)
    text = policy.decode(ids)
    start = text.find(opening + answer)
    inner = (start + len(opening), start + len(opening) + len(answer))
    found = [
        number
        for number, place in enumerate(token_places(lambda i: policy.decode(torch.tensor(i)),
                                                    ids.tolist(), text))
        if start >= 0 and place is not None and place[0] < inner[1] and place[1] > inner[0]
    ]  # fmt: skip
    if not found:
        raise ValueError(f"the answer {answer!r} has no tokens of its own")
    return ids, slice(found[0], found[-1] + 1)


@torch.no_grad()
def answer_confidence(
    policy: LanguagePolicy,
    contexts: Sequence[Tensor],
    answers: Sequence[tuple[Tensor, slice]],
) -> Tensor:
    """Mean log-probability `[N]` of the tokens of answers, each shown after its context.

    The logarithm of the length-normalised probability exp(1/L sum_j log pi(a_j | context, a_<j)).
    An answer is what `enclosed` gives: what surrounds it is read, and not counted. Equal pairs of
    context and answer are computed once.
    """
    if len(contexts) != len(answers):
        raise ValueError(f"{len(contexts)} contexts for {len(answers)} answers")
    places: dict[tuple[tuple[int, ...], ...], int] = {}
    owners = []
    for context, (ids, _) in zip(contexts, answers, strict=True):
        key = (tuple(context.tolist()), tuple(ids.tolist()))
        owners.append(places.setdefault(key, len(places)))
    first = [owners.index(place) for place in range(len(places))]
    means: list[Tensor] = []
    for part in _parts([len(contexts[i]) + len(answers[i][0]) for i in first]):
        chosen = [first[place] for place in part]
        scores = policy.score([contexts[i] for i in chosen], [answers[i][0] for i in chosen])
        means += [row[answers[i][1]].mean() for row, i in zip(scores.logprobs, chosen, strict=True)]
    return torch.stack(means).float().cpu()[owners] if means else torch.zeros(0)


def _parts(sizes: Sequence[int]) -> list[list[int]]:
    """Consecutive places whose sizes add up to at most what is scored at once."""
    parts: list[list[int]] = []
    used = _TOKENS_AT_ONCE
    for place, size in enumerate(sizes):
        if used + size > _TOKENS_AT_ONCE:
            parts.append([])
            used = 0
        parts[-1].append(place)
        used += size
    return parts
