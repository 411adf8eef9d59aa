"""Playing environments with a policy: what every control method learns from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from postgrad.sampling.environments import Environments, EpisodeEnd


@dataclass(frozen=True)
class Trajectory:
    """T steps of B environments: tensors `[T, B, ...]`, and for each step the episodes it ended.

    `next_observations` are the states really arrived at, also where an episode ended.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor
    truncations: Tensor
    finished: list[list[EpisodeEnd]]

    def episode_ends(self) -> tuple[Tensor, Tensor]:
        """Return and length of the episode that ended with each step, both `[T * B]`; else 0."""
        returns = torch.zeros(self.rewards.shape)
        lengths = torch.zeros(self.rewards.shape, dtype=torch.long)
        for t, ends in enumerate(self.finished):
            for end in ends:
                returns[t, end.index] = end.total
                lengths[t, end.index] = end.length
        return returns.flatten(), lengths.flatten()


@torch.no_grad()
def interact(
    environments: Environments, act: Callable[[Tensor, int], Tensor], steps: int
) -> Trajectory:
    """Let `act(observations [B, d], t) -> actions` play `steps` steps of every environment.

    `act` runs under inference mode: its result is copied, and carries no gradient.
    """
    spaces = environments.spaces
    count = len(environments)
    vector = (steps, count, spaces.observations)
    observations, arrived = np.empty(vector, np.float32), np.empty(vector, np.float32)
    rewards = np.empty((steps, count), np.float32)
    ends = np.empty((2, steps, count), bool)
    actions = torch.empty(
        (steps, count) if spaces.discrete else (steps, count, spaces.actions),
        dtype=torch.long if spaces.discrete else torch.float32,
    )
    finished: list[list[EpisodeEnd]] = []
    seen = torch.from_numpy(observations)
    with torch.inference_mode():
        for t in range(steps):
            observations[t] = environments.observations
            action = act(seen[t], t)
            actions[t] = action
            outcome = environments.step(action)
            arrived[t], rewards[t] = outcome.observations, outcome.rewards
            ends[0, t], ends[1, t] = outcome.terminations, outcome.truncations
            finished.append(outcome.finished)
    return Trajectory(
        observations=seen,
        actions=actions,
        rewards=torch.from_numpy(rewards),
        next_observations=torch.from_numpy(arrived),
        terminations=torch.from_numpy(ends[0]),
        truncations=torch.from_numpy(ends[1]),
        finished=finished,
    )
