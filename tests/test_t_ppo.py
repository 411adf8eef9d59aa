"""Truncated PPO: extended GAE, responses that go on, and which tokens the two losses are of."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.temporal import egae, token_advantages
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.t_ppo import TPPO
from postgrad.models.language import load_policy
from postgrad.sampling.generation import SamplingSettings, generate
from postgrad.sampling.slots import Slots
from postgrad.seeding import derive
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": letter} for letter in "abcdefgh"]
SHORT = {
    "batch_size": 4,
    "minibatches": 2,
    "critic_warm_up": 0,
    "window": 3,
    "rollout": {"samples": 1, "max_new_tokens": 8},
    "frontier": {"max_new_tokens": 8},
}
REWARD = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]
"""


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]


def ends_early(policy):
    """The policy, with an end token that is drawn about every fifth time."""
    policy.end_tokens = frozenset(range(3, 22))
    return policy


def made(reward=vowels, **config):
    values = {"model": "tiny", **SHORT, **config}
    return TPPO(
        validated(TPPO.Config, values),
        Place(),
        data=ROWS,
        reward=reward,
        model=ends_early(load_policy("tiny")),
    )


def optimisers(method, rate=1e-12):
    loop = LoopSettings(learning_rate=rate, clip_norm=0)
    return Optimisers(method.modules(), loop, torch.device("cpu"), method.rates())


def row(*values):
    return torch.tensor([values])


# Extended GAE ------------------------------------------------------------------------------------

VALUES = row(0.2, 0.3, 0.5, 0.4)
NOTHING, ALL = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
END = row(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("rewards", "finished", "discount", "lambda_", "expected"),
    [
        (NOTHING, False, 1.0, 0.95, (0.199750, 0.105000, -0.100000, 0.0)),
        (NOTHING, False, 0.99, 0.95, (0.185078, 0.093650, -0.107762, -0.004000)),
        (NOTHING, True, 1.0, 0.95, (-0.143200, -0.256000, -0.480000, -0.400000)),
        (END, True, 1.0, 0.95, (0.714175, 0.646500, 0.470000, 0.600000)),
        (END, True, 1.0, 1.0, (0.8, 0.7, 0.5, 0.6)),
    ],
)
def test_the_worked_example(rewards, finished, discount, lambda_, expected):
    got = egae(rewards, VALUES, ALL, torch.tensor([finished]), discount=discount, lambda_=lambda_)
    torch.testing.assert_close(got, row(*expected), atol=1e-6, rtol=0)


def windows(seed=0):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 3, 1, 4])
    mask = torch.arange(5) < lengths[:, None]
    finished = torch.tensor([True, False, False, True])
    values = torch.randn(4, 5, generator=random)
    rewards = torch.zeros(4, 5)
    rewards[0, 4] = rewards[3, 3] = 1.0
    return rewards, values, mask, finished


def test_of_finished_responses_it_is_gae():
    rewards, values, mask, _ = windows()
    for lambda_ in (0.0, 0.5, 1.0):
        got = egae(rewards, values, mask, torch.ones(4).bool(), discount=0.9, lambda_=lambda_)
        expected, _ = token_advantages(rewards, values, mask, discount=0.9, lambda_=lambda_)
        assert got.equal(expected)


def test_an_unfinished_response_is_worth_its_last_value():
    """With lambda = 1: A_t = V(s_{e-1}) - V(s_t); nothing is read beyond the window."""
    rewards, values, mask, finished = windows()
    spoilt = values.masked_fill(~mask, torch.nan)
    got = egae(rewards, spoilt, mask, finished, discount=1.0, lambda_=1.0)
    torch.testing.assert_close(got[1, :3], values[1, 2] - values[1, :3])
    assert float(got[2, 0]) == 0.0
    assert bool((got[~mask] == 0).all())
    alike = egae(0 * rewards, torch.full((4, 5), 0.7), mask, ~mask[:, 0], discount=1.0, lambda_=0.9)
    torch.testing.assert_close(alike, torch.zeros(4, 5), atol=1e-6, rtol=0)


def test_it_is_less_biased_than_taking_a_windows_end_for_the_end():
    """Values that are right: every advantage of a martingale is 0 in expectation but for one."""
    random = torch.Generator().manual_seed(0)
    steps = 0.1 * torch.randn(4000, 6, generator=random)
    values = 0.5 + torch.cumsum(steps, 1)  # V(s_t), right if the future is like the past
    nothing, mask = torch.zeros(4000, 6), torch.ones(4000, 6, dtype=torch.bool)
    cut = torch.zeros(4000, dtype=torch.bool)
    kept = egae(nothing, values, mask, cut, discount=1.0, lambda_=0.95)
    naive, _ = token_advantages(nothing, values, mask, discount=1.0, lambda_=0.95)
    assert kept.mean(0).abs().max() < 0.01
    assert naive.mean(0).abs().min() > 0.3


def test_wrong_calls_are_refused():
    rewards, values, mask, finished = windows()
    gap = torch.tensor([[True, False, True]])
    three = torch.zeros(1, 3)
    for call, message in (
        (lambda: egae(rewards, values, mask, ~finished, discount=1.0, lambda_=1.0), "no reward"),
        (lambda: egae(rewards, values, mask, finished[:2], discount=1.0, lambda_=1.0), r"\[4\]"),
        (lambda: egae(rewards, values[:2], mask, finished, discount=1.0, lambda_=1.0), r"\[N, T\]"),
        (lambda: egae(three, three, gap, gap[0, :1], discount=1.0, lambda_=1.0), "gaps"),
        (lambda: Slots(0), "at least one slot"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Responses that go on ----------------------------------------------------------------------------


def test_slots_continue_what_is_unfinished_and_refill_what_is_not():
    policy = ends_early(load_policy("tiny"))
    prompts = [policy.render(r["prompt"]) for r in ROWS]
    slots, settings = Slots(3), SamplingSettings(max_new_tokens=8)
    earlier, begun, ended, full = {}, 0, 0, 0
    for _ in range(12):
        step = slots.advance(policy, lambda item: prompts[item % 8], settings, 3, seed=7)
        assert len(step.items) == 3
        for i, item in enumerate(step.items):
            if item not in earlier:
                assert item == begun  # in order, each once
                begun += 1
            before = earlier.get(item, torch.zeros(0, dtype=torch.long))
            new = step.rollouts.responses[i]
            assert 1 <= len(new) <= 3
            assert step.rollouts.prompts[i].equal(torch.cat([prompts[item % 8], before]))
            assert step.whole[i].equal(torch.cat([before, new]))
            over = int(new[-1]) in policy.end_tokens
            assert bool(step.complete[i]) == (over or len(step.whole[i]) == 8)
            ended, full = ended + over, full + (not over and bool(step.complete[i]))
            earlier[item] = step.whole[i] if not step.complete[i] else None
    assert ended > 2
    assert full > 0
    assert begun > 6


def test_a_window_is_drawn_as_its_policy_would_go_on():
    """The same tokens as an ordinary response to prompt and beginning, by the seed of its place."""
    policy = ends_early(load_policy("tiny"))
    prompt, slots = policy.render("a"), Slots(1)
    settings = SamplingSettings(max_new_tokens=8)
    first = slots.advance(policy, lambda item: prompt, settings, 2, seed=3)
    assert not bool(first.complete[0])
    second = slots.advance(policy, lambda item: prompt, settings, 2, seed=3)
    alone = generate(
        policy,
        [torch.cat([prompt, first.whole[0]])],
        SamplingSettings(max_new_tokens=2),
        seeds=[derive(3, "window", 0, 2)],
    )
    assert second.rollouts.responses[0].equal(alone.responses[0])


# The method --------------------------------------------------------------------------------------


def some_steps(method, count):
    return [method.collect(step) for step in range(count)]


def test_only_complete_responses_are_judged_and_by_the_whole_of_them():
    seen = []

    def reward(completions):
        seen.extend(completions)
        return vowels(completions)

    method = made(reward=reward)
    texts = []
    for batch in some_steps(method, 6):
        for i in range(len(batch)):
            text = method.policy.decode(batch.so_far[i])
            if batch.complete[i]:
                texts.append(text)
                assert float(batch.reward[i]) == pytest.approx(vowels([text])[0])
            else:
                assert float(batch.reward[i]) == 0.0
            last = int(batch.mask[i].sum()) - 1
            assert float(batch.token_rewards[i, last]) == float(batch.reward[i])
            assert float(batch.token_rewards[i].abs().sum()) == float(batch.reward[i])
    assert seen == texts
    assert any(len(text) > 3 for text in texts)


def test_the_policy_learns_from_the_windows_tokens_alone():
    method = made(standardise=False)
    batch = some_steps(method, 3)[-1]
    moved(method, 0.01)
    assert any(len(whole) > 3 for whole in batch.so_far)
    method.policy.zero_grad()
    loss, metrics = method.loss(batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in method.policy.named_parameters()}
    # by the plain formula, over whole responses of which only the last tokens count
    method.policy.zero_grad()
    scores = method.policy.score(batch.origin, batch.so_far)
    total, tokens = 0.0, int(batch.mask.sum())
    for i, whole in enumerate(batch.so_far):
        new = scores.logprobs[i, len(whole) - int(batch.mask[i].sum()) : len(whole)]
        advantages = batch.advantages[i, : len(new)]
        ratio = (new - batch.old_logprobs[i, : len(new)]).exp()
        bounded = ratio.clamp(0.8, 1.28)
        total = total - torch.minimum(ratio * advantages, bounded * advantages).sum() / tokens
    assert loss.item() == pytest.approx(float(total.detach()), abs=1e-6)
    total.backward()
    for name, parameter in method.policy.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-3)
    assert metrics["ratio/mean"] != 1.0


def test_the_sampled_log_probabilities_are_the_old_ones():
    batch = some_steps(made(), 3)[-1]
    torch.testing.assert_close(
        batch.old_logprobs[batch.mask], batch.sampled_logprobs[batch.mask], atol=1e-5, rtol=0
    )


def test_the_critic_learns_from_all_tokens_of_finished_responses():
    method = made(discount=0.9)
    batch = next(
        b
        for b in some_steps(method, 8)
        if any(done and len(w) > 3 for done, w in zip(b.complete, b.so_far, strict=True))
    )
    whole = method.finished_responses(batch)
    done = batch.complete.nonzero().squeeze(1).tolist()
    assert len(whole) == len(done)
    for k, i in enumerate(done):
        length = len(batch.so_far[i])
        assert whole.responses[k].equal(batch.so_far[i])
        assert whole.prompts[k].equal(batch.origin[i])
        expected = [float(batch.reward[i]) * 0.9 ** (length - 1 - t) for t in range(length)]
        assert whole.returns[k, :length].tolist() == pytest.approx(expected)
        assert not bool(whole.mask[k, length:].any())
    with torch.no_grad():
        loss, _ = method.value_loss(whole)
        values = method.critic.values(whole.prompts, whole.responses)
    error = (values - whole.returns)[whole.mask].square().mean() / 2
    assert loss.item() == pytest.approx(float(error), abs=1e-6)


def test_without_a_finished_response_the_critic_stays():
    method = made(window=1, rollout={"samples": 1, "max_new_tokens": 8})
    method.policy.end_tokens = frozenset([1])
    batch = method.collect(0)
    assert not bool(batch.complete.any())
    before = {name: p.detach().clone() for name, p in method.critic.named_parameters()}
    metrics = method.update(batch, optimisers(method, 1e-3))
    assert "value/loss" not in metrics
    assert all(p.equal(before[name]) for name, p in method.critic.named_parameters())
    assert "reward" not in method.describe_batch(batch)


def test_at_first_the_critic_learns_alone():
    method = made(critic_warm_up=2, window=8)
    optimise = optimisers(method, 1e-3)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in method.policy.named_parameters()}
        metrics = method.update(method.collect(step), optimise)
        still = all(p.equal(before[name]) for name, p in method.policy.named_parameters())
        assert still == (step < 2)
        assert "value/loss" in metrics


def test_with_a_window_for_all_of_it_every_step_has_fresh_prompts():
    method = made(window=8, rollout={"samples": 2, "max_new_tokens": 8})
    for step in range(3):
        batch = method.collect(step)
        assert bool(batch.complete.all())
        index = method.order.indices(step).tolist()
        expected = [method.prompts[i] for i in index for _ in range(2)]
        assert all(a.equal(b) for a, b in zip(batch.origin, expected, strict=True))
        advantages, _ = token_advantages(
            batch.token_rewards, batch.old_values, batch.mask, discount=1.0, lambda_=0.95
        )
        plain = egae(
            batch.token_rewards, batch.old_values, batch.mask, batch.complete,
            discount=1.0, lambda_=0.95,
        )  # fmt: skip
        assert plain.equal(advantages)


def test_the_reward_rises(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 4e-3, "batch_size": 16, "window": 4}
    train("t-ppo", data=ROWS * 2, reward=vowels, steps=44, output=tmp_path / "run", **settings)
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    rewards = torch.tensor([r["reward"] for r in rows])
    first, last = rewards[:6], rewards[-6:]
    noise = float((first.var() / 6 + last.var() / 6).sqrt())
    assert float(last.mean() - first.mean()) > max(0.1, 4 * noise)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "critic_warm_up": 1}
    assert_resumes("t-ppo", tmp_path, data=data, reward=f"{reward}:vowels", **settings)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert any("reward" in r for r in rows)
    assert any("response/carried" in r for r in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window: .*greater than 0"),
        ({"window": 9}, "window: at most rollout.max_new_tokens, 8, got 9"),
        ({"rollout": {"stop": ["."]}}, r"rollout.stop: t-ppo ends .* got \['.'\]"),
        ({"kl_coefficient": 0.1}, "kl_coefficient, kl_target: t-ppo has no KL"),
        ({"kl_target": 1.0}, "kl_coefficient, kl_target: t-ppo has no KL"),
        ({"minibatches": 5}, "minibatches: 5 .*batch_size of 4"),
    ],
)
def test_faults_are_named_in_one_line(settings, message, tmp_path):
    rollout = {**SHORT["rollout"], **settings.get("rollout", {})}
    given = {**SMALL, **SHORT, "data": ROWS, "reward": vowels, **settings, "rollout": rollout}
    with pytest.raises(PostgradError, match=message) as caught:
        train("t-ppo", steps=1, output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
