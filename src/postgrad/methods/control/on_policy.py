"""On-policy actor-critic with generalised advantages: all but the policy's loss."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgrad.advantages.group import batch_standardised
from postgrad.advantages.moments import RewardScale
from postgrad.advantages.temporal import generalised_advantage
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.control.base import Control, EnvironmentSettings
from postgrad.models.control import Policy, PolicyShape, Standardiser, Value
from postgrad.models.distributions import Distribution
from postgrad.objectives.control import clipped_value_loss
from postgrad.sampling.environments import Environments, MakeEnvironment
from postgrad.sampling.interaction import Trajectory, interact
from postgrad.seeding import derive, generator
from postgrad.timing import timed


class OnPolicySettings(EnvironmentSettings):
    """Settings of every on-policy actor-critic."""

    environments: int = setting(8, "environments played at once", gt=0)
    steps_per_iteration: int = setting(
        2048,
        "environment steps collected by one policy, over all environments",
        source="code",
        gt=1,
    )
    m: int = setting(
        10, "passes over the batch by the policy; 1 is vanilla policy gradient", source="code", gt=0
    )
    policy_minibatch: int | None = setting(
        None, "steps in one gradient step of the policy; empty: all of them", source="code", gt=0
    )
    gae_lambda: float = setting(0.95, "lambda of the advantages", source="code", ge=0, le=1)
    entropy_bonus: float = setting(0.0, "weight of the policy's entropy", source="code", ge=0)
    value_epochs: int = setting(
        5, "passes over the batch by the value function", source="code", gt=0
    )
    value_minibatch: int = setting(
        128, "steps in one gradient step of the value", source="code", gt=0
    )
    value_clip: float | None = setting(
        0.2, "largest useful change of a value in one iteration; empty: any", source="code", gt=0
    )
    hidden: list[int] = setting([64, 64], "hidden layers of policy and value", source="code")
    normalise_observations: bool = setting(True, "standardise observations", source="code")
    normalise_rewards: bool = setting(
        True, "divide rewards by the deviation of the discounted return", source="code"
    )


class OnPolicy(Control):
    """Collect with pi_k, estimate advantages by GAE, improve the policy, then fit the value.

    A subclass fills `surrogate`. What networks see is standardised by moments that change only
    between iterations, so pi_k is one policy from its first action to the last of its m steps.
    Before the first iteration one rollout sets these moments and is thrown away. Rewards are
    scaled by the moments of all rollouts, the present one included. Advantages are standardised
    over the batch.
    """

    Config: ClassVar[type[OnPolicySettings]] = OnPolicySettings
    recipe: ClassVar[dict[str, Any]] = {
        "learning_rate": 3e-4,
        "adam_epsilon": 1e-5,
        "clip_norm": 0.5,
        "steps": 100,
    }

    def __init__(
        self,
        config: OnPolicySettings,
        place: Place,
        *,
        environment: MakeEnvironment | None = None,
    ):
        super().__init__(config, place, environment)
        self.settings: OnPolicySettings = config
        if config.steps_per_iteration % config.environments:
            raise PostgradError(
                f"steps_per_iteration: {config.steps_per_iteration} cannot be shared equally by "
                f"environments={config.environments}"
            )
        self.environments = Environments(
            self.make, config.environments, derive(place.seed, "training")
        )
        spaces = self.environments.spaces
        shape = PolicyShape(
            kind="categorical" if spaces.discrete else "gaussian",
            observations=spaces.observations,
            actions=spaces.actions,
            hidden=tuple(config.hidden),
            standardise=config.normalise_observations,
        )
        weights = generator(place.seed, "networks")
        self.policy = Policy(shape, weights).to(place.device)
        self.value = Value(spaces.observations, config.hidden, self.policy.standardise, weights).to(
            place.device
        )
        self.reward_scale = RewardScale(config.environments, config.discount)
        self.iteration = 0

    @abstractmethod
    def surrogate(
        self, policy: Distribution, old: Distribution, batch: Batch
    ) -> tuple[Tensor, Metrics]:
        """The policy's loss of each step `[B]`, and metrics.

        `policy` and `old` are the present and the collecting policy at the batch's observations;
        the batch has actions, old_logprobs and advantages.
        """

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "value": self.value}

    def collect(self, step: int) -> Batch:
        self.iteration = step
        standardise = self.policy.standardise
        with timed("rollout"):
            if isinstance(standardise, Standardiser) and standardise.empty:
                warm_up = self._play("warm-up")
                standardise.update(warm_up.observations.flatten(0, 1).to(self.place.device))
            played = self._play(step)
        with timed("scoring"):
            return self._valued(self.learnt_from(played))

    def learnt_from(self, played: Trajectory) -> Trajectory:
        """What was played, with the rewards that count: by default the environments' own."""
        return played

    def _play(self, stream: int | str) -> Trajectory:
        count = len(self.environments)
        steps = self.settings.steps_per_iteration // count
        draws = generator(self.place.seed, "actions", stream)
        noise = self.policy.noise(steps, count, generator=draws)
        if self.place.device.type == "cpu":
            return interact(self.environments, lambda o, t: self.policy.act(o, noise[t]), steps)
        device, noise = self.place.device, noise.to(self.place.device)
        return interact(
            self.environments, lambda o, t: self.policy.act(o.to(device), noise[t]).cpu(), steps
        )

    @torch.no_grad()
    def _valued(self, played: Trajectory) -> Batch:
        """The batch of all steps, with advantages, returns and the old policy's parameters."""
        device = self.place.device
        ends = played.terminations | played.truncations
        rewards = played.rewards
        if self.settings.normalise_rewards:
            rewards = self.reward_scale(rewards, ends)
        observations = played.observations.flatten(0, 1).to(device)
        values = self.value(observations)
        next_values = self.value(played.next_observations.flatten(0, 1).to(device))
        advantages, returns = generalised_advantage(
            rewards,
            values.cpu().view_as(rewards),
            next_values.cpu().view_as(rewards),
            played.terminations,
            played.truncations,
            discount=self.settings.discount,
            lambda_=self.settings.gae_lambda,
        )
        parameters = self.policy(observations)
        actions = played.actions.flatten(0, 1).to(device)
        episode_returns, episode_lengths = played.episode_ends()
        return Batch(
            observations=observations,
            actions=actions,
            rewards=played.rewards.flatten(),
            advantages=batch_standardised(advantages.flatten(), std="population").to(device),
            returns=returns.flatten().to(device),
            old_values=values,
            old_parameters=parameters,
            old_logprobs=self.policy.read(parameters).logprobs(actions),
            episode_returns=episode_returns,
            episode_lengths=episode_lengths,
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The policy's loss: the surrogate minus the entropy bonus, a mean over steps."""
        policy = self.policy.distribution(batch.observations)
        old = self.policy.read(batch.old_parameters)
        losses, metrics = self.surrogate(policy, old, batch)
        entropy = policy.entropy()
        losses = losses - self.settings.entropy_bonus * entropy
        metrics["entropy"] = float(entropy.detach().mean())
        return losses.sum() / batch.items, metrics

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        values = self.value(batch.observations)
        if self.settings.value_clip is None:
            losses = (values - batch.returns).square()
        else:
            losses = clipped_value_loss(
                values, batch.old_values, batch.returns, self.settings.value_clip
            )
        return losses.sum() / batch.items, {}

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        s = self.settings
        metrics: Metrics = {}
        learnt = _only(batch, "observations actions advantages old_logprobs old_parameters")
        for part in self._passes(learnt, s.m, s.policy_minibatch, "policy"):
            metrics = optimise(self.loss, part, "policy")
        learnt = _only(batch, "observations returns old_values")
        for part in self._passes(learnt, s.value_epochs, s.value_minibatch, "value"):
            value = optimise(self.value_loss, part, "value")
        spread = batch.returns.var()
        left = (batch.returns - batch.old_values).var()
        metrics |= {
            "value_loss": value["loss"],
            "value_gradient_norm": value["gradient_norm"],
            "explained_variance": float(1 - left / spread) if spread > 0 else 0.0,
        }
        if isinstance(self.policy.standardise, Standardiser):
            self.policy.standardise.update(batch.observations)
        return metrics

    def _passes(self, batch: Batch, passes: int, size: int | None, name: str) -> Iterator[Batch]:
        """`passes` times the whole batch, in shuffled minibatches of `size` (or all at once)."""
        for number in range(passes):
            if size is None or size >= len(batch):
                yield batch
                continue
            draws = generator(self.place.seed, "minibatches", self.iteration, name, number)
            order = torch.randperm(len(batch), generator=draws)
            for part in order.split(size):
                yield batch.select(part)

    def state_dict(self) -> dict[str, Any]:
        return {
            "environments": self.environments.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.environments.load_state_dict(state["environments"])
        self.reward_scale.load_state_dict(state["reward_scale"])


def _only(batch: Batch, names: str) -> Batch:
    """The named fields alone: cutting minibatches costs by the field."""
    return Batch(**{name: getattr(batch, name) for name in names.split()})
