"""REINFORCE on language."""

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice, DenominatorChoice, MaskChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class ReinforceSettings(RewardedPolicyGradientSettings):
    """REINFORCE's settings."""

    mask: MaskChoice = setting("none", "which tokens teach, by how far the policy has moved")
    denominator: DenominatorChoice = setting("policy", "what its probability is divided by")
    advantage: AdvantageChoice = setting("moving-mean", "from rewards to advantages")
    aggregation: Aggregation = setting(
        "sequence-sum-constant", "how token losses become one; the gradient of whole responses"
    )


class Reinforce(PolicyGradient):
    """REINFORCE (Williams 1992) with a baseline: the gradient estimate that all others refine.

        A_i = r_i - mean of the last rewards
        L   = - mean_i A_i sum_t log pi(y_it) / max_new_tokens

    `advantage=reward` is it without a baseline, `advantage=centred` with the group's mean. It takes
    samples to be the policy's own, and says nothing against several steps on them.
    """

    Config = ReinforceSettings
    config: ReinforceSettings
