"""An exponential moving average of trainable weights, for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Average of a module's trainable parameters, with the decay warmed up as in flow_grpo's code.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that early averages follow.
    Only trainable parameters are held: with adapters the average is as small as they are.
    """

    def __init__(self, module: nn.Module, decay: float):
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the module's weights are the average."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._load(self._average)
        try:
            yield
        finally:
            self._load(trained)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        for name, average in self._average.items():
            average.copy_(state["average"][name])
