"""LiPO: its ranking losses as functions, and what it adds to the family on the tiny model."""

import math
from typing import get_args

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.dpo import DPO
from postgrad.methods.language.preference.lipo import LiPO, RankingLoss
from postgrad.objectives.listwise import (
    lambda_loss,
    lambda_weights,
    list_mle,
    pair_hinge,
    pair_logistic,
    rank_labels,
    ranks,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    win_rate_labels,
)
from postgrad.objectives.pairwise import hinge, logistic
from postgrad.training.record import read_rows

LOSSES = {
    "lambda": lambda_loss,
    "pair-logistic": pair_logistic,
    "pair-hinge": pair_hinge,
    "softmax": softmax_cross_entropy,
    "list-mle": list_mle,
    "mse": squared_error,
    "sigmoid": sigmoid_cross_entropy,
}
ROWS = [
    {
        "prompt": f"{i} + {i} = ",
        "responses": [f"{2 * i}", f"{2 * i + 1}", f"{2 * i + 2}, no doubt", "never"][: 4 - i % 3],
        "scores": [2.0, 0.5, 0.0, -1.0][: 4 - i % 3],
    }
    for i in range(20)
]


def double(*values):
    return torch.tensor([values], dtype=torch.float64)


def example():
    """The worked example: s, psi and a list of three."""
    return double(0.2, 0.5, -0.1), double(0.9, 0.5, 0.1), torch.ones(1, 3, dtype=torch.bool)


def random_lists(size=5, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(2, count, size, generator=generator, dtype=torch.float64)
    return 4 * scores - 2, labels, torch.ones(count, size, dtype=torch.bool)


def value_and_slope(loss, scores, labels, present, **options):
    scores = scores.clone().requires_grad_()
    value = loss(scores, labels, present, **options)
    (slope,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), slope


# The functions -------------------------------------------------------------------------------


def test_the_worked_example_of_lambda():
    these = example()
    assert ranks(*these).tolist() == [[2, 1, 3]]
    weights = lambda_weights(*these)[0]
    assert weights[0, 1] == pytest.approx(0.240591, abs=1e-6)
    assert weights[0, 2] == pytest.approx(0.150035, abs=1e-6)
    assert weights[1, 2] == pytest.approx(0.247018, abs=1e-6)
    value, slope = value_and_slope(lambda_loss, *these)
    assert float(value) == pytest.approx(0.396791, abs=1e-6)
    assert slope[0].tolist() == pytest.approx([-0.202055, 0.050677, 0.151378], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("pair-logistic", {"reduction": "sum"}, 1.846198),
        ("pair-logistic", {}, 0.615399),
        ("pair-hinge", {"reduction": "sum"}, 2.4),
        ("list-mle", {}, 1.565878),
        ("softmax", {}, 1.048390),
        ("softmax", {"normalise": False}, 1.5 * 1.048390),  # the labels add up to 1.5
        ("mse", {}, 0.53),
        ("sigmoid", {}, 1.996613),
        ("lambda", {"weights": "uniform"}, 1.846198),
        ("lambda", {"reduction": "mean"}, 0.396791 / 3),
    ],
)
def test_the_worked_example_of_every_loss(name, options, expected):
    assert float(LOSSES[name](*example(), **options)) == pytest.approx(expected, abs=1e-6)


def test_one_factor_of_the_weights_alone():
    these = example()
    gains = [0.866066, 0.414214, 0.071773]
    discounts = [0.910239, 1.442695, 0.721348]
    label = lambda_weights(*these, "label")[0]
    position = lambda_weights(*these, "position")[0]
    for i in range(3):
        for j in range(3):
            assert float(label[i, j]) == pytest.approx(abs(gains[i] - gains[j]), abs=2e-6)
            assert float(position[i, j]) == pytest.approx(
                abs(discounts[i] - discounts[j]), abs=2e-6
            )
    torch.testing.assert_close(lambda_weights(*these)[0], label * position)


def test_two_responses_are_dpo_and_slic():
    scores, _, present = random_lists(size=2, count=50)
    labels = torch.tensor([[0.8, 0.3]], dtype=torch.float64).expand(50, 2)
    h = scores[:, 0] - scores[:, 1]
    torch.testing.assert_close(pair_logistic(scores, labels, present), logistic(h))
    torch.testing.assert_close(list_mle(scores, labels, present), logistic(h))
    torch.testing.assert_close(pair_hinge(scores, labels, present), hinge(h))
    delta = (2**0.8 - 2**0.3) * (1 / math.log(2) - 1 / math.log(3))
    torch.testing.assert_close(lambda_loss(scores, labels, present), delta * logistic(h))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_order_of_the_entries_does_not_matter(loss):
    scores, labels, present = random_lists()
    scores[:, 1] = scores[:, 3]  # of equal scores the better label ranks first, wherever it stands
    order = torch.tensor([4, 3, 0, 1, 2])
    shuffled = loss(scores[:, order], labels[:, order], present)
    torch.testing.assert_close(shuffled, loss(scores, labels, present))


@pytest.mark.parametrize("name", LOSSES)
def test_only_point_wise_losses_see_a_constant(name):
    scores, labels, present = random_lists()
    value, slope = value_and_slope(LOSSES[name], scores, labels, present)
    shifted, _ = value_and_slope(LOSSES[name], scores + 0.7, labels, present)
    pointwise = name in ("mse", "sigmoid")
    assert torch.allclose(value, shifted) != pointwise
    assert torch.allclose(slope.sum(1), torch.zeros(6).double(), atol=1e-12) != pointwise


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_entries_that_are_not_there_change_nothing(loss):
    scores, labels, present = random_lists(size=4)
    value, slope = value_and_slope(loss, scores, labels, present)
    nothing = torch.full((6, 2), torch.nan, dtype=torch.float64)
    places = torch.tensor([0, 4, 1, 2, 5, 3])  # also in the middle of the list
    padded = [torch.cat([x, nothing], 1)[:, places] for x in (scores, labels)]
    there = torch.cat([present, torch.zeros(6, 2, dtype=torch.bool)], 1)[:, places]
    longer, longer_slope = value_and_slope(loss, *padded, there)
    torch.testing.assert_close(longer, value)
    torch.testing.assert_close(longer_slope[:, places.argsort()[:4]], slope)
    assert longer_slope[~there].eq(0).all()


def test_weights_are_symmetric_constants_that_vanish_with_the_gap():
    scores, labels, present = random_lists()
    labels[:, 2] = labels[:, 0]
    weights = lambda_weights(scores.requires_grad_(), labels, present)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, weights.mT)
    assert weights[:, 0, 2].eq(0).all()
    assert weights[:, 0, 1].gt(0).all()
    # ranks, and so weights, do not depend on the scale of the scores
    torch.testing.assert_close(lambda_weights(0.01 * scores, labels, present), weights)


def test_ranks_follow_scores_not_labels_and_equal_scores_the_labels():
    labels = double(0.1, 0.9, 0.5, 0.5)
    present = torch.ones(1, 4, dtype=torch.bool)
    assert ranks(double(3, 2, 1, 0), labels, present).tolist() == [[1, 2, 3, 4]]
    assert ranks(double(0, 0, 0, 0), labels, present).tolist() == [[4, 1, 2, 3]]


def test_labels_are_mean_win_rates():
    values = double(1.0, 1.0, -1.0, math.nan)
    present = torch.tensor([[True, True, True, False]])
    psi = win_rate_labels(values, present)[0]
    win = 1 / (1 + math.exp(-2.0))
    expected = [(1 + win) / 3, (1 + win) / 3, (0.5 + 2 * (1 - win)) / 3, 0.0]
    assert psi.tolist() == pytest.approx(expected)
    assert psi[0] == psi[1]
    sharp = win_rate_labels(values, present, scale=1e-3)[0]
    assert sharp.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 6, 0])


def test_labels_of_places_share_the_rank_of_equals():
    values = double(7.0, 3.0, 3.0, -100.0, math.nan)
    present = torch.tensor([[True, True, True, True, False]])
    assert rank_labels(values, present).tolist() == [[1.0, 0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": double(1.5, 0.5, 0.1)}, r"labels must lie in \[0, 1\]"),
        ({"labels": double(math.nan, 0.5, 0.1)}, r"labels must lie in \[0, 1\]"),
        ({"labels": double(0.5, 0.1)}, "one shape"),
        ({"present": torch.tensor([[True, False, False]])}, "at least 2 scores"),
        ({"present": torch.ones(1, 3)}, "present must be boolean"),
    ],
)
def test_a_wrong_call_says_why(change, message):
    scores, labels, present = example()
    these = {"scores": scores, "labels": labels, "present": present, **change}
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=message):
            loss(**these)


def test_wrong_options_say_why():
    with pytest.raises(ValueError, match="weights must be full, label"):
        lambda_loss(*example(), weights="labels")
    with pytest.raises(ValueError, match="reduction must be sum or mean"):
        pair_hinge(*example(), reduction="none")
    with pytest.raises(ValueError, match="scale must be positive"):
        win_rate_labels(double(1.0, 2.0), torch.ones(1, 2, dtype=torch.bool), scale=0)


# The method ----------------------------------------------------------------------------------


def made(kind=LiPO, rows=ROWS, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return kind(validated(kind.Config, values), Place(), data=rows)


def lists_of(log_ratio, scores, present=None):
    """Comparisons with these log-ratios to the reference."""
    log_ratio, scores = torch.tensor(log_ratio), torch.tensor(scores)
    present = torch.ones_like(scores, dtype=torch.bool) if present is None else present
    nothing = torch.zeros_like(log_ratio)
    return Compared(log_ratio, nothing, nothing.long() + 1, scores, present, {})


def test_the_method_scores_by_beta_log_ratios_and_labels_by_win_rates():
    found = lists_of([[4.0, 10.0, -2.0]], [[2.0, 1.0, 0.0]])
    psi = win_rate_labels(found.scores, found.present, scale=2.0)
    expected = lambda_loss(0.05 * found.log_ratio, psi, found.present)
    torch.testing.assert_close(made(score_scale=2.0).losses(found), expected)


def test_every_loss_can_be_chosen():
    assert get_args(RankingLoss) == tuple(LOSSES)
    unit = [{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 0.0]}]
    found = lists_of([[4.0, 10.0, -2.0]], [[0.9, 0.5, 0.1]])
    for name, loss in LOSSES.items():
        got = made(rows=unit, batch_size=1, loss=name, labels="score").losses(found)
        torch.testing.assert_close(got, loss(0.05 * found.log_ratio, found.scores, found.present))


@pytest.mark.parametrize("weights", ["label", "position", "uniform"])
def test_weights_can_be_ablated(weights):
    found = lists_of([[4.0, 10.0, -2.0]], [[2.0, 1.0, 0.0]])
    psi = win_rate_labels(found.scores, found.present)
    expected = lambda_loss(0.05 * found.log_ratio, psi, found.present, weights)
    torch.testing.assert_close(made(weights=weights).losses(found), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_of_equal_scores_is_skipped_and_counted(name):
    method = made(loss=name)
    log_ratio = torch.tensor([[4.0, 10.0], [4.0, 10.0]], requires_grad=True)
    nothing = torch.zeros(2, 2)
    scores, present = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2).bool()
    losses = method.losses(Compared(log_ratio, nothing, nothing.long(), scores, present, {}))
    losses.sum().backward()
    assert losses[0] == 0
    assert log_ratio.grad[0].eq(0).all()
    assert log_ratio.grad[1].ne(0).any()


def test_batches_say_how_many_lists_have_no_order():
    equal = [{**row, "scores": [1.0] * len(row["responses"])} for row in ROWS[:2]]
    method = made(rows=equal + ROWS[2:8])
    batch = method.collect(0)
    described = method.describe_batch(batch)
    assert described["list/without_order"] == 2
    lengths = [len(row["responses"]) for row in equal + ROWS[2:8]]
    assert described["list/responses"] == pytest.approx(sum(lengths) / 8)


def test_pairs_are_lists_of_two_and_the_loss_is_dpos():
    """Plain preferences: with labels by place lambda's weight is one constant."""
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
        for row in ROWS
    ]
    listwise = moved(made(rows=pairs, loss="pair-logistic", beta=0.1))
    plain = made(DPO, rows=pairs, beta=0.1)
    plain.policy.load_state_dict(listwise.policy.state_dict())
    with torch.no_grad():
        loss, metrics = listwise.loss(listwise.collect(0))
        expected, expected_metrics = plain.loss(plain.collect(0))
        lambda_, _ = moved(made(rows=pairs, beta=0.1)).loss(listwise.collect(0))
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert metrics == pytest.approx(expected_metrics)
    constant = 1 / math.log(2) - 1 / math.log(3)  # psi is 1 and 0, so the gain's gap is 1
    assert float(lambda_) == pytest.approx(constant * float(expected), abs=1e-6)


def test_scores_of_pairs_count_where_they_agree_with_the_order():
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 3, "score_rejected": 1},
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 3},
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": None},
    ]
    method = made(rows=pairs, batch_size=3)
    batch = method.data.batch(torch.arange(3))
    found = Compared(*torch.zeros(2, 3, 2), batch.lengths, batch.scores, batch.present, {})
    win = (0.5 + 1 / (1 + math.exp(-2.0))) / 2
    expected = torch.tensor([[win, 1 - win], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(method.labels(found), expected)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, [1.0, 0.5, 0.0]),
        ({"ranks": [1, 2, 2]}, [1.0, 0.25, 0.25]),
    ],
)
def test_labels_without_scores_are_places(columns, expected):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], **columns}]
    method = made(rows=rows, batch_size=1)
    batch = method.data.batch(torch.tensor([0]))
    found = Compared(*torch.zeros(2, 1, 3), batch.lengths, batch.scores, batch.present, {})
    assert method.labels(found).tolist() == [expected]


def test_it_learns_the_order_of_twenty_lists(tmp_path):
    run = train(
        "lipo", data=ROWS, steps=40, batch_size=10, beta=0.1, output=tmp_path / "run", **SMALL
    )
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["rewards/accuracy"] < 0.6  # at the reference all are equal
    assert rows[-1]["rewards/accuracy"] > 0.8  # small gaps low in the list hardly count
    assert rows[-1]["rewards/margin"] > 0.5
    assert run.method.data.reference[:, 0].isfinite().all()
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert {"prompt", "response 1", "response 2", "margin"} <= samples[0].keys()


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "lists.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "save_every": 2}
    assert_resumes("lipo", tmp_path, **settings)


EQUAL = [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"loss": "ndcg"}, "loss: .*'lambda'"),
        ({"weights": "label", "loss": "softmax"}, "weights: only loss=lambda .*got label with"),
        ({"labels": "score"}, r"rows, row 1: with labels=score .*in \[0, 1\], got 2;"),
        ({"data": EQUAL}, "rows: the scores within every list are equal"),
        ({"data": [{"prompt": "p", "responses": ["a"]}]}, "at least 2 responses"),
        ({"data": [{**EQUAL[0], "scores": [1, math.nan]}]}, "holds nan, expected a number"),
    ],
)
def test_a_fault_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("lipo", output=run, **{**SMALL, "data": ROWS, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
