"""Responses that go on over several steps: which a step takes, and by which probabilities."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, untimed, write_rows
from postgrad.api import prepare, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.grpo import GRPO
from postgrad.models.language import load_policy
from postgrad.sampling.carried import CarriedGroups
from postgrad.sampling.generation import SamplingSettings
from several import together

ROWS = [{"prompt": letter} for letter in "abcdefghijk"]
LONG = {
    "batch_size": 2,
    "carry": 3,
    "window": 3,
    "rollout": {"samples": 2, "max_new_tokens": 12},
}
SETTINGS = SamplingSettings(max_new_tokens=12)


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]


def ends_early():
    """A policy whose end token is drawn about every eighth time."""
    policy = load_policy("tiny")
    policy.network.generation_config.eos_token_id = list(range(3, 15))
    policy.end_tokens = frozenset(range(3, 15))
    return policy


@pytest.fixture
def settings(tmp_path):
    ends_early().save(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def vowels(completions):\n"
        "    return [sum(letter in 'aeiou' for letter in text) / 8 for text in completions]\n"
    )
    return {
        **SMALL,
        **LONG,
        "model": str(tmp_path / "model"),
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{tmp_path}/reward.py:vowels",
        "learning_rate": 1e-2,
        "schedule": "constant",
    }


def taken(policy, groups, step):
    return groups.take(policy, lambda g: policy.render("abcdefghijk"[g % 11]), SETTINGS, 3, 7, step)


def test_every_group_is_taken_once_whole_and_not_after_its_windows():
    policy, groups = ends_early(), CarriedGroups(2, 3, 2)
    seen, carried = [], 0
    for step in range(12):
        found = taken(policy, groups, step)
        seen += found.groups
        assert len(found.groups) == 2
        assert found.rollouts.prompts[0].equal(found.rollouts.prompts[1])
        for tokens, logprobs, finished in zip(
            found.rollouts.responses, found.rollouts.logprobs, found.rollouts.finished, strict=True
        ):
            assert len(tokens) == len(logprobs) <= 12
            ended = int(tokens[-1]) in policy.end_tokens
            assert bool(finished) == ended
            assert ended or len(tokens) == 12
        age = step - found.begun
        assert bool((age >= 0).all())
        carried += int((age > 0).sum())
    assert len(set(seen)) == len(seen)
    # none is left behind for long: four windows, and two steps in which what is complete waits
    assert set(range(14)) <= set(seen)
    assert carried > 4


def test_longer_responses_are_taken_later_and_none_is_left_out():
    """Of the first groups all are taken in the end, short and long, so no length is preferred."""
    policy, many = ends_early(), CarriedGroups(2, 3, 1)
    found, order = {}, []
    for step in range(20):
        one = taken(policy, many, step)
        order += one.groups
        found |= {g: len(r) for g, r in zip(one.groups, one.rollouts.responses, strict=True)}
    first = [group for group in order if group < 5]
    assert sorted(first) == list(range(5))
    rounds = [-(-found[group] // 3) for group in first]
    assert rounds == sorted(rounds)  # begun together, taken by how many windows they took
    assert len(set(rounds)) > 1


def test_the_probabilities_are_those_of_the_weights_that_drew():
    policy, groups = ends_early(), CarriedGroups(2, 3, 2)
    steps = [taken(policy, groups, step) for step in range(4)]
    assert any(bool((step - found.begun > 0).any()) for step, found in enumerate(steps))
    for found in steps:  # the weights have stayed the same
        scores = policy.score(found.rollouts.prompts, found.rollouts.responses)
        for own, scored in zip(found.rollouts.logprobs, scores.logprobs, strict=True):
            torch.testing.assert_close(own, scored[: len(own)], atol=1e-4, rtol=1e-4)
    # and once they have changed, earlier windows keep theirs
    before = {item: torch.cat(r.logprobs) for item, r in groups._open.items()}
    assert before
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    later = [taken(policy, groups, step) for step in range(4, 9)]
    own = {
        2 * group + sample: found.rollouts.logprobs[2 * place + sample]
        for found in later
        for place, group in enumerate(found.groups)
        for sample in range(2)
    }
    for item, logprobs in before.items():
        assert own[item][: len(logprobs)].equal(logprobs)


def test_what_is_learnt_from_has_these_as_its_old_log_probabilities():
    values = {"model": "tiny", **LONG}
    method = GRPO(
        validated(GRPO.Config, values), Place(), data=ROWS, reward=vowels, model=ends_early()
    )
    for step in range(4):
        batch = method.collect(step)
        assert torch.equal(batch.old_logprobs, batch.sampled_logprobs)
        assert len(batch) == 4
        described = method.describe_batch(batch)
    assert described["rollout/carried"] > 0
    assert described["rollout/staleness"] > 0


def test_each_row_is_seen_as_often_as_the_others():
    method = GRPO(
        validated(GRPO.Config, {"model": "tiny", **LONG}),
        Place(),
        data=ROWS[:10],
        reward=vowels,
        model=ends_early(),
    )
    rows = [int(row) for step in range(25) for row in method.collect(step).row[::2]]
    counts = [rows.count(i) for i in range(10)]
    assert sum(counts) == 50
    assert max(counts) - min(counts) <= 2  # but for those under way


def test_a_run_learns_resumes_and_says_what_was_carried(settings, tmp_path):
    assert_resumes("grpo", tmp_path, **settings)
    rows = [row for row in untimed(tmp_path / "whole") if "loss" in row]
    assert len(rows) == 4
    assert any(row["rollout/carried"] > 0 for row in rows)
    assert any(abs(row["ratio/mean"] - 1) > 1e-4 for row in rows if row["rollout/carried"] > 0)


def trained(output, settings):
    train("grpo", output=output, **settings)


def test_two_processes_take_the_same_steps(settings, tmp_path):
    settings |= {"steps": 4, "learning_rate": 1e-3}
    trained(tmp_path / "one", settings)
    assert not together(2, tmp_path / "share", trained, tmp_path / "two", settings)
    one, two = (untimed(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        names = [n for n in a if n in ("loss", "gradient_norm", "reward", "rollout/carried")]
        assert [b[n] for n in names] == pytest.approx([a[n] for n in names], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("slug", "more", "line"),
    [
        (
            "dapo",
            {},
            "carry: this method draws again by what it has drawn first: expected 0, got 3",
        ),
        (
            "grpo",
            {"tool": "calculator"},
            "carry: this method has a tool answer between a response's turns: expected 0, got 3",
        ),
        (
            "grpo",
            {"sync_delay": 1},
            "sync_every, sync_delay: with carry the weights that draw are older already: "
            "expected 1 and 0",
        ),
        (
            "grpo",
            {"rollout": {"stop": ["\n"]}},
            "rollout.stop: a stop string could lie across two windows of carry: expected nothing, "
            "got ['\\n']",
        ),
        (
            "grpo",
            {"rollout": {"stale": 1, "workers": 1}},
            "carry: responses are carried over or drawn ahead, not both: expected 0 with "
            "rollout.stale=1, got 3",
        ),
        (
            "grpo",
            {"window": 12},
            "window: expected fewer than rollout.max_new_tokens, 12, got 12",
        ),
        ("grpo", {"carry": 0}, "window: carry is 0: expected nothing, got 3"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(settings, slug, more, line):
    rollout = {**LONG["rollout"], **more.get("rollout", {})}
    with pytest.raises(PostgradError) as caught:
        prepare(slug, **{**settings, **more, "rollout": rollout})
    assert str(caught.value) == line
