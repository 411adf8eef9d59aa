"""MDPO's losses: worked numbers, identities, and exact mirror descent on a random MDP."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from postgrad.objectives.control import (
    clipped_value_loss,
    md_closed_form,
    mdpo_surrogate,
    off_policy_mdpo_loss,
    one_step_target,
    soft_value_target,
    tsallis_log,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kl(new: Tensor, old: Tensor) -> Tensor:
    return (new * (new / old).log()).sum(-1)


def test_the_worked_example_of_the_closed_form():
    old, advantages, t = doubles(0.5, 0.3, 0.2), doubles(1, 0, -1), 0.5
    new = md_closed_form(old, advantages, t)
    assert new.tolist() == pytest.approx([0.661783, 0.240835, 0.097382], abs=1e-6)
    assert float(kl(new, old)) == pytest.approx(0.062529, abs=1e-6)
    objective = (new * advantages).sum() - kl(new, old) / t
    assert float(objective) == pytest.approx(0.439342, abs=1e-6)
    assert float(objective) == pytest.approx(
        float((old * (t * advantages).exp()).sum().log() / t), rel=1e-12
    )


def test_the_worked_example_of_the_on_policy_loss():
    ratio = doubles(1.2, 0.9)
    loss = mdpo_surrogate(ratio.log(), doubles(0, 0), doubles(1, -1), doubles(0.01, 0.01), 0.5)
    assert float(-loss.mean()) == pytest.approx(0.13, abs=1e-9)


def test_the_worked_example_of_the_off_policy_losses():
    loss = off_policy_mdpo_loss(
        doubles(-1.2)[None], doubles(-1.0)[None], doubles(3.0), t=1.0, entropy_coefficient=0.2
    )
    assert float(loss) == pytest.approx(-3.4, abs=1e-9)
    target = soft_value_target(doubles(3.0, 2.8).unsqueeze(1), doubles(-1.2), 0.2)
    assert float(target) == pytest.approx(3.04, abs=1e-9)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    actions = torch.arange(6) % 3
    gradients = []
    for surrogate in (True, False):
        logits = start.clone().requires_grad_()
        new, old = logits.log_softmax(1), start.log_softmax(1)
        chosen = new[torch.arange(6), actions]
        if surrogate:
            divergence = kl(new.exp(), old.exp())
            loss = mdpo_surrogate(
                chosen, old[torch.arange(6), actions], advantages, divergence, 0.1
            )
        else:
            loss = -advantages * chosen
        loss.sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_the_limits_of_the_step_size():
    old, advantages = doubles(0.5, 0.3, 0.2), doubles(1, 0, -1)
    torch.testing.assert_close(md_closed_form(old, advantages, 1e-9), old)
    torch.testing.assert_close(md_closed_form(old, advantages, 1e3), doubles(1, 0, 0))
    arguments = doubles(0.1, -0.2), doubles(0, 0), doubles(1, -1), doubles(0.3, 0.1)
    torch.testing.assert_close(mdpo_surrogate(*arguments, 1e12), -arguments[0].exp() * arguments[2])


def test_the_closed_form_maximises_the_objective():
    generator = torch.Generator().manual_seed(0)
    old = torch.rand(4, generator=generator, dtype=torch.float64).softmax(0)
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    best = md_closed_form(old, advantages, 0.7)

    def objective(policy: Tensor) -> float:
        return float((policy * advantages).sum() - kl(policy, old) / 0.7)

    for _ in range(50):
        noise = 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
        assert objective((best.log() + noise).softmax(0)) < objective(best)


def test_an_action_of_probability_zero_stays_impossible():
    assert md_closed_form(doubles(1.0, 0.0), doubles(0.0, 5.0), 1.0).tolist() == [1.0, 0.0]


# --- exact mirror descent -----------------------------------------------------------------------

STATES, ACTIONS, DISCOUNT = 20, 4, 0.9


def random_mdp() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (STATES, ACTIONS, STATES)
    transition = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    return transition, torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)


def evaluate(policy: Tensor, transition: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """Exact value `[S]` and advantage `[S, A]` of a policy."""
    move = torch.einsum("sa,sax->sx", policy, transition)
    eye = torch.eye(STATES, dtype=torch.float64)
    value = torch.linalg.solve(eye - DISCOUNT * move, (policy * reward).sum(1))
    return value, reward + DISCOUNT * transition @ value - value.unsqueeze(1)


def test_the_closed_form_converges_monotonically_to_the_optimum():
    transition, reward = random_mdp()
    optimal = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(400):
        optimal = (reward + DISCOUNT * transition @ optimal).max(1).values
    policy = torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64)
    values = []
    for _ in range(100):
        value, advantage = evaluate(policy, transition, reward)
        values.append(value)
        policy = md_closed_form(policy, advantage, 10.0)
    steps = torch.stack(values).diff(dim=0)
    assert (steps > -1e-12).all()
    assert float((optimal - values[0]).max()) > 1.0
    torch.testing.assert_close(values[-1], optimal, atol=1e-4, rtol=0)


def test_more_gradient_steps_come_closer_to_the_closed_form():
    transition, reward = random_mdp()
    old = torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64)
    _, advantage = evaluate(old, transition, reward)
    target = md_closed_form(old, advantage, 0.5)

    def distance(steps: int) -> float:
        logits = torch.zeros(STATES, ACTIONS, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            new = logits.log_softmax(1)
            # One sample of every action, weighed by the old policy: the exact expectation.
            loss = mdpo_surrogate(
                new.flatten(),
                old.log().flatten(),
                advantage.flatten(),
                kl(new.exp(), old).repeat_interleave(ACTIONS),
                0.5,
            )
            (gradient,) = torch.autograd.grad((old.flatten() * loss).sum(), logits)
            logits = (logits - 0.5 * gradient).detach().requires_grad_()
        return float(kl(logits.detach().softmax(1), target).mean())

    distances = [distance(m) for m in (1, 3, 10, 30, 100)]
    assert all(later < earlier for earlier, later in pairwise(distances))
    assert distances[-1] < 1e-3 * distances[0]


# --- the off-policy loss ------------------------------------------------------------------------


def test_with_c_equal_to_lambda_it_is_sac_and_forgets_the_old_policy():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, other = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    q_values = torch.randn(5, generator=generator, dtype=torch.float64)
    loss = off_policy_mdpo_loss(logprobs, old, q_values, t=5.0, entropy_coefficient=0.2)
    torch.testing.assert_close(loss, 0.2 * logprobs.sum(1) - q_values)
    again = off_policy_mdpo_loss(logprobs, other, q_values, t=5.0, entropy_coefficient=0.2)
    torch.testing.assert_close(loss, again)


def test_without_entropy_it_is_a_kl_regularised_step():
    logprobs, old = torch.randn(2, 5, 2, dtype=torch.float64)
    q_values = torch.randn(5, dtype=torch.float64)
    loss = off_policy_mdpo_loss(logprobs, old, q_values, t=0.5, entropy_coefficient=0.0)
    torch.testing.assert_close(loss, 2 * (logprobs - old).sum(1) - q_values)


def test_tsallis_logarithms():
    x = doubles(0.2, 0.5, 1.0, 3.0)
    for p in (-1.0, 0.0, 0.5, 1.5, 2.0):
        torch.testing.assert_close(tsallis_log(x.log(), p), (x ** (1 - p) - 1) / (1 - p))
    for nearly in (1 - 1e-9, 1.0, 1 + 1e-9):
        torch.testing.assert_close(tsallis_log(x.log(), nearly), x.log(), atol=1e-8, rtol=0)


def test_the_tsallis_form_acts_on_each_dimension():
    logprobs, old, q_values = doubles(-1.0, 0.3)[None], doubles(-0.5, 0.1)[None], doubles(2.0)
    q, c, entropy = 1.5, 2.0, 0.2
    loss = off_policy_mdpo_loss(
        logprobs, old, q_values, t=1 / c, entropy_coefficient=entropy, tsallis_q=q
    )

    def log_q(logs: Tensor) -> float:  # log_{2-q}, dimension by dimension
        return sum((math.exp(x) ** (q - 1) - 1) / (q - 1) for x in logs.flatten().tolist())

    expected = c * log_q(logprobs) + q * (entropy - c) * log_q(old) - 2.0
    assert float(loss) == pytest.approx(expected)
    close = off_policy_mdpo_loss(
        logprobs, old, q_values, t=0.5, entropy_coefficient=0.2, tsallis_q=1 + 1e-9
    )
    plain = off_policy_mdpo_loss(logprobs, old, q_values, t=0.5, entropy_coefficient=0.2)
    torch.testing.assert_close(close, plain, atol=1e-7, rtol=0)


def test_gradients_flow_into_the_action_through_all_three_terms():
    action = doubles(0.3)[None].requires_grad_()
    loss = off_policy_mdpo_loss(
        -action.square(), -2 * action, 3 * action[:, 0], t=1.0, entropy_coefficient=0.2
    )
    loss.sum().backward()
    assert float(action.grad) == pytest.approx(-2 * 0.3 + (0.2 - 1) * -2 - 3)


# --- critics ------------------------------------------------------------------------------------


def test_one_step_target_does_not_read_the_value_after_a_termination():
    target = one_step_target(doubles(1, 2), doubles(10, math.nan), torch.tensor([False, True]), 0.9)
    assert target.tolist() == [10.0, 2.0]


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, (1.1 - 3) ** 2, 2 * (1.1 - 3)),  # within the range
        (2.0, (1.2 - 3) ** 2, 0.0),  # moved too far towards the return: held
        (0.0, 9.0, -6.0),  # moved away: still pulled back
    ],
)
def test_clipped_value_loss(value, loss, slope):
    v = doubles(value).requires_grad_()
    result = clipped_value_loss(v, doubles(1.0), doubles(3.0), 0.2)
    result.sum().backward()
    assert float(result.detach()) == pytest.approx(loss)
    assert float(v.grad) == pytest.approx(slope)


def test_a_ratio_that_overflows_shows():
    x = doubles(0.0, 0.0)
    assert mdpo_surrogate(x, x - 1e4, doubles(1.0, -1.0), x, 0.5).tolist() == [-math.inf, math.inf]


def test_wrong_calls_are_refused():
    x = doubles(0.0, 0.0)
    for t in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="step size t must be positive"):
            mdpo_surrogate(x, x, x, x, t)
        with pytest.raises(ValueError, match="step size t must be positive"):
            md_closed_form(x, x, t)
    with pytest.raises(ValueError, match=r"KL is never negative, got -0\.01"):
        mdpo_surrogate(x, x, x, x - 0.01, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        mdpo_surrogate(x, x, x, x[:1], 0.5)
    with pytest.raises(ValueError, match=r"expected values \[2\]"):
        off_policy_mdpo_loss(x[:, None], x[:, None], x[:, None], t=1.0, entropy_coefficient=0.2)
    with pytest.raises(ValueError, match="at least 0"):
        off_policy_mdpo_loss(x[:, None], x[:, None], x, t=1.0, entropy_coefficient=-0.2)
    with pytest.raises(ValueError, match="one shape"):  # would broadcast to [B, B]
        soft_value_target(x.unsqueeze(0), x.unsqueeze(1), 0.2)
    with pytest.raises(ValueError, match="one shape"):
        clipped_value_loss(x, x, x[:1], 0.2)
