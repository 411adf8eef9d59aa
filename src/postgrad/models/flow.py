"""Flow-matching policies: a velocity field over latents, and a small one trained from scratch.

A rectified flow carries noise at time 1 to data at time 0 along dx/dt = v(x, t, prompt). Methods
see nothing but `FlowPolicy`. `digits_flow` is one for scikit-learn's 8x8 digits, pretrained on the
spot and cached; users' diffusers models come in by `postgrad.models.diffusers_flow`.
"""

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postgrad import __version__
from postgrad.errors import MissingExtra, PostgradError
from postgrad.models.cache import cached_folder
from postgrad.objectives.flow import flow_times
from postgrad.seeding import derive, generator

DIGITS = tuple("0123456789")


class FlowPolicy(nn.Module, ABC):
    """A conditional velocity field that can be sampled, scored and trained.

    `network` holds the weights. Latents are `[N, *latent_shape]`, a condition is a prompt. `cost`
    is how many tokens (or pixels' worth of one) an item occupies in a forward pass.
    """

    network: nn.Module
    latent_shape: tuple[int, ...]
    cost: int
    #: the prompts a run takes when it is given none; empty when data must be given
    own_prompts: tuple[str, ...] = ()

    @abstractmethod
    def velocity(self, latents: Tensor, time: Tensor, prompts: Sequence[str]) -> Tensor:
        """dx/dt in the shape of `latents` at `time` `[N]`, in float32."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, C, H, W]` in [0, 1], float32, without gradient."""

    @abstractmethod
    def require(self, prompt: str, where: str) -> None:
        """Raise PostgradError, naming `where` it stands, if this policy cannot take the prompt."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model into `folder`."""

    def times(self, steps: int) -> Tensor:
        """The schedule `[steps + 1]` from time 1 (noise) to 0 (data)."""
        return flow_times(steps)

    def freeze_reference(self) -> None:
        """Keep a frozen copy of the network as it is now, for `reference`."""
        self.frozen = copy.deepcopy(self.network).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this block velocities are those of the network at `freeze_reference`."""
        if not hasattr(self, "frozen"):
            raise ValueError("no reference: call freeze_reference() first")
        trained, self.network = self.network, self.frozen
        try:
            yield
        finally:
            self.network = trained


class VelocityNetwork(nn.Module):
    """A residual perceptron over flattened latents, modulated by time and class."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, blocks: int):
        super().__init__()
        dimensions = math.prod(shape)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(0, 2, 32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.enter = nn.Linear(dimensions, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Linear(width, dimensions)

    def forward(self, latents: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(labels)
        condition = nn.functional.silu(condition)
        hidden = self.enter(latents.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        velocity: Tensor = self.leave(hidden).view_as(latents)
        return velocity


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, 1)
        change: Tensor = self.layers(self.norm(hidden) * (1 + scale) + shift)
        return hidden + change


class ClassFlow(FlowPolicy):
    """A flow over small images `[C, H, W]` in [-1, 1], conditioned on a class by its name."""

    def __init__(
        self, classes: Sequence[str], shape: tuple[int, int, int], width: int, blocks: int
    ):
        super().__init__()
        self.network = VelocityNetwork(shape, len(classes), width, blocks)
        self.latent_shape = shape
        self.cost = 1
        self.own_prompts = tuple(classes)
        self._index = {name: number for number, name in enumerate(classes)}
        self._size = {"width": width, "blocks": blocks}

    def velocity(self, latents: Tensor, time: Tensor, prompts: Sequence[str]) -> Tensor:
        labels = torch.tensor([self._index[name] for name in prompts], device=latents.device)
        velocity: Tensor = self.network(latents, time, labels)
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float() + 1) / 2).clamp(0, 1)

    def require(self, prompt: str, where: str) -> None:
        if prompt not in self._index:
            classes = ", ".join(self._index)
            raise PostgradError(f"{where}: unknown class {prompt!r}: expected one of {classes}")

    def save(self, folder: Path) -> None:
        """`model.safetensors` and `flow.json`; `load_class_flow` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "model.safetensors")
        about = {"classes": self.own_prompts, "shape": self.latent_shape, **self._size}
        (folder / "flow.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_class_flow(folder: Path) -> ClassFlow:
    """The flow that `ClassFlow.save` wrote into `folder`."""
    try:
        about = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
        policy = ClassFlow(about["classes"], tuple(about["shape"]), about["width"], about["blocks"])
        policy.network.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise PostgradError(
            f"model: {folder} holds no class flow that can be read: {line}"
        ) from None
    return policy


@dataclass(frozen=True)
class Pretraining:
    """How a class flow is trained from scratch by flow matching."""

    width: int = 128
    blocks: int = 3
    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 2e-3


def flow_matching_loss(
    policy: FlowPolicy, data: Tensor, prompts: Sequence[str], random: torch.Generator
) -> Tensor:
    """mean (v(x_t, t) - (noise - data))^2 with x_t = (1 - t) data + t noise, t uniform in (0, 1).

    Lipman et al., arXiv 2210.02747, in the rectified form of Liu et al., arXiv 2209.03003.
    """
    time = torch.rand(len(data), generator=random).to(data.device)
    noise = torch.randn(data.shape, generator=random).to(data.device)
    t = time.view(-1, *[1] * (data.ndim - 1))
    velocity = policy.velocity((1 - t) * data + t * noise, time, prompts)
    return (velocity - (noise - data)).square().mean()


def digits_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits: images `[N, 1, 8, 8]` in [0, 1] and labels `[N]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "representation") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(found.target)


def digits_flow(seed: int = 0, pretraining: Pretraining | None = None) -> ClassFlow:
    """A class flow pretrained on the digits, from the cache or made now (in about 15 seconds)."""
    pretraining = pretraining or Pretraining()
    key = {"seed": seed, **asdict(pretraining), "postgrad": __version__}
    folder = cached_folder("digits-flow", key, lambda path: _pretrain(seed, pretraining, path))
    return load_class_flow(folder)


def _pretrain(seed: int, settings: Pretraining, folder: Path) -> None:
    images, labels = digits_images()
    data = images * 2 - 1
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(derive(seed, "digits-flow", "weights"))
        policy = ClassFlow(DIGITS, (1, 8, 8), settings.width, settings.blocks)
        optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        random = generator(seed, "digits-flow", "batches")
        for _ in range(settings.steps):
            chosen = torch.randint(len(data), (settings.batch_size,), generator=random)
            prompts = [DIGITS[label] for label in labels[chosen].tolist()]
            loss = flow_matching_loss(policy, data[chosen], prompts, random)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    policy.save(folder)
