"""CoPG: its identities and worked numbers, and real runs of the tiny model on scored responses."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.copg import CoPG, CoPGSettings
from postgrad.objectives.pairwise import copg, ipo
from postgrad.training.record import read_rows

PAIRS = [
    {
        "prompt": f"{i} + {i} = ",
        "chosen": f"{2 * i}",
        "rejected": f"{2 * i + 1}",
        "score_chosen": 1.0,
        "score_rejected": 0.5 * (i % 3),
    }
    for i in range(20)
]
LISTS = [
    {
        "prompt": f"{i}: ",
        "responses": [f"{i}{c}" for c in "abcd"[: 2 + i % 3]],
        "scores": [0.1, 1.5, -2.0, 0.4][: 2 + i % 3],
    }
    for i in range(12)
]

REWARDS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)  # the bandit, beta 1/2
OPTIMUM = torch.tensor([0.705385, 0.259496, 0.035119], dtype=torch.float64)


def made(rows=PAIRS, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return CoPG(validated(CoPGSettings, values), Place(), data=rows)


def slope(log_ratio, rewards, beta, present=None):
    log_ratio = log_ratio.clone().requires_grad_()
    return torch.autograd.grad(copg(log_ratio, rewards, beta, present).sum(), log_ratio)[0]


# The objective -------------------------------------------------------------------------------


def test_the_worked_example():
    log_ratio = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    rewards = torch.tensor([[2.5, 1.0]], dtype=torch.float64)
    loss = copg(log_ratio, rewards, 0.5)
    assert float(loss) == pytest.approx(1.562500, abs=1e-9)
    assert float(1.5**2 / (2 * 0.5) - loss) == pytest.approx(0.687500, abs=1e-9)
    torch.testing.assert_close(
        slope(log_ratio, rewards, 0.5), torch.tensor([[-1.25, 1.25]], dtype=torch.float64)
    )


def test_it_is_minus_the_papers_objective_value_and_gradient():
    beta = 0.3
    log_ratio, rewards = torch.randn(2, 9, 2, dtype=torch.float64)

    def objective(c):
        half = rewards - beta / 2 * c
        return (half[:, 0] - half[:, 1]) * c[:, 0] + (half[:, 1] - half[:, 0]) * c[:, 1]

    constant = (rewards[:, 0] - rewards[:, 1]).square() / (2 * beta)
    torch.testing.assert_close(copg(log_ratio, rewards, beta), constant - objective(log_ratio))
    c = log_ratio.clone().requires_grad_()
    expected = torch.autograd.grad(-objective(c).sum(), c)[0]
    torch.testing.assert_close(slope(log_ratio, rewards, beta), expected)


def test_the_gradient_is_the_difference_of_regularised_rewards():
    beta = 0.7
    log_ratio, rewards = torch.randn(2, 9, 2, dtype=torch.float64)
    regularised = rewards - beta * log_ratio
    expected = -(regularised - regularised.flip(1))
    torch.testing.assert_close(slope(log_ratio, rewards, beta), expected)
    fitted = rewards / beta  # Delta = dR / beta
    assert slope(fitted, rewards, beta).abs().max() < 1e-12
    at_reference = slope(torch.zeros_like(rewards), rewards, beta)
    torch.testing.assert_close(at_reference[:, 0], -(rewards[:, 0] - rewards[:, 1]))


def test_order_and_a_prompts_constants_do_not_matter():
    log_ratio, rewards = torch.randn(2, 6, 3, dtype=torch.float64)
    loss = copg(log_ratio, rewards, 0.2)
    torch.testing.assert_close(copg(log_ratio.flip(1), rewards.flip(1), 0.2), loss)
    constant = torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(copg(log_ratio, rewards + constant, 0.2), loss)
    torch.testing.assert_close(copg(log_ratio + constant, rewards, 0.2), loss)


def test_with_equal_gaps_of_one_half_it_is_ipo():
    beta = 0.1
    delta = torch.linspace(-8, 8, 9, dtype=torch.float64)
    log_ratio = torch.stack([delta, torch.zeros_like(delta)], 1)
    quarter = torch.tensor([0.25, -0.25], dtype=torch.float64).expand(9, 2)
    torch.testing.assert_close(copg(log_ratio, quarter, beta), beta / 2 * ipo(delta, beta))


def test_a_group_is_the_mean_over_its_pairs_and_a_multiple_of_a_variance():
    beta = 0.4
    log_ratio, rewards = torch.randn(2, 5, 4, dtype=torch.float64)
    got = copg(log_ratio, rewards, beta)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    each = [copg(log_ratio[:, p], rewards[:, p], beta) for p in map(list, pairs)]
    torch.testing.assert_close(got, torch.stack(each).mean(0))
    variance = (beta * log_ratio - rewards).var(1, correction=0)
    torch.testing.assert_close(got, 2 * 4 / 3 * variance / (2 * beta))


def test_what_is_not_there_has_no_part():
    log_ratio, rewards = torch.randn(2, 3, 4, dtype=torch.float64)
    present = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    rewards = rewards.masked_fill(~present, math.nan)
    got = copg(log_ratio, rewards, 0.1, present)
    for row, width in enumerate((2, 3, 4)):
        alone = copg(log_ratio[row : row + 1, :width], rewards[row : row + 1, :width], 0.1)
        assert float(got[row]) == pytest.approx(float(alone))
    gradient = slope(log_ratio, rewards, 0.1, present)
    assert gradient.isfinite().all()
    assert gradient[~present].eq(0).all()


def expectation(logits, data, other, beta=0.5):
    """The expected loss over pairs of the bandit, and J, both as functions of the logits `[3]`."""
    policy = logits.log_softmax(0)
    c = policy + math.log(3)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    losses = copg(torch.stack([c[first], c[second]], 1), REWARDS[torch.stack([first, second], 1)],
                  beta)  # fmt: skip
    value = policy.exp() @ (REWARDS - beta * c)
    return (data[first] * other[second] * losses).sum(), value


def test_on_policy_the_gradient_is_twice_that_of_the_regularised_return():
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    own = logits.detach().softmax(0)
    loss, value = expectation(logits, own, own)
    (down,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (up,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(-down, 2 * up)


def test_from_any_data_the_optimum_is_the_tilted_reference():
    data = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    other = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert expectation(logits, data, other)[1].item() == pytest.approx(1.833333, abs=1e-6)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss, _ = expectation(logits, data, other)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(logits.detach().softmax(0), OPTIMUM, atol=1e-6, rtol=0)
    assert expectation(logits, data, other)[1].item() == pytest.approx(2.125200, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"rewards": torch.zeros(3, 3)}, "one shape"),
        ({"log_ratio": torch.zeros(3)}, r"2 dimension\(s\)"),
        ({"rewards": torch.tensor([[0.0, math.nan]] * 3)}, "rewards must be finite"),
        ({"present": torch.tensor([[True, False]] * 3)}, "at least 2 responses"),
    ],
)
def test_wrong_calls(change, message):
    values = {"log_ratio": torch.zeros(3, 2), "rewards": torch.zeros(3, 2), "beta": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        copg(**values)


# The method ----------------------------------------------------------------------------------


def test_the_loss_is_that_of_plain_sequence_log_probabilities():
    method = moved(made(beta=0.2))
    batch = method.collect(0)
    with torch.no_grad():
        loss, _ = method.loss(batch)
        expected = []
        for i, (prompt, responses) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
            now = method.policy.score([prompt] * 2, responses).logprobs.sum(1)
            with method.policy.reference():
                before = method.policy.score([prompt] * 2, responses).logprobs.sum(1)
            c = now - before
            row = PAIRS[int(batch.index[i])]
            gap = row["score_chosen"] - row["score_rejected"]
            expected.append(0.1 * (c[0] - c[1] - gap / 0.2).square())
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_lists_of_several_lengths_are_learnt_from():
    method = moved(made(LISTS, batch_size=12))
    batch = method.collect(0)
    assert sorted(batch.present.sum(1).tolist()) == [2] * 4 + [3] * 4 + [4] * 4
    with torch.no_grad():
        whole, _ = method.loss(batch)
        found = method.compared(batch)
        single = [
            copg(found.log_ratio[i : i + 1, :n], found.scores[i : i + 1, :n], 0.06)
            for i, n in enumerate(batch.present.sum(1).tolist())
        ]
    assert float(whole) == pytest.approx(float(torch.cat(single).mean()), rel=1e-5)
    rows = method.samples(batch)
    assert rows[0].keys() >= {"prompt", "response 1", "response 2", "margin"}


def test_it_learns_by_how_much(tmp_path):
    """Three kinds of pairs, of gaps 1, 1/2 and 0: the margins come to be as far apart."""
    run = train("copg", data=PAIRS, steps=60, batch_size=20, beta=0.25, output=tmp_path / "run",
                eval_data=write_rows(tmp_path / "held.jsonl", PAIRS), **SMALL)  # fmt: skip
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(
        sum((1 - 0.5 * (i % 3)) ** 2 for i in range(20)) / 20 / (2 * 0.25), rel=1e-5
    )
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        method = run.method
        batch = method._batch(method.data, torch.arange(20))
        margins = method.compared(batch).delta
    kinds = [float(margins[kind::3].mean()) for kind in range(3)]
    assert kinds == pytest.approx([4, 2, 0], abs=0.8)
    assert run.evaluation["loss"] == pytest.approx(losses[-1], abs=0.2)


@pytest.mark.parametrize("rows", [PAIRS, LISTS])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, rows):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {**SMALL, "data": data, "batch_size": 4, "save_every": 2}
    assert_resumes("copg", tmp_path, **settings)


def without(row, *columns):
    return {name: value for name, value in row.items() if name not in columns}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [PAIRS[0], without(PAIRS[1], "score_rejected")],
            "row 2: copg learns from scores: expected numbers in score_chosen and score_rejected, "
            "found the columns prompt, chosen, rejected, score_chosen",
        ),
        ([without(row, "score_chosen", "score_rejected") for row in PAIRS], "row 1: copg learns"),
        ([{**PAIRS[0], "score_chosen": math.inf}], "row 1: column 'score_chosen' holds inf"),
        ([{**PAIRS[0], "score_rejected": "good"}], "row 1: column 'score_rejected' holds 'good'"),
        (
            [{**without(row, "scores"), "ranks": range(len(row["scores"]))} for row in LISTS],
            "row 1: copg learns from scores: expected numbers in scores, found the columns .*ranks",
        ),
    ],
)
def test_missing_scores_are_named_before_anything_is_written(rows, message, tmp_path):
    rows = [{**row, "ranks": list(row["ranks"])} if "ranks" in row else row for row in rows]
    for given in ({"data": rows}, {"data": PAIRS, "eval_data": rows}):
        with pytest.raises(PostgradError, match=message) as caught:
            train("copg", output=tmp_path / "run", **given, **SMALL)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_bad_beta_is_named(tmp_path):
    with pytest.raises(PostgradError, match=r"beta: .*greater than 0"):
        train("copg", data=PAIRS, beta=0, output=tmp_path / "run", **SMALL)
