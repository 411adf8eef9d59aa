"""Advantages within groups and over time: worked numbers, identities, and faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.advantages.group import (
    batch_standardised,
    group_mean_centred,
    group_standardised,
    leave_one_out,
    spread_to_tokens,
)
from postgrad.advantages.temporal import generalised_advantage

REWARDS = torch.tensor([1.0, 5.0, 0.0, 2.0, 5.0], dtype=torch.float64)
GROUPS = torch.tensor([9, -4, 9, 9, -4])  # unordered ids of unequal groups; -4 is degenerate


def test_mean_centred():
    torch.testing.assert_close(
        group_mean_centred(REWARDS, GROUPS),
        torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0], dtype=torch.float64),
    )
    alone = group_mean_centred(torch.tensor([3.0]), torch.tensor([0]))
    assert alone.tolist() == [0.0]


@pytest.mark.parametrize(("std", "deviation"), [("sample", 1.0), ("population", math.sqrt(2 / 3))])
def test_standardised(std, deviation):
    expected = torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0], dtype=torch.float64) / (deviation + 0.01)
    torch.testing.assert_close(group_standardised(REWARDS, GROUPS, std, eps=0.01), expected)


def test_leave_one_out():
    torch.testing.assert_close(
        leave_one_out(REWARDS, GROUPS),
        torch.tensor([0.0, 0.0, -1.5, 1.5, 0.0], dtype=torch.float64),
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=12),
    shift=st.floats(-100, 100),
)
def test_group_identities(data, shift):
    rewards = torch.tensor([r for r, _ in data], dtype=torch.float64)
    groups = torch.tensor([g for _, g in data])
    centred = group_mean_centred(rewards, groups)
    for group in groups.unique():
        assert abs(float(centred[groups == group].sum())) < 1e-9
    # A constant added to one group's rewards changes nothing.
    moved = rewards + shift * (groups == groups[0])
    torch.testing.assert_close(group_mean_centred(moved, groups), centred, atol=1e-9, rtol=0)
    if groups.unique(return_counts=True)[1].min() < 2:
        with pytest.raises(ValueError, match="at least 2 responses"):
            leave_one_out(rewards, groups)
        return
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    factor = (counts / (counts - 1).double())[index]
    torch.testing.assert_close(leave_one_out(rewards, groups), factor * centred)
    assert group_standardised(rewards, groups, eps=1e-4).isfinite().all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -7.7])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_all_equal_rewards_give_exactly_zero(value, eps):
    rewards, groups = torch.full((7,), value), torch.zeros(7, dtype=torch.long)
    for advantages in (
        group_mean_centred(rewards, groups),
        group_standardised(rewards, groups, eps=eps),
        leave_one_out(rewards, groups),
        batch_standardised(rewards, eps=eps),
    ):
        assert advantages.eq(0).all()


def test_a_nan_reward_stays_visible():
    rewards = torch.tensor([1.0, math.nan, 0.0, 1.0])
    groups = torch.tensor([0, 0, 1, 1])
    for estimate in (group_mean_centred, group_standardised, leave_one_out):
        advantages = estimate(rewards, groups)
        assert advantages[:2].isnan().all()
        assert advantages[2:].isfinite().all()


def test_batch_standardised():
    values = torch.tensor([[1.0, 3.0], [5.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    result = batch_standardised(values, mask, std="sample", eps=0.0)
    torch.testing.assert_close(result, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    every = batch_standardised(torch.randn(50, dtype=torch.float64), std="population", eps=0.0)
    assert float(every.mean()) == pytest.approx(0, abs=1e-12)
    assert float(every.std(correction=0)) == pytest.approx(1)


def test_spread_to_tokens():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    spread = spread_to_tokens(torch.tensor([2.0, math.nan]), mask)
    assert spread.tolist() == [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_wrong_groups_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="at least 2 responses"):
        group_standardised(one, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"both be \[N\]"):
        group_mean_centred(two, torch.tensor([0]))
    with pytest.raises(ValueError, match="groups integer"):
        group_mean_centred(two, two)
    with pytest.raises(ValueError, match="std must be"):
        group_standardised(two, torch.tensor([0, 0]), std="biased")
    with pytest.raises(ValueError, match="at least 2 responses"):
        batch_standardised(two, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="mask must be boolean"):
        batch_standardised(two, torch.ones(2))
    with pytest.raises(ValueError, match="do not fit a mask"):
        spread_to_tokens(two, torch.ones(3, 2, dtype=torch.bool))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values).bool().unsqueeze(1)


def test_generalised_advantage_by_hand():
    # Three steps; the second ends an episode by termination.
    advantages, returns = generalised_advantage(
        column(1, 2, 3),
        column(0.5, 1, 1.5),
        column(1, math.nan, 4),  # the value after a termination is never read
        flags(0, 1, 0),
        flags(0, 0, 0),
        discount=0.9,
        lambda_=0.8,
    )
    deltas = [1 + 0.9 * 1 - 0.5, 2 - 1, 3 + 0.9 * 4 - 1.5]
    torch.testing.assert_close(advantages, column(deltas[0] + 0.72 * deltas[1], *deltas[1:]))
    torch.testing.assert_close(returns, advantages + column(0.5, 1, 1.5))


def test_a_truncated_episode_bootstraps_but_stops_the_sum():
    arguments = column(1, 2, 3), column(0.5, 1, 1.5), column(1, 7, 4)
    none = flags(0, 0, 0)
    cut, _ = generalised_advantage(*arguments, none, flags(0, 1, 0), discount=0.9, lambda_=0.8)
    assert float(cut[1]) == pytest.approx(2 + 0.9 * 7 - 1)
    ended, _ = generalised_advantage(*arguments, flags(0, 1, 0), none, discount=0.9, lambda_=0.8)
    assert float(ended[1]) == pytest.approx(2 - 1)
    assert float(cut[2]) == float(ended[2])


def test_lambda_one_gives_discounted_returns_and_lambda_zero_temporal_differences():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    next_values = torch.cat([values[1:], torch.randn(1, 3, dtype=torch.float64)])
    none = torch.zeros(6, 3, dtype=torch.bool)
    _, returns = generalised_advantage(
        rewards, values, next_values, none, none, discount=0.9, lambda_=1.0
    )
    expected = sum(0.9**k * rewards[k] for k in range(6)) + 0.9**6 * next_values[-1]
    torch.testing.assert_close(returns[0], expected)
    advantages, _ = generalised_advantage(
        rewards, values, next_values, none, none, discount=0.9, lambda_=0.0
    )
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)


def test_exact_values_have_zero_expected_advantage():
    # A chain with fixed rewards: with the true values every advantage is 0 for every lambda.
    rewards = column(1, -2, 4, 0.5)
    values = [0.0]
    for reward in reversed(rewards.flatten().tolist()):
        values.insert(0, reward + 0.95 * values[0])
    for lambda_ in (0.0, 0.5, 1.0):
        advantages, _ = generalised_advantage(
            rewards,
            column(*values[:-1]),
            column(*values[1:]),
            flags(0, 0, 0, 1),
            flags(0, 0, 0, 0),
            discount=0.95,
            lambda_=lambda_,
        )
        torch.testing.assert_close(advantages, torch.zeros_like(rewards))


def test_wrong_trajectories_are_refused():
    x, ends = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"all inputs must be \[T, B\].*values \[4, 2\]"):
        generalised_advantage(x, torch.zeros(4, 2), x, ends, ends, discount=0.9, lambda_=0.9)
    with pytest.raises(ValueError, match="must be boolean"):
        generalised_advantage(x, x, x, x, ends, discount=0.9, lambda_=0.9)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        generalised_advantage(x, x, x, ends, ends, discount=1.1, lambda_=0.9)
