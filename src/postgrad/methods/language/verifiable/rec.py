"""Group-relative REINFORCE on samples of any policy: clipped, regularised, or of shaped data."""

from torch import Tensor

from postgrad.advantages.data_shaping import (
    balanced,
    centred_among_kept,
    exponentially_weighted,
)
from postgrad.advantages.group import group_mean_centred
from postgrad.batch import Batch
from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.methods.language.parts.base import Advantage, Around, require_groups
from postgrad.methods.language.parts.choices import (
    AdvantageChoice,
    DenominatorChoice,
    MaskChoice,
)
from postgrad.methods.language.verifiable.policy_gradient import (
    PolicyGradient,
    RewardedPolicyGradientSettings,
)
from postgrad.seeding import generator


class OfGroups(Advantage):
    """What RED's and AsymRE's advantages share: a baseline that is a group's mean."""

    def __init__(self, config: Settings, around: Around):
        super().__init__(config, around)
        require_groups(around, "a group's mean")


class Dropped(OfGroups):
    """centred reward after dropping the surplus of responses below the mean (RED-Drop)"""

    _dropped = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        random = generator(self.around.seed, "RED-Drop", int(batch.step[0]))
        keep = balanced(batch.reward, batch.group, random)
        self._dropped = float((~keep).float().mean())
        return centred_among_kept(batch.reward, batch.group, keep)

    def describe(self) -> dict[str, float]:
        return {"advantage/dropped": self._dropped}


class Temperature(Settings):
    temperature: float = setting(1.0, "T of exp(A/T)", gt=0, source="official code")
    weighted_mean: bool = setting(
        False,
        "the baseline is the mean under these weights, as in the derivation",
        source="official code",
    )


class Weighted(OfGroups):
    """centred reward A times exp(A/T) (RED-Weight)"""

    Config = Temperature

    def __call__(self, batch: Batch) -> Tensor:
        temperature, weighted = self.config.temperature, self.config.weighted_mean
        try:
            return exponentially_weighted(batch.reward, batch.group, temperature, weighted)
        except ValueError as error:
            raise PostgradError(f"advantage.temperature: {error}") from None


class Lowering(Settings):
    tau: float = setting(0.1, "what the baseline is lowered by", ge=0, source="official README")


class LoweredBaseline(OfGroups):
    """reward minus a baseline below its group's mean, mean - tau (AsymRE)"""

    Config = Lowering

    def __call__(self, batch: Batch) -> Tensor:
        return group_mean_centred(batch.reward, batch.group) + self.config.tau


class RECSettings(RewardedPolicyGradientSettings):
    """Settings of group-relative REINFORCE; the defaults are REC-OneSide-NoIS."""

    mask: MaskChoice = setting(
        "one-side",
        "which tokens teach; wider: mask.clip_low=0.6 mask.clip_high=2",
        source="official code",
    )
    denominator: DenominatorChoice = setting(
        "policy", "what its probability is divided by; sampler: with importance sampling"
    )
    advantage: AdvantageChoice = setting(
        "centred", "from rewards to advantages", source="official README: no deviation"
    )


class REC(PolicyGradient):
    """Group-relative REINFORCE is secretly off-policy (Yao et al. 2025, arXiv:2509.24203).

    Whoever drew the responses, centred rewards times grad log pi is the gradient, at the present
    policy, of a loss that asks all pairs of responses for one value of r - tau log(pi/pi_now). So
    importance sampling is not what makes GRPO work on stale samples. What does is keeping the
    policy from moving far (a mask, as REC; a penalty, as REP) and shaping the data (RED):

        L = mean over tokens of -c_t log pi(y_t),   c_t = M_t A_i [pi/pi_old],   A_i = r_i - mean(r)

    M_t is a mask on pi/pi_old, and the factor in brackets is there with importance sampling. The
    paper's algorithms as settings:

    - REC-OneSide-NoIS: as it stands; -IS: `denominator=sampler`; REC-TwoSide: `mask=two-side`;
      REC-Ring: `mask=ring`; GRPO in this form: `denominator=sampler advantage=standardised
      advantage.std=population advantage.eps=1e-6`; plain REINFORCE: `mask=none`
    - REP-OPMD (Kimi k1.5), + tau (log pi - log pi_old)^2: `mask=none kl_reference=sampler
      kl_estimator=k2 kl_coefficient=0.2`, which is 2 tau, for k2 has a factor 1/2
    - REP-AsymRE (Meta), A_i + tau: `mask=none advantage=asymre`
    - RED-Drop and RED-Weight: `mask=none advantage=red-drop`, `mask=none advantage=red-weight`

    Masks and penalty see the sampler where it differs from the policy: `sync_every` (the paper: 20,
    and `sync_delay` 10), `epochs` or `minibatches` above 1; else all but RED and AsymRE are one.
    The paper writes OPMD and AsymRE of whole responses, its code of tokens, as here; whole
    responses are `aggregation=sequence-sum kl_level=sequence`.

    Deviations: responses that RED-Drop drops count in the mean over tokens, as in the official
    code, which also makes the steps smaller; a fixed buffer of samples is not read.
    """

    Config = RECSettings
    config: RECSettings
