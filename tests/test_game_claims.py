"""The worlds of the claims about games: fitted rewards, trajectories and shares of tones."""

import pytest
import torch

from postgrad.claims import cyclic_opinions, egpo, nash_md, opinions
from postgrad.claims.matrix_games import Games, bradley_terry
from postgrad.objectives.game import nash_policy


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))


def test_the_fitted_reward_is_the_one_behind_the_preferences():
    reward = torch.tensor([1.5, -0.5, 0.25, 0.0], dtype=torch.float64)
    mu = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    preferences = torch.sigmoid(reward[:, None] - reward)
    found = bradley_terry(preferences, mu)
    torch.testing.assert_close(found, reward - (mu * reward).sum(), atol=1e-6, rtol=0)


def test_a_cycle_has_no_reward_but_for_what_it_is_compared_with():
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    found = bradley_terry(cyclic_opinions.CYCLE, even)
    torch.testing.assert_close(found, nothing, atol=1e-6, rtol=0)
    tilted = torch.tensor([0.7, 0.15, 0.15], dtype=torch.float64)
    assert bradley_terry(cyclic_opinions.CYCLE, tilted).argmax() == 2  # beats what is frequent


def test_the_games_judge_is_the_opinions_judge():
    said = [" good, lovely and old.", " bad, dull and old.", " long, short and bad."]
    assert [opinions.tone(text) for text in said] == [0, 1, 2]
    for i in range(3):
        for j in range(3):
            (wins,) = opinions.cyclic_preference([said[i]], [said[j]])
            assert wins == pytest.approx(float(cyclic_opinions.CYCLE[i, j]))
    assert cyclic_opinions.gained(torch.tensor([1 / 3] * 3)) == pytest.approx(0, abs=1e-7)
    assert cyclic_opinions.gained(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(0.4)


def test_a_trajectory_begins_at_the_reference_and_ends_with_the_last_step():
    games = Games.draw(0, 10, 10)
    at_equilibrium = torch.stack(
        [
            nash_policy(game, reference.exp(), 0.5)
            for game, reference in zip(games.preferences, games.reference, strict=True)
        ]
    )
    assert games.gap(at_equilibrium.log(), 0.5) == pytest.approx(0, abs=1e-10)
    curve = games.trajectory(lambda policy, t: at_equilibrium.log(), 50, 0.5)
    assert curve[0] == (0.0, games.gap(games.reference, 0.5))
    assert [curve[1][0], curve[-1][0]] == [1.0, 50.0]
    assert curve[-1][1] == pytest.approx(0, abs=1e-10)


def test_demonstrations_keep_the_odds_of_their_tones():
    """Words of three tones with odds 6, 1, 1, each of the opinion's own in two cases of three."""
    texts = [row["completion"] for row in opinions._written(0, (6, 1, 1))]
    approving = sum(opinions.tone(text) == 0 for text in texts) / len(texts)
    assert approving == pytest.approx(0.70, abs=0.03)


def test_a_quick_run_gives_the_metric_and_repeats_to_the_bit():
    first, second = nash_md.run("RLHF", 0, True), nash_md.run("RLHF", 0, True)
    assert nash_md.METRIC in first.values
    assert first == second
    assert egpo.METRIC in egpo.run("EGPO", 0, True).values
    assert nash_md.run("self-play without KL", 0, True).values.keys() == {nash_md.METRIC}
