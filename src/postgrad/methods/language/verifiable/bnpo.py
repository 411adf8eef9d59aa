"""Beta Normalization Policy Optimization."""

import warnings

import torch
from torch import Tensor

from postgrad.advantages.beta_normalised import BetaFit, beta_normalised
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.language.base import RolloutSettings
from postgrad.methods.language.parts.base import Advantage, Around, require_groups
from postgrad.methods.language.parts.choices import AdvantageChoice, MaskChoice
from postgrad.methods.language.rollouts import TERM
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation


class BetaNormalisation(Settings):
    low: float = setting(0.0, "the least reward there can be; mapped to 0")
    high: float = setting(1.0, "the greatest reward there can be; mapped to 1")
    limit: float = setting(1e6, "greatest weight 1/f", gt=0, source="official code")
    decompose: bool = setting(
        True, "several reward terms are normalised one by one, then averaged", source="paper"
    )


class BetaNormalised(Advantage):
    """reward minus its group's mean, over a Beta density of that mean fitted to the batch (BNPO)"""

    Config = BetaNormalisation

    def __init__(self, config: BetaNormalisation, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group's success rate")
        if not config.low < config.high:
            raise PostgradError(
                f"advantage.high: must be above advantage.low, {config.low:g}, got {config.high:g}"
            )
        if around.prompts == 1:
            warnings.warn(
                "batch_size: success rates of one prompt have no spread, so BNPO divides by 1",
                stacklevel=2,
            )
        self._fits: dict[str, BetaFit] = {}

    def __call__(self, batch: Batch) -> Tensor:
        self._fits = {}
        rewards = self._rewards(batch)
        return torch.stack([self._one(*named, batch.group) for named in rewards.items()]).mean(0)

    def _rewards(self, batch: Batch) -> dict[str, Tensor]:
        """What is normalised by itself: the terms `[N]` of the reward, or the reward."""
        terms = {name: values for name, values in batch.fields().items() if name.startswith(TERM)}
        if not self.config.decompose or len(terms) < 2:
            return {"": batch.reward}
        whole = torch.stack(list(terms.values())).sum(0)
        if not torch.allclose(whole.float(), batch.reward, atol=1e-5):
            raise PostgradError(
                "advantage.decompose: terms count alike when each is normalised by itself, but the "
                "reward is not their plain sum: weigh all by 1 or set advantage.decompose=false"
            )
        return {name.removeprefix(TERM): values.float() for name, values in terms.items()}

    def _one(self, name: str, rewards: Tensor, group: Tensor) -> Tensor:
        low, high = self.config.low, self.config.high
        if bool(((rewards < low) | (rewards > high)).any()):
            raise PostgradError(
                f"advantage.low, advantage.high: rewards {name and f'of {name!r} '}must lie in "
                f"[{low:g}, {high:g}], got {float(rewards.min()):g} to {float(rewards.max()):g}"
            )
        shares = (rewards - low) / (high - low)
        advantages, self._fits[name] = beta_normalised(shares, group, self.config.limit)
        return advantages

    def describe(self) -> dict[str, float]:
        return {
            f"normaliser/{parameter}{name and f'/{name}'}": getattr(fit, parameter)
            for name, fit in self._fits.items()
            for parameter in ("alpha", "beta")
        }


class BNPOSettings(RewardedPolicyGradientSettings):
    """BNPO's settings; the defaults are those of the official script."""

    advantage: AdvantageChoice = setting("bnpo", "from rewards to advantages", source="paper")
    mask: MaskChoice = setting(
        {"name": "ppo", "clip_high": 0.28, "dual_clip": 10.0},
        "which tokens teach, by how far the policy has moved",
        source="official script",
    )
    aggregation: Aggregation = setting(
        "sequence-sum", "how token losses become one", source="official script"
    )
    rollout: RolloutSettings = setting(
        RolloutSettings(samples=16), "how the policy is sampled", source="official script"
    )


class BNPO(PolicyGradient):
    """Beta Normalization Policy Optimization (Xiao et al. 2025, arXiv:2506.02864).

    How often prompts are solved changes as the policy learns. BNPO models the success rate p of a
    prompt as a Beta distribution over the batch's prompts and divides the centred reward by the
    Beta density that, for this distribution, makes the gradient's variance smallest. Dividing by
    1 (Dr. GRPO) and by the group's deviation (GRPO) are the cases alpha = beta = 1 and 3/2.

        A_i = (r_i - p) / f(p; 1 + a/3, 1 + b/3),   p = mean(r) of the prompt
        a = c m,  b = c (1 - m),  c = m (1 - m) / v - 1;   m, v: mean and variance of p over prompts

    Several reward terms are normalised one by one and their advantages averaged. Nothing is kept
    between steps. The loss is PPO's clip with a higher upper bound, summed over a response's
    tokens.

    Deviations: where all prompts are equally hard (v = 0) alpha = beta = 1, as with one prompt; the
    official code has no such guard. The smallest variance holds among densities, which have area 1;
    among weights scaled to the same expected gradient it need not.
    """

    Config = BNPOSettings
    recipe = {**PolicyGradient.recipe, "warmup_steps": 10}
    config: BNPOSettings
