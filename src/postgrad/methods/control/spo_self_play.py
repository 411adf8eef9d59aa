"""Self-Play Preference Optimization, for control."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from postgrad.advantages.group import batch_standardised
from postgrad.advantages.pairing import PreferenceQueue
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.control.ppo import PPO
from postgrad.rewards import RewardSpec, load_rewards
from postgrad.rewards.preferences import Judge, higher_return
from postgrad.sampling.environments import MakeEnvironment
from postgrad.sampling.interaction import Trajectory
from postgrad.seeding import generator


class SelfPlayControl(PPO):
    """Self-Play Preference Optimization (Swamy et al. 2024, arXiv:2401.04056) for Gymnasium.

    The control form of `spo-self-play`. No reward is learnt or needed: whole trajectories are
    compared, and how much a trajectory xi is preferred to the last ones of recent policies (the
    queue Q) is its reward, split evenly over its |xi| steps. Any learner may follow; here it is
    PPO.

        M(xi, xi') = 2 P(xi preferred to xi') - 1
        r(xi) = 1/|Q| sum_{xi' in Q} M(xi, xi'),        r_h = r(xi)/|xi|

    A preference is a function of the user's, `prefer(first, second) -> list[float]`: probabilities
    for pairs of trajectories, each with `observations` [H, d], `actions` and `rewards` [H] (the
    environment's own). `preference=return` compares the sums of those rewards.

    Deviations: PPO in place of SAC, so no reward is older than its iteration; every iteration
    begins with fresh episodes, and steps of episodes that are not finished at its end are left out;
    the end of an episode is the end of the sum, also at a time limit; a trajectory is divided by
    its own length; at the start the queue is filled with the first trajectories. `discount` is 1,
    as below 1 a trajectory's steps no longer sum to its reward. The paper's selection of the best
    policy on validation is left to the user.
    """

    class Config(PPO.Config):
        discount: float = setting(
            1.0, "gamma; with 1 the steps of a trajectory sum to its reward", source="paper",
            gt=0, le=1,
        )  # fmt: skip
        preference: RewardSpec = setting(
            "return", "what compares two trajectories: return, module:function or file.py:function"
        )
        flip_rate: float = setting(
            0.0, "share of verdicts that are turned round, to study noise", ge=0, le=0.5
        )
        queue: int = setting(
            10, "past trajectories that a new one is compared with", source="(uncertain)", gt=0
        )
        preference_time_limit: float = setting(60.0, "seconds a comparison may take", gt=0)

    settings: Config
    parts: ClassVar[FourParts] = FourParts(
        mask="PPO's: 1 where rho moved less than clip towards the advantage's sign, else 0",
        denominator="collecting policy pi_k",
        advantage="GAE(lambda) of r(xi)/|xi| a step, standardised over the batch",
        gradient="log pi(a|s), m passes of minibatches",
    )

    def __init__(
        self,
        config: Config,
        place: Place,
        *,
        environment: MakeEnvironment | None = None,
        preference: Any = None,
    ):
        super().__init__(config, place, environment=environment)
        self.settings = config
        given = config.preference if preference is None else preference
        function = higher_return if given == "return" else given
        self.preference = Judge(load_rewards(function, time_limit=config.preference_time_limit))
        self.queue = PreferenceQueue(config.queue)
        limit = config.episode_limit or self.environments.episode_limit
        if limit is None:
            raise PostgradError(
                f"episode_limit: trajectories are compared as a whole, and {config.environment} "
                "has no limit of its own: set one"
            )
        if limit * config.environments > config.steps_per_iteration:
            raise PostgradError(
                f"steps_per_iteration: {config.steps_per_iteration} steps of environments="
                f"{config.environments} may not hold a whole episode of {limit}: at least "
                f"{limit * config.environments} are needed"
            )

    def check(self) -> None:
        spaces = self.environments.spaces
        actions = torch.zeros(2).long() if spaces.discrete else torch.zeros(2, spaces.actions)
        still = {
            "observations": torch.zeros(2, spaces.observations),
            "actions": actions,
            "rewards": torch.zeros(2),
        }
        self._signed([still], [still], generator(self.place.seed, "check"))

    def _signed(
        self,
        first: list[dict[str, Tensor]],
        second: list[dict[str, Tensor]],
        draws: torch.Generator,
    ) -> list[float]:
        """M in [-1, 1] of every pair, some of them turned round."""
        said = torch.tensor(self.preference([{"prompt": None}] * len(first), first, second))
        turned = torch.rand(len(first), generator=draws) < self.settings.flip_rate
        signed: list[float] = torch.where(turned, 1 - 2 * said, 2 * said - 1).tolist()
        return signed

    def _play(self, stream: int | str) -> Trajectory:
        self.environments.restart()
        return super()._play(stream)

    def learnt_from(self, played: Trajectory) -> Trajectory:
        """The finished episodes with their preferences as rewards; unfinished ones have none."""
        ends = played.terminations | played.truncations
        places = list(_finished(ends))
        if not places:
            raise PostgradError(
                f"steps_per_iteration: no episode of {self.world.environment} ended within "
                f"{len(ends)} steps, so there is no trajectory to compare"
            )
        trajectories = [
            {
                "observations": played.observations[steps, column].clone(),
                "actions": played.actions[steps, column].clone(),
                "rewards": played.rewards[steps, column].clone(),
            }
            for steps, column in places
        ]
        if not len(self.queue):
            for trajectory in trajectories[: self.settings.queue]:
                self.queue.push(trajectory)
        draws = generator(self.place.seed, "flips", self.iteration)
        rewards = torch.zeros_like(played.rewards)
        for (steps, column), trajectory in zip(places, trajectories, strict=True):
            reward = self.queue.reward(
                trajectory, lambda first, second: self._signed(first, second, draws)
            )
            rewards[steps, column] = reward / (steps.stop - steps.start)
            self.queue.push(trajectory)
        return replace(
            played, rewards=rewards, terminations=ends, truncations=torch.zeros_like(ends)
        )

    def collect(self, step: int) -> Batch:
        """The steps of finished episodes."""
        batch = super().collect(step)
        ends = (batch.episode_lengths > 0).view(-1, len(self.environments))
        finished = ends.flip(0).cumsum(0).flip(0).flatten() > 0
        kept = batch.select(finished.nonzero().squeeze(1))
        # the advantages were standardised together with steps that do not count
        return kept.with_fields(advantages=batch_standardised(kept.advantages, std="population"))

    def describe_batch(self, batch: Batch) -> Metrics:
        ended = batch.episode_lengths > 0
        preferred = batch.rewards[ended] * batch.episode_lengths[ended]
        return {
            **super().describe_batch(batch),
            "preference": float(preferred.mean()),
            "trajectories": int(ended.sum()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "queue": self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.queue.load_state_dict(state["queue"])


def _finished(ends: Tensor) -> Iterator[tuple[slice, int]]:
    """Steps and environment of each episode that ended, in the order of their ends `[T, B]`."""
    begun = [0] * ends.shape[1]
    for step, column in ends.nonzero().tolist():
        yield slice(begun[column], step + 1), column
        begun[column] = step + 1
