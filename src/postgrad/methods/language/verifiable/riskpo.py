"""Risk-based policy optimisation over bundles of prompts."""

from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.advantages.risk import (
    Credit,
    QuantileTracker,
    averaged_value_at_risk,
    bundle_scores,
    bundles,
    mixed_value_at_risk,
    shared_out,
)
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.language.parts.base import Advantage, Around
from postgrad.methods.language.parts.choices import AdvantageChoice, GradientChoice
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.objectives.policy_gradient import Aggregation
from postgrad.seeding import generator

LEAST_DEVIATION = 1e-3  # bundles that are all alike and fall short must not get huge advantages


class Risk(Settings):
    bundle: int = setting(5, "prompts a bundle, B", gt=0, source="paper")
    low: float = setting(0.2, "level of the lower quantile, a", gt=0, lt=1, source="paper")
    high: float = setting(
        0.8,
        "level of the upper quantile, b (official MATH script: 0.9)",
        gt=0,
        lt=1,
        source="paper",
    )
    omega: float = setting(
        0.5, "extra weight of the lower tail (official scripts: 1.5)", ge=0, source="paper"
    )
    form: Literal["paper", "code", "seeking"] = setting(
        "paper", "tail and range added, averaged as in the released code, or with the upper tail"
    )
    baseline: bool = setting(
        True, "with form code and seeking: measure from the upper quantile, not from the lower"
    )
    quantiles: Literal["tracked", "set"] = setting(
        "tracked", "of all bundles so far, or of those of the same prompts (released code)"
    )
    rate: float = setting(0.1, "step of the tracked quantiles", gt=0, source="official scripts")
    scale: Literal["batch", "set", "none"] = setting(
        "batch",
        "divide by the deviation of all scores, of those of the same prompts (code), or not",
    )
    credit: Credit = setting(
        "uniform", "how a bundle's responses share its advantage (scripts: std, sum-mean)"
    )


class BundledRisk(Advantage):
    """how far the summed reward of a bundle of prompts falls short of two quantiles (RiskPO)"""

    Config = Risk

    def __init__(self, config: Risk, around: Around):
        super().__init__(config, around)
        if not config.low < config.high:
            raise PostgradError(
                f"advantage.high: must be above advantage.low, {config.low:g}, got {config.high:g}"
            )
        if around.prompts % config.bundle:
            lower = around.prompts - around.prompts % config.bundle
            raise PostgradError(
                f"batch_size: expected a multiple of advantage.bundle, {config.bundle}, got "
                f"{around.prompts}: use {lower + config.bundle} prompts"
            )
        self._tracker = QuantileTracker((config.low, config.high), config.rate)
        self._silent = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        config = self.config
        random = generator(self.around.seed, "bundles", int(batch.step[0]))
        try:
            bundle = bundles(batch.group, config.bundle, random)
        except ValueError as error:
            raise PostgradError(f"advantage.bundle: {error}") from None
        scores = bundle_scores(batch.reward, bundle)
        sets = scores.view(-1, int((batch.group == batch.group[0]).sum()))
        low, high = self._quantiles(sets)
        if config.form == "paper":
            advantages = mixed_value_at_risk(sets, low, high, config.omega)
        else:
            advantages = averaged_value_at_risk(
                sets,
                low,
                high,
                (config.low, config.high),
                config.omega,
                tail="upper" if config.form == "seeking" else "lower",
                baseline=config.baseline,
            )
        advantages = (advantages / self._scale(sets)).flatten()
        self._silent = float((advantages == 0).float().mean())
        return shared_out(advantages, bundle, batch.reward, batch.group, config.credit)

    def _quantiles(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """Both quantiles that these scores `[sets, bundles]` are measured by; follows them."""
        if self.config.quantiles == "set":
            levels = torch.tensor([self.config.low, self.config.high], dtype=sets.dtype)
            low, high = sets.quantile(levels, dim=1, keepdim=True)
            return low, high
        values = self._tracker.values  # of earlier steps: they may not depend on these samples
        self._tracker.update(sets.flatten())
        low, high = values if len(values) else self._tracker.values
        return low, high

    def _scale(self, sets: Tensor) -> Tensor:
        whole = self.config.scale == "batch" or sets.shape[1] == 1
        if self.config.scale == "none" or sets.numel() == 1:
            return torch.ones(())
        return (sets.std() if whole else sets.std(dim=1, keepdim=True)).clamp(min=LEAST_DEVIATION)

    def describe(self) -> dict[str, float]:
        quantiles = zip(("low", "high"), self._tracker.values.tolist(), strict=False)
        return {
            **{f"bundle/quantile_{name}": value for name, value in quantiles},
            "bundle/without_advantage": self._silent,
        }

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tracker.load_state_dict(state)


class RiskPOSettings(RewardedPolicyGradientSettings):
    """RiskPO's settings; the defaults are the paper's form."""

    advantage: AdvantageChoice = setting("riskpo", "from rewards to advantages", source="paper")
    gradient: GradientChoice = setting(
        "sequence", "the function of probabilities that is followed", source="paper"
    )
    aggregation: Aggregation = setting(
        "sequence-mean", "how token losses become one", source="paper"
    )
    batch_size: int = setting(10, "rows of data a step, a multiple of the bundle", gt=0)


class RiskPO(PolicyGradient):
    """Risk-based policy optimisation (Ren et al. 2025, arXiv:2510.00911).

    The mean reward spends the gradient on what is solved already, and most groups of 0/1 rewards
    say nothing. RiskPO bundles B prompts, scores one response to each by the sum R of their
    rewards, and raises the lower part of the distribution of R (mixed value at risk): what lies
    below the quantile q_a counts most, what lies above q_b not at all. Advantages covary less with
    log-probabilities, so entropy falls more slowly.

        A_j = -omega (q_a - R_j)^+ - (q_b - R_j)^+,   for all tokens of the B responses of bundle j
        q_s <- q_s + rate (s - share of bundles with R < q_s),   after each step, s = a, b
        L   = mean_ij max(-s_ij A_j, -clip(s_ij, 1 - low, 1 + high) A_j)

    with s_ij the geometric mean of a response's token ratios. As the released code mixes them:
    `advantage.form=code advantage.omega=1.5 advantage.quantiles=set advantage.scale=set
    advantage.credit=std gradient=token mask.dual_clip=3 aggregation=token-mean`, for MATH also
    `advantage.high=0.9`, for DAPO-Math `advantage.credit=sum-mean advantage.baseline=false`.

    Deviations: advantages are divided by the standard deviation of the batch's scores, without
    which learning rates depend on B; deviations are held at 1e-3 at least. The official code means
    to track quantiles but, as read, takes those of the batch (uncertain); here those of earlier
    steps are used, and the first step's own. The paper's form is known from two independent notes
    (uncertain); its gradient was derived anew.
    """

    Config = RiskPOSettings
    config: RiskPOSettings
