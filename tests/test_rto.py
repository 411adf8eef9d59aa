"""RTO: token rewards of a DPO model beside PPO's, to printed digits and on the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, final_weights, untimed, write_rows
from postgrad.advantages.temporal import token_advantages
from postgrad.advantages.token_rewards import log_ratio_reward
from postgrad.api import train
from postgrad.batch import Batch
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.rlhf.rto import RTO
from postgrad.models.language import load_policy
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 8,
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


def nothing(completions):
    return [0.0] * len(completions)


def made(dpo_model=None, reward=vowels, **config):
    values = {"model": "tiny", **SHORT, **config}
    dpo_model = dpo_model or load_policy("tiny", seed=1)
    return RTO(validated(RTO.Config, values), Place(), data=ROWS, reward=reward,
               dpo_model=dpo_model)  # fmt: skip


def rows(*values):
    return torch.tensor([list(row) for row in values])


# Token rewards -------------------------------------------------------------------------------

DPO, REFERENCE = rows((-0.5, -2, -0.1, -1)), rows((-0.9, -1.2, -0.15, -3))
OLD = rows((-0.7, -1, -0.2, -2))
ALL = torch.ones(1, 4, dtype=torch.bool)


def known(dpo=DPO, old=OLD, reference=REFERENCE, mask=ALL, reward=0.8):
    return Batch(
        mask=mask,
        dpo_logprobs=dpo,
        old_logprobs=old,
        reference_logprobs=reference,
        reward=torch.full((len(mask),), reward),
        finished=torch.ones(len(mask), dtype=torch.bool),
    )


def test_the_worked_example():
    dense = log_ratio_reward(DPO, REFERENCE, ALL, scale=0.05, clip=0.05)
    expected = rows((0.02, -0.04, 0.0025, 0.05))
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=0)
    rewards = made().token_rewards(known())
    expected = rows((0.018, -0.042, 0.003, 0.84))
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)
    values = rows((0.5, 0.6, 0.6, 0.7))
    advantages, returns = token_advantages(rewards, values, ALL, discount=1.0, lambda_=0.95)
    expected = rows((0.291090, 0.182200, 0.236000, 0.140000))
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    expected = rows((0.791090, 0.782200, 0.836000, 0.840000))
    torch.testing.assert_close(returns, expected, atol=1e-6, rtol=0)
    to_go, _ = token_advantages(rewards, 0 * values, ALL, discount=1.0, lambda_=1.0)
    expected = rows((0.819, 0.801, 0.843, 0.84))
    torch.testing.assert_close(to_go, expected, atol=1e-6, rtol=0)


def test_without_a_limit_they_add_up_to_the_response():
    dense = log_ratio_reward(DPO, REFERENCE, ALL, scale=0.05)
    assert float(dense.sum()) == pytest.approx(0.05 * float(DPO.sum() - REFERENCE.sum()))


def test_the_limit_is_on_the_scaled_value():
    far = rows((3.0, -3.0, 0.5, -0.5))
    got = log_ratio_reward(far, torch.zeros(1, 4), ALL, scale=0.1, clip=0.2)
    torch.testing.assert_close(got, rows((0.2, -0.2, 0.05, -0.05)))


def test_padding_is_worth_nothing_whatever_it_holds():
    mask = torch.tensor([[True, True, False, False]])
    spoilt = DPO.masked_fill(~mask, torch.nan)
    dense = log_ratio_reward(spoilt, REFERENCE, mask, scale=0.05, clip=0.05)
    assert dense[0, 2:].tolist() == [0.0, 0.0]
    rewards = made().token_rewards(known(mask=mask))
    assert rewards[0, 2:].tolist() == [0.0, 0.0]
    # the response's reward is at its last token
    assert float(rewards[0, 1]) == pytest.approx(0.8 - 0.042)


def test_a_dpo_model_like_the_policy_pays_back_the_kl():
    method = made(dpo_reward_scale=0.01, dpo_reward_clip=0.0)
    rewards = method.token_rewards(known(dpo=OLD))
    torch.testing.assert_close(rewards, rows((0.0, 0.0, 0.0, 0.8)), atol=1e-7, rtol=0)


def test_the_reward_of_a_response_is_cut_then_scaled():
    method = made(reward_scale=0.5, kl_coefficient=0.0, dpo_reward_scale=0.0)
    for reward, worth in ((40.0, 5.0), (-40.0, -5.0), (4.0, 2.0)):
        rewards = method.token_rewards(known(reward=reward))
        assert rewards.tolist() == [[0.0, 0.0, 0.0, worth]]


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"must all be \[N, T\]"):
        log_ratio_reward(DPO, REFERENCE[:, :3], ALL, scale=0.05)
    with pytest.raises(ValueError, match="scale must be at least 0"):
        log_ratio_reward(DPO, REFERENCE, ALL, scale=-0.1)
    with pytest.raises(ValueError, match="clip must be above 0"):
        log_ratio_reward(DPO, REFERENCE, ALL, scale=0.1, clip=-0.1)


# Why they are token rewards --------------------------------------------------------------------


def solved(reward, reference, beta):
    """Optimum of a token MDP whose states are letters: log pi* and V, `[T, S, A]`, `[T, S]`.

    `reward` and log `reference` are `[T, S, A]`; the state after an action is that letter.
    """
    steps, states, _ = reward.shape
    value = torch.zeros(steps + 1, states, dtype=reward.dtype)
    policy = torch.zeros_like(reward)
    for t in reversed(range(steps)):
        scores = reference[t] + (reward[t] + value[t + 1]) / beta
        value[t] = beta * scores.logsumexp(-1)
        policy[t] = scores.log_softmax(-1)
    return policy, value


def test_the_log_ratio_of_an_optimum_is_the_reward_up_to_a_potential():
    """So their advantages are equal, and their sums differ by the value of the beginning."""
    random = torch.Generator().manual_seed(0)
    steps, letters, beta = 6, 5, 0.3
    shape = steps, letters, letters
    reward = torch.randn(shape, generator=random, dtype=torch.float64)
    reference = torch.randn(shape, generator=random, dtype=torch.float64).log_softmax(-1)
    policy, value = solved(reward, reference, beta)
    path = torch.randint(letters, (20, steps + 1), generator=random)
    state, action = path[:, :-1], path[:, 1:]
    time = torch.arange(steps)
    mask = torch.ones(20, steps, dtype=torch.bool)
    dense = log_ratio_reward(
        policy[time, state, action], reference[time, state, action], mask, scale=beta
    )
    own = reward[time, state, action]
    begun = value[0, path[:, 0]]
    torch.testing.assert_close(dense.sum(1), own.sum(1) - begun)
    # a critic that is right about both: it is lower by V where rewards are log-ratios
    critic = torch.randn(20, steps, generator=random, dtype=torch.float64)
    shifted = critic - value[time, state]
    for lambda_ in (0.0, 0.95, 1.0):
        settings = {"discount": 1.0, "lambda_": lambda_}
        plain, _ = token_advantages(own, critic, mask, **settings)
        shaped, _ = token_advantages(dense, shifted, mask, **settings)
        torch.testing.assert_close(shaped, plain)


# The method ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "settings"), [(1, {"dpo_reward_scale": 0.0}), (0, {"dpo_reward_scale": 1.0})]
)
def test_without_a_dpo_model_that_differs_it_is_ppo(seed, settings, tmp_path):
    """With a scale of 0, or with the reference itself as the DPO model."""
    own = {**SMALL, **SHORT, "steps": 3, "kl_coefficient": 0.02, "epochs": 1, "critic_rate": 2.0,
           "aggregation": "token-mean", "adam_betas": (0.9, 0.95)}  # fmt: skip
    other = load_policy("tiny", seed=seed)
    train("rto", data=ROWS, reward=vowels, dpo_model=other, output=tmp_path / "rto",
          **own, **settings)  # fmt: skip
    train("ppo-language", data=ROWS, reward=vowels, output=tmp_path / "ppo", **own)
    first, second = final_weights(tmp_path / "rto"), final_weights(tmp_path / "ppo")
    assert all(torch.equal(first[name], second[name]) for name in second)
    more = {"reward/dpo", "dpo_reward/clipped"}
    kept = [{k: v for k, v in row.items() if k not in more} for row in untimed(tmp_path / "rto")]
    assert kept == untimed(tmp_path / "ppo")


def test_a_batch_knows_what_the_dpo_model_says():
    other = load_policy("tiny", seed=1)
    method = made(other, dpo_reward_clip=0.0, dpo_reward_scale=0.5)
    batch = method.collect(0)
    with torch.no_grad():
        said = other.score(batch.prompts, batch.responses).logprobs
    torch.testing.assert_close(batch.dpo_logprobs, said)
    ratio = 0.5 * (batch.dpo_logprobs - batch.reference_logprobs).sum(1)
    torch.testing.assert_close(batch.fields()["reward/dpo"], ratio)
    metrics = method.describe_batch(batch)
    assert metrics["reward/dpo"] == pytest.approx(float(ratio.mean()))
    assert metrics["dpo_reward/clipped"] == 0
    method = made(other, dpo_reward_clip=0.05, dpo_reward_scale=0.5)
    assert 0 < method.describe_batch(method.collect(0))["dpo_reward/clipped"] < 1
    assert set(method.modules()) == {"policy", "critic"}


def test_token_rewards_alone_teach_what_the_dpo_model_prefers(tmp_path):
    """Nothing else is paid: the policy's responses become likelier to the DPO model."""
    preferring = load_policy("tiny")
    demonstrations = [{"prompt": row["prompt"], "completion": "aeiouo"} for row in ROWS]
    trained = train(
        "sft", model=preferring, data=demonstrations, steps=10, output=tmp_path / "sft",
        **{key: value for key, value in SMALL.items() if key != "model"},
    )  # fmt: skip
    train(
        "rto",
        data=ROWS * 8,
        reward=nothing,
        dpo_model=trained.method.policy,
        output=tmp_path / "run",
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
            "dpo_reward_scale": 1.0,
            "dpo_reward_clip": 0.0,
        },
    )
    paid = [row["reward/dpo"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert all(map(math.isfinite, paid))
    assert sum(paid[-3:]) / 3 > sum(paid[:3]) / 3 + 2


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    load_policy("tiny", seed=1).save(tmp_path / "dpo")
    settings = {
        **SMALL,
        **SHORT,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{reward}:vowels",
        "dpo_model": tmp_path / "dpo",
    }
    assert_resumes("rto", tmp_path, **settings)


def refused(tmp_path, message, **config):
    with pytest.raises(PostgradError, match=message) as caught:
        train("rto", data=ROWS, reward=vowels, output=tmp_path / "run", **{**SMALL, **config})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "dpo_model: expected a folder or the Hub id of a model, got nothing"),
        ({"dpo_model": "./nowhere"}, "dpo_model: .*nowhere"),
        ({"dpo_model": "tiny", "dpo_reward_clip": -0.1}, "dpo_reward_clip: .*or equal to 0"),
        ({"dpo_model": "tiny", "dpo_reward_scale": -0.1}, "dpo_reward_scale: .*or equal to 0"),
        ({"dpo_model": "tiny", "reward_clip": 0}, "reward_clip: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named(config, message, tmp_path):
    refused(tmp_path, message, **config)


def test_a_dpo_model_of_other_tokens_is_refused(tmp_path):
    other = load_policy("tiny")
    other.tokenizer.add_tokens(["<other>"])
    refused(tmp_path, "dpo_model: .* has another vocabulary than the model tiny", dpo_model=other)


def test_a_dpo_model_that_cannot_read_so_far_is_refused(tmp_path):
    other = load_policy("tiny")
    other.context_length = 16
    refused(
        tmp_path, "dpo_model: .* has a context of 16 tokens, but .* may have 17", dpo_model=other,
        rollout={"max_new_tokens": 16},
    )  # fmt: skip
