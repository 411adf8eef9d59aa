"""Best of n: what is kept, the loss, the measured best and its bound, resuming, faults."""

import math

import pytest
import torch

from language_runs import SMALL, assert_same_run, write_rows
from postgrad.advantages.pairing import best_of_n_divergence
from postgrad.api import resume, train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.supervised.best_of_n import BestOfN, BestOfNSettings
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
REWARD = """
def letters(completions, **columns):
    return [float(sum(c.isalpha() for c in text)) for text in completions]
"""


def letters(completions):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def made(reward=letters, **config):
    values = {"model": "tiny", **SHORT, "frontier": {"max_new_tokens": 5}, **config}
    return BestOfN(
        validated(BestOfNSettings, values), Place(), data=ROWS, eval_data=ROWS, reward=reward
    )


def test_the_best_of_each_prompts_samples_is_kept_the_first_of_equals():
    method = made()
    batch = method.collect(0)
    assert batch.rewards.shape == (4, 4)
    assert letters(batch.texts) == batch.rewards.amax(1).tolist()
    same = made(lambda completions: [1.0] * len(completions))
    rollouts = same._drawn(batch.prompts, "rollout", 0)
    assert same.collect(0).texts == rollouts.texts[::4]


def test_the_loss_is_supervised_fine_tunings():
    method = made()
    batch = method.collect(0)
    with torch.no_grad():
        loss, _ = method.loss(batch)
        total, count = 0.0, 0
        for prompt, response in zip(batch.prompts, batch.responses, strict=True):
            labels = torch.cat([torch.full_like(prompt, -100), response])
            logits = method.policy.network(torch.cat([prompt, response])[None]).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            )
            count += len(response)
    assert float(loss) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_of_the_best_of_n_is_the_known_one(n):
    """Of many equally likely, differently good samples the best of n has this KL to one of them."""
    count = 200_000
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    best = edges[1:] ** n - edges[:-1] ** n
    exact = (best * (best * count).log()).sum()
    assert best_of_n_divergence(n) == pytest.approx(float(exact), abs=1e-3)


def test_the_divergence_of_four_and_of_none():
    assert best_of_n_divergence(4) == pytest.approx(0.636294, abs=1e-6)
    assert best_of_n_divergence(1) == 0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_divergence(0)


def test_evaluation_measures_the_best_of_n_of_the_initial_policy():
    method = made(frontier={"max_new_tokens": 5, "samples": 4})
    with torch.no_grad():
        found = method.evaluate()
        assert found["best_of_n/reward"] > found["reward"]
        assert found["best_of_n/kl"] == pytest.approx(math.log(4) - 0.75)
        for parameter in method.policy.parameters():
            parameter.mul_(0.5)
        later = method.evaluate()
        fresh = made(frontier={"max_new_tokens": 5, "samples": 4})
        fresh.policy.network.load_state_dict(method.policy.network.state_dict())
        # also where it is first measured after training
        assert fresh.evaluate()["best_of_n/reward"] == found["best_of_n/reward"]
    assert later["best_of_n/reward"] == found["best_of_n/reward"]
    assert later["kl"] > 0.01


def test_it_learns_to_say_letters(tmp_path):
    (tmp_path / "judge.py").write_text(REWARD)
    train(
        "best-of-n",
        data=write_rows(tmp_path / "rows.jsonl", ROWS),
        reward=f"{tmp_path / 'judge.py'}:letters",
        output=tmp_path / "run",
        steps=30,
        **SMALL,
        **SHORT,
    )
    rewards = [row["reward"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "judge.py").write_text(REWARD)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_rows(tmp_path / "held.jsonl", ROWS[:6]),
        "frontier": {"max_new_tokens": 5},
        "reward": f"{tmp_path / 'judge.py'}:letters",
        "save_every": 2,
    }
    train("best-of-n", steps=4, output=tmp_path / "whole", evaluate_every=2, **settings)
    train("best-of-n", steps=2, output=tmp_path / "parts", evaluate_every=2, **settings)
    resume(tmp_path / "parts", steps=4, allow_changes=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollout": {"samples": 1}}, "at least 2 samples a prompt, got 1"),
        ({"reward": None}, "brings no verifier of its own"),
        ({"reward_time_limit": 0}, "reward_time_limit: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(PostgradError, match=message) as caught:
        made(**setting)
    assert "\n" not in str(caught.value)
