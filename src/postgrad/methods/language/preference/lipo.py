"""Listwise Preference Optimization."""

from typing import Literal, Unpack

import torch
from torch import Tensor

from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.base import Given
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.base import (
    Comparisons,
    PreferenceMethod,
    PreferenceSettings,
)
from postgrad.objectives.listwise import (
    LambdaWeights,
    PairReduction,
    lambda_loss,
    list_mle,
    pair_hinge,
    pair_logistic,
    rank_labels,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    win_rate_labels,
)

RankingLoss = Literal[
    "lambda", "pair-logistic", "pair-hinge", "softmax", "list-mle", "mse", "sigmoid"
]


class LiPOSettings(PreferenceSettings):
    """LiPO's settings."""

    batch_size: int = setting(32, "lists a step", gt=0, source="paper")
    beta: float = setting(0.05, "scale of the scores s", gt=0, source="paper")
    loss: RankingLoss = setting("lambda", "which ranking loss", source="paper")
    weights: LambdaWeights = setting(
        "full", "factors of lambda's weights: both, one, or none", source="paper"
    )
    pair_reduction: PairReduction | None = setting(
        None, "over a list's pairs; empty: sum for lambda, mean for pair-logistic and pair-hinge"
    )
    normalise_labels: bool = setting(True, "softmax: labels are divided by their sum (uncertain)")
    labels: Literal["win-rate", "rank", "score"] | None = setting(
        None,
        "psi: win rates by the sigmoid of score gaps, places, or the scores themselves; empty: "
        "win rates if the data have scores, else places",
    )
    score_scale: float = setting(1.0, "win-rate: what score gaps are divided by", gt=0)


class LiPO(PreferenceMethod):
    """Listwise Preference Optimization (Liu et al. 2024, arXiv:2402.01878).

    Log-ratios to the reference are scores by which a list of responses is ranked, so any loss of
    learning to rank can train them. DPO and SLiC are those of pairs. LiPO-lambda weights a pair by
    how much the list's DCG would change if the two swapped their ranks under the present policy:
    gaps between labels count, and so do places.

        s_i = beta log pi(y_i|x)/pi_ref(y_i|x),   psi_i = 1/K sum_j sigma((r_i - r_j)/score_scale)
        L = sum_{psi_i > psi_j} Delta_ij log(1 + exp(-(s_i - s_j)))
        Delta_ij = |2^psi_i - 2^psi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|,   tau = ranks by s

    `loss` chooses another: pair-logistic (DPO on all pairs), pair-hinge, softmax, list-mle (DPO
    under Plackett-Luce), and point-wise mse and sigmoid. A list whose scores are all equal has no
    order: its loss is 0, and `list/without_order` counts such lists.

    Responses of equal s, as all are at the start, are ranked by label; random or shared ranks are
    as consistent with the paper, but shared ones give no gradient at the start. Uncertain, as no
    official code is known: whether pairs are summed or averaged, whether a win rate includes the
    response itself (here it does), and whether softmax normalises labels. Deviation: AdamW in
    place of Adafactor.
    """

    Config = LiPOSettings
    recipe = {**PreferenceMethod.recipe, "learning_rate": 1e-5}
    data_format = "rankings"
    config: LiPOSettings

    def __init__(self, config: LiPOSettings, place: Place, **given: Unpack[Given]):
        super().__init__(config, place, **given)
        self.label_kind = config.labels or ("win-rate" if self.data.graded else "rank")
        if config.loss != "lambda" and config.weights != "full":
            raise PostgradError(
                f"weights: only loss=lambda weights its pairs, got {config.weights} with loss="
                f"{config.loss}"
            )
        if self.label_kind == "score":
            for lists in filter(None, (self.data, self.held_out)):
                _expect_unit_scores(lists)

    def labels(self, found: Compared) -> Tensor:
        """psi `[B, K]`; a list without scores is labelled by its places."""
        places = -torch.arange(found.scores.shape[1], device=found.scores.device)
        unscored = (found.scores.isnan() & found.present).any(1, keepdim=True)
        values = torch.where(unscored, places.to(found.scores), found.scores)
        by_place = rank_labels(values, found.present)
        if self.label_kind == "rank":
            return by_place
        if self.label_kind == "score":
            return torch.where(unscored, by_place, found.scores)
        rates = win_rate_labels(values, found.present, self.config.score_scale)
        return torch.where(unscored, by_place, rates)

    def losses(self, found: Compared) -> Tensor:
        config = self.config
        these = config.beta * found.log_ratio, self.labels(found), found.present
        match config.loss:
            case "lambda":
                losses = lambda_loss(*these, config.weights, config.pair_reduction or "sum")
            case "pair-logistic":
                losses = pair_logistic(*these, config.pair_reduction or "mean")
            case "pair-hinge":
                losses = pair_hinge(*these, config.pair_reduction or "mean")
            case "softmax":
                losses = softmax_cross_entropy(*these, config.normalise_labels)
            case "list-mle":
                losses = list_mle(*these)
            case "mse":
                losses = squared_error(*these)
            case "sigmoid":
                losses = sigmoid_cross_entropy(*these)
        return torch.where(found.has_order, losses, 0.0)


def _expect_unit_scores(lists: Comparisons) -> None:
    outside = (lists.scores < 0) | (lists.scores > 1)
    if bool(outside.any()):
        number, place = outside.nonzero()[0].tolist()
        raise PostgradError(
            f"{lists.examples.where(number)}: with labels=score scores are labels in [0, 1], got "
            f"{float(lists.scores[number, place]):g}; labels=win-rate takes any scores"
        )
