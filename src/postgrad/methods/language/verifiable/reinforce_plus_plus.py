"""REINFORCE++."""

from typing import Literal

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)


class ReinforcePlusPlusSettings(RewardedPolicyGradientSettings):
    """REINFORCE++'s settings."""

    advantage: AdvantageChoice = setting("batch", "from rewards to advantages", source="paper")
    kl_estimator: Literal["k1", "k2", "k3"] = setting(
        "k2", "of a token's KL: d, d^2/2, exp(-d) - 1 + d, with d the log-ratio", source="paper"
    )
    minibatches: int = setting(4, "optimiser steps a pass", gt=0)


class ReinforcePlusPlus(PolicyGradient):
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): PPO's clip without a critic or groups.

    One normalisation over the whole batch takes the place of groups, so no prompt is weighed by its
    own deviation and one response a prompt suffices:

        A_i = (r_i - mean of all rewards) / std of all rewards
        L   = mean over tokens of max(-rho A, -clip(rho, 1 - eps, 1 + eps) A) + beta KL_k2

    The KL to the initial policy is in the loss, as the paper has it for its variant with a group
    baseline, and off by default; the paper's first form takes it off each token's reward.
    """

    Config = ReinforcePlusPlusSettings
    config: ReinforcePlusPlusSettings
