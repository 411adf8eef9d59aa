"""Flow-GRPO's stochastic steps and GRPO-Guard's ratio: worked numbers and identities."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from postgrad.objectives.flow import (
    flow_sde_step,
    flow_times,
    gaussian_step_kl,
    gaussian_step_logprob,
    ratio_norm,
    regulated_step_loss,
)
from postgrad.objectives.policy_gradient import clipped_surrogate


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noisy_step(count: int, width: int, drift: float, std: float, seed: int = 0):
    """Old and new means, the noise, and the step taken, for `count` items."""
    generator = torch.Generator().manual_seed(seed)
    old_mean = torch.randn(count, width, generator=generator, dtype=torch.float64)
    mean = old_mean + drift
    eps = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return mean, old_mean, eps, old_mean + std * eps, torch.full((count,), std).double()


def test_the_worked_example():
    _, std = flow_sde_step(
        torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), doubles(0.6), doubles(0.5), 0.7
    )
    assert float(std / math.sqrt(0.1)) == pytest.approx(0.857321, abs=1e-6)
    assert float(std) == pytest.approx(0.271109, abs=1e-6)
    old_mean, mean, eps = doubles(0.2, -0.1)[None], doubles(0.23, -0.06)[None], doubles(0.5, -1.0)
    x_next = old_mean + std * eps
    assert x_next[0].tolist() == pytest.approx([0.335554, -0.371109], abs=1e-6)
    old = gaussian_step_logprob(x_next, old_mean, std)
    new = gaussian_step_logprob(x_next, mean, std)
    assert float(old) == pytest.approx(0.073796, abs=1e-6)
    assert float(new) == pytest.approx(0.019186, abs=1e-6)
    assert float(new - old) == pytest.approx(-0.054610, abs=1e-6)
    assert float(gaussian_step_kl(mean, old_mean, std)) == pytest.approx(0.008503, abs=1e-6)
    guarded = ratio_norm(new, old, mean, old_mean, std)
    assert float(guarded) == pytest.approx(-0.0125, abs=1e-6)
    plain_ratio = (new - old).exp()
    assert float(plain_ratio) == pytest.approx(0.946854, abs=1e-6)
    assert float(guarded.exp()) == pytest.approx(0.987578, abs=1e-6)
    for advantage, plain_loss, guard_loss in ((1, -0.946854, -9.875778), (-1, 0.99, 9.9)):
        plain = clipped_surrogate(plain_ratio, doubles(advantage), 0.01, 0.01)
        guard = regulated_step_loss(guarded, doubles(advantage), doubles(0.1), 0.01)
        assert float(plain) == pytest.approx(plain_loss, abs=1e-6)
        assert float(guard) == pytest.approx(guard_loss, abs=1e-6)


def test_the_step_by_hand():
    x, v = doubles(1.0, -2.0)[None], doubles(0.5, 1.5)[None]
    mean, std = flow_sde_step(x, v, doubles(0.6), doubles(0.5), 0.7)
    variance = 0.49 * 0.6 / 0.4
    expected = x * (1 - variance / 1.2 * 0.1) - 0.1 * v * (1 + variance * 0.4 / 1.2)
    torch.testing.assert_close(mean, expected)
    assert float(std) == pytest.approx(math.sqrt(variance * 0.1))


def test_vanishing_noise_gives_the_euler_step():
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    time, next_time = doubles(0.6, 0.8, 0.3), doubles(0.5, 0.7, 0.0)
    mean, std = flow_sde_step(x, v, time, next_time, 1e-8)
    torch.testing.assert_close(mean, x + v * (next_time - time).unsqueeze(1))
    assert (std < 1e-8).all()


def test_the_first_step_uses_the_next_time():
    x, v = torch.randn(2, 1, 3, dtype=torch.float64)
    mean, std = flow_sde_step(x, v, doubles(1.0), doubles(0.9), 0.7)
    sigma = 0.7 * math.sqrt(1 / (1 - 0.9))
    assert float(std) == pytest.approx(sigma * math.sqrt(0.1))
    torch.testing.assert_close(mean, x * (1 - sigma**2 / 2 * 0.1) - 0.1 * v)


def test_a_linear_flow_keeps_its_marginals():
    # Data fixed at m: x_t = (1 - t) m + t n with n ~ N(0, 1), and the velocity n - m in terms of x.
    # The stochastic steps must reproduce the marginal mean and deviation, whatever the noise.
    m, steps = 2.0, 400
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    times = flow_times(steps).double()
    for time, next_time in pairwise(times):
        if next_time < 0.5:
            break
        velocity = (x - m) / time
        here = time.expand(len(x)), next_time.expand(len(x))
        mean, std = flow_sde_step(x, velocity, *here, 0.7)
        x = mean + std.unsqueeze(1) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    assert float(x.mean()) == pytest.approx(0.5 * m, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_the_logprob_is_the_mean_of_normal_logprobs():
    x, mean = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    std = doubles(0.1, 0.5, 2.0)
    normal = torch.distributions.Normal(mean, std.view(3, 1, 1))
    torch.testing.assert_close(gaussian_step_logprob(x, mean, std), normal.log_prob(x).mean((1, 2)))


def test_the_kl_is_that_of_two_gaussians():
    mean, reference = torch.randn(2, 3, 4, dtype=torch.float64)
    std = doubles(0.1, 0.5, 2.0)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std.unsqueeze(1)),
        torch.distributions.Normal(reference, std.unsqueeze(1)),
    )
    torch.testing.assert_close(gaussian_step_kl(mean, reference, std), exact.mean(1))


@pytest.mark.parametrize("std", [0.01, 0.3, 1.0])
def test_the_normalised_ratio_and_its_gradient_do_not_know_the_noise_level(std):
    start, old_mean, eps, x_next, stds = noisy_step(5, 16, 0.02, std)
    mean = start.requires_grad_()
    old = gaussian_step_logprob(x_next, old_mean, stds)
    log_ratio = ratio_norm(gaussian_step_logprob(x_next, mean, stds), old, mean, old_mean, stds)
    torch.testing.assert_close(log_ratio, ((mean - old_mean) * eps).mean(1))
    log_ratio.sum().backward()
    torch.testing.assert_close(mean.grad, eps / 16)


# time, step length, mean and deviation of the plain log-ratio for D = 16 and a drift of 0.02
PLAIN_BIAS = [
    (0.95, 0.05, -0.00043, 0.0073),
    (0.6, 0.1, -0.0027, 0.018),
    (0.2, 0.1, -0.0165, 0.045),
    (0.1, 0.1, -0.0367, 0.068),
]


@pytest.mark.parametrize(("time", "length", "bias", "spread"), PLAIN_BIAS)
def test_the_plain_ratio_is_biased_and_the_normalised_one_is_not(time, length, bias, spread):
    std = 0.7 * math.sqrt(time / (1 - time) * length)
    mean, old_mean, _, x_next, stds = noisy_step(100_000, 16, 0.02, std)
    old = gaussian_step_logprob(x_next, old_mean, stds)
    new = gaussian_step_logprob(x_next, mean, stds)
    plain = new - old
    guarded = ratio_norm(new, old, mean, old_mean, stds)
    assert float(plain.mean()) == pytest.approx(bias, rel=0.03, abs=1e-4)
    assert float(plain.std()) == pytest.approx(spread, rel=0.03)
    assert float(guarded.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(guarded.std()) == pytest.approx(0.005, rel=0.02)


def test_at_the_old_policy_it_is_the_policy_gradient_divided_by_the_step_length():
    start, old_mean, eps, x_next, stds = noisy_step(3, 4, 0.0, 0.3)
    mean = start.requires_grad_()
    old = gaussian_step_logprob(x_next, old_mean, stds)
    new = gaussian_step_logprob(x_next, mean, stds)
    log_ratio = ratio_norm(new, old, mean, old_mean, stds)
    torch.testing.assert_close(log_ratio, torch.zeros_like(log_ratio))
    advantages, lengths = doubles(1.0, -2.0, 0.5), doubles(0.1, 0.1, 0.05)
    regulated_step_loss(log_ratio, advantages, lengths, 0.01).sum().backward()
    torch.testing.assert_close(mean.grad, -(advantages / lengths).unsqueeze(1) * eps / 4)


def test_with_unit_noise_and_length_it_is_grpo_up_to_the_bias():
    start, old_mean, _, x_next, stds = noisy_step(3, 4, 0.1, 1.0)
    new = gaussian_step_logprob(x_next, start, stds)
    old = gaussian_step_logprob(x_next, old_mean, stds)
    guarded = ratio_norm(new, old, start, old_mean, stds).exp()
    torch.testing.assert_close(guarded, (new - old).exp() * math.exp(0.01 / 2))
    gradients = []
    for normalised in (True, False):  # at the old policy: the same value and gradient
        mean = old_mean.clone().requires_grad_()
        new = gaussian_step_logprob(x_next, mean, stds)
        log_ratio = ratio_norm(new, old, mean, old_mean, stds) if normalised else new - old
        loss = regulated_step_loss(log_ratio, doubles(1, -1, 2), torch.ones_like(stds), 0.2)
        loss.sum().backward()
        gradients.append(mean.grad)
    torch.testing.assert_close(*gradients)


def test_the_bias_of_the_authors_code_is_shared_by_the_batch():
    mean, old_mean, _, x_next, stds = noisy_step(2, 4, 0.0, 0.5)
    mean = mean + doubles(0.1, 0.3).unsqueeze(1)
    new = gaussian_step_logprob(x_next, mean, stds)
    old = gaussian_step_logprob(x_next, old_mean, stds)
    shared = ratio_norm(new, old, mean, old_mean, stds, bias_reduce="batch")
    torch.testing.assert_close(shared, 0.5 * (new - old + (0.01 + 0.09) / 2 / (2 * 0.25)))
    own = ratio_norm(new, old, mean, old_mean, stds)
    torch.testing.assert_close(own, 0.5 * (new - old + doubles(0.01, 0.09) / (2 * 0.25)))


def test_low_precision_latents_are_compared_in_float32():
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    logprob = gaussian_step_logprob(x, x, torch.tensor([0.1]))
    assert logprob.dtype == torch.float32
    assert float(logprob) == pytest.approx(-math.log(0.1) - math.log(2 * math.pi) / 2)


def test_the_schedule():
    assert flow_times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="at least 1"):
        flow_times(0)


def test_wrong_calls_are_refused():
    x, one = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(ValueError, match="deterministic step has no ratio"):
        flow_sde_step(x, x, 0.5 * one, 0.4 * one, 0.0)
    for time, next_time in ((0.4, 0.5), (0.5, 0.5), (1.1, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="1 >= time > next_time >= 0"):
            flow_sde_step(x, x, time * one, next_time * one, 0.7)
    with pytest.raises(ValueError, match="at least 2 steps"):
        flow_sde_step(x, x, one, 0 * one, 0.7)
    with pytest.raises(ValueError, match="one number per item"):
        flow_sde_step(x, x, torch.ones(2), torch.zeros(2), 0.7)
    with pytest.raises(ValueError, match="std must be positive"):
        gaussian_step_logprob(x, x, 0 * one)
    with pytest.raises(ValueError, match="one shape"):
        ratio_norm(one, one, x, torch.zeros(1, 3), one)
    with pytest.raises(ValueError, match="bias_reduce must be"):
        ratio_norm(one, one, x, x, one, bias_reduce="all")
    with pytest.raises(ValueError, match="step lengths must be positive"):
        regulated_step_loss(one, one, 0 * one, 0.1)
