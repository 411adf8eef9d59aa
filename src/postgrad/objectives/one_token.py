"""Supervised fine-tuning as reinforcement learning of one token (arXiv 2509.26313).

At every position of a demonstration the policy pi answers with one token, drawn from pi', the same
logits at temperature kappa. The reward R is 1 for the demonstrated token x and beta for all others;
the next position's context is the demonstration again.

    sampled:   L = - (1/K) sum_k R(a_k) log pi(a_k),                a_k ~ pi', K of them
    expected:  E[L] = - [pi'(x) log pi(x) + beta sum_{a != x} pi'(a) log pi(a)],   pi' constant

The expected loss descends the logits z by (1 - beta) pi'(x) (e_x - pi) + beta (pi' - pi). At
kappa = 1 the second part is 0: it is (1 - beta) times dynamic fine-tuning, whose loss is
- pi(x) log pi(x) with a constant weight (DFT, arXiv 2508.05629), and beta only adds variance.
"""

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_same_shape


def one_token_rollout(logits: Tensor, targets: Tensor, candidates: Tensor, beta: float) -> Tensor:
    """The sampled loss `[...]` of every position.

    Args:
        logits: `[..., V]` of the policy, at temperature 1 whatever the candidates' was.
        targets: `[...]`, the demonstrated tokens.
        candidates: `[..., K]`, tokens drawn from the policy.
        beta: the reward of any other token than the demonstrated one; below 1.
    """
    _expect_targets(logits, targets, beta)
    if candidates.shape[:-1] != targets.shape or candidates.shape[-1] < 1:
        raise ValueError(
            f"candidates must be {[*targets.shape, 'K']} with K of at least 1, got "
            f"{list(candidates.shape)}"
        )
    logp = _at_least_single(logits).log_softmax(-1)
    rewards = torch.where(candidates == targets.unsqueeze(-1), 1.0, beta)
    return -(rewards * logp.gather(-1, candidates)).mean(-1)


def expected_one_token_rollout(
    logits: Tensor, targets: Tensor, beta: float, kappa: float = 1.0
) -> Tensor:
    """The mean of the sampled loss over candidates, `[...]`, without drawing any.

    Args:
        logits: `[..., V]` of the policy.
        targets: `[...]`, the demonstrated tokens.
        beta: the reward of any other token; below 1. With 0 and kappa = 1 this is DFT's loss.
        kappa: temperature of the distribution that candidates would be drawn from.
    """
    _expect_targets(logits, targets, beta)
    if not kappa > 0:
        raise ValueError(f"kappa must be positive, got {kappa}")
    logits = _at_least_single(logits)
    sampling = (logits.detach() / kappa).softmax(-1)
    logp = logits.log_softmax(-1)
    terms = sampling * logp.masked_fill(sampling == 0, 0.0)  # what is never drawn counts nothing
    hits = terms.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -((1 - beta) * hits + beta * terms.sum(-1))


def _at_least_single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _expect_targets(logits: Tensor, targets: Tensor, beta: float) -> None:
    if not beta < 1:
        raise ValueError(f"beta must be below 1, the reward of the target, got {beta}")
    expect_same_shape(logits=logits[..., 0], targets=targets)
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"targets must be tokens of a vocabulary of {logits.shape[-1]}, got "
            f"{int(targets.min())} to {int(targets.max())}: leave masked positions out"
        )
