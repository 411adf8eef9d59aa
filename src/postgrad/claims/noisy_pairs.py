"""Pairs of points with a known reward, labels by Bradley-Terry and flips; rewards fitted to them.

A point has 32 standard normal features. The true reward is a random network of one hidden layer,
scaled to a standard deviation of 3. Shifted points lie around another centre, as the responses of
a policy do that has moved on.
"""

from collections.abc import Callable, Iterator
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
HELD_OUT = 4000
CANDIDATES, PROMPTS = 4, 16  # of MetaRM

Reward = Callable[[Tensor], Tensor]  # of points `[..., d]`


@dataclass(frozen=True)
class NoisyPairs:
    """Pairs of points, the one that is labelled as better first.

    `points` `[M, 2, d]` to train on: a label was `flipped` `[M]`, and in the end agrees with the
    true reward, or not (`right` `[M]`). `validation` `[m, 2, d]` has the same noise; `clean` and
    `shifted` `[n, 2, d]` are in true order, the second around another `centre` `[d]`.
    """

    points: Tensor
    flipped: Tensor
    right: Tensor
    validation: Tensor
    clean: Tensor
    shifted: Tensor
    centre: Tensor

    @classmethod
    def draw(cls, seed: int, count: int, flip_rate: float) -> "NoisyPairs":
        world = generator(seed, "noisy pairs")
        inner = torch.randn(FEATURES, HIDDEN, generator=world) / FEATURES**0.5
        outer = torch.randn(HIDDEN, generator=world)

        def raw(points: Tensor) -> Tensor:
            return torch.tanh(2 * points @ inner) @ outer

        scale = SPREAD / raw(torch.randn(4000, FEATURES, generator=world)).std()
        centre = SHIFT * torch.randn(FEATURES, generator=world)

        def ordered(size: int, around: float | Tensor = 0.0) -> Tensor:
            points = around + torch.randn(size, 2, FEATURES, generator=world)
            values = raw(points)
            return _swapped(points, values[:, 0] < values[:, 1])

        def labelled(size: int) -> tuple[Tensor, Tensor, Tensor]:
            points = ordered(size)
            gap = scale * (raw(points)[:, 0] - raw(points)[:, 1])
            chance = torch.rand(2, size, generator=world)
            flipped = chance[1] < flip_rate
            right = (chance[0] < torch.sigmoid(gap)) ^ flipped
            return _swapped(points, ~right), flipped, right

        validation, _, _ = labelled(HELD_OUT)
        return cls(
            *labelled(count), validation, ordered(HELD_OUT), ordered(HELD_OUT, centre), centre
        )

    def train(
        self, epochs: int, *stream: object, treatment: Treatment | None = None, eta: float = 0.0
    ) -> Iterator[Reward]:
        """A reward network after every epoch of Adam; with `eta`, by MetaRM on unlabelled points.

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

        def learn(index: Tensor) -> None:
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

        for step in range(epochs * order.per_epoch):
            index = pairs.kept[order.indices(step)]
            if eta:
                candidates = torch.randn(PROMPTS, CANDIDATES, FEATURES, generator=random)
                spread = spread_of_rewards(network(self.centre + candidates)).mean()
                direction = list(torch.autograd.grad(spread, trainable(network)))
                with displaced(network, direction, eta):
                    learn(index)
            else:
                learn(index)
            if (step + 1) % order.per_epoch == 0:
                yield network

    def ensemble(self, models: int, epochs: int, seed: int) -> list[Reward]:
        """Networks of different initial weights and orders, trained on these very pairs."""
        return [list(self.train(epochs, seed, "ensemble", k))[-1] for k in range(models)]

    @torch.no_grad()
    def strength(self, ensemble: list[Reward]) -> Tensor:
        """mu `[M]` of the pairs."""
        return preference_strength(torch.stack([model(self.points) for model in ensemble]))[0]


def _swapped(points: Tensor, where: Tensor) -> Tensor:
    return torch.where(where[:, None, None], points.flip(1), points)


@torch.no_grad()
def share_right(model: Reward, pairs: Tensor) -> float:
    """How many pairs `[m, 2, d]` a reward orders as they are."""
    rewards = model(pairs)
    return float((rewards[:, 0] > rewards[:, 1]).float().mean())
