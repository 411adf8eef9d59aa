"""Learning a reward from noisy pairs, and keeping it able to tell new responses apart.

Notation of arXiv 2401.06080: d = r(x, y_c) - r(x, y_r) is a pair's difference of rewards, mu its
preference strength: the mean of d over an ensemble of reward models.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from postgrad.objectives.shapes import expect_dimensions, expect_numbers, expect_same_shape


def bradley_terry(
    difference: Tensor,
    *,
    smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
    flip: Tensor | None = None,
) -> Tensor:
    """-(1 - p) log sigma(d - m) - p log sigma(m - d) `[B]`, of d `[B]`.

    `smoothing` p is one number in [0, 0.5), or the probability in [0, 1] of each pair that its
    label is wrong `[B]` (soft labels). `margin` m is a number or `[B]`. Where `flip` `[B]` is True
    chosen and rejected change places, d becomes -d, before the margin is taken off.
    """
    expect_dimensions(1, difference=difference)
    for name, values in (("smoothing", smoothing), ("margin", margin), ("flip", flip)):
        if isinstance(values, Tensor) and values.shape != difference.shape:
            raise ValueError(f"{name} {list(values.shape)} does not fit {list(difference.shape)}")
    if not bool(torch.as_tensor(margin).isfinite().all()):
        raise ValueError("a margin is not finite")
    if isinstance(smoothing, Tensor):
        if not bool(((smoothing >= 0) & (smoothing <= 1)).all()):
            raise ValueError("a soft label is a probability in [0, 1]")
    elif not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must lie in [0, 0.5), got {smoothing}")
    if flip is not None:
        difference = torch.where(flip, -difference, difference)
    ahead = difference - margin
    return -(1 - smoothing) * logsigmoid(ahead) - smoothing * logsigmoid(-ahead)


def preference_strength(scores: Tensor, *, normalised: bool = False) -> tuple[Tensor, Tensor]:
    """mu and sigma `[M]`: mean and standard deviation of each pair's d over N reward models.

    `scores` `[N, M, 2]` are each model's rewards of chosen and rejected, N >= 2. `normalised`
    divides each model's d by its root mean square over the pairs first, since reward models differ
    in scale. sigma is that of the population (divided by N).
    """
    expect_dimensions(3, scores=scores)
    if scores.shape[2] != 2 or not scores.shape[1]:
        raise ValueError(f"expected scores of shape [N, M, 2], got {list(scores.shape)}")
    if len(scores) < 2:
        raise ValueError(f"the strength of a preference needs at least 2 models, got {len(scores)}")
    difference = scores[..., 0] - scores[..., 1]
    if normalised:
        squares = difference.square().mean(1, keepdim=True)
        # a model that tells no pair apart has differences of 0, whatever they are divided by
        difference = difference / torch.where(squares > 0, squares, 1.0).sqrt()
    return difference.mean(0), difference.std(0, correction=0)


def weakest(strength: Tensor, share: float) -> Tensor:
    """`[M]` bool: the share of pairs with the least mu `[M]`, rounded down; earlier ones first."""
    expect_dimensions(1, strength=strength)
    expect_numbers(strength=strength)
    if not 0 <= share <= 0.5:
        raise ValueError(f"share must lie in [0, 0.5], got {share}")
    chosen = torch.zeros_like(strength, dtype=torch.bool)
    chosen[strength.argsort(stable=True)[: int(share * len(strength))]] = True
    return chosen


def sinkhorn_codes(scores: Tensor, *, sharpness: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes `[B, K]`: soft assignments of B items to K prototypes that use all of them evenly.

    exp(scores / sharpness) with rows and columns normalised in turn (SwAV, arXiv 2006.09882); every
    row sums to 1. Without gradient.
    """
    expect_dimensions(2, scores=scores)
    if not (sharpness > 0 and iterations >= 1):
        raise ValueError(
            f"sharpness must be positive and iterations at least 1, got {sharpness}, {iterations}"
        )
    with torch.no_grad():
        logits = scores.float() / sharpness
        for _ in range(iterations):
            logits = logits - logits.logsumexp(0, keepdim=True)
            logits = logits - logits.logsumexp(1, keepdim=True)
        return logits.exp()


def swav(view_s: Tensor, view_t: Tensor, prototypes: Tensor, *, temperature: float) -> Tensor:
    """SwAV's loss `[B]` of two views `[B, d]` and prototypes `[K, d]`, all taken at unit norm.

    H(q_s, p_t) + H(q_t, p_s): from each view the code q of the other is predicted,
    p = softmax(h^T C / temperature). Codes have no gradient.
    """
    expect_dimensions(2, view_s=view_s, view_t=view_t, prototypes=prototypes)
    expect_same_shape(view_s=view_s, view_t=view_t)
    if len(view_s) < 2:
        raise ValueError("a batch of one item has no other assignments: at least 2 are needed")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    directions = normalize(prototypes, dim=-1).T
    first, second = (normalize(view, dim=-1) @ directions for view in (view_s, view_t))
    predicted_s = (first / temperature).log_softmax(-1)
    predicted_t = (second / temperature).log_softmax(-1)
    code_s, code_t = sinkhorn_codes(first), sinkhorn_codes(second)
    return -(code_s * predicted_t).sum(-1) - (code_t * predicted_s).sum(-1)


def spread_of_rewards(rewards: Tensor, present: Tensor | None = None) -> Tensor:
    """J `[m]` of MetaRM: how well rewards `[m, k]` tell a prompt's k responses apart.

    (2 / k^2) sum over pairs i < j of sigma(|r_i - r_j|); where `present` `[m, k]` (bool, default
    all) is False there is no response. J lies in [(k - 1)/(2k), (k - 1)/k); equal rewards pull at
    nothing.
    """
    expect_dimensions(2, rewards=rewards)
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    expect_same_shape(rewards=rewards, present=present)
    count = present.sum(1)
    if not bool((count >= 2).all()):
        raise ValueError("every prompt needs at least 2 responses to be told apart")
    first, second = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=rewards.device)
    rewards = rewards.masked_fill(~present, 0.0)
    apart = torch.sigmoid((rewards[:, first] - rewards[:, second]).abs())
    return 2 * torch.where(present[:, first] & present[:, second], apart, 0.0).sum(1) / count**2
