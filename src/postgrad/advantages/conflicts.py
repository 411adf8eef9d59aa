"""Tokens on which good and bad responses agree, and responses too uncertain to learn from (GTPO).

After "GTPO: Trajectory-Based Policy Optimization" (Simoni et al. 2025, arXiv 2508.03772) and its
released code. Tensors are of N responses of at most T tokens, padded on the right; `groups` `[N]`
holds integer ids of their prompts.
"""

import math

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers

ONE_BIT = math.log(2)  # a response whose mean entropy is above that of a fair coin is uncertain


def conflict_masks(
    ids: Tensor, mask: Tensor, advantages: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """The shared openings and endings of rewarded and unrewarded responses, `[N, T]` bool each.

    A token is contested if it stands at its position in a response of its group with a positive
    advantage, and in one with a negative. The opening of a response is the run of contested tokens
    that it begins with. The ending is the same, counted from each response's last token. Responses
    with an advantage of 0 neither contest anything nor have a run.

    Args:
        ids: `[N, T]` tokens.
        mask: `[N, T]` bool, true at the first tokens of each response, its own.
        advantages: `[N]`; only their signs matter.
        groups: `[N]`.
    """
    lengths = _lengths(mask)
    _expect_tokens(mask, ids)
    if advantages.shape != lengths.shape or groups.shape != lengths.shape:
        raise ValueError(
            f"advantages and groups must be [N] with N = {len(lengths)}, got "
            f"{list(advantages.shape)} and {list(groups.shape)}"
        )
    expect_numbers(advantages=advantages)
    opening = _contested_run(ids, mask, advantages, groups)
    # position t from the front is position length - 1 - t from the back, and the same way again
    turned = (lengths[:, None] - 1 - torch.arange(ids.shape[1], device=ids.device)).clamp(min=0)
    ending = _contested_run(ids.gather(1, turned), mask, advantages, groups).gather(1, turned)
    return opening, ending & mask


def conflict_weights(
    opening: Tensor, ending: Tensor, advantages: Tensor, *, stack_runs: bool = False
) -> Tensor:
    """lambda `[N, T]`: 2 at conflict tokens of good responses, 0 at those of bad ones, 1 elsewhere.

    A token in both runs is in conflict once; with `stack_runs` its weight is squared, so 4 in a
    good response, as in the released code.
    """
    _expect_tokens(opening, ending)
    if advantages.shape != opening.shape[:1]:
        raise ValueError(f"advantages must be [{len(opening)}], got {list(advantages.shape)}")
    expect_numbers(advantages=advantages)
    weight = 1 + advantages.sign()[:, None].expand(opening.shape)
    if stack_runs:
        return torch.where(opening, weight, 1.0) * torch.where(ending, weight, 1.0)
    return torch.where(opening | ending, weight, 1.0)


def longest_run(opening: Tensor, ending: Tensor) -> Tensor:
    """The length `[N]` of the longer of a response's two runs, at least 1."""
    _expect_tokens(opening, ending)
    return torch.maximum(opening.sum(1), ending.sum(1)).clamp(min=1)


def response_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
    """<H> `[N]`: the mean entropy of a response's tokens; 0 for an empty one."""
    _expect_tokens(mask, entropies)
    return torch.where(mask, entropies, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def entropy_filter(
    entropy: Tensor, threshold: float = ONE_BIT, initial: float | None = None
) -> Tensor:
    """Which responses count, `[N]` bool: those of mean entropy `[N]` at most `threshold`.

    All count where the policy was above the threshold before training (`initial`).
    """
    if entropy.ndim != 1:
        raise ValueError(f"entropy must be [N], got {list(entropy.shape)}")
    if not threshold > 0:
        raise ValueError(f"the threshold must be above 0, got {threshold}")
    expect_numbers(entropy=entropy)
    if initial is not None and initial > threshold:
        return torch.ones_like(entropy, dtype=torch.bool)
    return entropy <= threshold


def _lengths(mask: Tensor) -> Tensor:
    """The number of tokens `[N]` of rows that are padded on the right."""
    _expect_tokens(mask, mask)
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("mask must be true at the first tokens of each row and nowhere else")
    return lengths


def _expect_tokens(mask: Tensor, values: Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool or values.shape != mask.shape:
        raise ValueError(
            f"expected a boolean mask [N, T] and values of its shape, got {mask.dtype} "
            f"{list(mask.shape)} and {list(values.shape)}"
        )


def _contested_run(ids: Tensor, mask: Tensor, advantages: Tensor, groups: Tensor) -> Tensor:
    run = torch.zeros_like(mask)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        own, there, sign = ids[members], mask[members], advantages[members].sign()
        # pairwise: a table of positions and vocabulary would be huge
        same = (own[:, None] == own[None]) & there[:, None] & there[None]
        contested = same[:, sign > 0].any(1) & same[:, sign < 0].any(1) & (sign != 0)[:, None]
        run[members] = contested.cumprod(1).bool()
    return run
