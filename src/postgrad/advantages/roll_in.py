"""Responses that one policy begins and another ends: who learns from which of their tokens.

RLGF (Chang et al. 2023, arXiv 2306.11816, section 4). A roll-in of h tokens comes from one policy,
the roll-out after it from the other.
"""

from typing import Literal

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers

Scheme = Literal["ppo++", "aggrevated"]


def roll_in_lengths(lengths: Tensor, uniforms: Tensor) -> Tensor:
    """h `[N]`, uniform on {1, ..., L - 1}, from lengths L `[N]` and numbers `[N]` in [0, 1).

    Something is always left to the roll-out, the end token included; where L < 2, h is 0.
    """
    if lengths.ndim != 1 or lengths.shape != uniforms.shape:
        raise ValueError(
            f"lengths and uniforms must both be [N], got {list(lengths.shape)} and "
            f"{list(uniforms.shape)}"
        )
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must lie in [0, 1)")
    expect_numbers(lengths=lengths)
    places = (lengths - 1).clamp(min=0)
    drawn = 1 + (uniforms * places).long()  # the product may round up to all places
    return torch.minimum(drawn, places)


def roll_in_masks(
    mask: Tensor, roll_ins: Tensor, scheme: Scheme, last_only: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens `[N, T]` that the policy learns from, and those that its critic learns from.

    With M_t = 1 for the first `roll_ins` `[N]` tokens and m_t the `mask` `[N, T]`:

    - "ppo++": the guide begins and the policy ends, m (1 - M) for both.
    - "aggrevated": the policy begins and the guide ends. The policy learns from m M, or with
      `last_only` from the last of these, the critic from the guide's tokens m (1 - M).
    """
    if mask.ndim != 2 or roll_ins.shape != mask.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean [N, T] and roll_ins [N], got {mask.dtype} {list(mask.shape)} "
            f"and {list(roll_ins.shape)}"
        )
    if bool(((roll_ins < 0) | (roll_ins > mask.sum(1))).any()):
        raise ValueError("a roll-in has at least 0 tokens and at most those of its response")
    places = torch.arange(mask.shape[1], device=mask.device)
    begun = mask & (places < roll_ins[:, None])
    rest = mask & ~begun
    if scheme == "ppo++":
        return rest, rest
    if scheme == "aggrevated":
        last = places == roll_ins[:, None] - 1
        return begun & last if last_only else begun, rest
    raise ValueError(f"scheme must be 'ppo++' or 'aggrevated', got {scheme!r}")
