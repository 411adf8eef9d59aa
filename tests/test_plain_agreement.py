"""verl's and ROLL's policy gradients as loops over tokens: the same values and gradients."""

import math

import pytest
import torch

from postgrad.advantages.group import (
    batch_standardised,
    group_mean_centred,
    group_standardised,
    leave_one_out,
    lite,
    spread_to_tokens,
)
from postgrad.objectives.policy_gradient import (
    aggregate,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
)

LENGTHS = (4, 1, 6, 3, 5, 2, 6, 1)  # one of a single token, two of the longest
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1)
REWARDS = (1.0, 0.0, 0.5, -2.0, 1.0, 1.0, 1.0, 1.0)  # the second group is degenerate
LOW, HIGH, DUAL = 0.2, 0.28, 3.0


@pytest.fixture
def batch():
    """Log-probabilities `[8, 6]` with ratios far inside and outside every clip, and their mask."""
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    old = -3 * torch.rand(8, 6, generator=random, dtype=torch.float64)
    new = old + 1.2 * torch.randn(8, 6, generator=random, dtype=torch.float64)
    return new, old, mask


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def plain_advantages(how):
    """One a response, from the rewards of its group."""
    found = []
    for reward, group in zip(REWARDS, GROUPS, strict=True):
        peers = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        mean = sum(peers) / len(peers)
        found.append({
            "grpo": (reward - mean) / (deviation(peers) + 1e-6),
            "dr-grpo": reward - mean,
            "rloo": reward - (sum(peers) - reward) / (len(peers) - 1),
            "lite": (reward - mean) / (deviation(REWARDS) + 1e-6),
            "batch": (reward - sum(REWARDS) / 8) / (deviation(REWARDS) + 1e-8),
        }[how])  # fmt: skip
    return found


def our_advantages(how):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    groups = torch.tensor(GROUPS)
    return {
        "grpo": lambda: group_standardised(rewards, groups, eps=1e-6),
        "dr-grpo": lambda: group_mean_centred(rewards, groups),
        "rloo": lambda: leave_one_out(rewards, groups),
        "lite": lambda: lite(rewards, groups, eps=1e-6),
        "batch": lambda: batch_standardised(rewards, eps=1e-8),
    }[how]()


def plain_loss(new, old, advantages, how, dual, level):
    """verl's loss: the worse of clipped and unclipped, never worse than dual A where A < 0."""
    rows = []
    for i, length in enumerate(LENGTHS):
        total = sum(new[i, t] - old[i, t] for t in range(length)) / length
        row = []
        for t in range(length):
            ratio = torch.exp(total if level == "sequence" else new[i, t] - old[i, t])
            a = advantages[i]
            value = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - LOW, 1 + HIGH))
            if dual is not None and a < 0:
                value = torch.minimum(value, torch.tensor(-a * dual))
            row.append(value)
        rows.append(row)
    flat = [value for row in rows for value in row]
    return {
        "token-mean": lambda: sum(flat) / len(flat),
        "sequence-mean": lambda: sum(sum(row) / len(row) for row in rows) / len(rows),
        "sequence-sum": lambda: sum(sum(row) for row in rows) / len(rows),
        "sequence-sum-constant": lambda: sum(flat) / (len(rows) * 7),
    }[how]()


@pytest.mark.parametrize("how", ["grpo", "dr-grpo", "rloo", "lite", "batch"])
def test_advantages(how):
    expected = torch.tensor(plain_advantages(how), dtype=torch.float64)
    torch.testing.assert_close(our_advantages(how), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, DUAL])
@pytest.mark.parametrize(
    "how", ["token-mean", "sequence-mean", "sequence-sum", "sequence-sum-constant"]
)
@pytest.mark.parametrize("advantage", ["grpo", "lite"])
def test_losses(batch, how, dual, level, advantage):
    new, old, mask = batch
    own, other = new.clone().requires_grad_(), new.clone().requires_grad_()
    expected = plain_loss(other, old, plain_advantages(advantage), how, dual, level)
    ratio = importance_ratio(own, old, mask, level)
    if level == "token":  # on both sides of both clips, of both signs
        outside = (ratio > DUAL) & mask, (ratio < 1 - LOW) & mask
        assert all(bool(part[torch.tensor([0, 2, 3])].any()) for part in outside)
    spread = spread_to_tokens(our_advantages(advantage), mask)
    losses = clipped_surrogate(ratio, spread, LOW, HIGH, dual)
    found = aggregate(losses, mask, how, constant=7)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=0)
    assert not own.grad[~mask].any()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergences(batch, kind):
    """verl calls them kl, mse and low_var_kl; it limits the last, which is no matter here."""
    new, reference, mask = batch
    own, other = new.clone().requires_grad_(), new.clone().requires_grad_()
    rows = []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            d = other[i, t] - reference[i, t]
            rows.append({"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind])
    expected = sum(rows) / len(rows)
    found = aggregate(kl_estimate(own, reference, mask, kind), mask, "token-mean")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=0)


def test_the_second_group_teaches_nothing(batch):
    """All of its rewards are equal: no advantage, no gradient, whatever the ratios."""
    new, old, mask = batch
    own = new.clone().requires_grad_()
    spread = spread_to_tokens(our_advantages("grpo"), mask)
    losses = clipped_surrogate(importance_ratio(own, old, mask), spread, LOW, HIGH)
    aggregate(losses, mask, "token-mean").backward()
    assert not own.grad[4:].any()
    assert own.grad[:4].any()
