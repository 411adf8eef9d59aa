"""HAPO: length rewards by hand, the record of each prompt, and responses that become shorter."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.history import HistoryTracker, history_length_reward, repetition_penalty
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.methods.language.verifiable.hapo import HAPO
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i), "id": i} for i in range(24)]
# an untrained policy ends a response by one of these
STOP = {"samples": 4, "max_new_tokens": 10, "stop": list("abcdefghijklmnopqrstuvwxyz")}
SHORT = {"rollout": STOP, "batch_size": 4}


def ends_early(completions):
    """Right if it ends in a letter, but for the last four."""
    return [float("a" <= text[-1:] <= "v") for text in completions]


def made(kind=HAPO, reward=ends_early, **config):
    settings = {"model": "tiny", **SHORT, **config}
    return kind(validated(kind.Config, settings), Place(), data=ROWS, reward=reward)


# Pure functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "cosine", "cosine_wrong", "linear", "linear_wrong"),
    [
        (50, 0.707107, 0, 0.5, 0),
        (100, 0, 0, 0, 0),
        (120, -0.309017, -0.309017, -0.1, -0.1),
        (150, -0.700000, -0.707107, -0.4, -0.4),
        (200, -0.700000, -1.000000, -0.7, -0.9),
        (400, -0.700000, -1.000000, -0.7, -1.0),
    ],
)
def test_the_worked_length_rewards(length, cosine, cosine_wrong, linear, linear_wrong):
    lengths, history = torch.tensor([length, length]), torch.tensor([100.0, 100.0])
    correct = torch.tensor([True, False])
    found = history_length_reward(lengths, history, correct)
    assert found.tolist() == pytest.approx([cosine, cosine_wrong], abs=5e-7)
    found = history_length_reward(lengths, history, correct, "linear")
    assert found.tolist() == pytest.approx([linear, linear_wrong], abs=5e-7)


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_length_rewards_fall_with_length_and_are_bounded(form):
    lengths, history = torch.arange(1.0, 300), torch.full((299,), 100.0)
    right = history_length_reward(lengths, history, torch.ones(299).bool(), form)
    wrong = history_length_reward(lengths, history, torch.zeros(299).bool(), form)
    assert bool((right.diff() <= 1e-6).all())
    assert bool((wrong.diff() <= 1e-6).all())
    assert right[99] == pytest.approx(0, abs=1e-6)
    assert bool((wrong[:99] == 0).all())
    assert bool((right[:98] > 0).all())
    assert float(right.min()) == pytest.approx(-0.7)
    # any correct response is worth more than any wrong one, as 1 + c > 0
    assert 1 + float(right.min()) > float(wrong.max())


def test_without_a_record_there_is_no_length_reward():
    lengths, nothing = torch.tensor([3, 900]), torch.full((2,), math.nan)
    assert history_length_reward(lengths, nothing, torch.tensor([True, False])).tolist() == [0, 0]


def test_the_shortest_correct_response_is_kept():
    tracker = HistoryTracker()
    assert bool(tracker.lookup(["a", "b"]).isnan().all())
    right = torch.tensor([True, False, True, True])
    tracker.update(["a", "a", "a", "b"], torch.tensor([30, 3, 20, 7]), right)
    assert tracker.lookup(["b", "a", "b"]).tolist() == [7, 20, 7]
    tracker.update(["a", "b"], torch.tensor([25, 6]), torch.tensor([True, True]))
    assert tracker.lookup(["a", "b"]).tolist() == [20, 6]
    assert tracker.mean == 13
    assert len(tracker) == 2


def test_in_whatever_order_a_step_is_taken_in():
    lengths, right = torch.tensor([9, 4, 6, 5]), torch.tensor([True, False, True, True])
    for mode, expected in (("min", 5), ("mean", 20 / 3)):
        forth, back = HistoryTracker(mode), HistoryTracker(mode)
        forth.update("aaaa", lengths, right)
        back.update("aaaa", lengths.flip(0), right.flip(0))
        assert forth.lookup("a") == back.lookup("a") == torch.tensor(expected)


def test_the_mean_goes_on_from_its_state():
    first, other = HistoryTracker("mean"), HistoryTracker("mean")
    first.update(["a", "a"], torch.tensor([10, 20]), torch.tensor([True, True]))
    other.load_state_dict(first.state_dict())
    other.update(["a"], torch.tensor([33]), torch.tensor([True]))
    assert other.lookup(["a"]).tolist() == [21]
    assert first.lookup(["a"]).tolist() == [15]


def test_repeated_n_grams_are_charged():
    # the second "1 2 3" covers three of seven tokens, and overlapping ones count once
    assert repetition_penalty(torch.tensor([1, 2, 3, 4, 1, 2, 3]), 3, -0.5) == pytest.approx(
        -0.5 * 3 / 7
    )
    assert repetition_penalty(torch.ones(6), 3, -1.0) == pytest.approx(-5 / 6)
    assert repetition_penalty(torch.arange(6), 2, -1.0) == 0
    assert repetition_penalty(torch.ones(2), 3, -1.0) == 0


def test_wrong_calls_are_refused():
    one, right = torch.ones(1), torch.ones(1).bool()
    for call, message in (
        (lambda: HistoryTracker("max"), "mode must be"),
        (lambda: HistoryTracker().update(["a", "b"], one, right), "got 2, 1 and 1"),
        (lambda: HistoryTracker().update(["a"], 0 * one, right), "lengths must be above 0"),
        (lambda: history_length_reward(one, one, torch.ones(2).bool()), r"must be \[N\]"),
        (lambda: history_length_reward(one, 0 * one, right), "history must be above 0"),
        (lambda: history_length_reward(one, one, right, floor=-1.0), "floor must lie"),
        (lambda: history_length_reward(one, one, right, tolerance=-0.1), "tolerance"),
        (lambda: history_length_reward(one, one, right, "square"), "form must be"),
        (lambda: repetition_penalty(one, 3, 0.1), "penalty <= 0"),
        (lambda: repetition_penalty(one[:0], 3, -0.1), "L >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The method ----------------------------------------------------------------------------------


def test_the_first_visit_is_grpo_and_the_second_is_measured_by_it():
    method = made()
    batch = method.collect(0)
    assert batch.fields()["reward/length"].eq(0).all()
    grpo = made(GRPO, rollout={**STOP, "temperature": 1.0})
    same = made(rollout={**STOP, "temperature": 1.0}).collect(0)
    # a response that was cut cannot end in a letter, so nothing else differs
    assert same.reward.equal(grpo.collect(0).reward)
    assert same.advantages.equal(grpo.collect(0).advantages)

    lengths = torch.tensor([method._length(response) for response in batch.responses])
    best = {
        int(row): int(lengths[(batch.row == row) & (batch.reward == 1)].min())
        for row in batch.row[batch.reward == 1].unique()
    }
    assert len(best) > 1
    again = method.sampled(batch.row[::4].tolist(), step=9)
    for i, row in enumerate(again.row.tolist()):
        record = best.get(row, math.nan)
        length, right = (
            method._length(again.responses[i]),
            again.fields()["reward/ends_early"][i] == 1,
        )
        expected = history_length_reward(
            torch.tensor([length]), torch.tensor([record]), right[None]
        )
        assert again.fields()["reward/length"][i] == pytest.approx(float(expected), abs=1e-6)
        assert again.reward[i] == pytest.approx(float(right + expected), abs=1e-6)


def test_what_was_cut_is_wrong_and_sets_no_record():
    method = made(reward=lambda completions: [1.0] * len(completions), rollout={**STOP, "stop": []})
    batch = method.collect(0)
    cut = ~batch.finished
    assert int(cut.sum()) > 8
    assert batch.reward[cut].eq(0).all()
    assert len(method.tracker) <= int(batch.finished.sum())


def test_the_end_token_is_not_counted():
    method = made()
    ends = min(method.policy.end_tokens)
    assert method._length(torch.tensor([5, 6, ends])) == 2
    assert method._length(torch.tensor([5, 6])) == 2
    assert method._length(torch.tensor([ends])) == 1


def test_ids_come_from_a_column_or_from_the_prompt():
    by_column, by_prompt = made(id_column="id"), made()
    assert by_column.identity(ROWS[3]) == "3"
    found = {by_prompt.identity(row) for row in ROWS}
    assert len(found) == len(ROWS)
    assert by_prompt.identity({"prompt": ROWS[0]["prompt"]}) in found


def test_weight_zero_is_grpo_and_repetition_is_a_term():
    method = made(length_weight=0.0, repetition_penalty=-0.5, repetition_size=1)
    method.collect(0)
    batch = method.sampled([0, 1, 2], step=1)
    terms = batch.fields()
    torch.testing.assert_close(
        batch.reward, terms["reward/ends_early"] + terms["reward/repetition"]
    )
    assert bool((terms["reward/repetition"] <= 0).all())


def test_correct_responses_become_shorter(tmp_path):
    """Every response that ends in a letter is right, so that length is all that differs."""
    settings = {
        **SMALL, "learning_rate": 5e-3, "batch_size": 8, "kl_coefficient": 0.0,
        "rollout": {**STOP, "max_new_tokens": 12, "temperature": 1.0},
        "reward": {"name": "format", "pattern": ".*[a-z]"},
    }  # fmt: skip

    def lengths(slug):
        train(slug, data=ROWS[:8], steps=12, output=tmp_path / slug, **settings)
        rows = read_rows(tmp_path / slug / "metrics.jsonl")
        return [row["response/length"] for row in rows if "response/length" in row]

    hapo, grpo = lengths("hapo"), lengths("grpo")
    assert sum(hapo[-4:]) / 4 < 0.7 * sum(grpo[-4:]) / 4
    records = [
        row["history/length"]
        for row in read_rows(tmp_path / "hapo" / "metrics.jsonl")
        if "history/length" in row
    ]
    assert records[-1] < records[0]


def test_a_resumed_run_remembers_its_records(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:4])
    reward = {"name": "format", "pattern": ".*[a-m]"}
    assert_resumes("hapo", tmp_path, data=data, reward=reward, **SMALL, **SHORT)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert any(row.get("reward/length") for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id_column": "key"}, "id_column: .*row 1 has no 'key'; the columns are .*id"),
        ({"id_column": "answer", "data": [*ROWS, ROWS[2]]}, "row 25 has the 'answer' of row 3"),
        ({"length_weight": 1.5}, "length_weight: .*less than or equal to 1"),
        ({"length_floor": -1.0}, "length_floor: .*greater than -1"),
        ({"length_floor": 0.1}, "length_floor: .*less than or equal to 0"),
        ({"repetition_penalty": 0.1}, "repetition_penalty: .*less than or equal to 0"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .* at least 2"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_done(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": ends_early}
    with pytest.raises(PostgradError, match=message) as caught:
        train("hapo", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
