"""The baselines on the estimator, each as the small change that it is; Lite PPO among them."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, untimed, write_rows
from postgrad.advantages.group import group_standardised, lite
from postgrad.api import train
from postgrad.catalogue import method_class
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import NothingToLearn, Place
from postgrad.sampling.selection import first_groups, informative_groups

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}
BASELINES = ("reinforce", "reinforce-plus-plus", "dr-grpo", "dapo", "gspo", "lite-ppo")
LITE = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1])
GROUPS = torch.arange(3).repeat_interleave(4)


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def vowels(completions):
    return [float(any(c in "aeiou" for c in text)) for text in completions]


def made(slug, reward=letters, **config):
    kind = method_class(slug)
    values = {"model": "tiny", **SHORT, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS, reward=reward)


def rows_of(*values):
    return torch.tensor([value for row in values for value in row])


# Lite PPO's advantage ----------------------------------------------------------------------------


def test_the_worked_example():
    high, low = 1.523254, 0.507751
    expected = rows_of([high, -low, -low, -low], [low, low, low, -high], [0, 0, 0, 0])
    torch.testing.assert_close(lite(LITE, GROUPS), expected, atol=1e-6, rtol=0)
    high, low = 1.499997, 0.499999
    expected = rows_of([high, -low, -low, -low], [low, low, low, -high], [0, 0, 0, 0])
    found = group_standardised(LITE, GROUPS, eps=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_prompt_has_the_advantages_of_grpo():
    rewards, one = LITE[:8], torch.zeros(8, dtype=torch.long)
    torch.testing.assert_close(lite(rewards, one), group_standardised(rewards, one, eps=1e-6))


def test_scale_and_level_of_the_rewards_do_not_matter():
    torch.testing.assert_close(
        lite(3 * LITE - 7, GROUPS, eps=0.0), lite(LITE, GROUPS, eps=0.0), atol=1e-5, rtol=0
    )
    sums = torch.zeros(3).index_add(0, GROUPS, lite(LITE, GROUPS))
    torch.testing.assert_close(sums, torch.zeros(3), atol=1e-6, rtol=0)
    twice = torch.cat([LITE, LITE])
    groups = torch.cat([GROUPS, GROUPS + 3])
    torch.testing.assert_close(
        lite(twice, groups, "population")[:12], lite(LITE, GROUPS, "population")
    )


def test_a_nearly_solved_group_does_not_stand_out():
    """One wrong of eight: its own deviation makes much of it, the batch's does not."""
    easy = torch.ones(16)
    easy[3] = 0
    easy[8:12] = 0
    groups = torch.arange(2).repeat_interleave(8)
    alone = float(group_standardised(easy, groups)[3])
    assert alone == pytest.approx(-2.474, abs=1e-3)
    assert float(lite(easy, groups)[3]) > -1.9


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must both be \[N\]"):
        lite(LITE, GROUPS[:3])
    with pytest.raises(ValueError, match="at least 2"):
        lite(LITE[:1], GROUPS[:1])


# Which groups are informative --------------------------------------------------------------------


def test_groups_with_a_difference():
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0])
    groups = torch.tensor([7, 7, 2, 2, 5, 5])
    assert informative_groups(rewards, groups).tolist() == [False, False, True, True, False, False]
    assert first_groups(groups, 2).tolist() == [2, 3, 4, 5]
    assert informative_groups(rewards[:0], groups[:0]).tolist() == []
    with pytest.raises(ValueError, match="rewards and groups"):
        informative_groups(rewards, groups[:2])


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    method = made("dapo", reward=vowels, most_rounds=6)
    batch = method.collect(0)
    assert len(batch) == 16
    for group in batch.group.unique():
        assert len(set(batch.reward[batch.group == group].tolist())) == 2
    assert batch.advantages.ne(0).all()
    assert 0 < method.describe_batch(batch)["reward/left_out"] < 1
    again = made("dapo", reward=vowels, most_rounds=6).collect(0)
    assert again.texts == batch.texts


def test_without_further_rounds_groups_are_just_left_out():
    batch = made("dapo", reward=vowels, most_rounds=1).collect(0)
    assert 0 < len(batch) < 16
    assert len(batch) % 4 == 0


def test_where_no_group_differs_the_step_is_passed_over(tmp_path):
    method = made("dapo", reward=lambda completions: [1.0] * len(completions))
    with pytest.raises(NothingToLearn, match="all rewards of a prompt are equal"):
        method.collect(0)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {"data": data, "reward": "numeric", "most_rounds": 1, **SMALL, **SHORT}
    train("dapo", steps=2, output=tmp_path / "run", **settings)
    assert all("loss" not in row for row in untimed(tmp_path / "run"))


# What each of them is ----------------------------------------------------------------------------


def gradient(method, batch):
    method.policy.zero_grad(set_to_none=True)
    method.loss(batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in method.policy.parameters()])


def test_dr_grpo_is_the_gradient_of_whole_responses_over_a_constant():
    method = made("dr-grpo")
    batch = method.collect(0)
    got = gradient(method, batch)
    method.policy.zero_grad(set_to_none=True)
    scores = method._score(batch)
    means = batch.reward.view(4, 4).mean(1).repeat_interleave(4)
    (-((batch.reward - means) * scores.logprobs.sum(1)).mean() / 5).backward()
    expected = torch.cat([p.grad.flatten() for p in method.policy.parameters()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_reinforce_takes_earlier_rewards_for_its_baseline():
    method = made("reinforce")
    first, second = method.collect(0), method.collect(1)
    assert first.advantages.equal(first.reward)
    torch.testing.assert_close(second.advantages, second.reward - first.reward.mean())
    # the older policy's probabilities do not matter to it
    moved = second.with_fields(old_logprobs=second.sampled_logprobs - 1.0)
    torch.testing.assert_close(gradient(method, second), gradient(method, moved))


def test_reinforce_plus_plus_compares_the_whole_batch():
    batch = made("reinforce-plus-plus", rollout={"samples": 1, "max_new_tokens": 5}).collect(0)
    assert len(batch) == 4
    expected = (batch.reward - batch.reward.mean()) / (batch.reward.std() + 1e-6)
    torch.testing.assert_close(batch.advantages, expected)


def test_gspo_clips_whole_responses():
    method = made("gspo")
    batch = method.collect(0)
    random = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(batch.old_logprobs.shape, generator=random)
    batch = batch.with_fields(old_logprobs=batch.old_logprobs + noise * batch.mask)
    scores = method._score(batch)
    losses, _ = method.token_losses(batch, scores)
    for row, mask in zip(losses.detach(), scores.mask, strict=True):
        assert len(set(row[mask].tolist())) == 1
    grads = torch.autograd.grad(losses[scores.mask].sum(), scores.logprobs)[0]
    stopped = [bool((row[mask] == 0).all()) for row, mask in zip(grads, scores.mask, strict=True)]
    assert any(stopped)
    assert not all(stopped)


@pytest.mark.parametrize("slug", BASELINES)
def test_it_trains_learns_and_resumes(slug, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    settings = {
        "data": data,
        "reward": f"{reward}:letters",
        **SMALL,
        "batch_size": 4,
        "rollout": {"samples": 8, "max_new_tokens": 5},
    }
    assert_resumes(slug, tmp_path, **settings)
    if slug == "gspo":
        settings["mask"] = {"clip_low": 0.1, "clip_high": 0.1}
    train(slug, steps=30, output=tmp_path / "long", **{**settings, "learning_rate": 5e-3})
    rewards = [row["reward"] for row in untimed(tmp_path / "long") if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_groups_are_asked_for_where_they_are_compared(tmp_path):
    one = {"rollout": {"samples": 1, "max_new_tokens": 5}}
    for slug in ("dr-grpo", "gspo", "lite-ppo"):
        with pytest.raises(PostgradError, match=r"rollout.samples: .* at least 2 samples, got 1"):
            made(slug, **one)
