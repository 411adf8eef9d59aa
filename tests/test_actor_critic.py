"""PPO with a value head on language."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.penalties import AdaptiveCoefficient
from postgrad.advantages.temporal import token_advantages
from postgrad.api import train
from postgrad.batch import Batch
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.actor_critic import (
    ActorCritic,
    ActorCriticSettings,
    at_last_token,
)
from postgrad.models.language import load_policy
from postgrad.models.scalar import ScalarModel
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
    "epochs": 2,
    "minibatches": 2,
    "rollout": {"samples": 1, "max_new_tokens": 6},
    "frontier": {"max_new_tokens": 6},
}


REWARD = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def made(reward=vowels, **config):
    values = {"model": "tiny", **SHORT, **config}
    return ActorCritic(validated(ActorCriticSettings, values), Place(), data=ROWS, reward=reward)


def rows(*values):
    return torch.tensor([list(row) for row in values])


def test_advantages_of_tokens_worked_out_by_hand():
    """gamma 1, lambda 0.95, one reward at the end less the KL of each token."""
    rewards = rows((0.018, -0.042, 0.003, 0.84))
    values = rows((0.5, 0.6, 0.6, 0.7))
    mask = torch.ones(1, 4, dtype=torch.bool)
    advantages, returns = token_advantages(rewards, values, mask, discount=1.0, lambda_=0.95)
    expected = rows((0.291090, 0.182200, 0.236000, 0.140000))
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    expected = rows((0.791090, 0.782200, 0.836000, 0.840000))
    torch.testing.assert_close(returns, expected, atol=1e-6, rtol=0)


def test_advantages_ignore_padding():
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=random)
    lengths = torch.tensor([5, 2, 1])
    mask = torch.arange(5) < lengths[:, None]
    spoilt = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    found = token_advantages(*spoilt, mask, discount=0.9, lambda_=0.8)
    for i, length in enumerate(lengths.tolist()):
        alone = token_advantages(
            rewards[i : i + 1, :length],
            values[i : i + 1, :length],
            mask[i : i + 1, :length],
            discount=0.9,
            lambda_=0.8,
        )
        for all_of_them, one in zip(found, alone, strict=True):
            torch.testing.assert_close(all_of_them[i, :length], one[0])
            assert (all_of_them[i, length:] == 0).all()


def test_advantages_without_bootstrapping_are_rewards_to_go():
    rewards = rows((0.0, 1.0, -1.0, 2.0))
    mask = torch.ones(1, 4, dtype=torch.bool)
    zeros = torch.zeros(1, 4)
    advantages, _ = token_advantages(rewards, zeros, mask, discount=1.0, lambda_=1.0)
    assert advantages.tolist() == [[2.0, 2.0, 1.0, 2.0]]
    advantages, _ = token_advantages(rewards, zeros, mask, discount=0.0, lambda_=0.0)
    assert advantages.tolist() == rewards.tolist()


def test_a_mask_with_a_gap_is_refused():
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="gaps"):
        token_advantages(torch.zeros(1, 3), torch.zeros(1, 3), mask, discount=1.0, lambda_=1.0)


def test_token_rewards_by_hand():
    """r_t = -beta log(pi_old/pi_ref) + [t last] R, and a penalty where the end is missing."""
    found = made(kl_coefficient=0.02, missing_end_penalty=1.0)
    batch = Batch(
        mask=torch.tensor([[True] * 3, [True] * 3]),
        old_logprobs=rows((-1.0, -2.0, -0.5), (-1.0, -2.0, -0.5)),
        reference_logprobs=rows((-1.2, -1.5, -0.5), (-1.2, -1.5, -0.5)),
        reward=torch.tensor([7.0, 7.0]),
        finished=torch.tensor([True, False]),
    )
    expected = rows((-0.004, 0.010, 7.0), (-0.004, 0.010, 6.0))
    torch.testing.assert_close(found.token_rewards(batch), expected)
    found = made(kl_coefficient=1.0, kl_estimate="k3")
    expected = torch.tensor([-0.018731, -0.148721, 7.0])
    torch.testing.assert_close(found.token_rewards(batch)[0], expected, atol=1e-6, rtol=0)


def test_the_worth_is_at_the_last_token():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert at_last_token(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 2, 0], [3, 0, 0]]


def test_the_kl_coefficient_follows_its_target():
    coefficient = AdaptiveCoefficient(0.005, 0.5)
    coefficient.update(0.9)
    assert coefficient.value == pytest.approx(0.005100, abs=1e-9)
    coefficient.update(0.45)
    assert coefficient.value == pytest.approx(0.005049, abs=1e-9)
    fixed = AdaptiveCoefficient(0.005)
    fixed.update(100.0)
    assert fixed.value == 0.005
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveCoefficient(0.1, 0.0)


def test_at_the_start_the_gradient_is_the_policy_gradient():
    """rho = 1: the clipped surrogate has the gradient of -mean A log pi."""
    found = made(epochs=1, minibatches=1)
    batch = found.collect(0)
    value, _ = found.loss(batch)
    value.backward()
    own = {name: p.grad.clone() for name, p in found.policy.named_parameters()}
    found.policy.zero_grad()
    logprobs = found.policy.score(batch.prompts, batch.responses).logprobs
    (-(batch.advantages * logprobs)[batch.mask].sum() / batch.tokens).backward()
    for name, parameter in found.policy.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_value_loss_is_half_the_mean_squared_error_at_the_start():
    found = made()
    batch = found.collect(0)
    value, _ = found.value_loss(batch)
    errors = (batch.old_values - batch.returns)[batch.mask].square()
    assert float(value.detach()) == pytest.approx(float(errors.mean() / 2), rel=1e-5)


def test_policy_and_critic_share_no_weights():
    found = made()
    names = found.modules()
    tensors = [{id(p) for p in module.parameters()} for module in names.values()]
    assert list(names) == ["policy", "critic"]
    assert not tensors[0] & tensors[1]


def test_it_learns(tmp_path):
    train(
        "ppo-language",
        data=ROWS * 8,
        reward=vowels,
        output=tmp_path,
        **{
            **SMALL,
            **SHORT,
            "steps": 12,
            "batch_size": 32,
            "minibatches": 1,
            "epochs": 4,
            "learning_rate": 3e-3,
            "critic_rate": 1.0,
            "kl_coefficient": 0.0,
        },
    )
    rewards = [row["reward"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.45


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{reward}:vowels",
        "kl_target": 0.1,
    }
    assert_resumes("ppo-language", tmp_path, **settings)


def test_the_critic_may_start_from_a_reward_model(tmp_path):
    model = ScalarModel.on_body_of(load_policy("tiny"))
    torch.nn.init.ones_(model.head.weight)
    model.save(tmp_path)
    found = made(critic=str(tmp_path))
    assert (found.critic.head.weight == 1).all()


def test_faults():
    with pytest.raises(PostgradError, match="minibatches: 9 optimiser steps"):
        made(minibatches=9)
    with pytest.raises(PostgradError, match="reward: rows brings no verifier"):
        made(reward=None)
    with pytest.raises(PostgradError, match="critic_rate"):
        made(critic_rate=0.0)
