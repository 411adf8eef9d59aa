"""Odds Ratio Preference Optimization."""

from torch import Tensor

from postgrad.config import setting
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.pairwise import negative_likelihood, odds_ratio


class ORPOSettings(PreferenceSettings):
    """ORPO's settings."""

    beta: float = setting(
        0.1, "the paper's lambda: weight of the odds ratio beside SFT", gt=0, source="TRL"
    )


class ORPO(PreferenceMethod):
    """Odds Ratio Preference Optimization (Hong, Lee, Thorne 2024, arXiv:2403.07691).

    Supervised fine-tuning on the chosen responses raises the likelihood of the rejected ones with
    them. A small penalty on the odds ratio stops that, so one stage does for two and no reference
    is needed:

        log p(y) = log pi(y)/|y|,   odds(y) = p(y) / (1 - p(y))
        L = -log p(y_w) - lambda log sigma(log odds(y_w) - log odds(y_l))

    Deviation from TRL: the SFT term is of response tokens, a mean over sequences of their means;
    TRL's also learns the prompt, and is one mean over all tokens of the batch.
    """

    Config = ORPOSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 8e-6}
    needs_reference = False
    config: ORPOSettings

    def losses(self, found: Compared) -> Tensor:
        terms = self.terms(found)
        return terms["nll"] + self.config.beta * terms["odds_ratio"]

    def terms(self, found: Compared) -> dict[str, Tensor]:
        won, lost = found.mean_logprobs.unbind(1)
        return {"nll": negative_likelihood(won), "odds_ratio": odds_ratio(won, lost)}

    def implicit_rewards(self, found: Compared) -> Tensor:
        return self.config.beta * found.mean_logprobs
