"""Dr. GRPO: GRPO done right."""

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class DrGRPOSettings(RewardedPolicyGradientSettings):
    """Dr. GRPO's settings."""

    advantage: AdvantageChoice = setting("centred", "from rewards to advantages", source="paper")
    aggregation: Aggregation = setting(
        "sequence-sum-constant", "how token losses become one", source="paper"
    )


class DrGRPO(PolicyGradient):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): GRPO without its two biases.

    Dividing by the group's deviation favours questions that are nearly always or nearly never
    solved; the mean over a response's own tokens favours long wrong responses. Without both,

        A_i = r_i - mean(r)
        L   = mean_i sum_t max(-rho A, -clip(rho, 1 - low, 1 + high) A) / max_new_tokens
    """

    Config = DrGRPOSettings
    config: DrGRPOSettings
