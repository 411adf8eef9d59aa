"""What the methods that compare their own samples share, on real rollouts of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.pairing import all_pairs, best_and_worst, win_rates
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.online_dpo import OnlineDPO, OnlineDPOSettings
from postgrad.rewards import load_rewards
from postgrad.rewards.preferences import (
    BradleyTerry,
    Judge,
    Noisy,
    load_preference,
    preference_matrices,
)
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
PREFERENCE = """
def letters(text):
    return sum(c.isalpha() for c in text) / max(len(text), 1)

def prefer(prompts, first, second, **columns):
    return [0.5 + 0.5 * (letters(a) - letters(b)) for a, b in zip(first, second)]
"""


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(reward=letters, **config):
    values = {"model": "tiny", **SHORT, **config}
    return OnlineDPO(
        validated(OnlineDPOSettings, values), Place(), data=ROWS, eval_data=ROWS, reward=reward
    )


def one_step(method, batch, **settings):
    loop = LoopSettings(
        **{"learning_rate": 1e-12, "clip_norm": 0, "token_budget": None, **settings}
    )
    return method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))


def test_the_best_is_set_against_the_worst_of_each_prompts_samples():
    method = made()
    batch = method.collect(0)
    assert len(batch) == 4
    for chosen, rejected in batch.responses:
        better, worse = letters([method.policy.decode(r) for r in (chosen, rejected)])
        assert better >= worse
    assert (batch.scores[:, 0] >= batch.scores[:, 1]).all()
    loss, metrics = method.loss(batch)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)  # at the reference
    assert metrics["rewards/accuracy"] == pytest.approx(0.5)


def test_the_loss_is_dpos_of_the_sampled_pair():
    method = moved(made(beta=0.5))
    batch = method.collect(0)
    with torch.no_grad():
        loss, _ = method.loss(batch)
        expected = []
        for prompt, (won, lost) in zip(batch.prompts, batch.responses, strict=True):
            now = method.policy.score([prompt] * 2, [won, lost]).logprobs.sum(1)
            with method.policy.reference():
                before = method.policy.score([prompt] * 2, [won, lost]).logprobs.sum(1)
            ratio = now - before
            expected.append(-torch.nn.functional.logsigmoid(0.5 * (ratio[0] - ratio[1])))
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_several_steps_a_round_see_every_prompt_once_an_epoch():
    method = made(epochs=2, minibatches=2)
    batch = method.collect(0)
    parts = list(method.minibatches(batch))
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    for pass_ in (parts[:2], parts[2:]):
        assert sorted(torch.cat([p.group for p in pass_]).tolist()) == [0, 1, 2, 3]


def test_evaluation_measures_win_rate_reward_and_divergence():
    method = made(frontier={"max_new_tokens": 5, "samples": 2})
    with torch.no_grad():
        start = method.evaluate()
        assert start["kl"] == pytest.approx(0, abs=1e-4)
        assert start["win_rate/low"] < 0.5 < start["win_rate/high"]
        again = method.evaluate()
        assert start == again  # the same draws, so only learning changes it
        moved(method, 0.1)
        assert method.evaluate()["kl"] > 0.01


def test_it_learns_to_say_letters(tmp_path):
    run = train(
        "online-dpo",
        data=write_rows(tmp_path / "rows.jsonl", ROWS),
        preference=str(_preference(tmp_path)) + ":prefer",
        output=tmp_path / "run",
        steps=30,
        beta=0.05,
        **SMALL,
        rollout={"samples": 4, "max_new_tokens": 5},
        batch_size=8,
        eval_data=write_rows(tmp_path / "held.jsonl", ROWS[:12]),
        evaluate_every=30,
        frontier={"max_new_tokens": 5, "samples": 4},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6
    assert run.finished.step == 30


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "preference": str(_preference(tmp_path)) + ":prefer",
        "save_every": 2,
    }
    assert_resumes("online-dpo", tmp_path, **settings)


def _preference(folder):
    file = folder / "judge.py"
    file.write_text(PREFERENCE)
    return file


def test_a_step_that_looks_ahead_leaves_no_trace():
    method = made()
    batch = method.collect(0)
    loop = LoopSettings(learning_rate=1e-2, clip_norm=0)
    plain = Optimisers(method.modules(), loop, torch.device("cpu"))
    start = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
    plain(method.loss, batch)
    expected = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
    method.policy.load_state_dict(start, strict=False)

    method = made()
    tried = Optimisers(method.modules(), loop, torch.device("cpu"))
    with tried.looking_ahead():
        tried(method.loss, batch)
        ahead = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
    for name, parameter in method.policy.named_parameters():
        assert torch.equal(parameter, start[name])
    assert any(not torch.equal(ahead[n], start[n]) for n in start)
    tried(method.loss, batch)
    for name, parameter in method.policy.named_parameters():
        assert torch.equal(parameter, expected[name])


# Preferences --------------------------------------------------------------------------------


def test_bradley_terry_of_a_reward():
    preference = BradleyTerry(load_rewards(letters), scale=0.5)
    said = preference([{"prompt": "x"}] * 2, ["ab", "12"], ["1b", "12"])
    assert said == pytest.approx([1 / (1 + math.exp(-1.0)), 0.5])


def test_a_share_of_the_verdicts_is_turned_once_and_for_all():
    clean = BradleyTerry(load_rewards(letters), scale=0.1)
    rows = [{"prompt": str(i)} for i in range(200)]
    first, second = ["ab"] * 200, ["1b"] * 200
    noisy = Noisy(clean, 0.3, seed=0)
    said = noisy(rows, first, second)
    turned = [value < 0.5 for value in said]
    assert 0.2 < sum(turned) / 200 < 0.4
    assert noisy(rows, first, second) == said
    # in the other order the same pairs are turned
    assert noisy(rows, second, first) == pytest.approx([1 - value for value in said])
    assert [value < 0.5 for value in Noisy(clean, 0.3, seed=1)(rows, first, second)] != turned


def test_noise_is_in_what_is_learnt_and_not_in_what_is_measured():
    method = made(data={"name": "rows", "flip_rate": 0.45}, preference_scale=0.01)
    assert isinstance(method.preference, Noisy)
    plain = made(preference_scale=0.01)
    noisy, clean = (
        [letters([each.policy.decode(r) for r in pair]) for pair in each.collect(0).responses]
        for each in (method, plain)
    )
    assert all(best >= worst for best, worst in clean)
    assert any(best < worst for best, worst in noisy)
    assert method.evaluate() == plain.evaluate()


def test_a_judge_with_a_liking_for_the_first_is_made_fair():
    def prefer(first, second):
        return [0.7 + 0.1 * (len(a) - len(b)) for a, b in zip(first, second, strict=True)]

    said = Judge(load_rewards(prefer))([{"prompt": "x"}] * 2, ["a", "bb"], ["a", "b"])
    assert said == pytest.approx([0.5, 0.6])


def test_matrices_are_antisymmetric_and_ask_once():
    asked = []

    def prefer(prompts, first, second, answer):
        asked.extend(zip(prompts, first, second, answer, strict=True))
        return [0.9] * len(first)

    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    preference = Judge(load_rewards(prefer), symmetric=False)
    first, second = preference_matrices(preference, rows, [["a", "b", "a"], ["c", "d"]])
    assert asked == [("p", "a", "b", "1"), ("p", "b", "a", "1"), ("q", "c", "d", "2")]
    expected = torch.tensor([[0.5, 0.9, 0.5], [0.1, 0.5, 0.9], [0.5, 0.1, 0.5]]).double()
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second + second.T, torch.ones(2, 2).double())


def test_win_rates_and_pairs():
    """Rock, paper, scissors with one bias, and the card's group of four."""
    preferences = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    torch.testing.assert_close(win_rates(preferences), torch.tensor([0.55, 0.45, 0.5]))
    assert best_and_worst(preferences) == [0, 1]
    assert best_and_worst(torch.full((3, 3), 0.5)) == [0, 2]
    assert all_pairs(preferences) == [[0, 1], [2, 0], [1, 2]]
    assert all_pairs(torch.full((2, 2), 0.5)) == []
    with pytest.raises(ValueError, match="K of at least 2"):
        win_rates(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preference": letters, "reward": letters}, "either preference or reward, not both"),
        ({"preference": None, "reward": None}, "name what compares two responses"),
        ({"preference": "nowhere.py:f", "reward": None}, "no such file nowhere.py"),
    ],
)
def test_a_missing_or_double_preference_is_named(given, message):
    with pytest.raises(PostgradError, match=message):
        load_preference(**given)


def test_a_preference_outside_the_unit_interval_is_named():
    def prefer(first):
        return [1.5] * len(first)

    judge = load_preference(prefer, None)
    with pytest.raises(PostgradError, match=r"'prefer' returned 1.5 for pair 1, .* in \[0, 1\]"):
        judge.probe({"prompt": "x"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollout": {"samples": 1}}, "at least 2 samples a prompt, got 1"),
        ({"minibatches": 9, "batch_size": 4}, "at most one step a prompt"),
        ({"beta": 0}, "beta: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message):
        made(**setting)


def test_a_step_without_a_comparison_is_passed_over(tmp_path):
    """All samples worth the same: nothing is learnt, the run goes on, and is ended in the end."""
    same = {**SMALL, **SHORT, "minibatches": 1, "frontier": {"max_new_tokens": 5}}

    def alike(completions):
        return [0.0] * len(completions)

    run = train("dno", data=ROWS, reward=alike, output=tmp_path / "run", steps=3, **same)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert run.finished.step == 3
    assert sum(row.get("passed_over", 0) for row in rows) == 3
    with pytest.raises(PostgradError, match=r"no comparison is left.*so it was for 20 steps"):
        train("dno", data=ROWS, reward=alike, output=tmp_path / "longer", steps=30, **same)
