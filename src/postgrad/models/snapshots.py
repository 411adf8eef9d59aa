"""A policy's trainable weights at one moment: previous iterates, moving averages, soups."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from postgrad import processes

Weights = dict[str, Tensor]


class Snapshot:
    """The trainable weights of a module, kept apart; the module can act by them for a while.

    With adapters only the adapters are kept, so a snapshot costs next to nothing. Of a module that
    is sharded each process keeps its share, also if it was sharded later.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._weights: Weights = {
            name: parameter.detach().clone() for name, parameter in _trainable(module)
        }

    @property
    def weights(self) -> Weights:
        """By name, in shares where the module's are."""
        for name, parameter in _trainable(self._module):
            if processes.in_shares(parameter) != processes.in_shares(self._weights[name]):
                self._weights[name] = processes.like(parameter, self._weights[name])
        return self._weights

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, the module computes with these weights, without gradients."""
        own = {name: parameter.data for name, parameter in _trainable(self._module)}
        if any(map(processes.in_shares, own.values())):
            own = {name: value.clone() for name, value in own.items()}
        self._put(self.weights)
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        """Let the module's parameters be these tensors, or have their values if it is sharded."""
        for name, parameter in _trainable(self._module):
            if processes.in_shares(parameter):  # FSDP gathers from memory of its own
                parameter.copy_(weights[name])
            else:
                parameter.data = weights[name]
        torch.clear_autocast_cache()  # it keeps what it rounded by parameter, not by value

    @torch.no_grad()
    def restore(self) -> None:
        """Give the module these weights."""
        for name, parameter in _trainable(self._module):
            parameter.copy_(self.weights[name])

    @torch.no_grad()
    def follow(self, rate: float = 1.0) -> None:
        """Move by `rate` of the way to the module's present weights (1: be them)."""
        for name, parameter in _trainable(self._module):
            self.weights[name].lerp_(parameter, rate)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(processes.like(weight, state[name]))


class LaggingPolicy:
    """What samples when it is brought up to date only now and then, and late.

    At every step that is a multiple of `every` the module's weights are taken, and `delay` steps
    later they take the place of the older ones. The first are there at once.
    """

    def __init__(self, module: nn.Module, every: int, delay: int = 0):
        self._module, self._every, self._delay = module, every, delay
        self._taken: list[tuple[int, Snapshot]] = []

    @contextmanager
    def acting(self, step: int) -> Iterator[None]:
        """Inside, the module computes with what has arrived by this step, without gradients.

        Steps may not go back.
        """
        if not self._taken or (step % self._every == 0 and self._taken[-1][0] < step):
            self._taken.append((step, Snapshot(self._module)))
        while len(self._taken) > 1 and self._taken[1][0] + self._delay <= step:
            self._taken.pop(0)
        with self._taken[0][1].acting():
            yield

    def state_dict(self) -> dict[str, Any]:
        return {str(step): taken.state_dict() for step, taken in self._taken}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._taken = []
        for step, weights in state.items():
            taken = Snapshot(self._module)
            taken.load_state_dict(weights)
            self._taken.append((int(step), taken))


def soup(ingredients: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The weighted sum of weights of one architecture, in float32.

    Shares are not normalised: 1 + alpha and -alpha extrapolate from the second through the first.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        if other.keys() != first.keys() or any(other[n].shape != first[n].shape for n in first):
            raise ValueError("weights of different architectures cannot be added")
    if len(shares) != len(ingredients):
        raise ValueError(f"{len(ingredients)} weights need as many shares, got {len(shares)}")
    return {
        name: sum(
            (
                share * weights[name].float()
                for share, weights in zip(shares, ingredients, strict=True)
            ),
            torch.zeros_like(value, dtype=torch.float32),
        ).to(value.dtype)
        for name, value in first.items()
    }


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
