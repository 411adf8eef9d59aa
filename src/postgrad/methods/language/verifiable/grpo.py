"""Group Relative Policy Optimization."""

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class GRPOSettings(RewardedPolicyGradientSettings):
    """GRPO's settings; the defaults are DeepSeekMath's form."""

    advantage: AdvantageChoice = setting(
        "standardised", "from rewards to advantages", source="paper, §4.1.2"
    )
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper, eq. 3"
    )
    kl_coefficient: float = setting(
        0.0, "weight of the KL to the initial policy (paper: 0.04)", ge=0, source="TRL"
    )


class GRPO(PolicyGradient):
    """Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300).

    PPO without a critic: the responses to one prompt are each other's baseline. With rewards
    r_1 … r_G of a group,

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)
        L   = mean_i 1/|y_i| sum_t max(-rho A, -clip(rho, 1 - low, 1 + high) A) + beta KL_k3

    with rho_t = pi(y_t) / pi_old(y_t). Other parts give its descendants: `dr-grpo`, `dapo`, `gspo`,
    `lite-ppo` …; `advantage=reward` is the paper's online rejection fine-tuning. The KL to the
    initial policy is off by default, as practice has come to prefer; the paper used 0.04.
    """

    Config = GRPOSettings
    config: GRPOSettings
