"""Rewards for several groups of people at once: what the worst-off group would have (MaxMin-RLHF).

arXiv 2402.08925. `scores` `[U, N]` are what N responses are worth to each of U groups; F_u, the
mean of a row, estimates how well the policy that wrote them serves group u.
"""

from typing import Any, Literal

import torch
from torch import Tensor

MaxMinForm = Literal["group", "sample", "weights"]


def maxmin_reward(scores: Tensor, form: MaxMinForm, weights: Tensor | None = None) -> Tensor:
    """What each response is worth to those who come off worst, `[N]`, from `scores` `[U, N]`.

    - `group`: the scores of the group with the least mean, the first of equals: max_pi min_u F_u
      (algorithm 1).
    - `sample`: min_u r_u of every response by itself. Its mean is at most the least F_u.
    - `weights`: sum_u lambda_u r_u with `weights` lambda `[U]` (see `GroupWeights`).

    Raises:
        ValueError: not `[U, N]`, scores that are not finite, weights that are no distribution over
            the groups, or weights with another form.
    """
    if scores.ndim != 2 or not all(scores.shape):
        raise ValueError(f"scores must be [U, N] of at least one each, got {list(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite")
    if (weights is not None) != (form == "weights"):
        raise ValueError(f"weights go with the form 'weights' alone, got {form!r}")
    if form == "group":
        return scores[scores.mean(1).argmin()]
    if form == "sample":
        return scores.amin(0)
    if form != "weights" or weights is None:
        raise ValueError(f"the form must be 'group', 'sample' or 'weights', got {form!r}")
    if weights.shape != scores.shape[:1]:
        raise ValueError(f"{len(scores)} groups need as many weights, got {list(weights.shape)}")
    if bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise ValueError(f"weights must be at least 0 and sum to 1, got {weights.tolist()}")
    return weights.to(scores) @ scores


class GroupWeights:
    """The adversary's weights lambda of the groups, by exponentiated gradient.

    lambda_u <- lambda_u exp(-rate F_u) / Z after every batch, so that weight moves to the groups
    that are worse off. With a large rate that is the group with the least mean alone; with a small
    one the weights, averaged over time, come to the saddle point of max_pi min_lambda.
    """

    def __init__(self, groups: int, rate: float):
        if groups < 1:
            raise ValueError(f"expected at least one group, got {groups}")
        if not rate > 0:
            raise ValueError(f"the rate must be above 0, got {rate}")
        self._logits = torch.zeros(groups, dtype=torch.float64)
        self._rate = rate

    @property
    def value(self) -> Tensor:
        """lambda `[U]`, float64."""
        return self._logits.softmax(0)

    @torch.no_grad()
    def update(self, means: Tensor) -> None:
        """Take in F `[U]`."""
        if means.shape != self._logits.shape or not bool(means.isfinite().all()):
            raise ValueError(
                f"expected {len(self._logits)} finite means, one a group, got {means.tolist()}"
            )
        self._logits = (self._logits - self._rate * means.double().cpu()).log_softmax(0)

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self._logits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logits = state["logits"].clone()
