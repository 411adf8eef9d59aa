"""PRO: its ranking loss as a function, and the method on real runs of the tiny model."""

import math
from itertools import permutations

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.comparisons import Compared
from postgrad.methods.language.preference.pro import PRO
from postgrad.objectives.listwise import list_mle, plackett_luce, tempered_plackett_luce
from postgrad.objectives.pairwise import logistic
from postgrad.training.record import read_rows

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


def everywhere(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def tempered(p, r):
    return tempered_plackett_luce(p, r, everywhere(p))


# The functions -------------------------------------------------------------------------------


def test_the_worked_example():
    p, r = double(-0.8, -1.0, -1.5), double(1.0, 0.4, -0.3)
    assert float(tempered(p, r)) == pytest.approx(1.616959, abs=1e-6)
    assert float(tempered(p[:, 1:], r[:, 1:])) == pytest.approx(0.533382, abs=1e-6)
    assert float(tempered(p, r) - tempered(p[:, 1:], r[:, 1:])) == pytest.approx(1.083577, abs=1e-6)
    assert float(plackett_luce(p)) == pytest.approx(1.313623, abs=1e-6)


def test_two_responses_are_a_logistic_loss_of_the_tempered_margin():
    p = torch.randn(20, 2, dtype=torch.float64)
    gap = torch.rand(20, dtype=torch.float64)
    r = torch.stack([gap - 3, torch.full_like(gap, -3)], 1)
    torch.testing.assert_close(tempered(p, r), logistic(gap * (p[:, 0] - p[:, 1])))
    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(20, 2)
    torch.testing.assert_close(tempered(p, unit), plackett_luce(p))
    torch.testing.assert_close(plackett_luce(p), logistic(p[:, 0] - p[:, 1]))


def test_without_a_gap_the_loss_is_log_two_and_pushes_nothing():
    p = double(-0.3, -2.0).requires_grad_()
    loss = tempered(p, double(1.0, 1.0))
    assert loss.tolist() == pytest.approx([math.log(2)])
    loss.sum().backward()
    assert p.grad.eq(0).all()


def test_plain_is_list_mle():
    p, r = double(-0.8, -1.0, -1.5), double(0.9, 0.4, 0.1)
    torch.testing.assert_close(plackett_luce(p), list_mle(p, r, everywhere(p)))


def test_a_response_of_equal_value_is_a_constant():
    p = double(-0.8, -1.0, -1.5).requires_grad_()
    loss = tempered(p, double(1.0, 1.0, 0.0))
    loss.sum().backward()
    one, _, three = p.detach()[0].exp()
    first = -math.log(one / (one + 1 + three))  # exp(p_2 * 0) = 1
    second = math.log(1 + math.exp(-1.5 + 1.0))
    assert loss.tolist() == pytest.approx([first + second])
    share = one / (one + 1 + three)
    assert float(p.grad[0, 0]) == pytest.approx(float(share - 1))


def test_invariances():
    p = torch.randn(6, 4, dtype=torch.float64)
    r = torch.randn(6, 4, dtype=torch.float64).sort(1, descending=True).values
    torch.testing.assert_close(tempered(p, r + 5), tempered(p, r))
    torch.testing.assert_close(tempered(p, 3 * r), tempered(3 * p, r))
    torch.testing.assert_close(plackett_luce(p + 5), plackett_luce(p))
    assert not torch.allclose(tempered(p + 5, r), tempered(p, r))


def test_entries_that_are_not_there_change_nothing():
    p, r = double(-0.8, -1.0, -1.5), double(1.0, 0.4, -0.3)
    longer = torch.cat([p, double(math.nan, math.inf)], 1).requires_grad_()
    values = torch.cat([r, double(math.nan, math.nan)], 1)
    present = torch.tensor([[True, True, True, False, False]])
    for loss, expected in (
        (tempered_plackett_luce(longer, values, present), tempered(p, r)),
        (plackett_luce(longer, present), plackett_luce(p)),
    ):
        torch.testing.assert_close(loss, expected)
        (slope,) = torch.autograd.grad(loss.sum(), longer)
        assert slope[:, :3].isfinite().all()
        assert slope[:, 3:].eq(0).all()


def test_large_values_stay_finite():
    p = double(-1.0, -2.0, -500.0).requires_grad_()
    loss = tempered(p, double(1e4, 0.0, -1e4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("values", [(0.4, 1.0), (math.nan, 0.0)])
def test_values_out_of_order_say_why(values):
    with pytest.raises(ValueError, match="sorted, the best first"):
        tempered(double(-1.0, -2.0), double(*values))


def test_all_rankings_of_a_plackett_luce_world_give_its_policy_back():
    """With one-token responses p = log pi, and plain PRO is maximum likelihood."""
    world = torch.tensor([1.0, 0.3, -0.2, -1.5], dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(4))))
    chance = (-plackett_luce(world[orders])).exp()
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss = (chance * plackett_luce(logits.log_softmax(0)[orders])).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(logits.softmax(0).detach(), world.softmax(0), atol=1e-6, rtol=0)


# The method ----------------------------------------------------------------------------------


def made(rows=ROWS, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return PRO(validated(PRO.Config, values), Place(), data=rows)


def worked(scores):
    """The worked example's responses, of 5 tokens each."""
    p = torch.tensor([[-0.8, -1.0, -1.5]])
    lengths = torch.full((1, 3), 5)
    return Compared(5 * p, torch.zeros(1, 3), lengths, torch.tensor([scores]), everywhere(p), {})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2.416959),
        ({"temperature": False}, 1.313623 + 0.8),
        ({"beta": 0}, 1.616959),
        ({"sft_index": 1}, 1.616959 + 0.05 * 4 * 5.0),
    ],
)
def test_the_worked_example_with_its_sft_term(config, expected):
    rows = [{**ROWS[0], "scores": [1.0, 0.4, -0.3, -1.0]}]
    method = made(rows=rows, **config)
    assert float(method.losses(worked([1.0, 0.4, -0.3]))) == pytest.approx(expected, abs=1e-6)


def test_standardised_scores_do_not_depend_on_their_unit():
    found, in_tens = worked([1.0, 0.4, -0.3]), worked([10.0, 4.0, -3.0])
    tens = [{**row, "scores": [10 * score for score in row["scores"]]} for row in ROWS]
    plain, scaled = made(standardise=True), made(rows=tens, standardise=True)
    torch.testing.assert_close(plain.losses(found), scaled.losses(in_tens))
    scores = torch.tensor([score for row in ROWS for score in row["scores"]])
    assert plain.scale == pytest.approx(float(scores.std(correction=0)))


def test_the_loss_is_that_of_mean_log_probabilities():
    """Against plain scores of one response at a time; the SFT term sums over tokens."""
    method = moved(made())
    batch = method.collect(0)
    expected = []
    with torch.no_grad():
        loss, metrics = method.loss(batch)
        for prompt, several, scores in zip(
            batch.prompts, batch.responses, batch.scores, strict=True
        ):
            sums = [float(method.policy.score([prompt], [y]).logprobs.sum()) for y in several]
            n = len(several)
            p = double(*(total / len(y) for total, y in zip(sums, several, strict=True)))
            chain = tempered(p, scores[None, :n].double())
            expected.append(float(chain) - 0.05 * (n - 1) ** 2 * sums[0])
    assert float(loss) == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert metrics["rewards/chosen"] < 0  # the mean log-likelihood of the best
    assert batch.reference.isnan().all()  # nobody was asked


def test_lists_of_equal_scores_are_skipped_and_lists_without_scores_are_plain():
    method = made()
    assert float(method.losses(worked([1.0, 1.0, 1.0]))) == 0
    unscored = float(method.losses(worked([math.nan] * 3)))
    assert unscored == pytest.approx(1.313623 + 0.8, abs=1e-6)


@pytest.mark.parametrize("ranks", [None, [1, 2, 3]])
def test_an_order_alone_gives_no_temperatures(ranks):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], **({"ranks": ranks} if ranks else {})}]
    assert not made(rows=rows, batch_size=1).temperature
    assert made().temperature


def test_pairs_are_lists_of_two():
    pairs = [{"prompt": "p", "chosen": "yes, yes", "rejected": "no"}]
    method = moved(made(rows=pairs, batch_size=1))
    with torch.no_grad():
        batch = method.collect(0)
        loss, _ = method.loss(batch)
        found = method.compared(batch)
    p = found.mean_logprobs[0]
    expected = logistic(p[0] - p[1]) - 0.05 * found.logprobs[0, 0]
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_it_learns_the_order_of_twenty_lists(tmp_path):
    train(
        "pro", data=ROWS, steps=40, batch_size=10, eval_data=ROWS, output=tmp_path / "run", **SMALL
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    accuracy = [row["evaluation/accuracy"] for row in rows if "evaluation/accuracy" in row]
    assert accuracy[-1] > max(0.8, accuracy[0])
    chosen = [row["logprobs/chosen"] for row in rows if "logprobs/chosen" in row]
    assert chosen[-1] > chosen[0] + 5  # the SFT term


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "lists.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "save_every": 2}
    assert_resumes("pro", tmp_path, **settings)


PLAIN = [{"prompt": "p", "responses": ["a", "b"]}]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": -1}, "beta: .*greater than or equal to 0"),
        ({"sft_index": 2}, "sft_index: 2 names no response of a list of 2"),
        ({"data": PLAIN, "temperature": True}, "temperature: .*no scores.*temperature=false"),
        ({"data": [{**PLAIN[0], "scores": [1, 1]}]}, "the scores within every list are equal"),
        ({"data": [{"prompt": "p", "responses": ["a"]}]}, "at least 2 responses"),
        ({"data": [{"prompt": "p", "responses": ["a", " "]}]}, "'responses' is empty"),
    ],
)
def test_a_fault_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("pro", output=run, **{**SMALL, "data": ROWS, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
