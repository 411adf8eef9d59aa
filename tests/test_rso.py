"""RSO: its sampler's law, pairings and losses, and real runs of the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, with_margins, write_rows
from postgrad.advantages.pairing import knockout, log_odds, neighbours, rejection_select
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.dpo import DPO, DPOSettings
from postgrad.methods.language.preference.rso import RSO, RSOSettings
from postgrad.objectives.pairwise import logistic
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "chosen": f"{2 * i}", "rejected": "?"} for i in range(12)]
SMALLER = {"rollout": {"samples": 12, "max_new_tokens": 5}, "accepted": 4, "batch_size": 4}
REWARD = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(rows=ROWS, reward=letters, **config):
    values = {"model": "tiny", "preference_scale": 0.1, **SMALLER, **config}
    return RSO(validated(RSOSettings, values), Place(), data=rows, reward=reward)


def reward_file(folder):
    file = folder / "letters.py"
    file.write_text(REWARD)
    return f"{file}:letters"


def random(seed=0):
    return torch.Generator().manual_seed(seed)


# The sampler -----------------------------------------------------------------------------------


def test_the_acceptance_of_the_worked_example():
    """Of rewards 0, 1, 2 in this order the first two are first if they pass in the first pass."""
    rewards, draws, stream = torch.tensor([0.0, 1.0, 2.0]), 20_000, random()
    counts = torch.zeros(3)
    for _ in range(draws):
        counts[rejection_select(rewards, 3, 0.5, stream)[0]] += 1
    passing = 0.018316, 0.135335
    expected = [passing[0], (1 - passing[0]) * passing[1]]
    for share, probability in zip((counts / draws).tolist(), expected, strict=False):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert share == pytest.approx(probability, abs=4 * error)


def test_with_many_candidates_the_first_accepted_has_the_law_of_the_optimum():
    """The worked example: uniform pi_sft over rewards 0, 1, 2 at beta 1/2."""
    rewards, draws, stream = torch.tensor([0.0, 1.0, 2.0]), 10_000, random()
    counts = torch.zeros(3)
    for _ in range(draws):
        candidates = torch.randint(3, (32,), generator=stream)
        chosen = rejection_select(rewards[candidates], 1, 0.5, stream)
        counts[candidates[chosen]] += 1
    optimum = (rewards / 0.5).softmax(0)
    torch.testing.assert_close(
        optimum, torch.tensor([0.015876, 0.117310, 0.866813]), atol=1e-6, rtol=0
    )
    distance = 0.5 * float((counts / draws - optimum).abs().sum())
    assert distance < 0.015  # sampling noise; with one candidate it would be 0.53


def test_its_limits_are_the_best_and_the_first():
    rewards = torch.randn(20, generator=random(), dtype=torch.float64)
    best = rewards.argsort(descending=True)[:6].tolist()
    assert rejection_select(rewards, 6, 0.0, random()) == best
    assert rejection_select(rewards, 6, 1e-9, random()) == best
    assert rejection_select(rewards, 6, 1e12, random()) == list(range(6))


def test_only_differences_in_units_of_beta_matter():
    rewards = torch.randn(30, generator=random(), dtype=torch.float64)
    chosen = rejection_select(rewards, 8, 0.5, random(3))
    assert len(set(chosen)) == 8
    assert rejection_select(rewards + 7, 8, 0.5, random(3)) == chosen
    assert rejection_select(4 * rewards, 8, 2.0, random(3)) == chosen
    assert rejection_select(rewards, 8, 0.5, random(4)) != chosen


def test_far_apart_rewards_still_fill_the_group():
    rewards = torch.tensor([0.0, -1e5, 1e5, -1e9])
    assert rejection_select(rewards, 4, 1e-3, random()) == [2, 0, 1, 3]


def test_rewards_are_log_odds_of_a_preference():
    assert float(log_odds(torch.tensor(0.731059, dtype=torch.float64))) == pytest.approx(
        1.000002, abs=1e-6
    )
    with pytest.warns(UserWarning, match="2 of 3 preferences are within 1e-06 of 0 or 1"):
        cut = log_odds(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(cut, torch.tensor([-13.815510, 0, 13.815510]).double())


def test_pairings():
    """Response i is preferred to j if i is larger: 3 wins, whoever it meets."""
    order = torch.arange(6)
    preferences = 0.5 + 0.4 * (order[:, None] - order).sign()
    assert neighbours(preferences) == [[1, 0], [3, 2], [5, 4]]
    # 1, 3 and 5 play on: 3 beats 1, 5 waits and then beats 3
    assert knockout(preferences) == [[1, 0], [3, 2], [5, 4], [3, 1], [5, 3]]
    assert len(knockout(torch.full((5, 5), 0.5))) == 4
    assert neighbours(torch.full((2, 2), 0.5)) == [[0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection_select(torch.zeros(3), 4, 0.5, random()), "cannot accept 4"),
        (lambda: rejection_select(torch.zeros(3), 2, -0.1, random()), "beta must be 0 or above"),
        (lambda: rejection_select(torch.full((3,), math.nan), 2, 0.5, random()), "must be finite"),
        (lambda: log_odds(torch.tensor([1.1])), r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The method ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"), [("sigmoid-norm", 0.630258), ("hinge-norm", 0.87), ("hinge", 0.87)]
)
def test_the_losses_of_the_worked_example(loss, value):
    got = made(loss=loss, gamma=0.1).losses(with_margins(torch.tensor([1.3])))
    assert float(got) == pytest.approx(value, abs=1e-6)


def test_hinge_alone_is_without_a_reference():
    found = moved(made()).compared(made().collect(0))
    shifted = found.__class__(**{**vars(found), "reference": found.reference * 2})
    for loss, same in (("hinge", True), ("hinge-norm", False), ("sigmoid-norm", False)):
        method = made(loss=loss, gamma=0.1)
        assert torch.equal(method.losses(found), method.losses(shifted)) == same


def test_on_the_datas_pairs_with_gamma_for_beta_it_is_dpo():
    method = moved(made(source="direct", gamma=0.3, batch_size=12))
    dpo = DPO(
        validated(DPOSettings, {"model": "tiny", "batch_size": 12, "beta": 0.3}),
        Place(),
        data=ROWS,
    )
    dpo.policy.load_state_dict(method.policy.state_dict())
    with torch.no_grad():
        got, expected = (m.loss(m.collect(0))[0] for m in (method, dpo))
    assert float(got) == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(got) - math.log(2)) > 1e-3


def test_pairs_are_labelled_and_of_different_texts():
    method = made()
    batch = method.collect(0)
    assert batch.group.unique().tolist() == sorted(method.order.indices(0).tolist())
    assert method.describe_batch(batch)["pairs"] == len(batch) == 8
    texts = [[method.policy.decode(r) for r in pair] for pair in batch.responses]
    for i, (won, lost) in enumerate(texts):
        assert letters([won])[0] >= letters([lost])[0]
        others = [text for j in range(8) if batch.group[j] == batch.group[i] for text in texts[j]]
        assert len(set(others)) == 4


def candidates(method, step=0):
    """The texts of the candidates of a step's prompts."""
    prompts = [method.prompts[i] for i in method.order.indices(step).tolist()]
    with method.policy.reference():
        texts = method.roll_out(prompts, "candidates", step).texts
    return [texts[i : i + 12] for i in range(0, len(texts), 12)]


def kept(method):
    """The texts that each prompt of the first step keeps, in the order of the prompts."""
    batch = method.collect(0)
    return [
        {
            method.policy.decode(r)
            for i in (batch.group == prompt).nonzero()
            for r in batch.responses[i]
        }
        for prompt in method.order.indices(0)
    ]


def test_at_temperature_zero_the_best_candidates_are_kept():
    method = made(beta=0.0)
    for texts, got in zip(candidates(method), kept(method), strict=True):
        values = dict(zip(texts, letters(texts), strict=True))
        best = sorted(values.values(), reverse=True)[:4]
        assert sorted((values[text] for text in got), reverse=True) == best


def test_without_rejection_the_first_candidates_are_kept():
    method = made(source="sft-sample-rank")
    for texts, got in zip(candidates(method), kept(method), strict=True):
        assert got == set(list(dict.fromkeys(texts))[:4])


def test_the_candidates_are_the_initial_policys_and_drawn_once():
    plain, method = made(), made()
    moved(method, 0.1)
    first = method.collect(0)
    for pair, expected in zip(first.responses, plain.collect(0).responses, strict=True):
        assert all(map(torch.equal, pair, expected))
    moved(method, 0.1)
    again = method.collect(0)
    assert all(
        torch.equal(r, s)
        for pair, same in zip(first.responses, again.responses, strict=True)
        for r, s in zip(pair, same, strict=True)
    )
    assert torch.equal(first.reference, again.reference)


def test_the_reference_is_scored_at_temperature_one():
    method = made()
    batch = method.collect(0)
    with torch.no_grad():
        found = method.compared(batch)
        expected = method.policy.score(batch.prompts, [pair[0] for pair in batch.responses])
    torch.testing.assert_close(found.delta, torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.reference[:, 0], expected.logprobs.sum(1), atol=1e-4, rtol=0)


def test_a_tournament_has_a_match_less_than_players():
    batch = made(pairing="tournament").collect(0)
    assert len(batch) == 4 * 3
    assert made(pairing="tournament", accepted=5).collect(0).group.bincount().max() == 4


def test_few_distinct_candidates_give_few_pairs():
    """From one likeliest token on there are no choices left: at most two texts are possible."""
    few = {"rollout": {"samples": 12, "max_new_tokens": 1, "top_k": 3}, "accepted": 4}
    batch = made(**few).collect(0)
    assert set(batch.group.bincount().tolist()) <= {0, 1}
    with pytest.raises(PostgradError, match="none of the 4 prompts of step 1 has 2 distinct"):
        made(rollout={"samples": 12, "max_new_tokens": 1, "top_k": 1}).collect(0)


@pytest.mark.parametrize("source", ["rso-sample-rank", "direct"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, source):
    """Three steps see all prompts; the resumed run needs the pairs that were made before."""
    settings = {
        **SMALL,
        **SMALLER,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": reward_file(tmp_path),
        "source": source,
        "save_every": 2,
    }
    train("rso", steps=6, output=tmp_path / "whole", **settings)
    train("rso", steps=4, output=tmp_path / "parts", **settings)
    resume(tmp_path / "parts", steps=6, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    sampled = source != "direct"
    assert [("time/rollout" in row) for row in rows] == [sampled] * 3 + [False] * 3


def test_it_learns_to_say_letters_from_pairs_drawn_once(tmp_path):
    train(
        "rso",
        data=[{"prompt": f"{i:02d}+{i:02d}="} for i in range(64)],
        reward=letters,
        preference_scale=0.1,
        output=tmp_path / "run",
        steps=20,
        gamma=0.1,
        batch_size=32,
        rollout={"samples": 16, "max_new_tokens": 5},
        eval_data=write_rows(tmp_path / "held.jsonl", ROWS),
        frontier={"max_new_tokens": 5, "samples": 24},
        **SMALL,
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["evaluation/reward"] for row in rows if "evaluation/reward" in row]
    assert rewards[-1] > rewards[0] + 0.04
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(float(logistic(torch.zeros(()))), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"accepted": 20}, r"accepted: at most .*rollout.samples=12.*got 20"),
        ({"accepted": 3}, r"accepted: pairing=first-round needs an even number, got 3"),
        ({"accepted": 1}, r"accepted: .*greater than or equal to 2"),
        ({"beta": -1.0}, r"beta: .*greater than or equal to 0"),
        ({"gamma": 0.0}, r"gamma: .*greater than 0"),
        ({"source": "sft"}, r"source: .*'direct', 'sft-sample-rank' or 'rso-sample-rank'"),
        ({"data": [{"prompt": "a"}], "source": "direct"}, r"row 1: source=direct .*found prompt"),
        ({"reward": None}, r"preference: name what compares two responses"),
    ],
)
def test_a_fault_is_named_before_anything_is_written(setting, message, tmp_path):
    values = {"data": ROWS, "reward": letters, **SMALL, **SMALLER, **setting}
    with pytest.raises(PostgradError, match=message) as caught:
        train("rso", output=tmp_path / "run", **values)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
