"""Right responses above wrong ones, near the policy that drew them (DisCO, arXiv 2505.12366).

Log-probabilities are `[N, T]` with a boolean `mask` of the response tokens; scores `[N]` are of
whole responses, `rewards` `[N]` are 0 or 1 and `groups` `[N]` hold integer ids of prompts.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.shapes import expect_dimensions, expect_same_shape, expect_tokens

Score = Literal["log-likelihood", "likelihood-ratio"]


def sequence_score(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: Score = "log-likelihood"
) -> Tensor:
    """The mean over a response's tokens of log pi, or of pi / pi_old; `[N]`, with gradient.

    Raises ValueError for an empty response.
    """
    expect_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("a response without tokens has no score")
    if kind == "log-likelihood":
        values = torch.where(mask, logprobs, 0.0)
    elif kind == "likelihood-ratio":
        ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()
        values = torch.where(mask, ratio, 0.0)
    else:
        raise ValueError(f"kind must be 'log-likelihood' or 'likelihood-ratio', got {kind!r}")
    return values.sum(1) / lengths


def discriminative_objective(
    scores: Tensor, rewards: Tensor, groups: Tensor, tau: float | None = None
) -> Tensor:
    """How far right responses score above wrong ones, each prompt's J(x), averaged over prompts.

        J(x) = mean of s over the right - tau log mean of exp(s/tau) over the wrong    (DisCO)

    The second term leans to the wrong responses of high score, the more the smaller tau; without
    `tau` it is their plain mean (DisCO-b). Prompts of which all responses are right, or all wrong,
    have J = 0 and count in the mean. Unlike GRPO's, no prompt's weight depends on how often it is
    solved.
    """
    expect_dimensions(1, scores=scores, rewards=rewards, groups=groups)
    expect_same_shape(scores=scores, rewards=rewards, groups=groups)
    if not bool(((rewards == 0) | (rewards == 1)).all()):
        raise ValueError(f"rewards must be 0 or 1, got {odd_values(rewards)}")
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    if not len(scores):
        raise ValueError("scores must be of at least one response, got none")
    ids = groups.unique()
    total = 0.0 * scores.sum()  # in the graph even where no prompt tells right from wrong
    for group in ids:
        right = scores[(groups == group) & (rewards == 1)]
        wrong = scores[(groups == group) & (rewards == 0)]
        if not len(right) or not len(wrong):
            continue
        if tau is None:
            below = wrong.mean()
        else:
            count = torch.tensor(float(len(wrong)), dtype=scores.dtype, device=scores.device)
            below = tau * ((wrong / tau).logsumexp(0) - count.log())
        total = total + right.mean() - below
    return total / len(ids)


def odd_values(rewards: Tensor) -> str:
    """The rewards that are neither 0 nor 1, a few of them, in words."""
    odd = rewards[(rewards != 0) & (rewards != 1)].unique()
    return ", ".join(f"{float(value):g}" for value in odd[:3])


def old_divergence(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Estimates of KL(pi_old || pi) from tokens that pi_old drew, `[N, T]`, 0 at padding.

    With d = log pi_old - log pi: "k1" d, which may be negative, "k3" exp(-d) - 1 + d. The gradient
    flows through `logprobs` only.
    """
    expect_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    difference = torch.where(mask, old_logprobs.detach() - logprobs, 0.0)
    if kind == "k1":
        return difference
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind must be 'k1' or 'k3', got {kind!r}")


def hinge_coefficient(divergence: float, delta: float, beta: float) -> float:
    """beta [D - delta]_+, the slope of (beta/2) [D - delta]_+^2 in D."""
    if not (delta >= 0 and beta >= 0):
        raise ValueError(f"delta and beta must be at least 0, got {delta} and {beta}")
    return max(beta * (divergence - delta), 0.0)
