"""Reinforced Token Optimization."""

from typing import Any, Literal

from torch import Tensor

from postgrad.advantages.token_rewards import log_ratio_reward
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.language.rlhf.actor_critic import (
    ActorCritic,
    ActorCriticSettings,
    over_tokens,
)
from postgrad.models.language import LanguagePolicy
from postgrad.timing import timed

_DENSE = "reward/dpo"


class RTOSettings(ActorCriticSettings):
    """RTO's settings."""

    dpo_model: str | None = setting(
        None, "what the token rewards come from: the folder or Hub id of a model that DPO has made "
        "of `model`"
    )  # fmt: skip
    dpo_reward_scale: float = setting(
        0.05, "b_1, on the log-ratio of each token; it must not dominate; 0 is plain PPO", ge=0,
        source="official script",
    )  # fmt: skip
    dpo_reward_clip: float = setting(
        0.05, "c: a token's scaled log-ratio is cut to [-c, c]; 0: not", ge=0,
        source="official script",
    )  # fmt: skip
    reward_scale: float = setting(
        1.0, "b_3, on the reward of the whole response", ge=0, source="official code"
    )
    reward_clip: float = setting(
        10.0, "the reward of the whole response is first cut to ± reward_clip", gt=0,
        source="official code",
    )  # fmt: skip
    kl_coefficient: float = setting(
        0.01, "b_2, of the KL to the reference, in each token's reward", ge=0,
        source="official script",
    )  # fmt: skip
    epochs: int = setting(1, "passes over the rollouts of a step", gt=0, source="official code")
    minibatches: int = setting(
        8, "optimiser steps a pass", gt=0, source="official script: 1024 rollouts, steps of 128"
    )
    critic_rate: float = setting(
        18.0, "the critic's learning rate, in multiples of the policy's", gt=0,
        source="official script",
    )  # fmt: skip
    aggregation: Literal["token-mean", "sequence-mean"] = setting(
        "sequence-mean", "how token losses become one", source="official code"
    )


class RTO(ActorCritic):
    """Reinforced Token Optimization (Zhong et al. 2024, arXiv:2404.18922).

    PPO's reward of a response arrives at its last token, and the critic must find out which tokens
    earned it. But a model that DPO has trained tells: where text is made token by token, its
    log-ratio to the reference is, up to the difference of a potential, the reward of each token
    that the preferences express. So some of it is paid at every token, beside the reward model's:

        r_t = clip(b_1 log(pi_dpo(y_t|s_t) / pi_ref(y_t|s_t)), -c, c)
              - b_2 log(pi_old(y_t|s_t) / pi_ref(y_t|s_t)) + [t last] b_3 clip(R(x, y), -10, 10)

    and PPO with a critic goes on as ever. Policy and reference are the model that DPO started from;
    `dpo_model` stays as it is. Its reference must be the policy's own: another one cannot be named,
    as the official code always subtracts the policy's, too.

    Deviations: a scale of 0 switches the token rewards off, where the official code then leaves
    them unscaled; rewards are not normalised by a reward model's stored moments; a step takes
    `batch_size` 32 where the official script has 1024, the critic's start is the policy's body
    unless `critic` names the reward model. The sum of token rewards grows with the length of a
    response: watch `response/length`.
    """

    Config = RTOSettings
    recipe = {**ActorCritic.recipe, "learning_rate": 5e-7, "adam_betas": (0.9, 0.95)}
    parts = FourParts(
        mask="PPO clip: no gradient where the ratio leaves [1 - eps, 1 + eps] on the winning side",
        denominator="the policy that sampled",
        advantage="GAE(gamma, lambda) of token rewards, those of a DPO model among them",
        gradient="token log-likelihood ratio",
    )
    config: RTOSettings

    def __init__(
        self,
        config: RTOSettings,
        place: Place,
        *,
        dpo_model: LanguagePolicy | None = None,
        **given: Any,
    ):
        super().__init__(config, place, **given)
        # it is scored without gradients and never handed to an optimiser, so it stays as it is
        self.dpo_model = self.other_policy("dpo_model", config.dpo_model, dpo_model)

    def with_known(self, batch: Batch) -> Batch:
        batch = super().with_known(batch)
        with timed("scoring"):
            logprobs = over_tokens(batch, lambda part: self._score(part, self.dpo_model))
        dense = self.dense_rewards(logprobs, batch)
        return batch.with_fields(dpo_logprobs=logprobs, **{_DENSE: dense.sum(1)})

    def dense_rewards(self, dpo_logprobs: Tensor, batch: Batch) -> Tensor:
        """What each token is worth to the DPO model `[N, T]`."""
        return log_ratio_reward(
            dpo_logprobs,
            batch.reference_logprobs,
            batch.mask,
            scale=self.config.dpo_reward_scale,
            clip=self.config.dpo_reward_clip or None,
        )

    def token_rewards(self, batch: Batch) -> Tensor:
        limit = self.config.reward_clip
        worth = self.config.reward_scale * batch.reward.clamp(-limit, limit)
        sparse = super().token_rewards(batch.with_fields(reward=worth))
        return sparse + self.dense_rewards(batch.dpo_logprobs, batch)

    def describe_batch(self, batch: Batch) -> Metrics:
        limit = self.config.dpo_reward_clip
        dense = self.dense_rewards(batch.dpo_logprobs, batch)[batch.mask].abs()
        at_limit = float((dense >= limit).float().mean()) if limit else 0.0
        return {**super().describe_batch(batch), "dpo_reward/clipped": at_limit}
