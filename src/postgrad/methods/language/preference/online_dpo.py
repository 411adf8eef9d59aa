"""Online DPO."""

from typing import Any, Literal

from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.online import OnlinePreference, OnlineSettings
from postgrad.objectives.pairwise import ipo, smoothed


class OnlineDPOSettings(OnlineSettings):
    """Online DPO's settings."""

    loss: Literal["sigmoid", "ipo"] = setting(
        "sigmoid", "DPO's loss of a pair, or that of IPO", source="TRL"
    )
    label_smoothing: float = setting(
        0.0, "assumed rate of wrong verdicts (cDPO)", ge=0, lt=0.5, source="TRL"
    )


class OnlineDPO(OnlinePreference):
    """DPO on fresh samples (Guo et al. 2024, arXiv:2402.04792, OAIF).

    Offline pairs come from other policies than the one that is trained. Here the policy itself
    samples, a preference (a judge, or a reward's Bradley-Terry probabilities) says which of two
    samples is better, and DPO's loss, or that of IPO, is taken of the pair:

        y, y' ~ pi;   L = -log sigma(beta Delta(y_w, y_l))
        loss=ipo      L = (Delta(y_w, y_l) - 1/(2 beta))^2

    With more than two samples the one that wins most often is set against the one that wins least.
    """

    Config = OnlineDPOSettings
    recipe = {**OnlinePreference.recipe, "learning_rate": 5e-7}
    config: OnlineDPOSettings

    def __init__(self, config: OnlineDPOSettings, place: Place, **given: Any):
        if config.loss == "ipo" and config.label_smoothing > 0:
            raise PostgradError(
                "label_smoothing: belongs to loss=sigmoid, expected 0 with loss=ipo, got "
                f"{config.label_smoothing:g}"
            )
        super().__init__(config, place, **given)

    def losses(self, found: Compared) -> Tensor:
        if self.config.loss == "ipo":
            return ipo(found.delta, self.config.beta)
        return smoothed(self.config.beta * found.delta, self.config.label_smoothing)
