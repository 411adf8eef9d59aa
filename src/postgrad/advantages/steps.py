"""Advantages of the steps that were tried in a state (arXiv 2412.18279)."""

import torch
from torch import Tensor

from postgrad.advantages.checks import expect_numbers


def state_means(values: Tensor, counts: Tensor, state: Tensor) -> Tensor:
    """The mean `[S]` over all that was tried in each state, of values of distinct steps `[n]`.

    Args:
        values: `[n]` of distinct steps: outcomes, or what they are worth.
        counts: `[n]` how often each was tried, at least once.
        state: `[n]` the number of its state, from 0; none is left out.
    """
    _expect_rows(values, counts, state)
    if bool((counts < 1).any()):
        raise ValueError("every step must have been tried at least once")
    number = _states(state)
    sums = torch.zeros(2, number, dtype=values.dtype)
    return sums[0].index_add_(0, state, counts * values) / sums[1].index_add_(
        0, state, counts.to(values)
    )


def step_advantages(values: Tensor, counts: Tensor, state: Tensor) -> Tensor:
    """Q - V of distinct steps `[n]`, V the mean of Q over all that were tried in the same state.

    Args:
        values: `[n]` what each step is worth, Q(s, a).
        counts: `[n]` how often it was tried, at least once.
        state: `[n]` the number of its state, from 0; none is left out.
    """
    return values - state_means(values, counts, state)[state]


def clear_states(advantages: Tensor, state: Tensor, least_gap: float) -> Tensor:
    """`[n]` bool: distinct steps of states that have two, `least_gap` apart or more.

    Args:
        advantages: `[n]` of distinct steps.
        state: `[n]` the number of its state, from 0.
        least_gap: between the best and the worst step of a state.
    """
    _expect_rows(advantages, state)
    if not least_gap >= 0:
        raise ValueError(f"least_gap must be at least 0, got {least_gap}")
    expect_numbers(advantages=advantages)
    number = _states(state)
    spread = torch.zeros(2, number, dtype=advantages.dtype)
    spread[0].scatter_reduce_(0, state, advantages, "amax", include_self=False)
    spread[1].scatter_reduce_(0, state, advantages, "amin", include_self=False)
    several = state.bincount(minlength=number) > 1
    return (several & (spread[0] - spread[1] >= least_gap))[state]


def balanced(rewards: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Positions of `count` responses of rewards `[n]`: half right, half wrong, where there are.

    Right is a reward above 1/2. What one side lacks is made up for by the other; which of a side
    are taken is drawn. The positions are in order.
    """
    if rewards.ndim != 1 or not 1 <= count <= len(rewards):
        raise ValueError(f"cannot take {count} of rewards of shape {list(rewards.shape)}")
    expect_numbers(rewards=rewards)
    right = rewards > 0.5
    sides = []
    for side in (right, ~right):
        places = side.nonzero().squeeze(1)
        sides.append(places[torch.randperm(len(places), generator=generator)])
    first = min(len(sides[0]), max(count - count // 2, count - len(sides[1])))
    return sorted(torch.cat([sides[0][:first], sides[1][: count - first]]).tolist())


def _states(state: Tensor) -> int:
    """How many states there are."""
    number = len(state.unique())
    if not number or int(state.min()) != 0 or int(state.max()) != number - 1:
        raise ValueError("state must hold the numbers of states from 0, none left out")
    return number


def _expect_rows(*tensors: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in tensors]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"expected tensors of one length [n], got {shapes}")
