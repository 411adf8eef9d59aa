"""iSogCLR: the dual objective, its temperatures, and the algorithm's state."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from postgrad.objectives.robust_contrastive import (
    PerSampleState,
    RobustSettings,
    log_normaliser,
    robust_bimodal_step,
    robust_global_objective,
    robust_two_view_step,
    tau_star,
    temperature_gradient,
)

H = torch.tensor([0.2, -0.1, -0.5, -0.9], dtype=torch.float64)
HALF = torch.tensor(0.5, dtype=torch.float64)


def settings(**changed) -> RobustSettings:
    given = {"rho": 0.1, "gamma": 0.8, "beta": 0.9, "eta": 0.01, "tau_min": 0.05, "tau_max": 1.0}
    return RobustSettings(**{**given, "gradient_limit": 3.0, **changed})


def views(count: int, seed: int = 0, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, width, generator=generator)


def divergence(h: Tensor, tau: Tensor) -> Tensor:
    p = torch.softmax(h / tau.unsqueeze(-1), -1)
    return (p * (p * h.shape[-1]).log()).sum(-1)


# --- the dual objective -------------------------------------------------------------------------


def test_the_worked_example_of_the_objective():
    best = tau_star(H, 0.1)
    assert float(best) == pytest.approx(0.874060, abs=1e-6)
    assert float(divergence(H, best)) == pytest.approx(0.1, abs=1e-6)
    assert float(robust_global_objective(H, best, 0.1)) == pytest.approx(-0.143743, abs=1e-6)
    log_g = log_normaliser(H, HALF)
    weights = torch.exp(H / HALF - log_g)
    assert float(log_g.exp()) == pytest.approx(0.710933, abs=1e-6)
    assert weights.tolist() == pytest.approx([2.098403, 1.151628, 0.517460, 0.232510], abs=1e-6)
    assert float(temperature_gradient(H, HALF, 0.1, log_g)) == pytest.approx(-0.159441, abs=1e-6)
    assert float(robust_global_objective(H, HALF, 0.1)) == pytest.approx(-0.120588, abs=1e-6)
    assert float((weights * H).mean()) == pytest.approx(-0.040868, abs=1e-6)


def test_the_worked_example_of_the_moving_averages():
    state = PerSampleState(3, tau_init=0.5)
    state.log_s[1] = math.log(1.2)
    index = torch.tensor([1])
    log_s = state.averaged(index, log_normaliser(H, HALF).unsqueeze(0), gamma=0.8)
    assert float(log_s.exp()) == pytest.approx(0.808747, abs=1e-6)
    gradient = temperature_gradient(H.unsqueeze(0), HALF.unsqueeze(0), 0.1, log_s)
    assert float(gradient) == pytest.approx(-0.040419, abs=1e-6)
    state.update(index, log_s, gradient, settings())
    assert float(state.u[1]) == pytest.approx(-0.036378, abs=1e-6)
    assert float(state.tau[1]) == pytest.approx(0.500364, abs=1e-6)
    assert state.tau[[0, 2]].tolist() == [0.5, 0.5]


def test_the_temperature_gradient_is_the_derivative_rho_minus_kl():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    tau = (torch.rand(50, generator=generator, dtype=torch.float64) + 0.05).requires_grad_()
    (exact,) = torch.autograd.grad(robust_global_objective(h, tau, 0.3).sum(), tau)
    tau = tau.detach()
    estimate = temperature_gradient(h, tau, 0.3, log_normaliser(h, tau))
    torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(estimate, 0.3 - divergence(h, tau))
    assert (estimate <= 0.3).all()
    shifted = temperature_gradient(h + 4, tau, 0.3, log_normaliser(h + 4, tau))
    torch.testing.assert_close(shifted, estimate)


def test_the_objective_is_convex_in_tau_and_minimal_at_tau_star():
    tau = torch.linspace(0.05, 3, 200, dtype=torch.float64)
    values = robust_global_objective(H.expand(200, 4), tau, 0.1)
    assert (values[2:] - 2 * values[1:-1] + values[:-2] > 0).all()
    best = tau_star(H, 0.1)
    assert (values >= robust_global_objective(H, best, 0.1) - 1e-12).all()


def test_the_limits_of_the_temperature():
    rho = 0.1
    hot, cold = torch.tensor([1e6, 1e-3], dtype=torch.float64)
    assert float(robust_global_objective(H, hot, rho) - hot * rho) == pytest.approx(
        float(H.mean()), abs=1e-6
    )
    # tau log(1/m) remains of the uniform prior
    assert float(robust_global_objective(H, cold, rho) - cold * rho) == pytest.approx(
        float(H.max()) - 1e-3 * math.log(4), abs=1e-9
    )


TWO_LEVEL = {
    0.3: (0.342161, 0.398391, 0.489751, 0.566457, 0.631353, 0.534869, 0.284046),
    0.1: (0.463018, 0.558387, 0.724863, 0.881131, 1.103959, 1.059947, 0.822497),
}


@pytest.mark.parametrize("rho", TWO_LEVEL)
def test_the_two_level_model_of_frequency(rho):
    # A fraction of the negatives has h = 0, the rest -1: tau* rises with it only at first.
    percentages = (1, 2, 5, 10, 30, 50, 70)
    h = torch.tensor([[0.0] * p + [-1.0] * (100 - p) for p in percentages], dtype=torch.float64)
    assert tau_star(h, rho).tolist() == pytest.approx(TWO_LEVEL[rho], abs=1e-6)


def test_tau_star_without_a_solution_is_the_lowest():
    assert float(tau_star(torch.zeros(5), 0.1, lowest=0.05)) == pytest.approx(0.05)
    assert float(tau_star(H, math.log(4) + 0.1, lowest=0.05)) == pytest.approx(0.05)


# --- the algorithm ------------------------------------------------------------------------------


def two_view_h(a: Tensor, b: Tensor) -> Tensor:
    """h `[2, B, 2B - 2]` by loops."""
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    rows = []
    for view in (a, b):
        for i in range(len(a)):
            others = [v[j] for v in (a, b) for j in range(len(a)) if j != i]
            rows.append(torch.stack(others) @ view[i] - a[i] @ b[i])
    return torch.stack(rows).view(2, len(a), -1)


@pytest.mark.parametrize("form", ["h", "sim"])
def test_without_averaging_the_gradient_is_that_of_the_objective(form):
    # gamma = 1, eta = 0: tau times the gradient of the decoupled InfoNCE at tau, in both forms.
    a, b = views(4).double()
    tau = torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64)
    state = PerSampleState(10, tau_init=0.3)
    index = torch.tensor([7, 0, 3, 9])
    state.tau[index] = tau.float()
    state.log_s[index] = 5.0  # an old value, which gamma = 1 forgets
    first, second = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss, metrics = robust_two_view_step(
        first, second, index, state, settings(gamma=1.0, eta=0.0, form=form)
    )
    loss.sum().backward()
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    objective = robust_global_objective(two_view_h(x, y), state.tau[index].expand(2, 4), 0.1)
    objective.sum().backward()
    torch.testing.assert_close(first.grad, x.grad)
    torch.testing.assert_close(second.grad, y.grad)
    assert metrics["objective"] == pytest.approx(float(objective.detach().mean()))
    torch.testing.assert_close(state.tau[index], tau.float())


def reference_step(h: Tensor, tau: Tensor, s: Tensor, b: Tensor, gamma: float, rho: float):
    """The paper's bimodal code: s kept relative to a running maximum b, V = 1 view, h `[B, m]`."""
    new_b = torch.maximum(b, (h / tau[:, None]).max(1).values)
    g = torch.exp(h / tau[:, None] - new_b[:, None]).mean(1)
    new_s = (1 - gamma) * s * torch.exp(b - new_b) + gamma * g
    weights = torch.exp(h / tau[:, None] - new_b[:, None]) / new_s[:, None]
    gradient = new_s.log() + new_b + rho - (weights * h / tau[:, None]).mean(1)
    return new_s, new_b, gradient


def test_log_s_equals_the_running_maximum_of_the_papers_code():
    generator = torch.Generator().manual_seed(0)
    count, chosen = 6, settings(rho=0.5, eta=0.02, beta=0.7, gamma=0.6, tau_min=0.02)
    left_state, right_state = PerSampleState(count, 0.1), PerSampleState(count, 0.1)
    tau, u = torch.full((count,), 0.1, dtype=torch.float64), torch.zeros(count).double()
    s = b = None
    for _ in range(5):
        left, right = torch.randn(2, count, 4, generator=generator)
        loss, _ = robust_bimodal_step(
            left, right, torch.arange(count), left_state, right_state, chosen
        )
        similarities = normalize(left.double(), dim=-1) @ normalize(right.double(), dim=-1).T
        h = similarities - similarities.diagonal().unsqueeze(1)
        h = h[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
        if s is None:  # the first visit takes s = g
            b = (h / tau[:, None]).max(1).values
            s = torch.exp(h / tau[:, None] - b[:, None]).mean(1)
        s, b, gradient = reference_step(h, tau, s, b, 0.6, 0.5)
        u = 0.3 * u + 0.7 * gradient.clamp(-3, 3)
        tau = (tau - 0.02 * u).clamp(0.02, 1.0)
        torch.testing.assert_close(left_state.tau.double(), tau, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left_state.log_s.double(), s.log() + b, atol=1e-4, rtol=1e-5)
    assert loss.isfinite().all()
    assert (left_state.tau != right_state.tau).any()


def test_the_encoder_loss_with_averages_weighs_h_by_the_stale_normaliser():
    left, right = views(4).double()
    state, other = PerSampleState(8, 0.2), PerSampleState(8, 0.2)
    index = torch.arange(4)
    state.log_s[index], other.log_s[index] = 1.0, 1.0
    x, y = left.clone().requires_grad_(), right.clone().requires_grad_()
    loss, _ = robust_bimodal_step(x, y, index, state, other, settings(gamma=0.5))
    loss.sum().backward()
    x2, y2 = left.clone().requires_grad_(), right.clone().requires_grad_()
    similarities = normalize(x2, dim=-1) @ normalize(y2, dim=-1).T
    expected = 0.0
    for sims in (similarities, similarities.T):
        h = sims - sims.diagonal().unsqueeze(1)
        h = h[~torch.eye(4, dtype=torch.bool)].view(4, 3)
        s = 0.5 * math.e + 0.5 * (h.detach() / 0.2).exp().mean(1)
        expected = expected + ((h.detach() / 0.2).exp() / s[:, None] * h).mean(1)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad, x2.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y.grad, y2.grad, atol=1e-6, rtol=1e-6)


def test_two_views_share_one_average():
    a, b = views(3).double()
    state = PerSampleState(5, 0.4)
    index = torch.tensor([4, 0, 2])
    h = two_view_h(a, b)
    robust_two_view_step(a, b, index, state, settings(eta=0.1, beta=1.0))
    g = (h / 0.4).exp().mean(-1)
    torch.testing.assert_close(state.log_s[index].exp().double(), g.mean(0), atol=1e-5, rtol=1e-5)
    gradient = (0.1 - divergence(h, torch.full((2, 3), 0.4).double())).mean(0)
    torch.testing.assert_close(state.u[index].double(), gradient, atol=1e-5, rtol=1e-5)
    assert state.log_s[[1, 3]].isneginf().all()


def test_temperatures_find_tau_star_on_fixed_similarities():
    # The exact twin: no encoder, gamma = beta = 1.
    a, b = views(6, seed=3)
    chosen = settings(rho=0.2, gamma=1.0, beta=1.0, eta=0.05, tau_min=0.01, tau_max=5.0)
    left_state, right_state = PerSampleState(6, 0.5), PerSampleState(6, 0.5)
    for _ in range(3000):
        robust_bimodal_step(a, b, torch.arange(6), left_state, right_state, chosen)
    similarities = normalize(a, dim=-1) @ normalize(b, dim=-1).T
    h = similarities - similarities.diagonal().unsqueeze(1)
    h = h[~torch.eye(6, dtype=torch.bool)].view(6, 5)
    torch.testing.assert_close(left_state.tau, tau_star(h, 0.2), atol=1e-3, rtol=1e-3)


def test_equal_negatives_drive_tau_to_its_minimum():
    a = torch.eye(4)  # all negatives alike
    state, other = PerSampleState(9, 0.3), PerSampleState(9, 0.3)
    chosen = settings(gamma=1.0, eta=0.5, tau_min=0.07)
    for _ in range(20):
        robust_bimodal_step(a, a, torch.arange(4), state, other, chosen)
    torch.testing.assert_close(state.tau[:4], torch.full((4,), 0.07))


def test_eta_zero_keeps_the_temperature_as_in_sogclr():
    a, b = views(4)
    state = PerSampleState(6, 0.3)
    for _ in range(3):
        robust_two_view_step(a, b, torch.arange(4), state, settings(eta=0.0))
    assert state.tau.eq(torch.tensor(0.3)).all()
    assert state.log_s[:4].isfinite().all()


@pytest.mark.parametrize("form", ["h", "sim"])
def test_tiny_temperatures_neither_overflow_nor_underflow(form):
    # exp(h / tau) reaches exp(+-400); the extremes alternate so that stale averages dominate.
    good, bad = torch.eye(4), -torch.eye(4) + 1e-3
    chosen = settings(rho=1.0, tau_min=0.005, eta=0.0, gradient_limit=5.0, form=form)
    state, other = PerSampleState(40, 0.005), PerSampleState(40, 0.005)
    pairs = [(good, good), (good, bad)] + [(good, good)] * 100 + [(good, bad)]
    for left, right in pairs:
        x = left.clone().requires_grad_()
        loss, metrics = robust_bimodal_step(x, right, torch.arange(4), state, other, chosen)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(math.isfinite(value) for value in metrics.values())
        assert state.log_s[:4].isfinite().all()


# --- state and faults ---------------------------------------------------------------------------


def test_the_state_resumes_exactly():
    batches = [(views(4, seed), torch.randperm(9)[:4]) for seed in range(6)]

    def run(state: PerSampleState, part: list) -> None:
        for (a, b), index in part:
            robust_two_view_step(a, b, index, state, settings())

    whole, first, resumed = (PerSampleState(9, 0.3) for _ in range(3))
    run(whole, batches)
    run(first, batches[:3])
    saved = first.state_dict()
    run(first, batches[3:])  # what was saved must not change with the state
    resumed.load_state_dict(saved)
    run(resumed, batches[3:])
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    with pytest.raises(ValueError, match="one shape"):
        PerSampleState(8, 0.3).load_state_dict(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 1, 1]), "twice"),
        (torch.tensor([0, 1, 9]), r"lie in \[0, 9\), got 0 to 9"),
        (torch.tensor([-1, 1, 2]), "got -1 to 2"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be integers"),
        (torch.tensor([0, 1]), "3 items but 2 indices"),
    ],
)
def test_wrong_indices_are_refused_before_anything_changes(index, message):
    state = PerSampleState(9, 0.3)
    with pytest.raises(ValueError, match=message):
        robust_two_view_step(*views(3), index, state, settings())
    assert state.log_s.isneginf().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rho": 0.0}, "rho must be positive"),
        ({"tau_min": 0.0}, "tau_min must be positive"),
        ({"tau_max": 0.01}, "below tau_min"),
        ({"gamma": 0.0}, "gamma must lie"),
        ({"beta": 1.5}, "beta must lie"),
        ({"eta": -0.1}, "eta must be at least 0"),
        ({"form": "cosine"}, "form must be"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_an_unreachable_rho_is_refused_and_one_of_the_batch_warned_of():
    a, b = views(3)
    index = torch.arange(3)
    with pytest.raises(ValueError, match="16 negatives is at most 2"):
        robust_two_view_step(a, b, index, PerSampleState(9, 0.3), settings(rho=2.8))
    left, right = PerSampleState(9, 0.3), PerSampleState(9, 0.3)
    with pytest.raises(ValueError, match="8 negatives is at most 2"):
        robust_bimodal_step(a, b, index, left, right, settings(rho=2.2))
    with pytest.warns(UserWarning, match="at most log 4"):
        robust_two_view_step(a, b, index, PerSampleState(9, 0.3), settings(rho=1.5, gamma=1.0))


def test_other_wrong_calls():
    a, b = views(3)
    index = torch.arange(3)
    with pytest.raises(ValueError, match="at least 2"):
        robust_two_view_step(a[:1], b[:1], index[:1], PerSampleState(9, 0.3), settings())
    with pytest.raises(ValueError, match="one shape"):
        robust_two_view_step(a, b[:2], index, PerSampleState(9, 0.3), settings())
    left, right = PerSampleState(9, 0.3), PerSampleState(8, 0.3)
    with pytest.raises(ValueError, match="do not pair"):
        robust_bimodal_step(a, b, index, left, right, settings())
    with pytest.raises(ValueError, match="tau_init must be positive"):
        PerSampleState(9, 0.0)
