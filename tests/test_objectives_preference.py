"""Pairwise and listwise preference losses: the identities and worked numbers of DPO and rDPO."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postgrad.objectives.listwise import plackett_luce
from postgrad.objectives.pairwise import (
    debias,
    hinge,
    ipo,
    logistic,
    margin,
    pair_weight,
    robust,
    sequence_logprobs,
    smoothed,
)

H = torch.linspace(-8, 8, 65, dtype=torch.float64)
RATES = [0.05, 0.1, 0.2, 0.4, 0.49]


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def slope(loss, h: Tensor) -> Tensor:
    h = h.clone().requires_grad_()
    return torch.autograd.grad(loss(h).sum(), h)[0]


def test_the_worked_example_of_dpo():
    beta = 0.1
    logp_w = number(-12).requires_grad_()
    logp_l = number(-14).requires_grad_()
    delta = margin(logp_w, logp_l, number(-12.5), number(-13.2))
    h = beta * delta
    logistic(h).sum().backward()
    delta, h = delta.detach(), h.detach()
    assert float(delta) == pytest.approx(1.3, abs=1e-6)
    assert float(h) == pytest.approx(0.13, abs=1e-6)
    assert float(logistic(h)) == pytest.approx(0.630258, abs=1e-6)
    assert float(pair_weight(h)) == pytest.approx(0.467546, abs=1e-6)
    assert float(smoothed(h, 0.1)) == pytest.approx(0.643258, abs=1e-6)
    assert float(hinge(h)) == pytest.approx(0.87, abs=1e-6)
    assert float(ipo(delta, beta)) == pytest.approx(13.69, abs=1e-6)
    assert float(logp_w.grad) == pytest.approx(-0.046755, abs=1e-6)
    assert float(logp_l.grad) == pytest.approx(0.046755, abs=1e-6)


@pytest.mark.parametrize(
    ("eps", "loss", "reverse", "weight", "smooth"),
    [(0.1, 0.614008, 0.776508, 0.592546, 0.643258), (0.2, 0.586925, None, 0.800879, 0.656258)],
)
def test_the_worked_example_of_rdpo(eps, loss, reverse, weight, smooth):
    h = number(0.13)
    assert float(robust(h, eps)) == pytest.approx(loss, abs=1e-6)
    assert float(-slope(lambda x: robust(x, eps), h)) == pytest.approx(weight, abs=1e-6)
    assert float(smoothed(h, eps)) == pytest.approx(smooth, abs=1e-6)
    if reverse is not None:
        assert float(robust(-h, eps)) == pytest.approx(reverse, abs=1e-6)


def test_cdpo_weight_of_the_worked_example():
    assert float(-slope(lambda x: smoothed(x, 0.1), number(0.13))) == pytest.approx(
        0.367546, abs=1e-6
    )


def test_at_the_reference_the_loss_is_log_two():
    same = torch.randn(5, dtype=torch.float64)
    h = 0.1 * margin(same, same - 1, same, same - 1)
    torch.testing.assert_close(logistic(h), torch.full_like(h, math.log(2)))
    torch.testing.assert_close(pair_weight(h), torch.full_like(h, 0.5))


def test_a_constant_of_the_prompt_cancels():
    logp_w, logp_l, ref_w, ref_l, constant = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        margin(logp_w, logp_l, ref_w + constant, ref_l + constant),
        margin(logp_w, logp_l, ref_w, ref_l),
    )


def test_swapping_the_pair_negates_the_margin():
    logp_w, logp_l, ref_w, ref_l = torch.randn(4, 7, dtype=torch.float64)
    h = margin(logp_w, logp_l, ref_w, ref_l)
    torch.testing.assert_close(margin(logp_l, logp_w, ref_l, ref_w), -h)
    torch.testing.assert_close(logistic(H) - logistic(-H), -H)


def test_the_gradient_is_the_weight():
    torch.testing.assert_close(slope(logistic, H), -pair_weight(H))


def test_extreme_margins_stay_finite():
    h = torch.tensor([-1e4, 1e4])
    assert logistic(h).tolist() == [1e4, 0.0]
    assert slope(logistic, h).isfinite().all()


def test_sums_not_means_of_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -6.0]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    left=st.booleans(),
)
def test_padding_never_leaks_on_either_side(lengths, poison, left):
    generator = torch.Generator().manual_seed(sum(lengths))
    positions = torch.arange(4).flip(0) if left else torch.arange(4)
    mask = positions < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    logprobs = torch.where(mask, tokens, poison).requires_grad_()
    zero = torch.zeros(len(lengths), dtype=torch.float64)
    logp = sequence_logprobs(logprobs, mask)
    logistic(0.1 * margin(logp, zero, zero, zero)).sum().backward()
    torch.testing.assert_close(logp, (tokens * mask).sum(1))
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[~mask].eq(0).all()


def test_smoothing_adds_a_linear_push_and_has_a_minimum():
    for eps in RATES:
        torch.testing.assert_close(smoothed(H, eps), logistic(H) + eps * H)
        minimum = number(math.log((1 - eps) / eps))
        assert float(slope(lambda x, e=eps: smoothed(x, e), minimum)) == pytest.approx(0, abs=1e-12)
    assert math.log(0.9 / 0.1) == pytest.approx(2.197225, abs=1e-6)


@pytest.mark.parametrize("eps", RATES)
def test_rdpo_is_unbiased_under_flips(eps):
    torch.testing.assert_close((1 - eps) * robust(H, eps) + eps * robust(-H, eps), logistic(H))
    torch.testing.assert_close(robust(H, eps), logistic(H) - H * eps / (1 - 2 * eps))


@pytest.mark.parametrize("eps", RATES)
def test_rdpos_weight_is_positive_between_its_limits(eps):
    weight = -slope(lambda h: robust(h, eps), H)
    assert (weight > 0).all()
    torch.testing.assert_close(weight - eps / (1 - 2 * eps), pair_weight(H))
    extremes = -slope(lambda h: robust(h, eps), torch.tensor([-60.0, 60.0], dtype=torch.float64))
    assert extremes.tolist() == pytest.approx([(1 - eps) / (1 - 2 * eps), eps / (1 - 2 * eps)])


def test_without_noise_all_three_are_dpo():
    for loss in (robust, smoothed):
        torch.testing.assert_close(loss(H, 0.0), logistic(H), atol=0, rtol=0)
        torch.testing.assert_close(slope(lambda h, f=loss: f(h, 0.0), H), slope(logistic, H))


def test_the_expected_rdpo_loss_is_minimal_at_the_clean_margin():
    true_h, eps = 1.4, 0.3
    clean = 1 / (1 + math.exp(-true_h))
    noisy = (1 - eps) * clean + eps * (1 - clean)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)

    def best(loss) -> float:
        expected = noisy * loss(grid) + (1 - noisy) * loss(-grid)
        return float(grid[expected.argmin()])

    assert best(lambda h: robust(h, eps)) == pytest.approx(true_h, abs=1e-3)
    assert best(logistic) == pytest.approx(math.log(noisy / (1 - noisy)), abs=1e-3)
    assert abs(best(logistic)) < true_h


def test_debias_corrects_any_loss():
    eps, beta, delta = 0.2, 0.5, H
    target = 1 / (2 * beta)
    torch.testing.assert_close(
        debias(lambda d: ipo(d, beta), eps)(delta),
        delta.square() - 2 * target * delta / (1 - 2 * eps) + target**2,
    )
    corrected = debias(hinge, eps)
    torch.testing.assert_close((1 - eps) * corrected(H) + eps * corrected(-H), hinge(H))


def test_flip_rates_may_differ_by_pair():
    h, rates = torch.tensor([0.5, -1.0]), torch.tensor([0.1, 0.3])
    expected = torch.cat([robust(h[:1], 0.1), robust(h[1:], 0.3)])
    torch.testing.assert_close(robust(h, rates), expected)
    with pytest.raises(ValueError, match=r"shape of h \[2\], got \[3\]"):
        robust(h, torch.full((3,), 0.1))


@pytest.mark.parametrize("eps", [-0.1, 0.5, 0.7, math.nan])
def test_a_flip_rate_out_of_range_says_why(eps):
    for loss in (robust, smoothed):
        with pytest.raises(ValueError, match=r"\[0, 0.5\).*denominator 1 - 2 eps"):
            loss(H, eps)


def test_other_wrong_calls():
    with pytest.raises(ValueError, match="one shape"):
        margin(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="beta must be positive"):
        ipo(H, 0.0)
    with pytest.raises(ValueError, match="at least 2 scores"):
        plackett_luce(torch.zeros(3, 1))


def test_plackett_luce_of_two_is_dpo_and_of_three_a_distribution():
    scores = torch.randn(9, 2, dtype=torch.float64)
    torch.testing.assert_close(plackett_luce(scores), logistic(scores[:, 0] - scores[:, 1]))
    scores = torch.randn(3, dtype=torch.float64)
    rankings = torch.stack([scores[list(order)] for order in permutations(range(3))])
    assert float((-plackett_luce(rankings)).exp().sum()) == pytest.approx(1)
    assert plackett_luce(torch.tensor([1e4, 0.0, -1e4])).isfinite().all()
