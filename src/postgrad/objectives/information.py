"""Differential information: what turns one policy into another, as a distribution (2505.23761).

The differential information distribution (DID) from pi_ref to pi is their normalised ratio over
the space of all responses,

    q_{pi/pi_ref}(y) = (pi(y)/pi_ref(y)) / sum_y' pi(y')/pi_ref(y')

Functions that take distributions want log-probabilities `[..., V]` over a whole finite space.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_numbers, expect_same_shape

Proposal = Literal["policy", "reference"]


def differential_information(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """log q_{pi/pi_ref} `[..., V]` of two policies of full support."""
    _expect_distributions(logp=logp, logp_ref=logp_ref)
    return (logp - logp_ref).log_softmax(-1)


def entropy(logq: Tensor) -> Tensor:
    """H(q) `[...]` in nats; log V is the largest, that of no information (pi = pi_ref)."""
    _expect_distributions(logq=logq)
    return -(logq.exp() * logq).sum(-1)


@dataclass(frozen=True)
class EntropyEstimate:
    """The DID's entropy from K samples, each of shape `[...]`.

    Attributes:
        entropy: in nats.
        effective_samples: between 1 and K. At sequences the weights 1/pi_ref differ by many nats,
            and one sample may be all there is to the estimate.
        error: standard error, to first order in 1/K; of no use where few samples are effective.
    """

    entropy: Tensor
    effective_samples: Tensor
    error: Tensor


def sampled_did_entropy(
    logp: Tensor, logp_ref: Tensor, proposal: Proposal = "policy"
) -> EntropyEstimate:
    """H(q) = log Z - E_q[log pi/pi_ref], Z = sum_y pi/pi_ref, from samples `[..., K]`.

    With y_k ~ proposal and l_k = log pi/pi_ref(y_k), weights are w_k = 1/pi_ref(y_k) (policy) or
    pi(y_k)/pi_ref(y_k)^2 (reference):

        H = log mean_k w_k - sum_k w_k l_k / sum_k w_k
    """
    expect_same_shape(logp=logp, logp_ref=logp_ref)
    count = logp.shape[-1] if logp.ndim else 0
    if count < 2:
        raise ValueError(f"at least 2 samples are needed, got {count}")
    _expect_support(logp=logp, logp_ref=logp_ref)
    ratio = logp - logp_ref
    if proposal == "policy":
        log_weights = -logp_ref
    elif proposal == "reference":
        log_weights = ratio - logp_ref
    else:
        raise ValueError(f"proposal must be 'policy' or 'reference', got {proposal!r}")
    shares = log_weights.softmax(-1)
    mean_ratio = (shares * ratio).sum(-1)
    influence = count * shares * (1 + mean_ratio.unsqueeze(-1) - ratio) - 1
    return EntropyEstimate(
        log_weights.logsumexp(-1) - math.log(count) - mean_ratio,
        1 / shares.square().sum(-1),
        influence.std(-1) / math.sqrt(count),
    )


def rejected_distribution(logp_ref: Tensor, logp_target: Tensor, beta: float) -> Tensor:
    """log pi_l `[..., V]`, pi_l ∝ pi_ref (pi_ref/pi*)^beta.

    If chosen responses follow pi_ref and rejected ones pi_l, preferences encode the information
    from pi_ref to pi*, and the optimum of DPO with this beta is pi*.
    """
    _expect_distributions(logp_ref=logp_ref, logp_target=logp_target)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (logp_ref + beta * (logp_ref - logp_target)).log_softmax(-1)


def preference_probabilities(logp_chosen: Tensor, logp_rejected: Tensor) -> Tensor:
    """p(i > j) `[..., V, V]`: that i is the chosen one of an unordered pair.

    Chosen and rejected responses are drawn from these distributions, independently of each other:
    p(i > j) = sigma(s_i - s_j), s = log pi_chosen - log pi_rejected.
    """
    _expect_distributions(logp_chosen=logp_chosen, logp_rejected=logp_rejected)
    scores = logp_chosen - logp_rejected
    return torch.sigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))


@dataclass(frozen=True)
class PowerLaw:
    """How well q_{pi_ref/pi_l} ∝ q_{pi*/pi_ref}^beta holds, each of shape `[...]`.

    Attributes:
        beta: the exponent, by least squares over the responses.
        residual: share of the variance of log q_{pi_ref/pi_l} that it leaves; 0 where it is exact.
    """

    beta: Tensor
    residual: Tensor


def power_law(logp_rejected: Tensor, logp_ref: Tensor, logp_target: Tensor) -> PowerLaw:
    """The condition under which preferences encode differential information, from `[..., V]`.

    The log-probabilities may be those of some responses only. Raises ValueError where pi* or pi_l
    gives all of them the probability of pi_ref, up to a constant: then there is no exponent.
    """
    expect_same_shape(logp_rejected=logp_rejected, logp_ref=logp_ref, logp_target=logp_target)
    _expect_support(logp_rejected=logp_rejected, logp_ref=logp_ref, logp_target=logp_target)
    learnt, wanted = logp_ref - logp_rejected, logp_target - logp_ref
    learnt = learnt - learnt.mean(-1, keepdim=True)
    wanted = wanted - wanted.mean(-1, keepdim=True)
    for name, differences in (("logp_rejected", learnt), ("logp_target", wanted)):
        if not bool((differences.square().sum(-1) > 0).all()):
            raise ValueError(f"{name} must differ from logp_ref by more than a constant")
    beta = (learnt * wanted).sum(-1) / wanted.square().sum(-1)
    left = (learnt - beta.unsqueeze(-1) * wanted).square().sum(-1)
    return PowerLaw(beta, left / learnt.square().sum(-1))


def margins_in_order(logp_rejected: Tensor, logp_ref: Tensor, logp_target: Tensor) -> Tensor:
    """Whether M_l <= M_ref <= M_*, or all reversed, for pairs `[..., 2]`: bool `[...]`.

    M is the log-margin log pi(y1) - log pi(y2). The power law makes M_ref the mean
    (M_l + beta M_*)/(1 + beta), so under it every pair is in order; the mean is the rate.
    """
    expect_same_shape(logp_rejected=logp_rejected, logp_ref=logp_ref, logp_target=logp_target)
    if logp_ref.ndim < 1 or logp_ref.shape[-1] != 2:
        raise ValueError(f"pairs must be [..., 2], got {list(logp_ref.shape)}")
    expect_numbers(logp_rejected=logp_rejected, logp_ref=logp_ref, logp_target=logp_target)
    low, middle, high = (
        logp[..., 0] - logp[..., 1] for logp in (logp_rejected, logp_ref, logp_target)
    )
    return ((low <= middle) & (middle <= high)) | ((low >= middle) & (middle >= high))


def _expect_support(**distributions: Tensor) -> None:
    for name, logp in distributions.items():
        if not bool(logp.isfinite().all()):
            raise ValueError(
                f"{name} must be finite: where a policy has probability 0 the ratio is infinite"
            )


def _expect_distributions(**distributions: Tensor) -> None:
    expect_same_shape(**distributions)
    _expect_support(**distributions)
    for name, logp in distributions.items():
        if logp.ndim < 1 or not bool((logp.logsumexp(-1).abs() < 1e-4).all()):
            raise ValueError(
                f"{name} must be log-probabilities of all responses: their probabilities do not "
                "add up to 1"
            )
