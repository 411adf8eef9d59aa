"""Contrastive Policy Gradient."""

from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import (
    PAIR_SCORES,
    Comparisons,
    PreferenceMethod,
    PreferenceSettings,
)
from postgrad.objectives.pairwise import copg


class CoPGSettings(PreferenceSettings):
    """CoPG's settings."""

    beta: float = setting(
        0.06,
        "strength of the KL to the reference, in units of the scores; the paper's stable range is "
        "0.03 to 0.1",
        gt=0,
        source="paper",
    )


class CoPG(PreferenceMethod):
    """Contrastive Policy Gradient (Flet-Berliac et al. 2024, arXiv:2406.19185).

    A preference says which response is better, a score also by how much. CoPG learns from scored
    responses of any origin: each has the regularised reward of the other as its baseline, which
    makes the policy gradient right without importance weights. Its one optimum is that of
    KL-regularised reward maximisation, pi ∝ pi_ref exp(R/beta):

        c(y) = log pi(y)/pi_ref(y)                                        (sums over tokens)
        Delta = c(y) - c(y'),   dR = R(y) - R(y')
        L = beta/2 (Delta - dR/beta)^2   =   -[dR Delta - beta/2 Delta^2] + constant

    Of more than two responses the mean over all pairs is taken (not in the paper). Scores are the
    columns `score_chosen` and `score_rejected` of preferences, whatever their order, or `scores` of
    rankings. Where dR = 1/2 for every pair it is IPO. The loss does not show the collapse that a
    small beta brings; fresh samples do (`frontier.reward`). Deviation: AdamW in place of Adam. No
    official code is known.
    """

    Config = CoPGSettings
    data_format = ("preferences", "rankings")
    config: CoPGSettings

    def check(self) -> None:
        for data in (self.data, self.held_out):
            if data is not None:
                _expect_scores(data)

    def losses(self, found: Compared) -> Tensor:
        return copg(found.log_ratio, found.scores, self.config.beta, found.present)


def _expect_scores(data: Comparisons) -> None:
    examples = data.examples
    expected = ("scores",) if examples.format == "rankings" else PAIR_SCORES
    for number, row in enumerate(examples.rows):
        if any(row.get(column) is None for column in expected):
            raise PostgradError(
                f"{examples.where(number)}: copg learns from scores: expected numbers in "
                f"{' and '.join(expected)}, found the columns "
                f"{', '.join(column for column, value in row.items() if value is not None)}"
            )
