"""Direct Preference Optimization."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import smoothed


class DPOSettings(PreferenceSettings):
    """DPO's settings."""

    label_smoothing: float = setting(
        0.0, "assumed flip rate of conservative DPO (cDPO)", ge=0, lt=0.5, source="official code"
    )


class DPO(PreferenceMethod):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    The optimum of KL-regularised reward maximisation is pi ∝ pi_ref exp(r/beta), so a reward is a
    log-ratio of policy to reference; in the Bradley-Terry likelihood of a pair the prompt's
    constant cancels, and reward modelling becomes classification by the policy itself:

        Delta = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)         (sums over tokens)
        L = -log sigma(beta Delta)

    `label_smoothing` eps gives cDPO, (1 - eps) l(h) + eps l(-h). Deviation: AdamW in place of the
    official RMSprop.
    """

    Config = DPOSettings
    config: DPOSettings

    def losses(self, found: Compared) -> Tensor:
        return smoothed(self.config.beta * found.delta, self.config.label_smoothing)
