"""Random preference games in which a tabular policy learns from pairs that it samples itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.claims.matrix_games import Games
from postgrad.seeding import generator

# of logits `[G, K]` and what was sampled: the loss of each game, `[G]`
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampled:
    """Labelled pairs of independent responses of G policies: how often i won against j.

    `wins` `[G, K, K]` are the shares of the pairs of a game in which i won against j.
    """

    wins: Tensor

    @property
    def drawn(self) -> Tensor:
        """The share of each response among those drawn, `[G, K]`."""
        return (self.wins.sum(-1) + self.wins.sum(-2)) / 2

    @property
    def win_rates(self) -> Tensor:
        """The share of its pairs that a response won, `[G, K]`; 1/2 of what was never drawn."""
        met = self.wins.sum(-1) + self.wins.sum(-2)
        return torch.where(met > 0, self.wins.sum(-1) / met.clamp(min=1e-12), 0.5)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean `[G]` over the pairs, of the loss `[G, K, K]` of every winner and loser."""
        return (self.wins * losses).sum((-1, -2))


def sample_pairs(games: Games, policy: Tensor, pairs: int, *stream: object) -> Sampled:
    """`pairs` pairs of independent responses of a policy `[G, K]` in every game, a label each."""
    random = generator(0, "pairs", *stream)
    count, size = policy.shape
    first, second = (
        torch.multinomial(policy.exp(), pairs, replacement=True, generator=random) for _ in range(2)
    )
    rows = torch.arange(count).unsqueeze(1)
    chance = games.preferences[rows, first, second]
    won = torch.rand(count, pairs, generator=random, dtype=torch.float64) < chance
    winner, loser = torch.where(won, first, second), torch.where(won, second, first)
    wins = torch.zeros(count, size * size, dtype=torch.float64)
    wins.scatter_add_(1, winner * size + loser, torch.ones_like(chance))
    return Sampled(wins.view(count, size, size) / pairs)


def every_pair(values: Tensor) -> Tensor:
    """All ordered pairs of values `[G, K]`, `[G K K, 2]`: the losses of pairs take them so."""
    size = values.shape[-1]
    first = values.unsqueeze(2).expand(-1, -1, size)
    second = values.unsqueeze(1).expand(-1, size, -1)
    return torch.stack([first, second], -1).reshape(-1, 2)


def fitted(policy: Tensor, loss: Loss, steps: int, learning_rate: float = 0.05) -> Tensor:
    """Log-probabilities `[G, K]` after Adam's steps from `policy`; games do not interact."""
    logits = policy.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(logits.log_softmax(-1)).sum().backward()
        optimiser.step()
    return logits.detach().log_softmax(-1)
