"""Mirror descent policy optimisation, on-policy and off-policy."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator
from torch import Tensor, nn

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Method, Metrics, Optimise, Place
from postgrad.methods.control.off_policy import OffPolicy, OffPolicySettings
from postgrad.methods.control.on_policy import OnPolicy, OnPolicySettings
from postgrad.models.distributions import Distribution, SquashedGaussian
from postgrad.objectives.control import mdpo_surrogate, off_policy_mdpo_loss
from postgrad.sampling.environments import MakeEnvironment


class MDPOSettings(OnPolicySettings):
    """Settings of both forms; those of the off-policy form alone are under `off_policy`."""

    form: Literal["on-policy", "off-policy"] = setting(
        "on-policy", "on-policy (or on), or off-policy (or off) for continuous actions"
    )
    step_size: float | None = setting(
        None, "t_k; empty: annealed as 1 - k/K over the K steps of the run", source="code", gt=0
    )
    off_policy: OffPolicySettings = setting(
        OffPolicySettings(),
        "settings of the off-policy form; of the others it shares environment, "
        "environment_settings, episode_limit, discount and evaluation_episodes",
    )

    @field_validator("form", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        # YAML reads a bare on or off as a truth value
        return {True: "on-policy", False: "off-policy", "on": "on-policy", "off": "off-policy"}.get(
            value, value
        )


class OnPolicyMDPO(OnPolicy):
    """The on-policy form; see `MDPO`."""

    settings: MDPOSettings

    @property
    def step_size(self) -> float:
        """t_k of the present iteration k, annealed from 1 and floored at 1/K."""
        if self.settings.step_size is not None:
            return self.settings.step_size
        total = self.place.steps
        return max(1 - self.iteration / total, 1 / total)

    def surrogate(
        self, policy: Distribution, old: Distribution, batch: Batch
    ) -> tuple[Tensor, Metrics]:
        kl = policy.kl(old)
        loss = mdpo_surrogate(
            policy.logprobs(batch.actions), batch.old_logprobs, batch.advantages, kl, self.step_size
        )
        return loss, {"kl": float(kl.detach().mean()), "step_size": self.step_size}


class OffPolicyMDPO(OffPolicy):
    """The off-policy form; see `MDPO`."""

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        parameters = self.policy(batch.observations)
        policy = SquashedGaussian(parameters)
        before = policy.sample_before(batch.noise)
        density = policy.log_density(before)
        # the old policy is asked about the value before tanh, where its density is exact
        old_density = SquashedGaussian(self.previous(batch.observations)).log_density(before)
        both = self.critics.q_values(batch.observations, before.tanh())
        losses = off_policy_mdpo_loss(
            density,
            old_density,
            both[0] if self.settings.critic == "first" else both.min(0).values,
            t=self.settings.step_size,
            entropy_coefficient=self.settings.entropy_coefficient,
            tsallis_q=self.settings.tsallis_q,
        )
        mean, log_std = parameters.chunk(2, dim=-1)
        size = self.settings.regularisation * (mean.square() + log_std.square()).mean(1)
        difference = (density - old_density).detach().sum(1).mean()
        metrics = {
            "kl_estimate": float(difference),
            "entropy": -float(density.detach().sum(1).mean()),
        }
        return (losses + size).sum() / batch.items, metrics


class MDPO(Method):
    """Mirror Descent Policy Optimization (Tomar et al. 2020, arXiv 2005.09814).

    Idea: each iteration maximises the linearised return minus a KL distance to the policy that
    collected the data: mirror descent itself, approximated by m gradient steps, without a hard
    trust region and without clipping.

    On-policy (`form=on`), m full-batch steps on

        J(theta) = mean_i rho_i A_i - (1/t_k) mean_i KL(pi_theta(.|s_i) || pi_k(.|s_i))
        rho_i = pi_theta(a_i|s_i) / pi_k(a_i|s_i),   t_k = max(1 - k/K, 1/K)

    with the exact KL, the new policy first. `m=1` is vanilla policy gradient: the KL's gradient
    is zero at pi_k.

    Off-policy (`form=off`, continuous actions), with c = 1/t, entropy coefficient lambda and a
    reparameterised action a ~ pi_theta:

        L(theta) = mean c L_q(pi_theta(a|s)) + q (lambda - c) L_q(pi_k(a|s)) - Q_1(s, a)

    where L_q = log_{2-q}, the Tsallis logarithm, summed over the action's dimensions (log for
    q = 1). Critics are twin soft Q functions and a V function with a slow target (SAC's first
    version). With c = lambda and q = 1 this is SAC's loss.

    Deviations from the authors' code: t_k is floored at 1/K, where the code starts slightly above
    1; observation moments change between iterations, not within; off-policy data is collected with
    sampled actions (as in the paper) where the code takes the mean action; the target of V uses
    each state's own log-probability, where the code broadcasts to the batch's mean; environment
    steps and gradient steps alternate in blocks of `off_policy.steps_per_iteration`; gradients of
    the off-policy form are clipped as well (`clip_norm=0` for the code's behaviour). The
    on-policy form with a Tsallis entropy is not built.
    """

    Config: ClassVar[type[MDPOSettings]] = MDPOSettings
    recipe: ClassVar[dict[str, Any]] = OnPolicy.recipe
    parts: ClassVar[FourParts] = FourParts(
        mask="none; the KL to pi_k in the objective does its work",
        denominator="collecting policy pi_k",
        advantage="GAE(lambda), standardised over the batch",
        gradient="log pi(a|s), m full-batch steps, minus the gradient of KL(pi || pi_k)/t_k",
    )

    def __init__(
        self,
        config: MDPOSettings,
        place: Place,
        *,
        environment: MakeEnvironment | None = None,
    ):
        super().__init__(config, place)
        self.learner: OnPolicyMDPO | OffPolicyMDPO
        if config.form == "on-policy":
            self.learner = OnPolicyMDPO(config, place, environment=environment)
        else:
            self.learner = OffPolicyMDPO(config, place, config.off_policy, environment=environment)

    def modules(self) -> dict[str, nn.Module]:
        return self.learner.modules()

    def collect(self, step: int) -> Batch:
        return self.learner.collect(step)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.learner.loss(batch)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        return self.learner.update(batch, optimise)

    def evaluate(self) -> Metrics:
        return self.learner.evaluate()

    def describe_batch(self, batch: Batch) -> Metrics:
        return self.learner.describe_batch(batch)

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return self.learner.samples(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)
