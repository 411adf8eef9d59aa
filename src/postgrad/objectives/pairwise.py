"""Pairwise preference losses: functions of the margin between a chosen and a rejected response.

Notation of DPO (arXiv 2305.18290): Delta is the margin of log-ratios, h = beta * Delta, and
l(h) = -log sigma(h). Every loss here is per pair; a method takes its mean over the pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from postgrad.objectives.shapes import expect_same_shape, expect_tokens

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
