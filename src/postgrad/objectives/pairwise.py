"""Pairwise preference losses: functions of the margin between a chosen and a rejected response.

Notation of DPO (arXiv 2305.18290): Delta is the margin of log-ratios, h = beta * Delta, and
l(h) = -log sigma(h). Every loss here is per pair; a method takes its mean over the pairs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape, expect_tokens

PairLoss = Callable[[Tensor], Tensor]


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) `[N]`: the SUM over a response's tokens `[N, T]`, never their mean."""
    expect_tokens(mask, logprobs=logprobs)
    return torch.where(mask, logprobs, 0.0).sum(1)


def margin(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """Delta `[B]`: how much more than the reference the policy prefers chosen (w) to rejected (l).

    Delta = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], all of shape `[B]`.
    """
    expect_same_shape(logp_w=logp_w, logp_l=logp_l, ref_w=ref_w, ref_l=ref_l)
    return (logp_w - ref_w) - (logp_l - ref_l)


def logistic(h: Tensor) -> Tensor:
    """DPO's loss l(h) = -log sigma(h) (arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(h)


def pair_weight(h: Tensor) -> Tensor:
    """sigma(-h) = -dl/dh: the probability with which the implicit reward mis-orders the pair."""
    return torch.sigmoid(-h)


def smoothed(h: Tensor, eps: float | Tensor) -> Tensor:
    """cDPO, label smoothing: (1 - eps) l(h) + eps l(-h), minimal at h = log((1 - eps)/eps).

    `eps` in [0, 0.5) is a number or one value per pair.
    """
    _expect_flip_rate(eps, h)
    return (1 - eps) * logistic(h) + eps * logistic(-h)


def debias(loss: PairLoss, eps: float | Tensor) -> PairLoss:
    """The loss whose mean over label flips of rate `eps` is `loss` on clean labels.

    [(1 - eps) loss(h) - eps loss(-h)] / (1 - 2 eps) (rDPO, arXiv 2403.00409). It may be negative
    and, for the logistic and hinge losses, is unbounded below; clamping it would bias it. `eps` in
    [0, 0.5) is a number or one value per pair.
    """

    def corrected(h: Tensor) -> Tensor:
        _expect_flip_rate(eps, h)
        return ((1 - eps) * loss(h) - eps * loss(-h)) / (1 - 2 * eps)

    return corrected


def robust(h: Tensor, eps: float | Tensor) -> Tensor:
    """rDPO's loss (arXiv 2403.00409): the debiased logistic, l(h) - h eps/(1 - 2 eps)."""
    return debias(logistic, eps)(h)


def hinge(h: Tensor) -> Tensor:
    """max(0, 1 - h) on normalised margins (RSO, arXiv 2309.06657; SLiC-HF, arXiv 2305.10425)."""
    return torch.relu(1 - h)


def ipo(delta: Tensor, beta: float) -> Tensor:
    """(Delta - 1/(2 beta))^2 (IPO, arXiv 2310.12036, eq. 17); takes Delta, not h.

    For the length-normalised form divide each log-ratio by its response's length before `margin`.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (delta - 1 / (2 * beta)).square()


def negative_likelihood(logp: Tensor, lengths: Tensor | None = None) -> Tensor:
    """-log pi(y|x) `[B]` of responses; with their `lengths` `[B]`, -log pi(y|x)/|y|.

    Added to a pairwise loss on the chosen response it is an SFT term. A batch's value of the second
    form is a mean over sequences of their means over tokens, not one mean over all tokens.
    """
    if lengths is None:
        return -logp
    expect_same_shape(logp=logp, lengths=lengths)
    if not bool((lengths > 0).all()):
        raise ValueError("a response without tokens has no mean log-probability")
    return -logp / lengths


def rpo(h: Tensor, logp_w: Tensor, weight: float, lengths: Tensor | None = None) -> Tensor:
    """RPO's loss `[B]` (arXiv 2405.16436): l(h) + weight * NLL of the chosen response.

    The paper's form sums the NLL over tokens, with weight = eta * beta; its average form, given the
    chosen responses' `lengths`, takes the mean over tokens. `logp_w` must be the same tensor, with
    its gradient, that h was made of.
    """
    expect_same_shape(h=h, logp_w=logp_w)
    if not weight >= 0:
        raise ValueError(f"the weight of the SFT term must be at least 0, got {weight}")
    return logistic(h) + weight * negative_likelihood(logp_w, lengths)


def slic(logp_w: Tensor, logp_l: Tensor, delta: float, weight: float, target: Tensor) -> Tensor:
    """SLiC-HF's loss `[B]` (arXiv 2305.10425, eq. 1), without a reference policy.

    max(0, delta - log pi(y_w) + log pi(y_l)) - weight * log pi(y_target), all log-probabilities
    `[B]`. The target keeps the policy near what it was tuned on: a demonstration, or y_w.
    """
    expect_same_shape(logp_w=logp_w, logp_l=logp_l, target=target)
    if not (delta > 0 and weight >= 0):
        raise ValueError(f"expected delta > 0 and a weight >= 0, got {delta} and {weight}")
    return torch.relu(delta - (logp_w - logp_l)) + weight * negative_likelihood(target)


def simpo(mean_w: Tensor, mean_l: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO's loss `[B]` (arXiv 2405.14734, eq. 6), without a reference policy.

    l(beta (mean_w - mean_l) - gamma), from mean log-probabilities of tokens log pi(y|x)/|y| `[B]`:
    gamma is the margin that their difference, times beta, should exceed.
    """
    expect_same_shape(mean_w=mean_w, mean_l=mean_l)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return logistic(beta * (mean_w - mean_l) - gamma)


def log_odds(mean_logp: Tensor) -> Tensor:
    """log [p/(1 - p)], p = exp(mean_logp) the geometric mean of a response's token probabilities.

    The odds of p = 1 are infinite: p counts as at most 1 - eps, of the dtype, without gradient.
    """
    if bool((mean_logp > 1e-3).any()):
        raise ValueError("expected mean log-probabilities, got positive values")
    mean_logp = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    # log(1 - p) by whichever form does not cancel; each sees only values it has a gradient at
    half = -math.log(2)
    likely = mean_logp > half
    small = torch.log1p(-torch.exp(mean_logp.masked_fill(likely, half)))
    large = torch.log(-torch.expm1(mean_logp.masked_fill(~likely, half)))
    return mean_logp - torch.where(likely, large, small)


def odds_ratio(mean_w: Tensor, mean_l: Tensor) -> Tensor:
    """ORPO's odds-ratio loss `[B]` (arXiv 2403.07691, eq. 7), without a reference policy.

    l(log odds(y_w) - log odds(y_l)), from mean log-probabilities of tokens log pi(y|x)/|y| `[B]`.
    ORPO's loss is the SFT loss of y_w plus lambda times this.
    """
    expect_same_shape(mean_w=mean_w, mean_l=mean_l)
    return logistic(log_odds(mean_w) - log_odds(mean_l))


def copg(log_ratio: Tensor, rewards: Tensor, beta: float, present: Tensor | None = None) -> Tensor:
    """Contrastive policy gradient of scored responses (CoPG, arXiv 2406.19185), `[B]`.

    Of K responses to each of B prompts, `log_ratio` `[B, K]` is c = log pi/pi_ref and `rewards`
    `[B, K]` is R; `present` `[B, K]` (bool, default all) says which there are, at least two each.
    The mean over a prompt's pairs (i, j) of

        (beta/2) [(c_i - c_j) - (R_i - R_j)/beta]^2

    is, up to a constant, minus the paper's objective (R_{beta/2} is R - beta/2 c)

        [R_{beta/2}(i) - R_{beta/2}(j)] c_i + [R_{beta/2}(j) - R_{beta/2}(i)] c_j

    Its gradient is minus the policy gradient of each response with the other's regularised reward
    R_beta as the baseline. With R_i - R_j = 1/2 it is beta/2 times `ipo`.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    expect_dimensions(2, log_ratio=log_ratio)
    present = torch.ones_like(log_ratio, dtype=torch.bool) if present is None else present
    expect_tokens(present, log_ratio=log_ratio, rewards=rewards)
    if not bool(rewards[present].isfinite().all()):
        raise ValueError("rewards must be finite where a response is present")
    width = log_ratio.shape[1]
    first, second = torch.triu_indices(width, width, offset=1, device=present.device)
    counts = present[:, first] & present[:, second]
    if not bool(counts.any(1).all()):
        raise ValueError("every prompt needs at least 2 responses that are present")
    distance = torch.where(present, log_ratio - rewards / beta, 0.0)
    squares = (distance[:, first] - distance[:, second]).square()
    return beta / 2 * torch.where(counts, squares, 0.0).sum(1) / counts.sum(1)


def _expect_flip_rate(eps: float | Tensor, h: Tensor) -> None:
    rates = torch.as_tensor(eps)
    if rates.ndim and rates.shape != h.shape:
        raise ValueError(
            f"eps must be a number or have the shape of h {list(h.shape)}, got {list(rates.shape)}"
        )
    if not bool(((rates >= 0) & (rates < 0.5)).all()):
        raise ValueError(
            f"eps must lie in [0, 0.5), got {eps}: at 0.5 labels carry no information and the "
            "denominator 1 - 2 eps of the correction is 0; above it they are reversed"
        )
