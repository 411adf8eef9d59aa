"""Targets made of a base policy and rewards: distributions that are known up to a constant.

P(x) = a(x) exp(phi(x)) with a the base. What is computed here is phi = log P - log a, of text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.objectives.divergence import fit_moments
from postgrad.rewards.functions import RewardSet

TargetKind = Literal["exponential", "binary", "distributional"]


class Target:
    """A target of one of three kinds.

    - "exponential": P = a exp(r / beta), what RL with a KL penalty of beta aims at.
    - "binary": P = a b, the base where a reward b of 0 or 1 is 1.
    - "distributional": P = a exp(sum_i lambda_i r_i), in which each reward r_i (without its weight)
      has the mean `moments[i]`; lambda is `fit` to samples of the base.

    `floor` bounds phi from below by -floor, so that no response has probability 0.
    """

    def __init__(
        self,
        rewards: RewardSet,
        kind: TargetKind = "exponential",
        *,
        beta: float = 1.0,
        moments: Sequence[float] = (),
        floor: float | None = None,
    ):
        wanted = len(rewards.terms) if kind == "distributional" else 0
        if len(moments) != wanted:
            raise PostgradError(
                f"moments: target={kind} takes {wanted} of them"
                f"{', one a reward' if wanted else ''}, got {len(moments)}"
            )
        self.rewards = rewards
        self.fitted: Tensor | None = None  # lambda
        self._kind = kind
        self._beta = beta
        self._moments = torch.tensor(moments, dtype=torch.float64)
        self._floor = floor

    @property
    def needs_fit(self) -> bool:
        return self._kind == "distributional" and self.fitted is None

    def probe(self, row: Mapping[str, Any]) -> None:
        """Try the rewards on one row, before any compute is spent."""
        values = self.rewards.probe(row)
        if self._kind == "binary":
            total = sum(term.weight * values[term.name] for term in self.rewards.terms)
            _log_binary(torch.tensor([total]))

    def measure(
        self, rows: Sequence[Mapping[str, Any]], texts: list[str], ids: list[Tensor]
    ) -> dict[str, Tensor]:
        """`reward` and every `reward/TERM` `[n]` float64 of responses to the rows' prompts."""
        total, terms = self.rewards.of_rows(rows, texts, [tokens.tolist() for tokens in ids])
        named = {"reward": total, **{f"reward/{name}": values for name, values in terms.items()}}
        return {name: torch.tensor(values).double() for name, values in named.items()}

    def log_factor(self, measured: Mapping[str, Tensor]) -> Tensor:
        """phi `[n]` of responses that were measured; -inf where P is 0."""
        if self._kind == "binary":
            factor = _log_binary(measured["reward"])
        elif self._kind == "exponential":
            factor = measured["reward"] / self._beta
        else:
            if self.fitted is None:
                raise ValueError("a distributional target has to be fitted first")
            factor = self._features(measured) @ self.fitted
        return factor if self._floor is None else factor.clamp(min=-self._floor)

    def fit(self, measured: Mapping[str, Tensor], contexts: int) -> None:
        """Fit lambda to samples of the base, equally many in each of the contexts, in order."""
        features = self._features(measured).unflatten(0, (contexts, -1))
        least, most = features.amin(1).mean(0), features.amax(1).mean(0)
        for i, term in enumerate(self.rewards.terms):
            mean, low, high = (float(x[i]) for x in (self._moments, least, most))
            if not low < mean < high:
                raise PostgradError(
                    f"moments: the mean of {term.name!r} is to be {mean:g}, but what samples of "
                    f"the initial policy reach lies between {low:g} and {high:g}"
                )
        self.fitted = fit_moments(features, self._moments)

    def _features(self, measured: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([measured[f"reward/{term.name}"] for term in self.rewards.terms], 1)


def _log_binary(reward: Tensor) -> Tensor:
    """log b; an error unless b is 0 or 1."""
    odd = (reward != 0) & (reward != 1)
    if odd.any():
        raise PostgradError(
            f"reward: target=binary takes rewards of 0 and 1, got {float(reward[odd][0]):g}"
        )
    return reward.log()
