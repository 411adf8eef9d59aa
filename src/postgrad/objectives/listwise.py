"""Listwise preference losses: functions of the scores of a list of responses to one prompt.

Notation of LiPO (arXiv 2402.01878): s `[B, K]` are the policy's scores, psi `[B, K]` labels in
[0, 1], higher is better. A pair (i, j) is ordered if psi_i > psi_j. Lists of different lengths
share a tensor: `present` `[B, K]` (boolean) says which entries there are, at least two of each
list. What the others hold changes nothing. Every loss is per list, `[B]`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from postgrad.objectives.shapes import expect_numbers, expect_same_shape

PairReduction = Literal["sum", "mean"]
LambdaWeights = Literal["full", "label", "position", "uniform"]


# The likelihood of a ranking -----------------------------------------------------------------


def plackett_luce(scores: Tensor, present: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a ranking under the Plackett-Luce model, `[...]`.

    `scores` `[..., K]` are in ranked order, best first; with s_k = beta log(pi/pi_ref)(y_(k)):
    -sum_{k<K} [ s_k - log sum_{j>=k} exp s_j ] (DPO, arXiv 2305.18290, appendix A.3). For K = 2 it
    is DPO's loss of the pair.
    """
    present = torch.ones_like(scores, dtype=torch.bool) if present is None else present
    _expect_lists(present, scores=scores)
    scores = torch.where(present, scores, 0.0)
    return _chain(scores, scores.unsqueeze(-2), present)


def tempered_plackett_luce(scores: Tensor, values: Tensor, present: Tensor) -> Tensor:
    """PRO's ranking loss (arXiv 2306.17492): Plackett-Luce with a temperature for each pair.

    `scores` p and `values` r, what the responses are worth, are `[..., K]` in ranked order. The
    inverse temperature of a pair is its gap in value, that of a step's best response the largest:

        L = -sum_{k<K} log [ exp(p_k g_k) / (exp(p_k g_k) + sum_{i>k} exp(p_i g_ki)) ]
        g_ki = r_k - r_i,   g_k = max_{i>k} g_ki

    A response of equal value counts as exp(0), a constant. Since log-likelihoods p are negative,
    the largest gap handicaps the best response; that is the published form.
    """
    _expect_lists(present, scores=scores, values=values)
    scores, values = torch.where(present, scores, 0.0), torch.where(present, values, 0.0)
    gaps = torch.where(_later(present), _differences(values.detach()), 0.0)
    if not bool((gaps >= 0).all()):
        raise ValueError("values must be sorted, the best first, and none of them NaN")
    return _chain(scores * gaps.amax(-1), scores.unsqueeze(-2) * gaps, present)


def _chain(best: Tensor, others: Tensor, present: Tensor) -> Tensor:
    """Sum over k of -log of the share of exp best_k in itself and the exp others_ki of later i."""
    diagonal = torch.eye(present.shape[-1], dtype=torch.bool, device=present.device)
    logits = torch.where(_later(present), others, -torch.inf)
    logits = torch.where(diagonal, best.unsqueeze(-1), logits)
    # a step without later responses, such as the last, is exactly 0
    return (logits.logsumexp(-1) - best).sum(-1)


def _later(present: Tensor) -> Tensor:
    """`[..., K, K]`: whether k and i are there and i comes after k."""
    return (present.unsqueeze(-1) & present.unsqueeze(-2)).triu(1)


# Learning to rank ----------------------------------------------------------------------------


def ordered_pairs(labels: Tensor, present: Tensor) -> Tensor:
    """`[B, K, K]`: whether i and j are there and psi_i > psi_j. Equal labels have no order."""
    expect_numbers(labels=torch.where(present, labels, 0.0))
    there = present.unsqueeze(-1) & present.unsqueeze(-2)
    return there & (_differences(labels) > 0)


def pair_logistic(
    scores: Tensor, labels: Tensor, present: Tensor, reduction: PairReduction = "mean"
) -> Tensor:
    """-log sigma(s_i - s_j) of the ordered pairs: DPO on all of a list's pairs (RankNet)."""
    scores, labels = _expect_labels(scores, labels, present)
    losses = -logsigmoid(_differences(scores))
    return _over_pairs(losses, ordered_pairs(labels, present), reduction)


def pair_hinge(
    scores: Tensor, labels: Tensor, present: Tensor, reduction: PairReduction = "mean"
) -> Tensor:
    """max(0, 1 - (s_i - s_j)) of the ordered pairs: SLiC's loss on log-ratios (RankSVM)."""
    scores, labels = _expect_labels(scores, labels, present)
    losses = torch.relu(1 - _differences(scores))
    return _over_pairs(losses, ordered_pairs(labels, present), reduction)


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    present: Tensor,
    weights: LambdaWeights = "full",
    reduction: PairReduction = "sum",
) -> Tensor:
    """LiPO-lambda (arXiv 2402.01878): Delta_ij times -log sigma(s_i - s_j), over ordered pairs.

    The weights Delta (see `lambda_weights`) carry no gradient.
    """
    scores, labels = _expect_labels(scores, labels, present)
    losses = -logsigmoid(_differences(scores)) * lambda_weights(scores, labels, present, weights)
    return _over_pairs(losses, ordered_pairs(labels, present), reduction)


@torch.no_grad()
def lambda_weights(
    scores: Tensor, labels: Tensor, present: Tensor, kind: LambdaWeights = "full"
) -> Tensor:
    """Delta `[B, K, K]`: how much the list's DCG would change if i and j swapped their ranks.

    |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)| with the gain G = 2^psi - 1, the discount
    D = log(1 + rank) and the `ranks` tau of the present scores. "label" and "position" keep one of
    the two factors, "uniform" neither.
    """
    scores, labels = _expect_labels(scores, labels, present)
    weights = torch.ones_like(_differences(scores))
    if kind in ("full", "label"):
        weights = weights * _differences(torch.exp2(labels) - 1).abs()
    if kind in ("full", "position"):
        discounts = torch.log1p(ranks(scores, labels, present).to(scores))
        weights = weights * _differences(1 / discounts).abs()
    if kind not in ("full", "label", "position", "uniform"):
        raise ValueError(f"weights must be full, label, position or uniform, got {kind!r}")
    return torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), weights, 0.0)


def ranks(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """tau `[B, K]`: places from 1 in the order of falling scores; of equals the better label first.

    Those equal in both take their order in the list. Entries that are not there take no rank.
    """
    scores, labels = _expect_labels(scores, labels, present)
    expect_numbers(scores=scores)
    above = _differences(scores) < 0  # j is ahead of i
    better = _differences(labels) < 0
    before = torch.ones_like(above).tril(-1)
    ahead = above | (_equal(scores) & (better | (_equal(labels) & before)))
    return 1 + (ahead & present.unsqueeze(-2)).sum(-1)


def softmax_cross_entropy(
    scores: Tensor, labels: Tensor, present: Tensor, normalise: bool = True
) -> Tensor:
    """-sum_i psi_i log softmax(s)_i, the labels first divided by their sum if `normalise`."""
    scores, labels = _expect_labels(scores, labels, present)
    target = labels / labels.sum(-1, keepdim=True).clamp(min=1e-12) if normalise else labels
    likely = torch.where(present, scores, -torch.inf).log_softmax(-1)
    return -torch.where(present, target * torch.where(present, likely, 0.0), 0.0).sum(-1)


def list_mle(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """The Plackett-Luce loss of the order that the labels give; equal labels as they are listed."""
    scores, labels = _expect_labels(scores, labels, present)
    order = torch.where(present, labels, -1.0).argsort(dim=-1, descending=True, stable=True)
    return plackett_luce(scores.gather(-1, order), present.gather(-1, order))


def squared_error(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Point-wise: the sum of (psi_i - s_i)^2."""
    scores, labels = _expect_labels(scores, labels, present)
    return torch.where(present, (labels - scores).square(), 0.0).sum(-1)


def sigmoid_cross_entropy(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Point-wise: the sum of -psi_i log sigma(s_i) - (1 - psi_i) log(1 - sigma(s_i))."""
    scores, labels = _expect_labels(scores, labels, present)
    losses = -labels * logsigmoid(scores) - (1 - labels) * logsigmoid(-scores)
    return torch.where(present, losses, 0.0).sum(-1)


# Labels --------------------------------------------------------------------------------------


def win_rate_labels(values: Tensor, present: Tensor, scale: float = 1.0) -> Tensor:
    """psi_i = 1/K sum_j sigma((r_i - r_j) / scale), `[B, K]`, of what responses are worth.

    How often a response is preferred to another of its list, itself (at 1/2) included.
    """
    values = _expect_values(values, present)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    wins = _sum_over_list(torch.sigmoid(_differences(values) / scale), present)
    return wins / present.sum(-1, keepdim=True)


def rank_labels(values: Tensor, present: Tensor) -> Tensor:
    """psi = (K - rank)/(K - 1) `[B, K]`: 1 for the best, 0 for the worst; equals share a rank."""
    values = _expect_values(values, present)
    wins = _sum_over_list(0.5 * (_differences(values).sign() + 1), present)
    # a response's half win against itself is left out
    return torch.where(present, (wins - 0.5) / (present.sum(-1, keepdim=True) - 1), 0.0)


def _sum_over_list(wins: Tensor, present: Tensor) -> Tensor:
    return torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), wins, 0.0).sum(-1)


# Parts ---------------------------------------------------------------------------------------


def _differences(values: Tensor) -> Tensor:
    """values_i - values_j, `[..., K, K]`."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def _equal(values: Tensor) -> Tensor:
    return values.unsqueeze(-1) == values.unsqueeze(-2)


def _over_pairs(losses: Tensor, pairs: Tensor, reduction: PairReduction) -> Tensor:
    """The sum or mean `[B]` over a list's ordered pairs; 0 where there are none."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    total = torch.where(pairs, losses, 0.0).sum((-2, -1))
    return total / pairs.sum((-2, -1)).clamp(min=1) if reduction == "mean" else total


def _expect_lists(present: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless `present` is boolean, as large, and holds two or more of a list."""
    if present.dtype != torch.bool:
        raise ValueError(f"present must be boolean, got {present.dtype}")
    expect_same_shape(present=present, **tensors)
    if present.ndim < 1 or bool((present.sum(-1) < 2).any()):
        raise ValueError(f"a ranking needs at least 2 scores, got shape {list(present.shape)}")


def _expect_labels(scores: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Checked scores and labels, 0 where no response is present."""
    _expect_lists(present, scores=scores, labels=labels)
    labels = torch.where(present, labels, 0.0)
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError("labels must lie in [0, 1]: turn what responses are worth into win rates")
    return torch.where(present, scores, 0.0), labels


def _expect_values(values: Tensor, present: Tensor) -> Tensor:
    _expect_lists(present, values=values)
    values = torch.where(present, values, 0.0)
    if bool(values.isnan().any()):
        raise ValueError("values must not be NaN")
    return values
