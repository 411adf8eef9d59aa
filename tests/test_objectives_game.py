"""Tabular preference games: the cards' numbers, optimality and symmetry."""

import pytest
import torch

from postgrad.objectives.game import (
    best_response,
    divergence,
    duality_gap,
    exploitability,
    game_value,
    nash_policy,
    random_game,
)

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
MU = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.5, (0.527119, 0.230675, 0.242205)), (0.1, (0.400889, 0.211822, 0.387289))],
)
def test_the_equilibria_of_the_worked_example(tau, expected):
    """Nash-MD's card; the policy is the fixed point mu exp(P(y > policy)/tau)/Z."""
    policy = nash_policy(P, MU, tau)
    torch.testing.assert_close(policy, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    fixed = (MU.log() + P @ policy / tau).softmax(-1)
    torch.testing.assert_close(policy, fixed, atol=1e-7, rtol=0)
    assert float(duality_gap(P, policy, MU, tau)) == pytest.approx(0, abs=1e-12)


def test_the_gap_is_what_best_replies_gain():
    random = torch.Generator().manual_seed(0)
    game = random_game(6, random)
    torch.testing.assert_close(game + game.T, torch.ones(6, 6).double())
    mu, policy = torch.rand(2, 6, generator=random).double().softmax(-1)
    for tau in (0.0, 0.2):
        reply = best_response(game, policy, mu, tau)
        gain = float(game_value(game, reply, policy, mu, tau))
        for _ in range(50):
            other = torch.rand(6, generator=random).double().softmax(-1)
            assert float(game_value(game, other, policy, mu, tau)) <= gain + 1e-12
        value = float(game_value(game, policy, policy, mu, tau))
        assert value == pytest.approx(0.5)
        assert float(duality_gap(game, policy, mu, tau)) == pytest.approx(2 * (gain - 0.5))


def test_rock_paper_scissors_is_solved_by_the_even_mixture():
    cycle = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], dtype=torch.float64)
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert float(exploitability(cycle, even)) == pytest.approx(0)
    # against (0.5, 0.3, 0.2) scissors, the last, win with 0.5 + 0.2 / 2
    assert float(exploitability(cycle, MU)) == pytest.approx(0.1)
    torch.testing.assert_close(nash_policy(cycle, even, 0.05), even)


def test_divergence_of_what_never_happens_is_zero():
    assert float(divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))) == pytest.approx(
        0.693147
    )
    with pytest.raises(ValueError, match="tau > 0 only"):
        nash_policy(P, MU, 0.0)
