"""PPO with a value head on language: what the methods of reinforcement learning from human feedback
are built on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from postgrad.advantages.group import batch_standardised
from postgrad.advantages.penalties import AdaptiveCoefficient
from postgrad.advantages.temporal import token_advantages
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Method, Metrics, Optimise, Place
from postgrad.methods.language.base import (
    Given,
    RolloutSettings,
    draw_responses,
    find_materials,
    prompt_minibatches,
    render_prompts,
    require_minibatches,
)
from postgrad.methods.language.comparisons import SCORING_TOKENS
from postgrad.methods.language.correction import EngineCorrection
from postgrad.methods.language.critics import find_critic, require_readable
from postgrad.methods.language.frontier import Frontier, FrontierSettings
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward
from postgrad.methods.language.rollouts import (
    describe_rollouts,
    rollout_batch,
    rollout_rows,
)
from postgrad.models.language import LanguagePolicy, load_policy
from postgrad.models.scalar import ScalarModel
from postgrad.objectives.control import clipped_value_loss
from postgrad.objectives.policy_gradient import (
    aggregate,
    clip_fractions,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
)
from postgrad.sampling.generation import Rollouts
from postgrad.timing import timed


class ActorCriticSettings(RewardedSettings):
    """Settings of PPO with a value head."""

    batch_size: int = setting(32, "prompts a step", gt=0)
    rollout: RolloutSettings = setting(RolloutSettings(samples=1), "how the policy is sampled")
    critic: str | None = setting(
        None, "reward model (a folder or a Hub id) that the critic starts from; if empty, the body "
        "of the policy"
    )  # fmt: skip
    critic_rate: float = setting(
        10.0, "the critic's learning rate, in multiples of the policy's", gt=0, source="OpenRLHF"
    )
    epochs: int = setting(4, "passes over the rollouts of a step", gt=0, source="TRL")
    minibatches: int = setting(1, "optimiser steps a pass", gt=0, source="TRL")
    clip: float = setting(0.2, "the ratio is clipped to 1 ± clip", gt=0, lt=1, source="paper")
    value_clip: float | None = setting(
        0.2, "new values are clipped to old ones ± value_clip", gt=0, source="TRL"
    )
    discount: float = setting(1.0, "gamma", gt=0, le=1, source="TRL")
    gae_lambda: float = setting(0.95, "lambda of the advantages", ge=0, le=1, source="TRL")
    standardise: bool = setting(True, "advantages to mean 0, deviation 1 over a batch's tokens")
    aggregation: Literal["token-mean", "sequence-mean"] = setting(
        "token-mean", "how token losses become one", source="TRL"
    )
    kl_coefficient: float = setting(
        0.05, "of the KL to the reference, in each token's reward", ge=0, source="TRL"
    )
    kl_target: float | None = setting(
        None, "KL in nats a response that the coefficient is steered to; if empty it is fixed", gt=0
    )
    kl_estimate: Literal["k1", "k3", "full"] = setting(
        "k1", "of a token: estimates from the sampled one, or the sum over the vocabulary, for "
        "another forward pass of policy and reference", source="TRL"
    )  # fmt: skip
    missing_end_penalty: float = setting(
        0.0, "taken off the reward of a response that did not end in time", ge=0
    )
    frontier: FrontierSettings = setting(
        FrontierSettings(), "reward and KL of fresh samples, in every evaluation"
    )


class ActorCritic(Method):
    """Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv:1707.06347; on
    language: Ziegler et al. 2019, arXiv:1909.08593, Ouyang et al. 2022, arXiv:2203.02155).

    The policy is rewarded for its whole response y and pays for every token that the reference
    would not have written; a critic V of the size of the policy says what a beginning is worth.

        r_t = -beta log(pi_old(y_t|s_t) / pi_ref(y_t|s_t)) + [t last] R(x, y)
        A   = GAE(gamma, lambda) of r and V, standardised over the batch's tokens
        L   = mean max(-rho A, -clip(rho, 1 - eps, 1 + eps) A),   rho = pi(y_t) / pi_old(y_t)
        L_V = mean max((V - G)^2, (V_old + clip(V - V_old, -eps_V, eps_V) - G)^2) / 2,
        G   = A + V_old

    G takes A before it is standardised. Two networks, two optimisers: nothing is shared, so there
    is no weight between the two losses but `critic_rate`. A subclass changes what a response is
    worth (`judge`), or what its tokens are (`token_rewards`).
    """

    Config = ActorCriticSettings
    recipe = {
        "precision": "auto",
        "learning_rate": 1e-6,
        "clip_norm": 1.0,
        "steps": 100,
    }
    parts = FourParts(
        mask="PPO clip: no gradient where the ratio leaves [1 - eps, 1 + eps] on the winning side",
        denominator="the policy that sampled",
        advantage="GAE(gamma, lambda) of token rewards and a critic, standardised over the batch",
        gradient="token log-likelihood ratio",
    )
    data_format: ClassVar[str | tuple[str, ...]] = "prompts"  # or richer ones, which hold prompts
    config: ActorCriticSettings

    def __init__(
        self,
        config: ActorCriticSettings,
        place: Place,
        *,
        reward: Any = None,
        **given: Unpack[Given],
    ):
        super().__init__(config, place)
        require_minibatches(config.minibatches, config.batch_size)
        found = find_materials(
            config,
            place,
            self.data_format,
            given,
            held_out_formats="prompts",
            corrected=True,
        )
        self.policy, self.data, self.order = found.policy, found.data, found.order
        self.correction = EngineCorrection(self.policy, config.rollout)
        self.reward = self.find_reward(reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        self.policy.freeze_reference()
        self.critic = self._find_critic()
        self.kl_coefficient = AdaptiveCoefficient(config.kl_coefficient, config.kl_target)
        self.frontier = Frontier.of(
            config, config.frontier, found, place, rewards=self.reward.functions
        )

    def find_reward(self, reward: Any) -> TaskReward:
        """The reward that was passed from Python, or the one that settings or data name."""
        return TaskReward(self.config, self.data, reward)

    def _find_critic(self) -> ScalarModel:
        return find_critic(
            self.config.critic, self.policy, self.config, self.place, self._longest()
        )

    def _longest(self) -> int:
        return max(map(len, self.prompts)) + self.config.rollout.max_new_tokens

    def other_policy(
        self, key: str, name: str | None, given: LanguagePolicy | None = None
    ) -> LanguagePolicy:
        """Another model of the policy's tokens: what the setting `key` names, or was `given`."""
        if given is None and not name:
            raise PostgradError(f"{key}: expected a folder or the Hub id of a model, got nothing")
        if given is None:
            try:
                given = load_policy(
                    str(name),
                    device=self.place.device,
                    trust_remote_code=self.config.trust_remote_code,
                )
            except PostgradError as problem:
                raise PostgradError(f"{key}: {problem}") from problem
        require_readable(key, str(name), given, self.policy, self.config, self._longest())
        return given

    def judge(
        self, rows: list[dict[str, Any]], rollouts: Rollouts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What responses to the prompts of N rows are worth `[N]`, and the terms of it `[N]`."""
        return self.reward.of(rows, rollouts)

    def token_rewards(self, batch: Batch) -> Tensor:
        """The reward of each token `[N, T]`; 0 at padding.

        The batch has everything but these and what follows from them: `reward` `[N]`,
        `old_logprobs` and `reference_logprobs` `[N, T]` among it.
        """
        worth = batch.reward - self.config.missing_end_penalty * (~batch.finished).float()
        return at_last_token(worth, batch.mask) - self.kl_penalty(batch)

    def kl_penalty(self, batch: Batch) -> Tensor:
        """What each token pays for its KL to the reference `[N, T]`; 0 at padding."""
        kind = self.config.kl_estimate
        if kind == "full":
            with timed("scoring"):
                divergence = over_tokens(batch, self._divergence)
        else:
            divergence = kl_estimate(batch.old_logprobs, batch.reference_logprobs, batch.mask, kind)
        return self.kl_coefficient.value * divergence

    def check(self) -> None:
        self.reward.probe()

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critic": self.critic}

    def rates(self) -> dict[str, float]:
        return {"critic": self.config.critic_rate}

    def collect(self, step: int) -> Batch:
        return self.collected(self.order.indices(step).tolist(), step)

    def collected(self, index: list[int], step: int) -> Batch:
        """The batch of fresh responses to the prompts of the rows `index`."""
        rollouts, fields = self.responses(index, step)
        rows, group = self.owners(index)
        reward, terms = self.judge(rows, rollouts)
        batch = rollout_batch(rollouts, step, group=group, reward=reward, terms=terms, **fields)
        return self.with_advantages(self.with_known(batch))

    def owners(self, index: list[int]) -> tuple[list[dict[str, Any]], Tensor]:
        """The row of data of each of the N responses to rows `index`, and its prompt `[N]`."""
        samples = self.config.rollout.samples
        rows = [self.data.rows[i] for i in index for _ in range(samples)]
        return rows, torch.arange(len(index)).repeat_interleave(samples)

    def responses(self, index: list[int], step: int) -> tuple[Rollouts, dict[str, Any]]:
        """Responses to the prompts of rows `index`, and more fields of the batch about them."""
        return draw_responses(
            self.policy,
            [self.prompts[i] for i in index],
            self.config.rollout,
            self.place.seed,
            "rollout",
            step,
        ), {}

    def with_known(self, batch: Batch) -> Batch:
        """The batch with what stays fixed while it is learnt from: log-probabilities and values."""
        with timed("scoring"):
            with self.policy.reference():
                reference = over_tokens(batch, self._score)
            return batch.with_fields(
                old_logprobs=over_tokens(batch, self._score),
                reference_logprobs=reference,
                old_values=over_tokens(batch, self._values),
            )

    def with_advantages(self, batch: Batch) -> Batch:
        """The batch with token rewards, advantages and returns, all `[N, T]`."""
        rewards = self.token_rewards(batch)
        advantages, returns = token_advantages(
            rewards,
            batch.old_values,
            batch.mask,
            discount=self.config.discount,
            lambda_=self.config.gae_lambda,
        )
        if self.config.standardise:
            advantages = batch_standardised(advantages, batch.mask)
        return batch.with_fields(token_rewards=rewards, advantages=advantages, returns=returns)

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        config = self.config
        return prompt_minibatches(batch, config.epochs, config.minibatches, self.place.seed)

    def update(self, batch: Batch, optimise: Optimise) -> Metrics:
        every = []
        for part in self.minibatches(batch):
            metrics = optimise(self.loss, part, "policy")
            value = self.learn_values(part, optimise)
            metrics |= {"value/loss": value["loss"], "value/gradient_norm": value["gradient_norm"]}
            every.append(metrics)
        self.kl_coefficient.update(self.divergence(batch))
        return {name: sum(m[name] for m in every) / len(every) for name in every[0]}

    def divergence(self, batch: Batch) -> float:
        """KL to the reference in nats a response, which the coefficient is steered by."""
        return float((batch.old_logprobs - batch.reference_logprobs).sum(1).mean())

    def learn_values(self, batch: Batch, optimise: Optimise) -> Metrics:
        """The critic's step on a minibatch."""
        return optimise(self.value_loss, batch, "critic")

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        return self.config.clip, self.config.clip

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The policy's: PPO's clipped surrogate."""
        new = self._score(batch)
        length, (low, high) = new.shape[1], self.clip_range
        mask = batch.mask[:, :length].to(new.device)
        advantages = batch.advantages[:, :length].to(new)
        ratio = importance_ratio(new, batch.old_logprobs[:, :length].to(new), mask)
        per_token = clipped_surrogate(ratio, advantages, low, high)
        if self.correction.needed:
            old = batch.old_logprobs[:, :length].to(new)
            per_token = per_token * self.correction.weights(batch, old, mask)
        clipped = clip_fractions(ratio.detach(), advantages, low, high, mask)
        metrics = {f"ratio/{name}": value for name, value in clipped.items()}
        metrics["ratio/mean"] = float(ratio.detach()[mask].mean()) if mask.any() else 1.0
        return self._aggregated(per_token, mask, batch), metrics

    def engine_metrics(self) -> Metrics:
        return {**super().engine_metrics(), **self.correction.metrics()}

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The critic's: half the squared error to the returns, clipped on the safe side."""
        values = self._values(batch)
        length, clip = values.shape[1], self.config.value_clip
        mask = batch.mask[:, :length].to(values.device)
        returns = batch.returns[:, :length].to(values)
        if clip is None:
            errors = (values - returns).square()
        else:
            old = batch.old_values[:, :length].to(values)
            errors = clipped_value_loss(values, old, returns, clip)
        return self._aggregated(errors / 2, mask, batch), {}

    def _aggregated(self, per_token: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        if batch.tokens == 0:
            return 0.0 * per_token.sum()  # there is nothing to learn from
        return aggregate(
            per_token, mask, self.config.aggregation, items=batch.items, tokens=batch.tokens
        )

    def _score(self, batch: Batch, policy: LanguagePolicy | None = None) -> Tensor:
        """log pi(y_t|s_t) `[N, T]` at the temperature of the rollouts, of the policy or another."""
        return (
            (policy or self.policy)
            .score(batch.prompts, batch.responses, temperature=self.config.rollout.temperature)
            .logprobs
        )

    def _divergence(self, batch: Batch) -> Tensor:
        return self.policy.divergence(
            batch.prompts, batch.responses, temperature=self.config.rollout.temperature
        )

    def _values(self, batch: Batch) -> Tensor:
        return self.critic.values(batch.prompts, batch.responses)

    def describe_batch(self, batch: Batch) -> Metrics:
        mask = batch.mask
        returns, values = batch.returns[mask], batch.old_values[mask]
        spread = returns.var(correction=0)
        left = (returns - values).var(correction=0)
        return {
            **describe_rollouts(batch),
            "kl": self.divergence(batch),
            "kl_coefficient": self.kl_coefficient.value,
            "value/mean": float(values.mean()),
            "value/explained": float(1 - left / spread) if spread > 0 else 0.0,
        }

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        return rollout_rows(self.policy, batch)

    def evaluate(self) -> Metrics:
        """Reward, KL and length of fresh samples on held-out prompts."""
        return self.frontier.measure(self.policy) if self.frontier is not None else {}

    def evaluation_samples(self) -> list[dict[str, Any]]:
        return self.frontier.samples if self.frontier is not None else []

    def fingerprints(self) -> dict[str, str]:
        return {"data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_coefficient.value = state["kl_coefficient"]

    def save(self, folder: Path) -> None:
        self.policy.save(folder)


@torch.no_grad()
def over_tokens(batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
    """What `compute` gives of the responses in parts of a batch, each `[n, T]`, for all of them.

    Without gradients, on the CPU, and 0 at padding.
    """
    parts = [compute(part).cpu() for part in batch.split(SCORING_TOKENS)]
    length = batch.mask.shape[1]
    return torch.cat([nn.functional.pad(part, (0, length - part.shape[1])) for part in parts])


def at_last_token(worth: Tensor, mask: Tensor) -> Tensor:
    """`[N, T]`: what a response is worth `[N]` at its last token, 0 elsewhere."""
    rewards = torch.zeros(mask.shape)
    rows = torch.arange(len(mask))
    rewards[rows, mask.sum(1) - 1] = worth.float()
    return rewards
