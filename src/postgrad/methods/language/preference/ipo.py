"""Identity Preference Optimization."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import ipo


class IPOSettings(PreferenceSettings):
    """IPO's settings."""

    beta: float = setting(
        0.1, "strength of the KL to the reference, the paper's tau", gt=0, source="TRL"
    )
    length_normalised: bool = setting(
        True,
        "divide each log-ratio by its response's length; the paper's equation does not",
        source="TRL, which confirmed it with the authors",
    )


class IPO(PreferenceMethod):
    """Identity Preference Optimization (Azar et al. 2023, arXiv:2310.12036).

    DPO's loss has no minimum on a pair that is always labelled the same way: its margin grows
    without bound whatever beta is, and the KL to the reference is lost. Maximising the preference
    probability itself, in place of its logit, gives a square with its minimum at a finite margin:

        Delta = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)
        L = (Delta - 1/(2 beta))^2

    With `length_normalised` each log-ratio of Delta is a mean over its response's tokens, so that
    beta means the same for long and for short responses.
    """

    Config = IPOSettings
    config: IPOSettings

    def losses(self, found: Compared) -> Tensor:
        if not self.config.length_normalised:
            return ipo(found.delta, self.config.beta)
        ratio = found.log_ratio / found.lengths
        return ipo(ratio[:, 0] - ratio[:, 1], self.config.beta)
