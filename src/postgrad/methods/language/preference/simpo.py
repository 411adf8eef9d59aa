"""Simple Preference Optimization."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import simpo


class SimPOSettings(PreferenceSettings):
    """SimPO's settings."""

    beta: float = setting(2.0, "scale of the mean log-probabilities", gt=0, source="official code")
    gamma: float = setting(
        0.5,
        "margin by which the chosen response's reward should exceed the other's",
        ge=0,
        source="TRL; official code: 0.25 of beta",
    )


class SimPO(PreferenceMethod):
    """Simple Preference Optimization (Meng, Xia, Chen 2024, arXiv:2405.14734).

    What ranks responses in decoding is their mean log-probability, so that is the reward here: no
    reference policy, and no liking for length. A pair should be apart by the margin gamma.

        r(y) = beta log pi(y)/|y|
        L = -log sigma(r(y_w) - r(y_l) - gamma)

    TRL's form (`loss_type="simpo"` of CPO) adds an SFT term unless its `cpo_alpha` is 0; the paper
    and this have none.
    """

    Config = SimPOSettings
    needs_reference = False
    config: SimPOSettings

    def losses(self, found: Compared) -> Tensor:
        won, lost = found.mean_logprobs.unbind(1)
        return simpo(won, lost, self.config.beta, self.config.gamma)

    def implicit_rewards(self, found: Compared) -> Tensor:
        return self.config.beta * found.mean_logprobs
