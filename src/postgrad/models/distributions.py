"""Distributions over actions, each made from one tensor of parameters, so that it can be kept.

A policy network maps observations to parameters `[B, P]`; `Categorical(parameters)` and the like
give log-probabilities, exact KL, entropy and samples. Keeping the parameters of a batch keeps the
old policy at its states exactly, without a copy of the network.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Distribution(ABC):
    """Independent action distributions at B states, from `parameters` `[B, P]`."""

    parameters: Tensor

    @staticmethod
    @abstractmethod
    def noise(*shape: int, generator: torch.Generator) -> Tensor:
        """Noise `[*shape]` for `sample`; the last dimension is that of actions."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Actions drawn with the given noise `[B, A]`."""

    @abstractmethod
    def mode(self) -> Tensor:
        """The likeliest actions (for a squashed Gaussian: the squashed mean)."""

    @abstractmethod
    def logprobs(self, actions: Tensor) -> Tensor:
        """log pi(a|s) of one action per state, `[B]`."""

    @abstractmethod
    def kl(self, other: "Distribution") -> Tensor:
        """Exact KL(self || other) at each state, `[B]`."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats at each state, `[B]`."""


class Categorical(Distribution):
    """A choice among A actions from logits `[B, A]`; actions are integers `[B]`."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.log_table = torch.log_softmax(parameters, dim=-1)

    @staticmethod
    def noise(*shape: int, generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise: the argmax of logits plus it is a sample."""
        return -torch.empty(shape).exponential_(generator=generator).log()

    def sample(self, noise: Tensor) -> Tensor:
        return (self.parameters + noise).argmax(-1)

    def mode(self) -> Tensor:
        return self.parameters.argmax(-1)

    def logprobs(self, actions: Tensor) -> Tensor:
        return self.log_table.gather(-1, actions[:, None])[:, 0]

    def kl(self, other: Distribution) -> Tensor:
        if not isinstance(other, Categorical):
            raise ValueError(f"expected a Categorical, got {type(other).__name__}")
        return (self.log_table.exp() * (self.log_table - other.log_table)).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.log_table.exp() * self.log_table).sum(-1)


class Gaussian(Distribution):
    """A diagonal Gaussian from means and log standard deviations `[B, 2A]`; actions `[B, A]`."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, self.log_std = parameters.chunk(2, dim=-1)

    @staticmethod
    def noise(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_density(self, actions: Tensor) -> Tensor:
        """Log-density of each dimension of the actions, `[B, A]`."""
        scaled = (actions - self.mean) * (-self.log_std).exp()
        return -0.5 * scaled.square() - self.log_std - _HALF_LOG_TWO_PI

    def logprobs(self, actions: Tensor) -> Tensor:
        return self.log_density(actions).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        if not isinstance(other, Gaussian):
            raise ValueError(f"expected a Gaussian, got {type(other).__name__}")
        # written in differences, so that it is exactly 0 for equal distributions
        difference = self.log_std - other.log_std
        shift = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * (torch.expm1(2 * difference) + shift.square()) - difference).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + _HALF_LOG_TWO_PI + 0.5).sum(-1)


class SquashedGaussian:
    """tanh of a diagonal Gaussian, with actions in (-1, 1); parameters `[B, 2A]` as in `Gaussian`.

    Log-densities take the value `before` tanh: recovering it from an action by atanh is inaccurate
    near the edge. There is no closed form of the entropy, and none is offered.
    """

    noise = staticmethod(Gaussian.noise)

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.gaussian = Gaussian(parameters)

    def sample_before(self, noise: Tensor) -> Tensor:
        """Values before tanh `[B, A]`, differentiable in the parameters."""
        return self.gaussian.sample(noise)

    def sample(self, noise: Tensor) -> Tensor:
        return self.sample_before(noise).tanh()

    def mode(self) -> Tensor:
        return self.gaussian.mode().tanh()

    def log_density(self, before: Tensor) -> Tensor:
        """Log-density of each dimension of the action tanh(before), `[B, A]`.

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) stays finite for every u.
        """
        squash = 2 * (math.log(2) - before - functional.softplus(-2 * before))
        return self.gaussian.log_density(before) - squash
