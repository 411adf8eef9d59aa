"""Policy-gradient losses: worked numbers, independent derivations, and ragged masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postgrad.advantages.group import group_mean_centred, group_standardised, spread_to_tokens
from postgrad.objectives.policy_gradient import (
    aggregate,
    clip_fractions,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
    reinforce,
)

POISON = [math.nan, math.inf, -math.inf, 1e30, -1e30]
HOWS = ["token-mean", "sequence-mean", "sequence-sum-constant"]


def random_batch(
    seed: int, lengths: list[int], width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of policy, old policy and reference `[N, T]` in float64, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    new = old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    reference = old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return new, old, reference, mask


def test_grpo_in_deepseekmaths_form_equals_plain_loops():
    # DeepSeekMath (arXiv 2402.03300), eq. 3, written out for one response after another.
    lengths, rewards, groups = [3, 5, 1, 4], [1.0, 0.0, 0.5, 0.25], [7, 7, 2, 2]
    new, old, reference, mask = random_batch(0, lengths, 5)
    expected = 0.0
    for i, length in enumerate(lengths):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        mean = sum(mates) / len(mates)
        std = math.sqrt(sum((r - mean) ** 2 for r in mates) / (len(mates) - 1))
        advantage = (rewards[i] - mean) / (std + 1e-4)
        for t in range(length):
            ratio = math.exp(new[i, t] - old[i, t])
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            d = float(reference[i, t] - new[i, t])
            expected -= (surrogate - 0.04 * (math.exp(d) - d - 1)) / length / len(lengths)

    advantages = group_standardised(torch.tensor(rewards).double(), torch.tensor(groups))
    ratio = importance_ratio(new, old, mask)
    loss = clipped_surrogate(ratio, spread_to_tokens(advantages, mask), 0.2, 0.2)
    loss = loss + 0.04 * kl_estimate(new, reference, mask, kind="k3")
    assert float(aggregate(loss, mask, "sequence-mean")) == pytest.approx(expected, rel=1e-12)


def test_sequence_ratio_is_the_geometric_mean_of_token_ratios():
    new, old, _, mask = random_batch(1, [2, 4, 0], 4)
    new.requires_grad_()
    ratio = importance_ratio(new, old, mask, level="sequence")
    (gradient,) = torch.autograd.grad(ratio[1, 0], new)
    torch.testing.assert_close(gradient[1], (ratio[1] / 4).detach())  # GSPO: s / |y| at each token
    ratio, new = ratio.detach(), new.detach()
    token = importance_ratio(new, old, mask)
    assert ratio[0, 0] == pytest.approx(float((token[0, 0] * token[0, 1]) ** 0.5), rel=1e-12)
    assert ratio[1].unique().numel() == 1
    assert ratio[2].eq(1).all()
    assert ratio[~mask].eq(1).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        (1.1, 1.0, None, -1.1, -1.0),  # inside the clip range
        (1.5, 1.0, None, -1.28, 0.0),  # clipped above: no gradient left
        (0.5, 1.0, None, -0.5, -1.0),  # a likely-again good token keeps its gradient
        (0.5, -1.0, None, 0.8, 0.0),  # clipped below
        (1.5, -1.0, None, 1.5, 1.0),  # a bad token grown likely keeps its gradient
        (5.0, -1.0, None, 5.0, 1.0),
        (5.0, -1.0, 3.0, 3.0, 0.0),  # the dual clip bounds exactly this case
        (2.0, -1.0, 3.0, 2.0, 1.0),
        (5.0, 1.0, 3.0, -1.28, 0.0),  # and no positive advantage
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, dual, loss, slope):
    r = torch.tensor(ratio, requires_grad=True)
    value = clipped_surrogate(r, torch.tensor(advantage), 0.2, 0.28, dual)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss)
    assert float(r.grad) == pytest.approx(slope)


def test_at_the_old_policy_the_surrogate_has_the_gradient_of_reinforce():
    new, _, _, mask = random_batch(2, [3, 2], 4)
    advantages = spread_to_tokens(torch.tensor([1.5, -0.5], dtype=torch.float64), mask)
    first, second = new.clone().requires_grad_(), new.clone().requires_grad_()
    ratio = importance_ratio(first, new, mask)
    aggregate(clipped_surrogate(ratio, advantages, 0.2, 0.2), mask, "token-mean").backward()
    aggregate(reinforce(second, advantages, mask), mask, "token-mean").backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_binary_rewards_weigh_questions_as_disco_says():
    # DisCO (arXiv 2505.12366): with 0/1 rewards at success rate p, the weight of a question is
    # sqrt(p(1-p)) under GRPO with the population deviation and p(1-p) without the division.
    for correct in range(1, 8):
        p = correct / 8
        rewards = (torch.arange(8) < correct).double()
        group = torch.zeros(8, dtype=torch.long)
        plain = group_mean_centred(rewards, group)
        scaled = group_standardised(rewards, group, std="population", eps=0.0)
        assert float(plain[rewards == 1].sum() / 8) == pytest.approx(p * (1 - p))
        assert float(scaled[rewards == 1].sum() / 8) == pytest.approx(math.sqrt(p * (1 - p)))


def test_clip_fractions_are_split_by_the_sign_of_the_advantage():
    ratio = torch.tensor([[1.5, 1.1, 0.5, 0.5], [0.5, 1.5, 9.0, 1.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert clip_fractions(ratio, advantages, 0.6, 0.2, mask)["clipped_negative"] == 0
    assert clip_fractions(ratio, advantages, 0.2, 0.6, mask)["clipped_positive"] == 0
    assert clip_fractions(ratio, advantages, 0.2, 0.2, mask) == {
        "clipped": pytest.approx(2 / 7),
        "clipped_positive": pytest.approx(1 / 4),
        "clipped_negative": pytest.approx(1 / 2),
    }
    assert clip_fractions(ratio, advantages, 0.2, 0.2)["clipped_positive"] == pytest.approx(2 / 5)
    nothing = clip_fractions(ratio, advantages, 0.2, 0.2, torch.zeros_like(mask))
    assert nothing == {"clipped": 0, "clipped_positive": 0, "clipped_negative": 0}


def test_kl_estimators_agree_with_the_exact_divergence():
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.1, 0.2, -0.4], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    tokens, every = policy.unsqueeze(0), torch.ones(1, 4, dtype=torch.bool)

    def estimate(kind: str) -> Tensor:  # in expectation over the policy's samples, held fixed
        value = kl_estimate(tokens, reference.unsqueeze(0), every, kind=kind)
        return (policy.detach().exp() * value).sum()

    torch.testing.assert_close(estimate("k1"), exact)
    torch.testing.assert_close(estimate("k3"), exact)
    assert (kl_estimate(tokens, reference.unsqueeze(0), every, kind="k3") >= 0).all()
    # The gradient of k2 on samples is that of the divergence; that of k1 is 0 in expectation.
    (gradient,) = torch.autograd.grad(estimate("k2"), logits, retain_graph=True)
    torch.testing.assert_close(gradient, exact_gradient)
    (gradient,) = torch.autograd.grad(estimate("k1"), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_aggregations_by_hand():
    per_token = torch.tensor([[1.0, 2.0, 3.0], [10.0, -7.0, -7.0], [-7.0, -7.0, -7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert float(aggregate(per_token, mask, "token-mean")) == pytest.approx(16 / 4)
    assert float(aggregate(per_token, mask, "sequence-mean")) == pytest.approx((2 + 10) / 3)
    summed = aggregate(per_token, mask, "sequence-sum-constant", constant=8)
    assert float(summed) == pytest.approx(16 / (3 * 8))


@pytest.mark.parametrize("how", HOWS)
def test_parts_of_a_batch_add_up_to_the_whole(how):
    new, _, _, mask = random_batch(3, [3, 0, 5, 1, 2], 5)
    whole = aggregate(new, mask, how, constant=5)
    totals = {"items": len(mask), "tokens": int(mask.sum()), "constant": 5}
    parts = [aggregate(new[p], mask[p], how, **totals) for p in ([0, 1], [1, 3], [2, 4])]
    overlap = aggregate(new[[1]], mask[[1]], how, **totals)
    torch.testing.assert_close(sum(parts), whole + overlap)
    assert float(overlap) == 0


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    poison=st.sampled_from(POISON),
    how=st.sampled_from(HOWS),
    level=st.sampled_from(["token", "sequence"]),
    kind=st.sampled_from(["k1", "k2", "k3"]),
)
def test_padding_never_leaks(lengths, seed, poison, how, level, kind):
    new, old, reference, mask = random_batch(seed, lengths, 4)

    def loss_and_gradient(filler: float) -> tuple[Tensor, Tensor]:
        filled = [torch.where(mask, x, filler) for x in (new, old, reference, 0.5 * new + 1)]
        logprobs = filled[0].requires_grad_()
        ratio = importance_ratio(logprobs, filled[1], mask, level=level)
        loss = clipped_surrogate(ratio, filled[3], 0.2, 0.28, dual_clip=3.0)
        loss = loss + 0.1 * kl_estimate(logprobs, filled[2], mask, kind=kind)
        loss = loss + 0.1 * reinforce(logprobs, filled[3], mask)
        total = aggregate(loss, mask, how, constant=4)
        total.backward()
        return total.detach(), logprobs.grad

    if how == "token-mean" and not mask.any():
        with pytest.raises(ValueError, match="no tokens that count"):
            loss_and_gradient(poison)
        return
    value, gradient = loss_and_gradient(poison)
    clean_value, clean_gradient = loss_and_gradient(0.0)
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert gradient.isfinite().all()
    assert gradient[~mask].eq(0).all()


def test_equal_rewards_give_a_zero_gradient():
    new, old, _, mask = random_batch(5, [3, 4, 2], 4)
    advantages = group_standardised(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long))
    logprobs = new.requires_grad_()
    ratio = importance_ratio(logprobs, old, mask)
    spread = spread_to_tokens(advantages, mask).double()
    aggregate(clipped_surrogate(ratio, spread, 0.2, 0.2), mask, "sequence-mean").backward()
    assert logprobs.grad.eq(0).all()


def test_a_ratio_that_overflows_is_visible():
    mask = torch.ones(1, 1, dtype=torch.bool)
    ratio = importance_ratio(torch.tensor([[0.0]]), torch.tensor([[-1000.0]]), mask)
    assert ratio.isinf().all()


def test_wrong_calls_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape.*old_logprobs \[2\]"):
        importance_ratio(x, torch.zeros(2), mask)
    with pytest.raises(ValueError, match="mask must be boolean"):
        importance_ratio(x, x, mask.float())
    with pytest.raises(ValueError, match="level must be"):
        importance_ratio(x, x, mask, level="word")
    with pytest.raises(ValueError, match=r"advantages \[2\]"):
        clipped_surrogate(x, torch.zeros(2), 0.2, 0.2)
    with pytest.raises(ValueError, match="clip_low must lie"):
        clipped_surrogate(x, x, -0.2, 0.2)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        clipped_surrogate(x, x, 0.2, 0.2, dual_clip=1.0)
    with pytest.raises(ValueError, match="kind must be"):
        kl_estimate(x, x, mask, kind="k4")
    with pytest.raises(ValueError, match="how must be"):
        aggregate(x, mask, "mean")
    with pytest.raises(ValueError, match="positive constant"):
        aggregate(x, mask, "sequence-sum-constant")
    with pytest.raises(ValueError, match="no items that count"):
        aggregate(x[:0], mask[:0], "sequence-mean")
