"""GRACE's rewards for rationales: how well the embedding of text and rationale tells texts apart.

Source: GRACE (arXiv 2510.04506) and its authors' code. Embeddings are pooled hidden states of a
text and its rationale; only their direction matters. No gradient flows through them: the reward is
a number for a sampled rationale.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.errors import PostgradError

Rewards = tuple[Tensor, dict[str, Tensor]]


def _in_full_precision(reward: Callable[..., Rewards]) -> Callable[..., Rewards]:
    """Without gradients and without autocast: half precision would round similarities away."""

    @functools.wraps(reward)
    def computed(own: Tensor, *others: Any, **settings: Any) -> Rewards:
        with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
            return reward(own, *others, **settings)

    return computed


@_in_full_precision
def contrastive_rationale_reward(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    negative_weight: float = 1.0,
    consistency: float = 0.2,
    hard_negatives: float = 0.2,
    temperature: float = 0.1,
    negatives: Literal["paper", "per_rollout"] = "paper",
    truncated: Tensor | None = None,
    truncation_reward: float = -1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards `[B, K]` of K rationales for each of B positive texts, and their terms `[B, K]`.

    `query` `[B, d]`, `positive` `[B, K, d]`, `negative` `[B, d]` or None (it then has no term).

    R = (positive + negative_weight * negative + consistency * R_cons + hard_negatives * R_hard)
    / temperature with

    - positive: sim(query_i, positive_ik),
    - consistency: the mean of sim(positive_ik, positive_ij) over the other rollouts j,
    - `negatives="paper"`: negative is -sim(query_i, negative_i); R_hard is minus the mean over
      other prompts j of max_l sim(query_i, positive_jl). Neither depends on k, so both cancel in
      an advantage centred within the prompt's group.
    - `negatives="per_rollout"` (a variant of this library): negative is
      -sim(positive_ik, negative_i); R_hard is minus the mean over other prompts j of
      sim(positive_ik, query_j). They do not cancel.

    Where `truncated` `[B, K]` (boolean: the rationale was cut at its longest length) the reward is
    replaced by `truncation_reward`. That is no floor: other rewards may be lower, and how strong a
    penalty it is depends on the temperature.
    """
    _expect_settings(temperature, positive, consistency, hard_negatives)
    query, positive = _unit("query", query, 2), _unit("positive", positive, 3)
    _expect_match("query", query, positive)
    if negatives not in ("paper", "per_rollout"):
        raise PostgradError(f"negatives must be 'paper' or 'per_rollout', got {negatives!r}")
    attraction = torch.einsum("id,ikd->ik", query, positive)
    if negatives == "paper":
        hardest = torch.einsum("id,jld->ijl", query, positive).amax(-1)
        hard = -_mean_over_others(hardest).unsqueeze(1).expand_as(attraction)
    else:
        hard = -_mean_over_others(torch.einsum("ikd,jd->ijk", positive, query))
    agreement = _agreement(positive)
    terms = {"positive": attraction, "consistency": agreement, "hard_negatives": hard}
    rewards = attraction + consistency * agreement + hard_negatives * hard
    if negative is not None:
        negative = _unit("negative", negative, 2)
        _expect_match("negative", negative, positive)
        against = query.unsqueeze(1).expand_as(positive) if negatives == "paper" else positive
        terms["negative"] = -torch.einsum("ikd,id->ik", against, negative)
        rewards = rewards + negative_weight * terms["negative"]
    return _penalise(rewards / temperature, truncated, truncation_reward), terms


@_in_full_precision
def unsupervised_rationale_reward(
    anchor: Tensor,
    rollouts: Tensor,
    *,
    consistency: float = 0.2,
    cross: float = 0.2,
    temperature: float = 0.1,
    truncated: Tensor | None = None,
    truncation_reward: float = -1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards `[B, K]` of K rationales for each of B texts without labels, and their terms.

    `anchor` `[B, d]` is the embedding with one more rationale of the same text, `rollouts`
    `[B, K, d]`. R = (self + consistency * R_cons + cross * R_cross) / temperature with

    - self: sim(anchor_i, rollout_ik),
    - consistency: the mean of sim(rollout_ik, rollout_ij) over the other rollouts j,
    - cross: minus the mean over other texts j of sim(rollout_ik, anchor_j).

    `truncated` and `truncation_reward` as in `contrastive_rationale_reward`.
    """
    _expect_settings(temperature, rollouts, consistency, cross)
    anchor, rollouts = _unit("anchor", anchor, 2), _unit("rollouts", rollouts, 3)
    _expect_match("anchor", anchor, rollouts)
    terms = {
        "self": torch.einsum("id,ikd->ik", anchor, rollouts),
        "consistency": _agreement(rollouts),
        "cross": -_mean_over_others(torch.einsum("ikd,jd->ijk", rollouts, anchor)),
    }
    rewards = (
        terms["self"] + consistency * terms["consistency"] + cross * terms["cross"]
    ) / temperature
    return _penalise(rewards, truncated, truncation_reward), terms


def _agreement(rollouts: Tensor) -> Tensor:
    """Mean similarity `[B, K]` of each rollout to the other rollouts of its text; 0 for K = 1."""
    similarities = torch.einsum("ikd,ild->kli", rollouts, rollouts)
    return _mean_over_others(similarities).T


def _mean_over_others(similarities: Tensor) -> Tensor:
    """Mean over j != i of `[i, j, ...]`, both of size B: `[B, ...]`, 0 for B = 1."""
    count = len(similarities)
    itself = torch.eye(count, dtype=torch.bool, device=similarities.device)
    itself = itself.view(count, count, *[1] * (similarities.ndim - 2))
    return similarities.masked_fill(itself, 0.0).sum(1) / max(count - 1, 1)


def _penalise(rewards: Tensor, truncated: Tensor | None, truncation_reward: float) -> Tensor:
    if truncated is None:
        return rewards
    if truncated.shape != rewards.shape or truncated.dtype != torch.bool:
        raise ValueError(
            f"truncated must be boolean {list(rewards.shape)}, got {truncated.dtype} "
            f"{list(truncated.shape)}"
        )
    return torch.where(truncated, truncation_reward, rewards)


def _expect_settings(
    temperature: float, rollouts: Tensor, consistency: float, between_prompts: float
) -> None:
    """Raise PostgradError for settings of a run under which a term is undefined."""
    if rollouts.ndim != 3 or 0 in rollouts.shape:
        raise ValueError(f"rollouts must be [B, K, d] and not empty, got {list(rollouts.shape)}")
    if not temperature > 0:
        raise PostgradError(f"the reward temperature must be positive, got {temperature}")
    prompts, samples, _ = rollouts.shape
    if consistency != 0 and samples < 2:
        raise PostgradError(
            "the consistency reward compares the rollouts of a prompt: sample at least 2 of each, "
            "or set its weight to 0"
        )
    if between_prompts != 0 and prompts < 2:
        raise PostgradError(
            "the reward against other prompts needs at least 2 prompts per step: raise their "
            "number, or set its weight to 0"
        )


def _unit(name: str, embeddings: Tensor, dimensions: int) -> Tensor:
    """The embeddings at length 1; a zero or non-finite one (an empty pooling) has no direction."""
    if embeddings.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got {list(embeddings.shape)}")
    lengths = embeddings.square().sum(-1, keepdim=True).sqrt()
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"{name} holds an embedding that is zero or not finite")
    return embeddings / lengths


def _expect_match(name: str, single: Tensor, rollouts: Tensor) -> None:
    expected = [len(rollouts), rollouts.shape[-1]]
    if list(single.shape) != expected:
        raise ValueError(
            f"{name} must be {expected} to match rollouts {list(rollouts.shape)}, got "
            f"{list(single.shape)}"
        )
