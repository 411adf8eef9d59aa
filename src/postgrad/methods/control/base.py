"""What control methods share: the environment, evaluation, and the saved policy."""

from pathlib import Path
from typing import Any, ClassVar

import torch

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.evaluation.control import evaluate_policy
from postgrad.methods.base import Method, Metrics, Place
from postgrad.models.control import Policy, save_policy
from postgrad.sampling.environments import Environments, MakeEnvironment, environment_maker


class EnvironmentSettings(Settings):
    """Which environment, and how it is valued and evaluated."""

    environment: str = setting("CartPole-v1", "a Gymnasium id; `package.module:Name-v0` for yours")
    environment_settings: dict[str, Any] = setting({}, "the environment's keyword arguments")
    episode_limit: int | None = setting(
        None, "steps after which an episode is cut; the environment's own limit when empty", gt=0
    )
    discount: float = setting(0.99, "gamma", source="code", gt=0, le=1)
    evaluation_episodes: int = setting(10, "episodes of one evaluation", gt=0)


class Control(Method):
    """A policy learning in Gymnasium environments.

    A subclass makes `policy` and `environments` and says how to collect and learn. From Python,
    `environment` may be a function that makes an environment.
    """

    Config: ClassVar[type[Settings]] = EnvironmentSettings
    policy: Policy
    environments: Environments

    def __init__(
        self,
        config: EnvironmentSettings,
        place: Place,
        environment: MakeEnvironment | None = None,
    ):
        super().__init__(config, place)
        self.world = config
        self.make = environment or environment_maker(
            config.environment, config.environment_settings, config.episode_limit
        )

    def evaluate(self) -> Metrics:
        return evaluate_policy(self.policy, self.make, self.world.evaluation_episodes)

    def describe_batch(self, batch: Batch) -> Metrics:
        """Mean reward of a step; mean return and length of the episodes that ended here, if any."""
        metrics = {"reward": float(batch.rewards.mean()), "steps_played": self.environments.steps}
        ended = batch.episode_lengths > 0
        if bool(ended.any()):
            metrics["return"] = float(batch.episode_returns[ended].mean())
            metrics["episode_length"] = float(batch.episode_lengths[ended].float().mean())
        return metrics

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        """The first steps of the batch."""
        count = min(5, len(batch))
        return [
            {
                "observation": _numbers(batch.observations[i]),
                "action": _numbers(batch.actions[i]),
                "reward": float(batch.rewards[i]),
                **({"advantage": float(batch.advantages[i])} if "advantages" in batch else {}),
            }
            for i in range(count)
        ]

    def save(self, folder: Path) -> None:
        """Write the policy and its environment's name; `evaluate_saved_policy` reads them."""
        environment = {
            "name": self.world.environment,
            "settings": self.world.environment_settings,
            "episode_limit": self.world.episode_limit,
        }
        save_policy(self.policy, environment, folder)


def _numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:.4g}" for value in values.reshape(-1).tolist())
