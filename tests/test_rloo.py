"""RLOO: REINFORCE on whole responses with the others' mean as baseline."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.rloo import RLOO
from postgrad.objectives.trajectory import clipped_responses
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 3, "max_new_tokens": 5}, "batch_size": 4}
LETTERS = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(**config):
    values = {"model": "tiny", **SHORT, **config}
    return RLOO(validated(RLOO.Config, values), Place(), data=ROWS, reward=letters)


def test_each_response_is_compared_with_the_others_mean():
    method = moved(made(beta=0.3))
    batch = method.collect(0)
    rewards = batch.scores - 0.3 * (batch.old - batch.reference)
    for row in range(4):
        for k in range(3):
            others = [float(rewards[row, j]) for j in range(3) if j != k]
            expected = float(rewards[row, k]) - sum(others) / 2
            assert float(batch.credit[row, k]) == pytest.approx(expected, abs=1e-5)


def test_with_one_step_it_is_reinforce():
    method = made()
    batch = method.collect(0)
    loss, _ = method.loss(batch)
    loss.backward()
    found = [p.grad.clone() for p in method.policy.parameters()]
    method.policy.zero_grad(set_to_none=True)
    total = 0.0
    for prompt, responses, advantages in zip(
        batch.prompts, batch.responses, batch.credit, strict=True
    ):
        logprobs = method.policy.score([prompt] * 3, responses).logprobs.sum(1)
        total = total - (advantages * logprobs).mean()
    (total / 4).backward()
    for got, parameter in zip(found, method.policy.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_moving_average_is_over_the_last_rewards_of_all_prompts():
    method = made(baseline="moving-average", baseline_window=18, beta=0.0)
    first, second = method.collect(0), method.collect(1)
    torch.testing.assert_close(first.credit, first.scores - first.scores.mean())
    recent = torch.cat([first.scores.flatten(), second.scores.flatten()])[-18:]
    torch.testing.assert_close(second.credit, second.scores - recent.mean())


def test_the_clip_stops_a_response_that_has_moved_enough():
    old = torch.zeros(1, 3)
    logprobs = torch.tensor([[0.3, -0.3, 0.3]], requires_grad=True)
    clipped_responses(logprobs, old, torch.tensor([[1.0, 1.0, -1.0]]), 0.2).sum().backward()
    expected = [0.0, -0.7408182 / 3, 1.3498588 / 3]
    assert logprobs.grad[0].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="one shape"):
        clipped_responses(logprobs, old, torch.ones(1, 2))


def test_it_learns(tmp_path):
    settings = {**SMALL, **SHORT, "batch_size": 12, "learning_rate": 3e-3, "beta": 0.01}
    train("rloo", data=ROWS, reward=letters, steps=40, output=tmp_path / "run", **settings)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    first, last = torch.tensor(rewards[:8]), torch.tensor(rewards[-8:])
    # far beyond the noise of a mean over eight steps
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.15, 4 * noise)


@pytest.mark.parametrize("baseline", ["leave-one-out", "moving-average"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(baseline, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(LETTERS)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "prompts.jsonl", ROWS),
        "reward": f"{reward}:letters",
        "baseline": baseline,
        "minibatches": 2,
        "save_every": 2,
    }
    assert_resumes("rloo", tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: .*at least 2 samples a prompt, got 1"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p: expected 1, got 0.9"),
        ({"eps": 1.0}, "eps: .*less than 1"),
        ({"baseline": "mean"}, "baseline: .*'leave-one-out' or 'moving-average'"),
        ({"baseline_window": 0}, "baseline_window: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_written(settings, message, tmp_path):
    given = {"data": ROWS, "reward": letters, **SMALL, **SHORT, **settings}
    with pytest.raises(PostgradError, match=message) as caught:
        train("rloo", output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
