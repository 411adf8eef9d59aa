"""The worlds of the claims about preference games: sampled tables and the cycle of tones."""

import pytest
import torch

from postgrad.claims import apo, dno, inpo
from postgrad.claims.matrix_games import Games
from postgrad.claims.sampled_games import Sampled, every_pair, fitted, sample_pairs
from postgrad.objectives.iterative import geometric_centre, mirror_step

GAMES = Games.draw(0, 3, 4)


def endless(policy):
    """As many pairs as there can be: each labelled by its probability."""
    chance = policy.exp().unsqueeze(2) * policy.exp().unsqueeze(1)
    return Sampled(2 * chance * GAMES.preferences)  # i and j are drawn in two orders


def test_shares_of_samples_are_those_of_the_policy_and_its_preferences():
    sampled = sample_pairs(GAMES, GAMES.reference, 40_000, 0)
    expected = endless(GAMES.reference)
    # four standard errors of a share of 40 000 pairs
    torch.testing.assert_close(sampled.wins, expected.wins, atol=0.01, rtol=0)
    torch.testing.assert_close(sampled.drawn, GAMES.reference.exp(), atol=0.01, rtol=0)
    assert sampled.wins.sum((-1, -2)).tolist() == pytest.approx([1.0] * 3)
    torch.testing.assert_close(expected.win_rates, GAMES.win_rates(GAMES.reference))


def test_what_was_never_drawn_has_an_even_win_rate():
    wins = torch.zeros(1, 3, 3)
    wins[0, 0, 1] = 1.0
    assert Sampled(wins).win_rates.tolist() == [[1.0, 0.0, 0.5]]


def test_every_pair_is_in_the_order_of_the_table():
    values = torch.tensor([[1.0, 2.0]])
    assert every_pair(values).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_games_do_not_interact_in_a_fit():
    def loss(policy):
        return (policy - target).square().sum(-1)

    target = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    together = fitted(GAMES.reference, loss, 20)
    target = target[:1]
    torch.testing.assert_close(together[:1], fitted(GAMES.reference[:1], loss, 20))


@pytest.mark.parametrize("arm", ["INPO", "SPPO"])
def test_with_endless_pairs_inpo_takes_the_step_of_mirror_descent(arm, monkeypatch):
    monkeypatch.setattr(inpo, "STEPS", 1000)
    centre = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    tau = {"INPO": inpo.TAU, "SPPO": 0.0}[arm]
    about = geometric_centre(centre, GAMES.reference, tau / inpo.ETA)
    exact = mirror_step(about, GAMES.win_rates(centre), inpo.ETA)
    found = inpo.one_round(arm, GAMES, centre, endless(centre))
    # SPPO takes the logarithm of the normaliser to be 1/(2 eta)
    torch.testing.assert_close(found, exact, atol=1e-4 if arm == "INPO" else 0.02, rtol=0)


def test_with_endless_pairs_dnos_soft_form_takes_the_exact_step_and_dpo_does_not(monkeypatch):
    monkeypatch.setattr(dno, "STEPS", 1000)
    centre = GAMES.reference
    for arm, right in (("DNO, soft", True), ("iterative DPO", False)):
        exact = mirror_step(centre, GAMES.win_rates(centre), dno.TABULAR[arm][1])
        found = dno.one_round(arm, centre, endless(centre))
        assert torch.allclose(found, exact, atol=1e-5) == right


def test_exact_rounds_of_the_bandit_follow_the_closed_form():
    """Four rounds with alpha = 0.3 go 5.107 times as far as one."""
    fast = apo.bandit_rounds(3, 0.3, 1.0, 4, exact=True)
    plain = apo.bandit_rounds(3, 0.0, 1.0, 6, exact=True)
    same = apo.bandit_rounds(3, 0.0, 1 / 5.107, 1, exact=True)
    assert fast[4] == pytest.approx(same[1])
    assert plain[6] < fast[4] < plain[5]
