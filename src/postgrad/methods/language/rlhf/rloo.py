"""REINFORCE Leave-One-Out."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from postgrad.advantages.group import leave_one_out
from postgrad.advantages.running_means import MovingMean
from postgrad.config import setting
from postgrad.methods.base import FourParts, Place
from postgrad.methods.language.base import Given, RolloutSettings
from postgrad.methods.language.rlhf.trajectory import TrajectoryPolicyGradient, TrajectorySettings
from postgrad.objectives.trajectory import clipped_responses


class RLOOSettings(TrajectorySettings):
    """RLOO's settings."""

    rollout: RolloutSettings = setting(
        RolloutSettings(samples=4), "how the policy is sampled", source="paper: 2 and 4"
    )
    beta: float = setting(
        0.05, "weight of the KL to the initial policy in the reward", ge=0, source="TRL"
    )
    baseline: Literal["leave-one-out", "moving-average"] = setting(
        "leave-one-out", "the other responses' mean, or that of the last rewards of any prompt"
    )
    baseline_window: int = setting(1024, "rewards in the moving average", gt=0)


class RLOO(TrajectoryPolicyGradient):
    """REINFORCE Leave-One-Out (Ahmadian et al. 2024, arXiv:2402.14740).

    A response is one action and its whole reward counts, so plain REINFORCE serves where PPO has a
    critic; what the other responses to the prompt earned is its baseline:

        R_i = r(x, y_i) - beta log pi_old(y_i|x)/pi_ref(y_i|x)
        A_i = R_i - 1/(K - 1) sum_{j != i} R_j
        L   = - 1/K sum_i A_i log pi(y_i|x)

    With several steps a rollout (not in the paper) L is PPO's clipped surrogate on the ratio of
    whole responses. `baseline=moving-average` is the paper's REINFORCE with a baseline b of all
    prompts, A_i = R_i - b; here b is the mean of the last rewards, these included, in place of the
    mean of all so far. Compared with one another by the claim of `p3o`.
    """

    Config = RLOOSettings
    parts = FourParts(
        mask="none with one step a rollout; else PPO's clip, of whole responses",
        denominator="the policy that sampled",
        advantage="reward less KL, minus the mean of the prompt's other responses",
        gradient="log-likelihood ratio of a response",
    )
    config: RLOOSettings

    def __init__(
        self, config: RLOOSettings, place: Place, *, reward: Any = None, **given: Unpack[Given]
    ):
        super().__init__(config, place, reward=reward, **given)
        self._recent = MovingMean(config.baseline_window)

    def credit(self, rewards: Tensor) -> Tensor:
        if self.config.baseline == "moving-average":
            self._recent.update(rewards.flatten())
            return rewards - self._recent.value
        prompts = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
        return leave_one_out(rewards.flatten(), prompts).view_as(rewards)

    def losses(self, logprobs: Tensor, old: Tensor, credit: Tensor) -> Tensor:
        return clipped_responses(logprobs, old, credit, self.config.eps)

    def state_dict(self) -> dict[str, Any]:
        return self._recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent.load_state_dict(state)
