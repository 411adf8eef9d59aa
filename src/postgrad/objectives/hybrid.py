"""Policy gradient and supervised fine-tuning side by side, some prompts by one, some by the other.

After HPT ("Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419). Token
tensors are `[N, T]`, with a boolean `mask` of those that count.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.policy_gradient import Aggregation, aggregate
from postgrad.objectives.shapes import expect_tokens

Normalisation = Literal["prompts", "official"]


def hybrid(
    per_token: Tensor,
    mask: Tensor,
    demonstrated: Tensor,
    *,
    how: Aggregation,
    prompts: int,
    samples: int,
    longest: int,
    rollout_tokens: int,
    demonstration_tokens: int,
    coefficient: float = 1.0,
    normalisation: Normalisation = "prompts",
) -> Tensor:
    """Rollouts' and demonstrations' losses `[N, T]` as one number.

        L = L_RL + coefficient · L_SFT

    - "prompts": both are means over all prompts. L_RL adds up the rollouts' tokens by `how`, as if
      every prompt had its n rollouts (`how` "sequence-sum-constant": a response's sum over
      `longest`); L_SFT is the mean of a demonstration's tokens. What a prompt counts then does not
      depend on the others.
    - "official": as the authors' code has it, L_RL is not divided by the number of rollouts, and
      L_SFT is the mean over all demonstrations' tokens.

    `demonstrated` `[N]` says which items are demonstrations. `prompts`, `rollout_tokens` and
    `demonstration_tokens` are those of the whole batch, so that the parts of it add up; a kind of
    which there is none gives 0.
    """
    expect_tokens(mask, per_token=per_token)
    if demonstrated.dtype != torch.bool or demonstrated.shape != mask.shape[:1]:
        raise ValueError(
            f"demonstrated must be boolean [{len(mask)}], got {demonstrated.dtype} "
            f"{list(demonstrated.shape)}"
        )
    rollouts, shown = mask & ~demonstrated[:, None], mask & demonstrated[:, None]
    official = normalisation == "official"
    policy_gradient = aggregate(
        per_token,
        rollouts,
        how,
        items=1 if official else prompts * samples,
        tokens=max(rollout_tokens, 1),
        constant=longest,
    )
    supervised = aggregate(
        per_token,
        shown,
        "token-mean" if official else "sequence-mean",
        items=prompts,
        tokens=max(demonstration_tokens, 1),
    )
    return policy_gradient + coefficient * supervised
