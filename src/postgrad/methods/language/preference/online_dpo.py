"""Online DPO."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.online import OnlinePreference, OnlineSettings
from postgrad.objectives.pairwise import smoothed


class OnlineDPOSettings(OnlineSettings):
    """Online DPO's settings."""

    label_smoothing: float = setting(
        0.0, "assumed rate of wrong verdicts (cDPO)", ge=0, lt=0.5, source="TRL"
    )


class OnlineDPO(OnlinePreference):
    """DPO on fresh samples (Guo et al. 2024, arXiv:2402.04792, OAIF).

    Offline pairs come from other policies than the one that is trained. Here the policy itself
    samples, a preference (a judge, or a reward's Bradley-Terry probabilities) says which of two
    samples is better, and DPO's loss is taken of the pair:

        y, y' ~ pi;   L = -log sigma(beta Delta(y_w, y_l))

    With more than two samples the one that wins most often is set against the one that wins least.
    """

    Config = OnlineDPOSettings
    recipe = {**OnlinePreference.recipe, "learning_rate": 5e-7}
    config: OnlineDPOSettings

    def losses(self, found: Compared) -> Tensor:
        return smoothed(self.config.beta * found.delta, self.config.label_smoothing)
