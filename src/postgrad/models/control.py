"""Small networks for control: policies from observations to action distributions, and critics."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postgrad.advantages.moments import RunningMoments
from postgrad.errors import PostgradError
from postgrad.models.distributions import Categorical, Distribution, Gaussian, SquashedGaussian

PolicyKind = Literal["categorical", "gaussian", "squashed-gaussian"]
_KINDS: dict[str, type[Categorical | Gaussian | SquashedGaussian]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "squashed-gaussian": SquashedGaussian,
}
DESCRIPTION, WEIGHTS = "control.json", "policy.safetensors"


def multilayer(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.Tanh,
    output_gain: float = 1.0,
) -> nn.Sequential:
    """A perceptron with layers of the given sizes, orthogonal weights and zero biases."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        last = index == len(sizes) - 1
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5, generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, activation()]
    return nn.Sequential(*layers)


class Standardiser(nn.Module):
    """(x - mean) / std of all observations taken in, within [-10, 10] (VecNormalize).

    It changes only when `update` is called, so a policy stays one policy while data is collected
    and learned from. Before the first `update` observations pass unchanged.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.moments = RunningMoments(size)
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @property
    def empty(self) -> bool:
        return not self.moments.count

    def update(self, observations: Tensor) -> None:
        """Take in observations `[n, d]`."""
        self.moments.update(observations)
        self.shift.copy_(self.moments.mean)
        self.scale.copy_((self.moments.variance + 1e-8).rsqrt())

    def forward(self, observations: Tensor) -> Tensor:
        return ((observations - self.shift) * self.scale).clamp(-10, 10)


@dataclass(frozen=True)
class PolicyShape:
    """What is needed to build a policy network; `actions` counts choices or dimensions."""

    kind: PolicyKind
    observations: int
    actions: int
    hidden: tuple[int, ...]
    standardise: bool


class Policy(nn.Module):
    """Observations `[B, d]` to the parameters `[B, P]` of an action distribution.

    - "categorical": logits; - "gaussian": means, and log standard deviations that do not depend on
    the observation; - "squashed-gaussian": means and log standard deviations in [-20, 2], ReLU.
    """

    def __init__(self, shape: PolicyShape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        squashed = shape.kind == "squashed-gaussian"
        self.standardise = Standardiser(shape.observations) if shape.standardise else nn.Identity()
        self.network = multilayer(
            [shape.observations, *shape.hidden, shape.actions * (2 if squashed else 1)],
            generator,
            activation=nn.ReLU if squashed else nn.Tanh,
            output_gain=0.01,
        )
        if shape.kind == "gaussian":
            self.log_std = nn.Parameter(torch.zeros(shape.actions))

    def forward(self, observations: Tensor) -> Tensor:
        output: Tensor = self.network(self.standardise(observations)).float()
        if self.shape.kind == "gaussian":
            return torch.cat([output, self.log_std.expand_as(output)], dim=-1)
        if self.shape.kind == "squashed-gaussian":
            mean, log_std = output.chunk(2, dim=-1)
            return torch.cat([mean, log_std.clamp(-20, 2)], dim=-1)
        return output

    def act(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions drawn with the given noise `[B, A]`, or the modes without."""
        at_states = _KINDS[self.shape.kind](self(observations))
        return at_states.mode() if noise is None else at_states.sample(noise)

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Noise `[*shape, A]` for `act`."""
        return _KINDS[self.shape.kind].noise(*shape, self.shape.actions, generator=generator)

    def distribution(self, observations: Tensor) -> Distribution:
        """The distribution at each state; not for squashed Gaussians, which have no exact KL."""
        return self.read(self(observations))

    def read(self, parameters: Tensor) -> Distribution:
        """The distribution that parameters `[B, P]` of this policy (or an older one) stand for."""
        if self.shape.kind == "categorical":
            return Categorical(parameters)
        if self.shape.kind == "gaussian":
            return Gaussian(parameters)
        raise ValueError(f"a {self.shape.kind} policy has no exact KL")


class Value(nn.Module):
    """V(s) `[B]`; sees observations through the policy's own standardiser."""

    def __init__(
        self,
        observations: int,
        hidden: Sequence[int],
        standardise: nn.Module,
        generator: torch.Generator,
    ):
        super().__init__()
        self.standardise = standardise
        self.network = multilayer([observations, *hidden, 1], generator)

    def forward(self, observations: Tensor) -> Tensor:
        values: Tensor = self.network(self.standardise(observations))
        return values.squeeze(-1).float()


class SoftCritics(nn.Module):
    """Twin Q(s, a) and V(s) with ReLU (SAC's first version, arXiv 1801.01290)."""

    def __init__(
        self, observations: int, actions: int, hidden: Sequence[int], generator: torch.Generator
    ):
        super().__init__()
        self.q = nn.ModuleList(
            multilayer([observations + actions, *hidden, 1], generator, activation=nn.ReLU)
            for _ in range(2)
        )
        self.v = multilayer([observations, *hidden, 1], generator, activation=nn.ReLU)

    def q_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both critics' values `[2, B]`."""
        pair = torch.cat([observations, actions], dim=-1)
        return torch.stack([network(pair).squeeze(-1).float() for network in self.q])

    def forward(self, observations: Tensor) -> Tensor:
        values: Tensor = self.v(observations)
        return values.squeeze(-1).float()


def save_policy(policy: Policy, environment: dict[str, Any], folder: Path) -> None:
    """Write the weights, and a JSON file with the network's shape and the environment's name."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().contiguous() for name, value in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    about = {"policy": asdict(policy.shape), "environment": environment}
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def is_policy(folder: Path) -> bool:
    """Whether `save_policy` wrote this folder."""
    return (folder / DESCRIPTION).is_file()


def load_policy(folder: Path) -> tuple[Policy, dict[str, Any]]:
    """The policy that `save_policy` wrote, and the description of its environment."""
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise PostgradError(f"{folder} holds no control policy: {name} is missing")
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    shape = {**about["policy"], "hidden": tuple(about["policy"]["hidden"])}
    policy = Policy(PolicyShape(**shape), torch.Generator())
    try:
        policy.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise PostgradError(f"{folder / WEIGHTS} holds no weights of a policy: {line}") from error
    return policy, about["environment"]
