"""Means over samples seen so far: partition functions, and a baseline over a window."""

import math

import torch
from torch import Tensor


class PartitionFunctions:
    """Z_c = sum_x P(x|c) of many contexts c: the mean of P(x)/q(x) over all samples x ~ q so far.

    Kept as logarithms, so that targets of any scale fit. A context without a sample of positive P
    has log Z = -inf.
    """

    def __init__(self, contexts: int):
        self._log_sums = torch.full((contexts,), -math.inf, dtype=torch.float64)
        self._counts = torch.zeros(contexts, dtype=torch.float64)

    @torch.no_grad()
    def update(self, contexts: Tensor, log_weights: Tensor) -> None:
        """Take in log P(x)/q(x) `[n]` of samples in the contexts `[n]`."""
        if contexts.ndim != 1 or contexts.shape != log_weights.shape:
            raise ValueError(
                "contexts and log_weights must both be [n], got "
                f"{list(contexts.shape)} and {list(log_weights.shape)}"
            )
        if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
            raise ValueError("log P/q must be numbers below +inf")
        for context in contexts.unique().tolist():
            found = log_weights[contexts == context].double()
            self._log_sums[context] = torch.cat([self._log_sums[[context]], found]).logsumexp(0)
            self._counts[context] += len(found)

    def log(self, contexts: Tensor) -> Tensor:
        """log Z `[n]` float64 of the contexts `[n]`; NaN where nothing was sampled."""
        return self._log_sums[contexts] - self._counts[contexts].log()

    @property
    def empty(self) -> bool:
        """Whether no sample so far had a positive P."""
        return bool((self._log_sums == -math.inf).all())

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_sums": self._log_sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._log_sums.copy_(state["log_sums"])
        self._counts.copy_(state["counts"])


class MovingMean:
    """The mean of the last values, at most `window` of them; 0 before the first."""

    def __init__(self, window: int):
        if window < 1:
            raise ValueError(f"the window must hold at least one value, got {window}")
        self._window = window
        self._values = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in values `[n]`."""
        self._values = torch.cat([self._values, values.double()])[-self._window :]

    @property
    def value(self) -> float:
        return float(self._values.mean()) if len(self._values) else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self._values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._values = state["values"].clone()
