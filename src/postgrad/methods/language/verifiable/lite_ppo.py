"""Lite PPO, and the tricks that its study compares."""

from postgrad.config import setting
from postgrad.methods.language.parts.choices import AdvantageChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class LitePPOSettings(RewardedPolicyGradientSettings):
    """Lite PPO's settings."""

    advantage: AdvantageChoice = setting(
        "lite", "from rewards to advantages", source="official code"
    )
    aggregation: Aggregation = setting(
        "token-mean", "how token losses become one", source="official documentation"
    )


class LitePPO(PolicyGradient):
    """Lite PPO (Liu et al. 2025, arXiv:2508.08221), "Part I: Tricks or Traps?".

    The study takes the published tricks of reinforcement learning for reasoning apart, one at a
    time in one framework, and finds that two suffice on plain PPO without a critic: the group's
    mean with the whole batch's deviation, and the mean over tokens instead of responses.

        A_ij = (r_ij - mean_i) / (std of all rewards + 1e-6)
        L    = sum_ijt max(-rho A, -clip(rho, 1 - eps, 1 + eps) A) / number of tokens

    The deviation is that of the raw rewards of the whole batch, groups without a difference among
    them (uncertain: the text could mean that of the centred rewards). The other tricks are
    settings: normalisation `advantage=standardised`, `centred` or `batch`; clip-higher
    `mask.clip_high`; loss by responses `aggregation=sequence-mean`; overlong filtering
    `mask.drop_truncated`. `postgrad compare` sweeps them.
    """

    Config = LitePPOSettings
    config: LitePPOSettings
