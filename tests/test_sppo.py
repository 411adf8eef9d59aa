"""SPPO: its targets, its fixed point, and real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.sppo import SPPO
from postgrad.objectives.iterative import mirror_step, sppo
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}="} for i in range(24)]
SHORT = {"rollout": {"samples": 3, "max_new_tokens": 5}, "batch_size": 8, "minibatches": 2}


def letters(completions):
    return [10.0 * sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def test_each_response_has_its_own_target():
    log_ratio = torch.tensor([[0.2, -0.1]], dtype=torch.float64, requires_grad=True)
    loss = sppo(log_ratio, torch.tensor([[0.8, 0.4]], dtype=torch.float64), eta=0.5)
    assert loss[0].tolist() == pytest.approx([0.4**2, 0.1**2])
    loss.sum().backward()
    assert log_ratio.grad[0].tolist() == pytest.approx([-0.8, 0.2])


def test_even_win_rates_ask_for_no_change():
    log_ratio = torch.zeros(2, 3)
    assert sppo(log_ratio, torch.full((2, 3), 0.5), eta=0.01).tolist() == [[0.0] * 3] * 2


def test_small_steps_are_multiplicative_weights():
    """The exact step's log-ratio is the target but for the normaliser, eta^2/8 at the most."""
    random = torch.Generator().manual_seed(0)
    game = torch.rand(5, 5, generator=random, dtype=torch.float64).triu(1)
    game = game + (1 - game.mT).tril(-1) + 0.5 * torch.eye(5)
    centre = torch.randn(5, generator=random, dtype=torch.float64).log_softmax(0)
    wins = game @ centre.exp()
    for inverse_step in (5.0, 50.0):
        exact = mirror_step(centre, wins, inverse_step)
        # the mean win rate of a policy against itself is 1/2, so the normaliser is nearly that
        worst = sppo(exact - centre, wins, inverse_step).max().sqrt()
        assert float(worst) <= 1 / (8 * inverse_step**2)


def test_wrong_calls():
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        sppo(torch.zeros(1, 2), torch.tensor([[0.5, 1.2]]), 0.5)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        sppo(torch.zeros(1, 2), torch.tensor([[0.5, torch.nan]]), 0.5)
    with pytest.raises(ValueError, match="eta must be positive, got -1"):
        sppo(torch.zeros(1, 2), torch.zeros(1, 2), -1)
    with pytest.raises(ValueError, match="one shape"):
        sppo(torch.zeros(1, 2), torch.zeros(2), 0.5)


def made(**config):
    values = {"model": "tiny", **SHORT, **config}
    return SPPO(validated(SPPO.Config, values), Place(), data=ROWS, reward=letters)


def test_whole_groups_are_learnt_from_best_first():
    method = moved(made(beta=0.2), 0.05)
    batch = method.collect(0)
    assert batch.present.shape == (8, 3)
    assert bool((batch.scores.diff(dim=1) <= 0).all())
    torch.testing.assert_close(batch.scores.mean(1), torch.full((8,), 0.5))
    with torch.no_grad():
        loss, _ = method.loss(batch)
        assert float(loss) == pytest.approx(
            float(((batch.scores - 0.5) / 0.2).square().mean()), rel=1e-3
        )
        moved(method, 0.03)
        now = method.compared(batch).logprobs
        loss, _ = method.loss(batch)
    expected = (now - batch.centre - (batch.scores - 0.5) / 0.2).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_it_learns_to_say_letters(tmp_path):
    train(
        "sppo",
        data=ROWS,
        reward=letters,
        output=tmp_path / "run",
        steps=6,
        beta=0.1,
        **{**SMALL, **SHORT, "minibatches": 4, "batch_size": 16},
        eval_data=write_rows(tmp_path / "held.jsonl", ROWS[:12]),
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "longer.py").write_text(
        "def score(completions):\n    return [len(set(text)) for text in completions]\n"
    )
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{tmp_path}/longer.py:score",
        "save_every": 1,
    }
    train("sppo", steps=2, output=tmp_path / "whole", **settings)
    train("sppo", steps=1, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=2, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_bad_setting_is_named():
    with pytest.raises(PostgradError, match=r"beta: .*greater than 0"):
        made(beta=0)
