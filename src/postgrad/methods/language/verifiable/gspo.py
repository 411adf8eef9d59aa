"""Group Sequence Policy Optimization."""

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice, GradientChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class GSPOSettings(RewardedPolicyGradientSettings):
    """GSPO's settings."""

    mask: MaskChoice = setting(
        {"name": "ppo", "clip_low": 3e-4, "clip_high": 4e-4},
        "which tokens teach, by how far the policy has moved",
        source="paper, §5.1",
    )
    advantage: AdvantageChoice = setting(
        "standardised", "from rewards to advantages", source="paper, eq. 6"
    )
    gradient: GradientChoice = setting(
        "sequence", "the function of probabilities that is followed", source="paper, eq. 7"
    )
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper, eq. 5"
    )
    minibatches: int = setting(4, "optimiser steps a pass", gt=0, source="paper, §5.1")


class GSPO(PolicyGradient):
    """Group Sequence Policy Optimization (Zheng et al. 2025, arXiv:2507.18071).

    What is rewarded is the whole response, so the importance ratio and its clip are of the whole
    response too, length-normalised so that one range fits all lengths:

        s_i = exp(1/|y_i| sum_t log pi(y_it)/pi_old(y_it))
        L   = mean_i max(-s_i A_i, -clip(s_i, 1 - low, 1 + high) A_i)

    with GRPO's advantages. A response is clipped as a whole, and the range is narrow, as ratios of
    whole responses hardly vary.
    """

    Config = GSPOSettings
    config: GSPOSettings
