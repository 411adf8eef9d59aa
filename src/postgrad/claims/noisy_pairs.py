"""Pairs of points with a known reward, labels by Bradley-Terry and flips; rewards fitted to them.

A point has 32 standard normal features. The true reward is a random network of one hidden layer,
scaled to a standard deviation of 3. Shifted points lie around another centre, as the responses of
a policy do that has moved on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postgrad.methods.language.rlhf.preference_strength import Treatment, untreated
from postgrad.methods.language.rlhf.shifted_responses import displaced, trainable
from postgrad.objectives.reward_modeling import (
    bradley_terry,
    preference_strength,
    spread_of_rewards,
)
from postgrad.sampling.epochs import Epochs
from postgrad.seeding import derive, generator

FEATURES, HIDDEN, SPREAD, SHIFT = 32, 64, 3.0, 1.0
BATCH, RATE = 64, 1e-3
CANDIDATES, PROMPTS = 4, 16  # of MetaRM


@dataclass(frozen=True)
class NoisyPairs:
    """`points` `[M, 2, d]`, chosen first; where a label was `flipped` `[M]` or agrees with the true
    reward, `right` `[M]`; and pairs `[m, 2, d]` in true order, of the same points and shifted."""

    points: Tensor
    flipped: Tensor
    right: Tensor
    clean: Tensor
    shifted: Tensor
    centre: Tensor

    @classmethod
    def draw(cls, seed: int, count: int, flip_rate: float, held_out: int = 4000) -> "NoisyPairs":
        world = generator(seed, "noisy pairs")
        inner = torch.randn(FEATURES, HIDDEN, generator=world) / FEATURES**0.5
        outer = torch.randn(HIDDEN, generator=world)

        def raw(points: Tensor) -> Tensor:
            return torch.tanh(2 * points @ inner) @ outer

        probe = raw(torch.randn(4000, FEATURES, generator=world))
        centre = SHIFT * torch.randn(FEATURES, generator=world)

        def reward(points: Tensor) -> Tensor:
            return SPREAD * raw(points) / probe.std()

        def ordered(points: Tensor) -> Tensor:
            values = reward(points)
            swap = values[:, 0] < values[:, 1]
            return torch.where(swap[:, None, None], points.flip(1), points)

        points = ordered(torch.randn(count, 2, FEATURES, generator=world))
        gap = reward(points).diff(dim=1).abs().squeeze(1)
        chance = torch.rand(2, count, generator=world)
        flipped = chance[1] < flip_rate
        right = (chance[0] < torch.sigmoid(gap)) ^ flipped
        points = torch.where(right[:, None, None], points, points.flip(1))
        clean = ordered(torch.randn(held_out, 2, FEATURES, generator=world))
        shifted = ordered(centre + torch.randn(held_out, 2, FEATURES, generator=world))
        return cls(points, flipped, right, clean, shifted, centre)

    def fit(
        self, epochs: int, *stream: object, treatment: Treatment | None = None, eta: float = 0.0
    ) -> Callable[[Tensor], Tensor]:
        """A reward network after `epochs` of Adam; with `eta`, by MetaRM on unlabelled points.

        `stream` names its initial weights and the order of the pairs.
        """
        pairs = treatment or untreated(len(self.points), 0.0)
        torch.manual_seed(derive(0, "network", *stream))
        network = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 1), nn.Flatten(-2),
        )  # fmt: skip
        optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
        random = generator(0, "candidates", *stream)
        order = Epochs(len(pairs.kept), BATCH, derive(0, "order", *stream))
        for step in range(epochs * order.per_epoch):
            index = pairs.kept[order.indices(step)]

            def learn(index: Tensor = index) -> None:
                rewards = network(self.points[index])
                losses = bradley_terry(
                    rewards[:, 0] - rewards[:, 1],
                    smoothing=pairs.smoothing[index],
                    margin=pairs.margin[index],
                    flip=pairs.flip[index],
                )
                optimiser.zero_grad()
                losses.mean().backward()
                optimiser.step()

            if not eta:
                learn()
                continue
            candidates = torch.randn(PROMPTS, CANDIDATES, FEATURES, generator=random)
            spread = spread_of_rewards(network(self.centre + candidates)).mean()
            direction = list(torch.autograd.grad(spread, trainable(network)))
            with displaced(network, direction, eta):
                learn()
        return network.requires_grad_(False)

    def strength(self, models: int, epochs: int, seed: int) -> tuple[Tensor, Tensor]:
        """mu and sigma `[M]` of an ensemble trained on these very pairs."""
        ensemble = [self.fit(epochs, seed, "ensemble", k) for k in range(models)]
        return preference_strength(torch.stack([model(self.points) for model in ensemble]))


def share_right(model: Callable[[Tensor], Tensor], ordered: Tensor) -> float:
    """How many pairs `[m, 2, d]` in true order a reward orders so."""
    rewards = model(ordered)
    return float((rewards[:, 0] > rewards[:, 1]).float().mean())
