"""DNO: its losses and pairs to the card's digits, and real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.advantages.pairing import clear_pairs, win_rates
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.dno import DNO
from postgrad.objectives.game import divergence, random_game
from postgrad.objectives.iterative import mirror_step, soft_pair
from postgrad.objectives.pairwise import logistic, margin
from postgrad.training.record import read_rows

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
CENTRE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3))
ROWS = [{"prompt": f"{i:02d}+{i:02d}="} for i in range(24)]
SHORT = {"rollout": {"samples": 3, "max_new_tokens": 5}, "batch_size": 8, "minibatches": 2}


def letters(completions):
    return [10.0 * sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def population_loss(policy, wins, eta):
    """Over pairs of independent draws from the centre."""
    chance = CENTRE.exp()[PAIRS].prod(1)
    return (chance * soft_pair(policy[PAIRS], CENTRE[PAIRS], wins[PAIRS], eta)).sum()


# The losses ----------------------------------------------------------------------------------


def test_the_worked_game():
    eta = 0.5
    wins = P @ CENTRE.exp()
    assert wins.tolist() == pytest.approx([0.56, 0.36, 0.56])
    target = mirror_step(CENTRE, wins, eta)
    expected = torch.tensor([0.554880, 0.223168, 0.221952]).double()
    torch.testing.assert_close(target.exp(), expected, atol=1e-6, rtol=0)
    gain = float(target.exp() @ P @ CENTRE.exp())
    moved_by = float(divergence(target.exp(), CENTRE.exp()))
    assert gain == pytest.approx(0.515366, abs=1e-6)
    assert moved_by == pytest.approx(0.014876, abs=1e-6)
    assert gain >= 0.5 + eta * moved_by == pytest.approx(0.507438, abs=1e-6)
    assert float(population_loss(CENTRE, wins, eta)) == pytest.approx(0.693147, abs=1e-6)
    assert float(population_loss(target, wins, eta)) == pytest.approx(0.691058, abs=1e-6)
    first = PAIRS[1:2]
    assert float(torch.sigmoid(wins[0] - wins[1])) == pytest.approx(0.549834, abs=1e-6)
    for policy, loss in ((CENTRE, 0.693147), (target, 0.688172)):
        got = soft_pair(policy[first], CENTRE[first], wins[first], eta)
        assert float(got) == pytest.approx(loss, abs=1e-6)


def test_the_worked_pair():
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    delta = 0.1 * margin(*logprobs[:, None], *torch.tensor([[-1.2], [-1.7]]).double())
    loss = logistic(delta)
    loss.sum().backward()
    assert float(delta.detach()) == pytest.approx(0.05)
    assert float(loss.detach()) == pytest.approx(0.668460, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-0.048750, 0.048750], abs=1e-6)


def test_the_soft_losses_minimum_is_the_multiplicative_step():
    random = torch.Generator().manual_seed(0)
    game, eta = random_game(3, random), 0.3
    wins = game @ CENTRE.exp()
    target = mirror_step(CENTRE, wins, eta).requires_grad_()
    population_loss(target, wins, eta).backward()
    assert float(target.grad.abs().max()) == pytest.approx(0, abs=1e-12)
    least = float(population_loss(target.detach(), wins, eta))
    for _ in range(20):
        other = (target.detach() + 0.3 * torch.randn(3, generator=random).double()).log_softmax(0)
        assert float(population_loss(other, wins, eta)) > least
    scaled = mirror_step(CENTRE, 0.4 * wins, 0.4 * eta)
    torch.testing.assert_close(scaled, target.detach())


def test_the_improvement_bound_holds_in_every_step():
    random = torch.Generator().manual_seed(1)
    for _ in range(10):
        game = random_game(8, random)
        policy = torch.full((8,), 1 / 8, dtype=torch.float64).log()
        for _ in range(20):
            better = mirror_step(policy, game @ policy.exp(), 2.0)
            gain = float(better.exp() @ game @ policy.exp())
            assert gain >= 0.5 + 2.0 * float(divergence(better.exp(), policy.exp())) - 1e-12
            policy = better


def test_symmetries_of_the_soft_loss():
    random = torch.Generator().manual_seed(2)
    logprobs, centre = -torch.rand(2, 6, 2, generator=random, dtype=torch.float64)
    wins = torch.rand(6, 2, generator=random, dtype=torch.float64)
    swapped = soft_pair(logprobs.flip(1), centre.flip(1), wins.flip(1), 0.7)
    torch.testing.assert_close(soft_pair(logprobs, centre, wins, 0.7), swapped)
    at_centre = soft_pair(centre, centre, wins, 0.7)
    torch.testing.assert_close(at_centre, torch.full_like(at_centre, math.log(2)))
    even = wins[:, :1].expand(6, 2)
    assert bool((soft_pair(logprobs, centre, even, 0.7) > math.log(2)).all())


def test_wrong_calls():
    pairs = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        soft_pair(pairs, pairs, pairs - 0.1, 0.5)
    with pytest.raises(ValueError, match="eta must be positive"):
        soft_pair(pairs, pairs, pairs, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        soft_pair(pairs, pairs, torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match=r"must be \[K\]"):
        clear_pairs(torch.zeros(2, 2), 0.1)


def test_clear_pairs_lead_by_a_margin():
    wins = torch.tensor([0.2, 0.6, 0.9, 0.3], dtype=torch.float64)
    assert clear_pairs(wins, 0.0) == [[2, 1], [2, 3], [2, 0], [1, 3], [1, 0], [3, 0]]
    assert clear_pairs(wins, 0.4) == [[2, 3], [2, 0], [1, 0]]  # 0.6 leads 0.2 by 0.4
    assert clear_pairs(wins, 0.4, least=0.8) == [[2, 3], [2, 0]]
    leads = torch.tensor([1.0, 1.0, 0.65, 1.0], dtype=torch.float64)
    assert clear_pairs(wins, leads) == [[2, 0]]
    assert clear_pairs(torch.full((3,), 0.5), 0.0) == [[0, 1], [0, 2], [1, 2]]


# The method ----------------------------------------------------------------------------------


def made(rows=ROWS, **config):
    values = {"model": "tiny", **SHORT, **config}
    return DNO(validated(DNO.Config, values), Place(), data=rows, reward=letters)


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_its_loss_is_centred_at_the_policy_that_sampled(form, share):
    method = moved(made(form=form, beta=0.3, reference_share=share), 0.05)
    batch = method.collect(0)
    assert not torch.allclose(batch.centre, batch.reference, atol=1e-3)
    with torch.no_grad():
        if share == 0:
            assert float(method.loss(batch)[0]) == pytest.approx(math.log(2), abs=1e-4)
        moved(method, 0.03)
        now = method.compared(batch).logprobs
        loss, _ = method.loss(batch)
    ratio = now - ((1 - share) * batch.centre + share * batch.reference)
    delta = 0.3 * (ratio[:, 0] - ratio[:, 1])
    target = torch.sigmoid(batch.scores[:, 0] - batch.scores[:, 1]) if form == "soft" else 1.0
    expected = target * logistic(delta) + (1 - target) * logistic(-delta)
    assert float(loss) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_hard_pairs_are_clear_and_soft_ones_are_all():
    hard, soft = made().collect(0), made(form="soft").collect(0)
    assert len(soft) == 8 * 3
    assert len(hard) < len(soft)
    assert bool((hard.scores[:, 0] - hard.scores[:, 1] >= 0.2 - 1e-6).all())
    assert bool((hard.scores[:, 0] >= 0.5 - 1e-6).all())


def test_a_teachers_response_is_compared_where_a_row_has_one():
    rows = [{**row, "teacher": "aaa" if i % 2 else None} for i, row in enumerate(ROWS)]
    method = made(rows, form="soft", batch_size=6, teacher="teacher")
    batch = method.collect(0)
    sizes = [int((batch.group == number).sum()) for number in range(6)]
    taught = [rows[i]["teacher"] is not None for i in method.order.indices(0).tolist()]
    assert sizes == [6 if with_teacher else 3 for with_teacher in taught]  # pairs of 4 and of 3
    texts = [[method.policy.decode(r) for r in pair] for pair in batch.responses]
    for pair, own in zip(texts, batch.own.tolist(), strict=True):
        assert [text == "aaa" for text in pair] == [not mine for mine in own]
    assert batch.scores[~batch.own].min() > 0.5  # nothing has more letters
    shares = method.describe_batch(batch)
    assert shares["pairs"] == len(batch)
    assert shares["pairs/own_better"] == pytest.approx(float(batch.own[:, 0].float().mean()))


def test_a_teacher_needs_a_larger_lead_than_the_policy():
    method = made(least_win_rate=0.0, lead=0.5, own_lead=0.3)
    # three samples in an order, and a teacher between the first and the second
    strength = torch.tensor([2.0, 0.0, -1.0, 1.5], dtype=torch.float64)
    preferences = torch.sigmoid(strength.unsqueeze(1) - strength)
    wins = win_rates(preferences)
    lead = float(wins[3] - wins[1])
    assert 0.3 < lead < 0.5
    chosen = method.choose(preferences)
    assert [3, 1] not in chosen
    assert [0, 1] in chosen
    assert [3, 1] in made(least_win_rate=0.0, lead=0.3, own_lead=0.3).choose(preferences)


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_it_learns_to_say_letters(form, tmp_path):
    train(
        "dno",
        data=ROWS,
        reward=letters,
        form=form,
        output=tmp_path / "run",
        steps=6,
        **{**SMALL, **SHORT, "minibatches": 4, "batch_size": 16},
        eval_data=write_rows(tmp_path / "held.jsonl", ROWS[:12]),
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "letters.py").write_text(
        "def score(completions):\n    return [9.0 * len(set(text)) for text in completions]\n"
    )
    rows = [{**row, "completion": "abc"} for row in ROWS]
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "reward": f"{tmp_path}/letters.py:score",
        "save_every": 1,
    }
    train("dno", steps=2, output=tmp_path / "whole", **settings)
    train("dno", steps=1, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=2, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_no_clear_pair_is_an_error_with_counts():
    with pytest.raises(PostgradError, match="none of the 8 groups of 3 responses") as caught:
        made(lead=1.0, own_lead=1.0, least_win_rate=1.0).collect(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"form": "firm"}, "form: .*hard"),
        ({"lead": 1.5}, "lead: .*less than or equal to 1"),
        ({"reference_share": -0.1}, "reference_share: .*greater than or equal to 0"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message):
        made(**setting)
