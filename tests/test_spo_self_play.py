"""Self-play on language: win-rate rewards as the card has them, learning, resuming, faults."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.pairing import win_rate_rewards, win_rates
from postgrad.api import train
from postgrad.claims.spo_self_play import RewardModel, bradley_terry, with_reward_model
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.spo_self_play import SelfPlay, SelfPlaySettings
from postgrad.objectives.game import exploitability, hedge_self_play
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
PREFERENCE = """
def letters(text):
    return sum(c.isalpha() for c in text) / max(len(text), 1)

def prefer(prompts, first, second, **columns):
    return [0.5 + 0.5 * (letters(a) - letters(b)) for a, b in zip(first, second)]
"""
SIGNED = torch.tensor(
    [[0, 1, -1, 1], [-1, 0, 1, 1], [1, -1, 0, -1], [-1, -1, 1, 0]], dtype=torch.float64
)


def letters(text):
    return sum(c.isalpha() for c in text)


def more_letters(first, second):
    """1 for the text with more letters, 1/2 for equally many."""
    gaps = [letters(a) - letters(b) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * (gap > 0) - 0.5 * (gap < 0) for gap in gaps]


def undecided(first):
    return [0.5] * len(first)


def made(preference=more_letters, eval_data=ROWS, **config):
    values = {"model": "tiny", **SHORT, **config}
    return SelfPlay(
        validated(SelfPlaySettings, values),
        Place(),
        data=ROWS,
        eval_data=eval_data,
        preference=preference,
    )


def judge_file(folder):
    file = folder / "judge.py"
    file.write_text(PREFERENCE)
    return f"{file}:prefer"


def gradients(method, batch):
    method.policy.zero_grad(set_to_none=True)
    loss, _ = method.loss(batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def test_the_worked_example():
    got = win_rate_rewards(SIGNED)
    assert got.tolist() == pytest.approx([0.333333, 0.333333, -0.333333, -0.333333], abs=1e-6)
    rates = win_rates((SIGNED + 1) / 2)
    assert rates.tolist() == pytest.approx([0.666667, 0.666667, 0.333333, 0.333333], abs=1e-6)
    torch.testing.assert_close(rates, (got + 1) / 2)


def test_hedge_self_plays_worked_example():
    """20,000 steps: the average is the minimax winner (0.3, 0.3, 0.4), the last goes round it."""
    signed = torch.tensor([[0, 0.8, -0.6], [-0.8, 0, 0.6], [0.6, -0.6, 0]], dtype=torch.float64)
    game = (signed + 1) / 2
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    average, last = hedge_self_play(game, start, math.sqrt(8 * math.log(3) / 20_000), 20_000)
    assert average.tolist() == pytest.approx([0.301547, 0.295773, 0.402681], abs=1e-6)
    assert last.tolist() == pytest.approx([0.058412, 0.200540, 0.741048], abs=1e-6)
    # these numbers are of M, twice those of P
    assert 2 * float(exploitability(game, average)) == pytest.approx(0.003464, abs=1e-6)
    assert 2 * float(exploitability(game, last)) == pytest.approx(0.397899, abs=1e-6)


def test_rewards_sum_to_zero_within_bounds_and_two_mirror_each_other():
    random = torch.Generator().manual_seed(0)
    upper = (2 * torch.rand(5, 6, 6, generator=random, dtype=torch.float64) - 1).triu(1)
    rewards = win_rate_rewards(upper - upper.mT)
    torch.testing.assert_close(rewards.sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)
    assert (rewards.abs() <= 1).all()
    pair = torch.tensor([[0.0, 0.4], [-0.4, 0.0]])
    torch.testing.assert_close(win_rate_rewards(pair), torch.tensor([0.4, -0.4]))


def test_a_reward_enters_by_its_ranks_alone():
    worth = torch.tensor([0.3, -2.0, 5.0, 0.1, 9.0])
    signed = (worth[:, None] - worth[None, :]).sign()
    got = win_rate_rewards(signed)
    ranks = worth.argsort().argsort().float()
    torch.testing.assert_close(got, (2 * ranks - 4) / 4)
    other = worth.exp()
    torch.testing.assert_close(got, win_rate_rewards((other[:, None] - other[None, :]).sign()))


@pytest.mark.parametrize(
    ("signed", "message"),
    [
        (torch.zeros(1, 1), "K of at least 2"),
        (torch.zeros(2, 3), "K of at least 2"),
        (torch.tensor([[0.0, 0.5], [0.5, 0.0]]), "antisymmetric"),
        (torch.tensor([[0.0, 1.5], [-1.5, 0.0]]), r"in \[-1, 1\]"),
    ],
)
def test_what_is_no_preference_is_named(signed, message):
    with pytest.raises(ValueError, match=message):
        win_rate_rewards(signed)


def test_rewards_are_win_rates_among_a_prompts_own_samples():
    method = made()
    batch = method.collect(0)
    for number in range(4):
        mine = (batch.group == number).nonzero().squeeze(1).tolist()
        counts = torch.tensor([float(letters(batch.texts[i])) for i in mine])
        expected = win_rate_rewards((counts[:, None] - counts[None, :]).sign())
        torch.testing.assert_close(batch.advantages[mine], expected)
    metrics = method.describe_batch(batch)
    assert metrics["preference/gap"] > 0
    assert "reward" not in metrics


def test_the_gradient_is_that_of_reinforce():
    method = made()
    batch = method.collect(0)
    got = gradients(method, batch)
    method.policy.zero_grad(set_to_none=True)
    scores = method.policy.score(batch.prompts, batch.responses)
    sums = torch.where(scores.mask, scores.logprobs, 0.0).sum(1)
    (-(batch.advantages * sums).mean() / 5).backward()
    for name, parameter in method.policy.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_without_a_preference_nothing_is_learnt():
    method = made(undecided)
    batch = method.collect(0)
    assert all(not grad.any() for grad in gradients(method, batch).values())
    assert method.describe_batch(batch)["preference/undecided_groups"] == 1


def test_it_learns_to_say_letters(tmp_path):
    held = write_rows(tmp_path / "held.jsonl", ROWS[:12])
    train(
        "spo-self-play",
        data=write_rows(tmp_path / "rows.jsonl", ROWS),
        preference=judge_file(tmp_path),
        output=tmp_path / "run",
        steps=30,
        **SMALL,
        rollout={"samples": 4, "max_new_tokens": 5},
        eval_data=held,
        evaluate_every=30,
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    last = next(row for row in reversed(rows) if "evaluation/win_rate" in row)
    assert last["evaluation/win_rate/low"] > 0.55
    assert last["evaluation/kl"] > 0.1


@pytest.mark.parametrize("several", [{}, {"epochs": 2, "minibatches": 2, "kl_coefficient": 0.1}])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(several, tmp_path):
    settings = {
        **SMALL,
        **SHORT,
        **several,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "preference": judge_file(tmp_path),
        "save_every": 2,
    }
    assert_resumes("spo-self-play", tmp_path, **settings)


def test_a_reward_may_stand_for_the_preference_and_is_measured():
    values = {"model": "tiny", **SHORT, "frontier": {"max_new_tokens": 5}}

    def count(completions):
        return [letters(text) for text in completions]

    method = SelfPlay(
        validated(SelfPlaySettings, values), Place(), data=ROWS, eval_data=ROWS, reward=count
    )
    batch = method.collect(0)
    worth = torch.tensor([float(letters(text)) for text in batch.texts[:4]])
    expected = win_rate_rewards(2 * torch.sigmoid(worth[:, None] - worth[None, :]) - 1)
    torch.testing.assert_close(batch.advantages[:4], expected)
    with torch.no_grad():
        found = method.evaluate()
    assert found["reward"] > 0
    assert found["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollout": {"samples": 1}}, "at least 2 samples a prompt, got 1"),
        ({"minibatches": 9}, "at most one step a prompt"),
        ({"preference_scale": 0}, "preference_scale: .*greater than 0"),
        ({"preference": None}, "name what compares two responses"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**setting)
    assert "\n" not in str(caught.value)


def test_a_preference_that_is_no_probability_is_named_before_the_run(tmp_path):
    def prefer(first):
        return [-1.0] * len(first)

    with pytest.raises(PostgradError, match=r"'prefer' returned -1 for pair 1"):
        train("spo-self-play", data=ROWS, preference=prefer, output=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# The claim's reward models --------------------------------------------------------------------


def test_a_reward_that_explains_the_preferences_is_found_and_followed():
    worth = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
    game = torch.sigmoid(worth[:, None] - worth[None, :])
    scores = bradley_terry(game, torch.zeros(4).double(), ridge=1e-6)
    torch.testing.assert_close(scores - scores.mean(), worth - worth.mean(), atol=1e-3, rtol=0)
    for arm in ("reward model", "newest comparisons", "first comparisons"):
        average, last = with_reward_model(game, torch.zeros(4).double(), 0.2, 200, arm)
        assert int(average.argmax()) == int(last.argmax()) == 3
        assert float(exploitability(game, last)) < 0.01


def test_an_even_cycle_has_no_reward():
    cycle = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
    scores = bradley_terry(cycle, torch.zeros(3).double())
    assert scores.tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    # seen mostly together, the first two alone have an order
    counts = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1], [0.1, 0.1, 0.1]]).double()
    scores = bradley_terry(cycle * counts, torch.zeros(3).double())
    assert scores[0] > scores[1] + 1


def test_the_reward_model_learns_from_a_prompts_samples():
    good, bad, plain = " good, warm and lovely.", " bad, dull and rude.", " long, old and red."
    model = RewardModel(newest=False)
    scores = model(["a", "a", "b", "b"], [good, bad, bad, plain])
    assert scores[0] > scores[1] == scores[2] > scores[3]
    assert model(["c", "c"], [plain, good])[0] > scores[3]  # of all that was seen
    newest = RewardModel(newest=True)
    newest(["a", "a"], [good, bad])
    after = newest(["b", "b"], [plain, good])
    assert after[0] > after[1]
