"""Sequence Likelihood Calibration with Human Feedback."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import negative_likelihood, slic


class SLiCSettings(PreferenceSettings):
    """SLiC-HF's settings."""

    beta: float = setting(
        1.0,
        "scale of the log-probabilities in the hinge; the paper has none",
        gt=0,
        source="SLiC-HF paper",
    )
    delta: float = setting(
        1.0, "margin at which a pair counts as calibrated", gt=0, source="SLiC-HF paper (uncertain)"
    )
    weight: float = setting(
        0.5,
        "lambda: weight of the cross-entropy of the target",
        ge=0,
        source="SLiC-HF paper (uncertain)",
    )


class SLiC(PreferenceMethod):
    """SLiC-HF (Zhao et al. 2023, arXiv:2305.10425).

    Calibrates likelihoods of sequences: the preferred response should be likelier than the other by
    a margin, beyond which a pair gives no gradient. There is no reference policy; a cross-entropy
    keeps the policy near its target:

        L = max(0, delta - beta [log pi(y_w) - log pi(y_l)]) - lambda log pi(y_w)

    The target is the preferred response, one of the paper's two choices (the other, a separate
    demonstration, is not in preference data). `beta` = 1 is the paper; another value is TRL's hinge
    in CPO, with delta = 1.
    """

    Config = SLiCSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 1e-5}
    needs_reference = False
    config: SLiCSettings

    def losses(self, found: Compared) -> Tensor:
        won, lost = found.logprobs.unbind(1)
        config = self.config
        return slic(config.beta * won, config.beta * lost, config.delta, config.weight, won)

    def terms(self, found: Compared) -> dict[str, Tensor]:
        return {"nll": negative_likelihood(found.logprobs[:, 0])}
