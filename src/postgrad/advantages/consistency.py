"""Advantages within a prompt and between prompts, blended by how far answers agree (COPO).

After "COPO: Consistency-Aware Policy Optimization" (Han et al. 2025, arXiv 2508.04138) and its
released code. J prompts, in order of the ids in `groups` `[N]`, have N responses.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers
from postgrad.advantages.group import batch_standardised

BlendMode = Literal[
    "only-soft",
    "soft-with-forced",
    "only-forced",
    "soft-with-zero",
    "only-zero",
    "only-global",
    "no-global",
]


def answer_entropy(answers: Sequence[Hashable], groups: Tensor) -> Tensor:
    """H_j = -sum_a p_j(a) log2 p_j(a) `[J]`: the entropy in bits of the answers to each prompt.

    `answers` are N final answers; equal ones are one answer, and None (no answer) is one as well.
    """
    if groups.ndim != 1 or len(answers) != len(groups):
        raise ValueError(
            f"expected an answer for each of groups [N], got {len(answers)} answers and groups "
            f"{list(groups.shape)}"
        )
    counts: dict[int, Counter[Hashable]] = {group: Counter() for group in groups.unique().tolist()}
    for answer, group in zip(answers, groups.tolist(), strict=True):
        counts[group][answer] += 1

    def bits(counter: Counter[Hashable]) -> float:
        total = counter.total()
        return sum(n / total * math.log2(total / n) for n in counter.values())

    return torch.tensor([bits(counts[group]) for group in sorted(counts)])


def entropy_gate(entropy: Tensor, k: float, b: float) -> Tensor:
    """w_j = sigmoid(k (H_j - b)) `[J]`: near 1 where answers differ, near 0 where they agree."""
    if not k > 0:
        raise ValueError(f"k must be above 0, got {k}")
    return torch.sigmoid(k * (entropy - b))


def consistency(entropy: Tensor, samples: int) -> Tensor:
    """c_j = 1 - lambda H_j, lambda = (1 - 1/G) / log2 G `[J]`: from 1 (agreement) down to 1/G."""
    if samples < 2:
        raise ValueError(f"agreement needs at least 2 samples, got {samples}")
    return 1 - (1 - 1 / samples) / math.log2(samples) * entropy


def global_advantage(prompt_rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """A_j = (R_j - mean(R)) / (std(R) + eps) `[J]`: prompts' rewards measured by each other.

    Exactly 0 if all are equal. Raises ValueError for fewer than two prompts.
    """
    if prompt_rewards.ndim != 1 or len(prompt_rewards) < 2:
        raise ValueError(
            f"expected rewards [J] of at least 2 prompts, got {list(prompt_rewards.shape)}"
        )
    return batch_standardised(prompt_rewards, eps=eps)


def local_weight(mode: BlendMode, gate: Tensor, local: Tensor, rewards: Tensor) -> Tensor:
    """The weight `[N]` of each response's local advantage; the global one has the rest.

    - "only-soft": the gate.
    - "soft-with-forced": the gate, but 0 where the local advantage is 0.
    - "only-forced": 1, but 0 where the local advantage is 0.
    - "soft-with-zero": the gate, but 0 where the reward is 0.
    - "only-zero": 1, but 0 where the reward is 0.
    - "only-global": 0. "no-global": 1, which is GRPO.

    `gate`, `local` (advantages) and `rewards` are `[N]`.
    """
    if not gate.shape == local.shape == rewards.shape or gate.ndim != 1:
        raise ValueError(
            f"gate, local and rewards must be [N], got {list(gate.shape)}, {list(local.shape)} and "
            f"{list(rewards.shape)}"
        )
    expect_numbers(local=local, rewards=rewards)
    if mode == "only-soft":
        return gate
    if mode == "soft-with-forced":
        return torch.where(local != 0, gate, 0.0)
    if mode == "only-forced":
        return (local != 0).to(gate)
    if mode == "soft-with-zero":
        return torch.where(rewards != 0, gate, 0.0)
    if mode == "only-zero":
        return (rewards != 0).to(gate)
    if mode == "only-global":
        return torch.zeros_like(gate)
    if mode == "no-global":
        return torch.ones_like(gate)
    raise ValueError(f"unknown mode {mode!r}")
