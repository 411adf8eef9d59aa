"""GRACE's rewards for rationales: how well the embedding of text and rationale tells texts apart.

Source: GRACE (arXiv 2510.04506) and its authors' code. Embeddings are pooled hidden states of a text
and its rationale; only their direction matters. No gradient flows through them: the reward is a
number for a sampled rationale.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.errors import PostgradError


@torch.no_grad()
def contrastive_rationale_reward(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    consistency: float = 0.2,
    hard_negatives: float = 0.2,
    temperature: float = 0.1,
    negatives: Literal["paper", "per_rollout"] = "paper",
    truncated: Tensor | None = None,
    truncation_reward: float = -1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards `[B, K]` of K rationales for each of B positive texts, and their terms, each `[B, K]`.

    `query` `[B, d]`, `positive` `[B, K, d]`, `negative` `[B, d]` or None (its term is then 0).

    R = (positive + negative + consistency * R_cons + hard_negatives * R_hard) / temperature with

    - positive: sim(query_i, positive_ik),
    - consistency: the mean of sim(positive_ik, positive_ij) over the other rollouts j,
    - `negatives="paper"`: negative is -sim(query_i, negative_i); hard_negatives is minus the mean over
      other prompts j of max_l sim(query_i, positive_jl). Neither depends on k, so both cancel in an
      advantage centred within the prompt's group.
    - `negatives="per_rollout"` (a variant of this library): negative is -sim(positive_ik, negative_i);
      hard_negatives is minus the mean over other prompts j of sim(positive_ik, query_j). They do not
      cancel.

    Where `truncated` `[B, K]` (the rationale was cut at its longest length) the reward is replaced by
    `truncation_reward`. That is no floor: other rewards may be lower, and how strong a penalty it is
    depends on the temperature.
    """
    prompts, rollouts = _expect_embeddings(query, positive)
    _expect_settings(temperature, consistency, rollouts, "hard_negatives", hard_negatives, prompts)
    query, positive = _unit("query", query), _unit("positive", positive)
    if negative is None:
        contrast = torch.zeros_like(positive[..., 0])
    else:
        if negative.shape != query.shape:
            raise ValueError(
                f"negative must be {list(query.shape)} like query, got {list(negative.shape)}"
            )
        contrast = _unit("negative", negative)
    across = torch.einsum("bd,jld->bjl", query, positive)  # query b to rollout l of prompt j
    if negatives == "paper":
        hard = _mean_of_others(across.max(-1).values).unsqueeze(1).expand(prompts, rollouts)
        against = query.unsqueeze(1)
    elif negatives == "per_rollout":
        hard = _mean_of_others(across.permute(1, 2, 0))
        against = positive
    else:
        raise PostgradError(f"negatives must be 'paper' or 'per_rollout', got {negatives!r}")
    terms = {}
    return terms, terms
