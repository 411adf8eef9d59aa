"""Off-policy actor-critic with entropy regularisation: all but the policy's loss."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Metrics, Optimise, Place
from postgrad.methods.control.base import Control, EnvironmentSettings
from postgrad.models.control import Policy, PolicyShape, SoftCritics
from postgrad.models.distributions import SquashedGaussian
from postgrad.objectives.control import one_step_target, soft_value_target, tsallis_log
from postgrad.sampling.environments import Environments, MakeEnvironment
from postgrad.sampling.interaction import interact
from postgrad.sampling.replay import Replay
from postgrad.seeding import derive, generator
from postgrad.timing import timed


class OffPolicySettings(Settings):
    """Settings of an entropy-regularised off-policy actor-critic."""

    steps_per_iteration: int = setting(
        100, "environment steps, then as many gradient steps, in one step of the loop", gt=0
    )
    m: int = setting(
        1000, "gradient steps after which pi_k becomes the present policy", source="README", gt=0
    )
    step_size: float = setting(1.0, "t = 1/c of mirror descent", source="README (c)", gt=0)
    entropy_coefficient: float = setting(0.2, "lambda", source="README", ge=0)
    tsallis_q: float = setting(1.0, "q of the Tsallis entropy; 1 is Shannon's", source="code", gt=0)
    critic: Literal["first", "minimum"] = setting(
        "first", "which of the two critics the policy climbs", source="code"
    )
    batch_size: int = setting(256, "transitions in one gradient step", source="code", gt=0)
    polyak: float = setting(0.005, "how fast the target of V follows", source="code", gt=0, le=1)
    replay: int = setting(1_000_000, "transitions kept", source="code", gt=0)
    warm_start: int = setting(
        10_000, "first steps, with uniform actions and no learning", source="code", ge=0
    )
    regularisation: float = setting(
        1e-3, "weight of the mean squares of mean and log deviation", source="code", ge=0
    )
    hidden: list[int] = setting([256, 256], "hidden layers of every network", source="code")


class OffPolicy(Control):
    """Blocks of environment steps, then as many gradient steps on replayed transitions.

    A subclass fills `policy_loss`. Q_1 and Q_2 regress on r + gamma Vbar(s'); V on min_i Q_i(s, a)
    - lambda log pi(a|s) with a fresh action; Vbar follows V (SAC's first form, arXiv 1801.01290).
    `previous` is pi_k, a frozen copy of the policy.
    """

    def __init__(
        self,
        config: EnvironmentSettings,
        place: Place,
        settings: OffPolicySettings,
        *,
        environment: MakeEnvironment | None = None,
    ):
        super().__init__(config, place, environment)
        self.settings = settings
        self.environments = Environments(
            self.make, 1, derive(place.seed, "training"), unit_actions=True
        )
        spaces = self.environments.spaces
        if not spaces.bounded:
            found = f"{spaces.actions} discrete actions" if spaces.discrete else "unbounded actions"
            raise PostgradError(
                f"form: off-policy MDPO needs continuous actions with bounds, but "
                f"{config.environment} has {found}: choose form=on"
            )
        if settings.replay < max(settings.batch_size, settings.steps_per_iteration):
            raise PostgradError(
                f"off_policy.replay: {settings.replay} is less than off_policy.batch_size or "
                "off_policy.steps_per_iteration"
            )
        shape = PolicyShape(
            "squashed-gaussian",
            spaces.observations,
            spaces.actions,
            tuple(settings.hidden),
            standardise=False,
        )
        weights = generator(place.seed, "networks")
        self.policy = Policy(shape, weights).to(place.device)
        self.critics = SoftCritics(
            spaces.observations, spaces.actions, settings.hidden, weights
        ).to(place.device)
        self.target = deepcopy(self.critics.v).requires_grad_(False)
        self.previous = deepcopy(self.policy).requires_grad_(False)
        self.replay = Replay(settings.replay)
        self.gradient_steps = 0

    @abstractmethod
    def policy_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The policy's loss on replayed observations; `batch.noise` draws its actions."""

    def modules(self) -> dict[str, nn.Module]:
        return {
            "policy": self.policy,
            "critics": self.critics,
            "target": self.target,
            "previous": self.previous,
        }

    def collect(self, step: int) -> Batch:
        """The next block of environment steps, which also enters the replay."""
        self.iteration = step
        steps = self.settings.steps_per_iteration
        draws = generator(self.place.seed, "actions", step)
        noise = self.policy.noise(steps, 1, generator=draws)
        uniform = torch.rand(noise.shape, generator=draws) * 2 - 1
        random_until = self.settings.warm_start - self.environments.steps
        device = self.place.device

        def act(observations: Tensor, t: int) -> Tensor:
            if t < random_until:
                return uniform[t]
            return self.policy.act(observations.to(device), noise[t].to(device)).cpu()

        with timed("rollout"):
            played = interact(self.environments, act, steps)
        fields = {
            "observations": played.observations,
            "actions": played.actions,
            "rewards": played.rewards,
            "next_observations": played.next_observations,
            "terminations": played.terminations,
        }
        flat: dict[str, Any] = {name: values.flatten(0, 1) for name, values in fields.items()}
        self.replay.add(**flat)
        episode_returns, episode_lengths = played.episode_ends()
        return Batch(**flat, episode_returns=episode_returns, episode_lengths=episode_lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.policy_loss(batch)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Half the squared errors of Q_1, Q_2 and V, summed."""
        s = self.settings
        with torch.no_grad():
            q_target = one_step_target(
                batch.rewards,
                self.target(batch.next_observations).squeeze(-1).float(),
                batch.terminations,
                self.world.discount,
            )
            policy = SquashedGaussian(self.policy(batch.observations))
            before = policy.sample_before(batch.noise)
            # one logarithm a dimension; a plain sum for q = 1
            entropy = tsallis_log(policy.log_density(before), 2 - s.tsallis_q).sum(1)
            fresh = self.critics.q_values(batch.observations, before.tanh())
            v_target = soft_value_target(fresh, entropy, s.entropy_coefficient)
        q_errors = self.critics.q_values(batch.observations, batch.actions) - q_target
        v_errors = self.critics(batch.observations) - v_target
        losses = 0.5 * (q_errors.square().sum(0) + v_errors.square())
        return losses.sum() / batch.items, {"q": float(fresh[0].mean())}

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        if self.environments.steps < max(self.settings.warm_start, self.settings.batch_size):
            return {}
        draws = generator(self.place.seed, "replay", self.iteration)
        totals: Metrics = {}
        rounds = self.settings.steps_per_iteration
        for _ in range(rounds):
            for name, value in self._gradient_step(draws, optimise).items():
                totals[name] = totals.get(name, 0.0) + value / rounds
        return totals

    def _gradient_step(self, draws: torch.Generator, optimise: Optimise) -> Metrics:
        size = self.settings.batch_size
        drawn: dict[str, Any] = dict(self.replay.draw(size, draws))
        drawn["noise"] = self.policy.noise(size, generator=draws)
        part = Batch(**{name: values.to(self.place.device) for name, values in drawn.items()})
        critics = optimise(self.critic_loss, part, "critics")
        with frozen(self.critics):
            metrics = optimise(self.policy_loss, part, "policy")
        with torch.no_grad():
            for slow, fast in zip(
                self.target.parameters(), self.critics.v.parameters(), strict=True
            ):
                slow.lerp_(fast, self.settings.polyak)
        self.gradient_steps += 1
        if self.gradient_steps % self.settings.m == 0:
            self.previous.load_state_dict(self.policy.state_dict())
        return {**metrics, "critic_loss": critics["loss"], "q": critics["q"]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "environments": self.environments.state_dict(),
            "replay": self.replay.state_dict(),
            "gradient_steps": self.gradient_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.environments.load_state_dict(state["environments"])
        self.replay.load_state_dict(state["replay"])
        self.gradient_steps = state["gradient_steps"]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within this block gradients pass through the module but none is computed for its weights."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
