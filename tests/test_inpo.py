"""INPO: its loss and selectors to the card's digits, and real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.advantages.pairing import drawn_verdicts, neighbours, tournament, win_rates
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.inpo import INPO
from postgrad.objectives.game import duality_gap, nash_policy, random_game
from postgrad.objectives.iterative import geometric_centre, inpo, mirror_step
from postgrad.objectives.pairwise import ipo, margin
from postgrad.training.record import read_rows

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
CENTRE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
FIRST, SECOND = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
PAIRS = torch.stack([FIRST, SECOND], 1)
ROWS = [{"prompt": f"{i:02d}+{i:02d}="} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 8, "minibatches": 2}


def letters(completions):
    return [10.0 * sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def random_pairs(count=5):
    random = torch.Generator().manual_seed(3)
    return -torch.rand(3, count, 2, generator=random, dtype=torch.float64)


# The loss ------------------------------------------------------------------------------------


def test_the_worked_pair():
    logprobs = torch.tensor([[-3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-3.5, -3.9]], dtype=torch.float64)
    centre = torch.tensor([[-3.2, -3.8]], dtype=torch.float64)
    loss = inpo(logprobs, reference, centre, 0.5, 0.5 / 3)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.284444, abs=1e-6)
    # the square root is 1/(2 eta) - h
    assert 1 - float(loss.detach().sqrt()) == pytest.approx(0.466667, abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx([-1.066667, 1.066667], abs=1e-6)


def test_the_worked_game():
    """Closed form of a round, and the labelled loss above mirror descent's by one constant."""
    eta, tau = 2.5, 0.5
    wins = P @ CENTRE.exp()
    solution = mirror_step(geometric_centre(CENTRE, REFERENCE, tau / eta), wins, eta)
    expected = torch.tensor([0.258493, 0.466723, 0.274783]).double()
    torch.testing.assert_close(solution.exp(), expected, atol=1e-6, rtol=0)

    chance = CENTRE.exp()[FIRST] * CENTRE.exp()[SECOND]
    labelled_first = P[FIRST, SECOND]

    def losses(policy):
        both = [
            inpo(policy[pairs], REFERENCE[pairs], CENTRE[pairs], eta, tau)
            for pairs in (PAIRS, PAIRS.flip(1))
        ]
        labelled = (chance * (labelled_first * both[0] + (1 - labelled_first) * both[1])).sum()
        mixed = geometric_centre(CENTRE, REFERENCE, tau / eta)
        h = margin(policy[FIRST], policy[SECOND], mixed[FIRST], mixed[SECOND])
        ideal = (chance * (h - (wins[FIRST] - wins[SECOND]) / eta).square()).sum()
        return float(labelled), float(ideal)

    assert losses(CENTRE) == pytest.approx((0.073949, 0.035517), abs=1e-6)
    assert losses(REFERENCE) == pytest.approx((0.400450, 0.362018), abs=1e-6)
    assert losses(solution) == pytest.approx((0.038432, 0.0), abs=1e-6)


def test_without_a_reference_it_is_ipo_around_the_centre_and_with_all_of_it_around_the_reference():
    logprobs, reference, centre = random_pairs()
    eta = 0.7
    for tau, about in ((0.0, centre), (eta, reference)):
        expected = ipo(margin(*logprobs.unbind(1), *about.unbind(1)), eta)
        torch.testing.assert_close(inpo(logprobs, reference, centre, eta, tau), expected)


def test_in_the_first_round_the_share_of_the_reference_is_nothing():
    logprobs, reference, _ = random_pairs()
    some, other = (inpo(logprobs, reference, reference, 0.4, tau) for tau in (0.1, 0.3))
    torch.testing.assert_close(some, other)


def test_swapping_a_pair_turns_its_margin_round():
    """(h - c)^2 and (-h - c)^2 differ by -4hc and add up to 2h^2 + 2c^2."""
    logprobs, reference, centre = random_pairs()
    eta, tau = 0.5, 0.2
    one = inpo(logprobs, reference, centre, eta, tau)
    other = inpo(logprobs.flip(1), reference.flip(1), centre.flip(1), eta, tau)
    h = (other - one) / 4
    torch.testing.assert_close(one + other, 2 * h.square() + 2)


def test_the_last_iterate_reaches_the_regularised_equilibrium():
    random = torch.Generator().manual_seed(0)
    game = random_game(6, random)
    reference = torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0)
    tau, eta, policy = 0.2, 2.0, reference
    for _ in range(400):
        centre = geometric_centre(policy, reference, tau / eta)
        policy = mirror_step(centre, game @ policy.exp(), eta)
    assert float(duality_gap(game, policy.exp(), reference.exp(), tau)) < 1e-6
    equilibrium = nash_policy(game, reference.exp(), tau)
    torch.testing.assert_close(policy.exp(), equilibrium, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 0.0}, "eta must be positive, got 0"),
        ({"tau": 0.6}, r"in \[0, 1\], got 1.2"),
        ({"tau": -0.1}, r"in \[0, 1\]"),
        ({"centre": torch.zeros(4, 2)}, "one shape"),
    ],
)
def test_wrong_calls(change, message):
    logprobs, reference, centre = torch.zeros(3, 5, 2)
    given = {"logprobs": logprobs, "reference": reference, "centre": centre, "eta": 0.5, "tau": 0.1}
    with pytest.raises(ValueError, match=message):
        inpo(**{**given, **change})
    with pytest.raises(ValueError, match=r"pairs \[B, 2\]"):
        inpo(torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5, 3), 0.5, 0.1)


# Selection -----------------------------------------------------------------------------------


def by_strength(*strengths):
    values = torch.tensor(strengths, dtype=torch.float64)
    return torch.sigmoid(values.unsqueeze(1) - values)


def test_a_tournament_finds_best_and_worst_of_an_order_with_few_verdicts():
    asked = []

    class Asked(torch.Tensor):
        def __getitem__(self, places):
            asked.append(places)
            return torch.Tensor.__getitem__(self, places)

    strengths = (3.0, 1.0, 8.0, 2.0, 5.0, 0.0, 7.0, 4.0)
    assert tournament(by_strength(*strengths).as_subclass(Asked)) == [[2, 5]]
    assert len(asked) == 11


def test_of_equals_the_first_wins_and_a_tie_at_the_end_is_left_out():
    assert tournament(torch.full((4, 4), 0.5)) == []
    # 0 ties with 1 and goes on, beats 2; 1 loses to 3: then 0 against 1 is a tie
    tied = torch.tensor(
        [[0.5, 0.5, 0.9, 0.5], [0.5, 0.5, 0.5, 0.1], [0.1, 0.5, 0.5, 0.9], [0.5, 0.9, 0.1, 0.5]]
    )
    assert tournament(tied) == []
    tied[0, 1], tied[1, 0] = 0.6, 0.4
    assert tournament(tied) == [[0, 1]]
    with pytest.raises(ValueError, match="K >= 2"):
        tournament(torch.full((1, 1), 0.5))


def test_verdicts_are_drawn_once_a_pair_with_their_probabilities():
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([drawn_verdicts(P, random) for _ in range(4000)])
    torch.testing.assert_close(drawn + drawn.mT, torch.ones_like(drawn))
    assert set(drawn.unique().tolist()) == {0.0, 0.5, 1.0}
    # four standard errors of a mean of 4000
    torch.testing.assert_close(drawn.mean(0), P, atol=0.032, rtol=0)


def test_neighbours_are_disjoint_and_the_winner_comes_first():
    assert neighbours(by_strength(1.0, 2.0, 4.0, 3.0, 0.0)) == [[1, 0], [2, 3]]


# The method ----------------------------------------------------------------------------------


def made(**config):
    values = {"model": "tiny", **SHORT, **config}
    return INPO(validated(INPO.Config, values), Place(), data=ROWS, reward=letters)


def test_the_centre_is_the_policy_that_sampled_and_its_loss_is_the_functions():
    method = moved(made(beta=0.3, reference_share=0.25), 0.05)
    batch = method.collect(0)
    centre = batch.centre
    assert not torch.allclose(centre, batch.reference, atol=1e-3)
    for (won, lost), rates in zip(batch.responses, batch.scores, strict=True):
        assert not won.equal(lost)
        assert rates[0] > rates[1]
    with torch.no_grad():
        at_centre, _ = method.loss(batch)
        moved(method, 0.03)
        now = method.compared(batch)
        loss, _ = method.loss(batch)
    mixed = 0.25 * batch.reference + 0.75 * centre
    for logprobs, found in ((centre, at_centre), (now.logprobs, loss)):
        h = (logprobs - mixed)[:, 0] - (logprobs - mixed)[:, 1]
        expected = (h - 1 / (2 * 0.3)).square().mean()
        assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_independent_pairs_have_drawn_labels_that_a_resumed_run_draws_again():
    method = made(selection="independent")
    batch = method.collect(3)
    assert len(batch) == 16  # two pairs of each of eight prompts
    assert bool((batch.scores[:, 0] < batch.scores[:, 1]).any())  # some labels are against the odds
    again = made(selection="independent").collect(3)
    for one, other in zip(batch.responses, again.responses, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_groups_that_say_nothing_are_left_out_and_it_is_an_error_if_none_is_left():
    equal = torch.full((4, 4), 0.5)
    for selection in ("tournament", "best-and-worst"):
        assert made(selection=selection).choose(equal) == []
    assert win_rates(equal).unique().tolist() == [0.5]
    method = INPO(
        validated(INPO.Config, {"model": "tiny", **SHORT}),
        Place(),
        data=ROWS,
        preference=lambda first: [0.5] * len(first),
    )
    with pytest.raises(PostgradError, match="none of the 8 groups of 4 responses") as caught:
        method.collect(0)
    assert "\n" not in str(caught.value)


def test_it_learns_to_say_letters(tmp_path):
    held = write_rows(tmp_path / "held.jsonl", ROWS[:12])
    train(
        "inpo",
        data=ROWS,
        reward=letters,
        output=tmp_path / "run",
        steps=8,
        beta=0.1,
        **{**SMALL, **SHORT, "minibatches": 4, "batch_size": 16},
        eval_data=held,
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "judge.py").write_text(
        "def prefer(first, second):\n"
        "    return [0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b)))"
        " for a, b in zip(first, second)]\n"
    )
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "preference": f"{tmp_path}/judge.py:prefer",
        "selection": "independent",
        "save_every": 1,
    }
    train("inpo", steps=2, output=tmp_path / "whole", **settings)
    train("inpo", steps=1, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=2, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollout": {"samples": 5}}, "rollout.samples: a tournament needs an even .* got 5"),
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"reference_share": 1.5}, "reference_share: .*less than or equal to 1"),
        ({"selection": "all"}, "selection: .*tournament"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message):
        made(**setting)
