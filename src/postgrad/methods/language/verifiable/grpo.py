"""Group Relative Policy Optimization."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.advantages.group import group_mean_centred, group_standardised
from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import FourParts, Metrics, Place
from postgrad.methods.language.base import Given, render_prompts
from postgrad.methods.language.policy_gradient import ClippedPolicyGradient, PolicyGradientSettings
from postgrad.methods.language.rewarded import RewardedSettings, TaskReward


class GRPOSettings(RewardedSettings, PolicyGradientSettings):
    """GRPO's settings; the defaults are DeepSeekMath's form."""

    normalise: Literal["std", "none"] = setting(
        "std", "divide the centred reward by the group's standard deviation", source="paper, §4.1.2"
    )
    baseline: Literal["group-mean", "none"] = setting(
        "group-mean", "what is subtracted from the reward; none, with rewards of 0 and 1, is "
        "online rejection fine-tuning", source="paper, §5.2.1"
    )  # fmt: skip
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum-constant"] = setting(
        "sequence-mean", "how token losses become one", source="paper, eq. 3"
    )
    kl_coefficient: float = setting(
        0.0, "weight of the KL to the initial policy (paper: 0.04)", ge=0, source="TRL"
    )


class GRPO(ClippedPolicyGradient):
    """Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300).

    PPO without a critic: the responses to one prompt are each other's baseline. With rewards
    r_1 … r_G of a group,

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)
        L   = mean_i 1/|y_i| sum_t max(-rho A, -clip(rho, 1 - low, 1 + high) A) + beta KL_k3

    with rho_t = pi(y_t) / pi_old(y_t). Switches give its descendants' changes: `normalise=none` and
    `aggregation=sequence-sum-constant` (Dr. GRPO), `clip_high` (DAPO), `aggregation=token-mean`,
    `importance=sequence` (GSPO's ratio), `dual_clip`. The KL to the initial policy is off by
    default, as practice has come to prefer; the paper used 0.04.
    """

    Config = GRPOSettings
    recipe = {"precision": "auto", "learning_rate": 1e-6, "steps": 100}
    parts = FourParts(
        mask="PPO clip: no gradient where the ratio leaves [1 - low, 1 + high] on the winning side",
        denominator="the policy that sampled",
        advantage="reward minus group mean, over group standard deviation",
        gradient="token log-likelihood ratio",
    )
    config: GRPOSettings

    def __init__(
        self, config: GRPOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        if config.rollout.samples < 2 and config.baseline == "group-mean":
            raise PostgradError(
                "rollout.samples: a group-normalised advantage needs at least 2 samples a prompt, "
                f"got {config.rollout.samples}"
            )
        super().__init__(config, place, "prompts", given)
        self.reward = TaskReward(config, self.data, reward)
        room = config.rollout.max_new_tokens
        self.prompts = render_prompts(self.policy, self.data, config, room)
        if self.held_out is not None:
            self.held_out_prompts = render_prompts(self.policy, self.held_out, config, room)

    def check(self) -> None:
        self.reward.probe()

    def collect(self, step: int) -> Batch:
        index = self.order.indices(step).tolist()
        samples = self.config.rollout.samples
        rollouts = self.roll_out([self.prompts[i] for i in index], "rollout", step)
        rows = [self.data.rows[i] for i in index for _ in range(samples)]
        reward, terms = self.reward.of(rows, rollouts)
        group = torch.arange(len(index)).repeat_interleave(samples)
        return self.batch_of(
            rollouts,
            step,
            group=group,
            advantages=self.advantages(reward, group),
            reward=reward,
            terms=terms,
        )

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """One number a response `[N]` from rewards `[N]` and the prompt each belongs to `[N]`."""
        if self.config.baseline == "none":
            return reward
        if self.config.normalise == "none":
            return group_mean_centred(reward, group)
        return group_standardised(reward, group)

    def describe_batch(self, batch: Batch) -> Metrics:
        groups = [batch.reward[batch.group == group] for group in batch.group.unique()]
        degenerate = sum(bool((group == group[0]).all()) for group in groups) / len(groups)
        return {**super().describe_batch(batch), "reward/degenerate_groups": degenerate}

    def evaluate(self) -> Metrics:
        """Mean reward of greedy completions on held-out prompts."""
        if self.held_out is None:
            return {}
        return self.reward.evaluate(
            self.policy, self.held_out, self.held_out_prompts, self.config.rollout
        )
