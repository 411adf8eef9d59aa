"""Preference Ranking Optimization."""

from typing import Unpack

import torch
from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.base import Given
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import PreferenceMethod, PreferenceSettings
from postgrad.objectives.listwise import plackett_luce, tempered_plackett_luce


class PROSettings(PreferenceSettings):
    """PRO's settings."""

    beta: float = setting(
        0.05, "weight of the SFT term, times (n - 1)^2", ge=0, source="official scripts"
    )
    temperature: bool | None = setting(
        None, "temper pairs by their gap in score; empty: if the data have scores"
    )
    standardise: bool = setting(False, "divide scores by their standard deviation over the data")
    sft_index: int = setting(
        0, "place of the response that the SFT term imitates", ge=0, source="official code"
    )


class PRO(PreferenceMethod):
    """Preference Ranking Optimization (Song et al. 2023, arXiv:2306.17492).

    The best of a list is to beat all others, the second all that remain, and so on, in the policy's
    own log-likelihood per token; an SFT term keeps it to the best response. Gaps in score r temper
    the pairs, so that near equals are not pushed apart. There is no reference.

        p_k = log pi(y^k|x)/|y^k|,   g_ki = r^k - r^i,   g_k = max_{i>k} g_ki
        L = -sum_{k<n} log [ exp(p_k g_k) / (exp(p_k g_k) + sum_{i>k} exp(p_i g_ki)) ]
            - beta (n - 1)^2 log pi(y^1|x)

    The SFT term is a sum over tokens. Without `temperature` all g are 1, a Plackett-Luce likelihood
    in the order of the data, equal scores too; so are lists without scores. A list whose scores are
    all equal has no order: its loss is 0, and `list/without_order` counts such lists.

    Deviations from the official code: the end of every response is scored, where there only
    padding made some be; log-sum-exp in place of a logarithm of a quotient + 1e-10; lists of
    different lengths may share a batch; nothing is learnt from a list of equal scores.
    """

    Config = PROSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 5e-6, "warmup_steps": 0}
    data_format = "rankings"
    needs_reference = False
    config: PROSettings

    def __init__(self, config: PROSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place, **given)
        self.temperature = self.data.graded if config.temperature is None else config.temperature
        known = self.data.scores[~self.data.scores.isnan()]
        if self.temperature and not len(known):
            raise PostgradError(
                "temperature: it comes from gaps in score, but the data have no scores: give lists "
                "a column scores, or set temperature=false"
            )
        self.scale = 1.0
        if self.temperature and config.standardise:
            self.scale = float(known.std(correction=0))
        for examples in (self.data, self.held_out):
            shortest = min(map(len, examples.responses)) if examples else config.sft_index + 1
            if config.sft_index >= shortest:
                raise PostgradError(
                    f"sft_index: {config.sft_index} names no response of a list of {shortest}, "
                    "places count from 0"
                )

    def implicit_rewards(self, found: Compared) -> Tensor:
        return found.mean_logprobs

    def losses(self, found: Compared) -> Tensor:
        losses = plackett_luce(found.mean_logprobs, found.present)
        if self.temperature:
            values = found.scores / self.scale
            scored = ~values[:, 0].isnan()
            tempered = tempered_plackett_luce(
                found.mean_logprobs, values.nan_to_num(0.0), found.present
            )
            losses = torch.where(scored, tempered, losses)
        weight = self.config.beta * (found.present.sum(1) - 1).square()
        losses = losses - weight * found.logprobs[:, self.config.sft_index]
        return torch.where(found.has_order, losses, 0.0)
