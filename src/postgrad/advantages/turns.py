"""Advantages of the turns of conversations with a tool, and of their tokens.

`rewards` `[N, K]` holds a number for each of at most K turns of N responses, `counts` `[N]` how
many turns each response has, at least 1; what stands beyond them does not matter. `groups` `[N]`
holds integer ids. After arXiv 2510.14967 (IGPO).
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.advantages.group import Deviation, group_standardised

TurnNormalisation = Literal["joint", "separate", "position"]


def information_gains(confidences: Tensor, counts: Tensor) -> Tensor:
    """How much each turn but the last raised the confidence in the true answer, `[N, K]`.

        g_t = p_t - p_{t-1}    for 1 <= t < T,    0 at the last turn and beyond

    `confidences` `[N, K]` holds p_0 (of the prompt) to p_{T-1} (after turn T - 1) of each response,
    probabilities or their logarithms.
    """
    inside = _inside(confidences, counts)
    later = confidences.roll(-1, 1)
    return torch.where(inside & ~_last(confidences, counts), later - confidences, 0.0)


def with_outcomes(rewards: Tensor, outcomes: Tensor, counts: Tensor) -> Tensor:
    """Rewards of turns `[N, K]` with what the whole response is worth `[N]` at its last turn."""
    inside = _inside(rewards, counts)
    if outcomes.shape != counts.shape:
        raise ValueError(f"outcomes must be [N], got {list(outcomes.shape)}")
    kept = torch.where(inside, rewards, 0.0)
    return torch.where(_last(rewards, counts), outcomes[:, None].to(rewards), kept)


def normalised_turns(
    rewards: Tensor,
    counts: Tensor,
    groups: Tensor,
    *,
    by: Literal["joint", "separate"] = "joint",
    std: Deviation = "sample",
    eps: float = 1e-6,
) -> Tensor:
    """(reward - mean) / (deviation + eps) of turns within their group, `[N, K]`, 0 beyond.

    "joint": one mean and deviation over all turns of a group's responses. "separate": one for last
    turns, the outcomes, and one for all others. What is alike, or alone, is 0.
    """
    inside, last = _inside(rewards, counts), _last(rewards, counts)
    _expect_groups(groups, counts)
    if by not in ("joint", "separate"):
        raise ValueError(f"by must be 'joint' or 'separate', got {by!r}")
    ids = groups[:, None].expand_as(rewards)
    found = torch.zeros_like(rewards)
    for part in [inside] if by == "joint" else [inside & ~last, last]:
        _, place, sizes = ids[part].unique(return_inverse=True, return_counts=True)
        some = part.masked_scatter(part, sizes[place] > 1)
        if some.any():
            standardised = group_standardised(rewards[some], ids[some], std, eps)
            found = found.masked_scatter(some, standardised)
    return found


def turn_returns(rewards: Tensor, counts: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = sum over k >= t of gamma^(k - t) r_k, `[N, K]`, 0 beyond the last turn."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    kept = torch.where(_inside(rewards, counts), rewards, 0.0)
    returns, following = [], torch.zeros_like(kept[:, 0])
    for column in reversed(kept.unbind(1)):
        following = column + gamma * following
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def spread_turns(values: Tensor, turns: Tensor, inside: Tensor) -> Tensor:
    """Every token gets the value of its turn: `[N, K]` and turns `[N, T]` to `[N, T]`.

    `inside` `[N, T]` bool are the tokens of the responses; all others get 0.
    """
    if turns.shape != inside.shape or len(values) != len(turns):
        raise ValueError(
            f"values must be [N, K], turns and inside [N, T], got {list(values.shape)}, "
            f"{list(turns.shape)} and {list(inside.shape)}"
        )
    if bool((turns[inside] >= values.shape[1]).any()):
        raise ValueError(f"a token is of turn {int(turns.max())}, values are of {values.shape[1]}")
    places = torch.where(inside, turns, 0).long()
    return torch.where(inside, values.gather(1, places), 0.0)


def position_centred(values: Tensor, groups: Tensor) -> Tensor:
    """Values of tokens `[N, T]` minus their group's mean at the same position, `[N, T]`.

    Positions beyond a response count with their value, 0: so does the official code of IGPO, which
    compares tokens of different turns where lengths differ.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be [N, T], got {list(values.shape)}")
    _expect_groups(groups, values.sum(1))
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), values.shape[1], dtype=values.dtype, device=values.device)
    means = sums.index_add(0, index, values) / sizes[:, None]
    return values - means[index]


def _inside(values: Tensor, counts: Tensor) -> Tensor:
    if values.ndim != 2 or counts.shape != values.shape[:1]:
        raise ValueError(
            f"turns must be [N, K] and counts [N], got {list(values.shape)} and "
            f"{list(counts.shape)}"
        )
    if len(counts) and not 1 <= int(counts.min()) <= int(counts.max()) <= values.shape[1]:
        raise ValueError(
            f"every response needs 1 to {values.shape[1]} turns, got {int(counts.min())} to "
            f"{int(counts.max())}"
        )
    return torch.arange(values.shape[1], device=values.device) < counts[:, None]


def _last(values: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device) == counts[:, None] - 1


def _expect_groups(groups: Tensor, like: Tensor) -> None:
    if groups.shape != like.shape or groups.is_floating_point():
        raise ValueError(f"groups must be integer [N], got {groups.dtype} {list(groups.shape)}")
