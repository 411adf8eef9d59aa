"""What was seen of each prompt before, and rewards of length measured by it (HAPO).

After "HAPO: Training Language Models to Reason Concisely via History-Aware Policy Optimization"
(Huang et al. 2025, arXiv 2505.11225) and its released code.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers

LengthForm = Literal["cosine", "linear"]
HistoryMode = Literal["min", "mean"]


class HistoryTracker:
    """The length h of the correct responses so far to each prompt, by the prompt's id.

    "min" keeps the shortest, "mean" the mean of all.
    """

    def __init__(self, mode: HistoryMode = "min"):
        if mode not in ("min", "mean"):
            raise ValueError(f"mode must be 'min' or 'mean', got {mode!r}")
        self._mode = mode
        self._lengths: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def lookup(self, ids: Sequence[str]) -> Tensor:
        """h `[N]` of each id; NaN where no correct response was seen."""
        return torch.tensor([self._lengths.get(key, math.nan) for key in ids])

    def update(self, ids: Sequence[str], lengths: Tensor, correct: Tensor) -> None:
        """Take in N responses: the prompt's id, the length `[N]`, whether it is correct `[N]`."""
        if not len(ids) == len(lengths) == len(correct):
            raise ValueError(
                f"expected as many ids as lengths and marks, got {len(ids)}, {len(lengths)} and "
                f"{len(correct)}"
            )
        expect_numbers(lengths=lengths)
        _expect_positive(lengths, "lengths")
        for key, length, right in zip(ids, lengths.tolist(), correct.tolist(), strict=True):
            if not right:
                continue
            seen, known = self._counts.get(key, 0), self._lengths.get(key, length)
            if self._mode == "min":
                self._lengths[key] = min(known, float(length))
            else:
                self._lengths[key] = (seen * known + length) / (seen + 1)
            self._counts[key] = seen + 1

    @property
    def mean(self) -> float:
        """The mean of h over all prompts with one; NaN without."""
        return sum(self._lengths.values()) / len(self) if self._lengths else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"lengths": dict(self._lengths), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lengths, self._counts = dict(state["lengths"]), dict(state["counts"])


def history_length_reward(
    lengths: Tensor,
    history: Tensor,
    correct: Tensor,
    form: LengthForm = "cosine",
    floor: float = -0.7,
    tolerance: float = 0.1,
) -> Tensor:
    """r_len `[N]`: what a length l is worth beside the prompt's record h; 0 where h is NaN.

    - "cosine": f = cos(min(pi/2 l/h, pi)); max(f, floor) if correct, min(f, 0) if wrong.
    - "linear", with tolerance t: correct 1 - l/h below h, 0 up to (1 + t) h, then
      max(floor, -(l - (1 + t) h)/h); wrong 0 up to (1 + t) h, then max(-1, the same).

    So a wrong response is never rewarded for being short.

    Args:
        lengths: `[N]` in tokens, above 0.
        history: `[N]`, above 0 or NaN.
        correct: `[N]` bool.
        floor: in (-1, 0], the least for a correct response.
    """
    if lengths.ndim != 1 or not lengths.shape == history.shape == correct.shape:
        raise ValueError(
            f"lengths, history and correct must be [N], got {list(lengths.shape)}, "
            f"{list(history.shape)} and {list(correct.shape)}"
        )
    if not -1 < floor <= 0:
        raise ValueError(f"floor must lie in (-1, 0], got {floor}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    _expect_positive(lengths, "lengths")
    _expect_positive(history, "history")
    share = lengths / history
    if form == "cosine":
        value = (math.pi / 2 * share).clamp(max=math.pi).cos()
        reward = torch.where(correct, value.clamp(min=floor), value.clamp(max=0))
    elif form == "linear":
        beyond = (1 + tolerance - share).clamp(max=0)
        shorter = (1 - share).clamp(min=0)
        reward = torch.where(correct, shorter + beyond.clamp(min=floor), beyond.clamp(min=-1))
    else:
        raise ValueError(f"form must be 'cosine' or 'linear', got {form!r}")
    return torch.where(history.isnan(), 0.0, reward)


def repetition_penalty(tokens: Tensor, size: int, penalty: float) -> float:
    """`penalty` times the share of tokens in an n-gram of `size` that stood there before.

    `tokens` are those of one response, `[L]`.
    """
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens must be [L] with L >= 1, got {list(tokens.shape)}")
    if size < 1 or penalty > 0:
        raise ValueError(f"expected size >= 1 and penalty <= 0, got {size} and {penalty}")
    ids: list[int] = tokens.tolist()
    seen: set[tuple[int, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(ids) - size + 1):
        gram = tuple(ids[start : start + size])
        if gram in seen:
            repeated.update(range(start, start + size))
        seen.add(gram)
    return penalty * len(repeated) / len(ids)


def _expect_positive(values: Tensor, name: str) -> None:
    if bool((values <= 0).any()):
        raise ValueError(f"{name} must be above 0, got {float(values.min())}")
