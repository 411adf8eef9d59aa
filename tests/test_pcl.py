"""Prompt curriculum learning: which prompts are chosen, and what the value model learns."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.group import group_mean_centred
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.pcl import PCL, _by_prompt
from postgrad.sampling.prompt_choice import nearest_to
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

# what begins with "e" is always right, with "h" never, with "m" half of the time
ROWS = [{"prompt": f"{kind}{i:02d}="} for i in range(16) for kind in "ehm"]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 4}, "batch_size": 8}
REWARD = """
def kinds(prompts, completions):
    worth = {"e": 1.0, "h": 0.0}
    return [worth.get(p[0], float(i % 2)) for i, p in enumerate(prompts)]
"""


def kinds(prompts, completions):
    worth = {"e": 1.0, "h": 0.0}
    return [worth.get(p[0], float(i % 2)) for i, p in enumerate(prompts)]


def made(reward=kinds, **config):
    values = {"model": "tiny", **SHORT, **config}
    return PCL(validated(PCL.Config, values), Place(), data=ROWS, reward=reward)


def fitted(method, steps, rate=1e-3):
    optimise = Optimisers(method.modules(), LoopSettings(learning_rate=rate), torch.device("cpu"))
    for step in range(steps):
        batch = method.collect(step)
        yield batch, method.describe_batch(batch), method.update(batch, optimise)


def share_of_middling(method, index):
    return sum(ROWS[i]["prompt"][0] == "m" for i in index) / len(index)


# Which prompts -----------------------------------------------------------------------------------


def test_the_worked_example():
    values = torch.tensor([0.05, 0.48, 0.91, 0.60, 0.30, 0.52, 0.75, 0.12])
    chosen = nearest_to(values, 0.5, 4, torch.Generator().manual_seed(0)).tolist()
    assert set(chosen[:2]) == {1, 5}
    assert chosen[2:] == [3, 4]


def test_the_choice_does_not_depend_on_the_order_of_the_pool():
    random = torch.Generator().manual_seed(0)
    values = torch.rand(50, generator=random)
    wanted = (values - 0.4).abs().topk(10, largest=False).values.sort().values
    for _ in range(5):
        shuffled = values[torch.randperm(50, generator=random)]
        chosen = nearest_to(shuffled, 0.4, 10, random)
        torch.testing.assert_close((shuffled[chosen] - 0.4).abs().sort().values, wanted)


def test_equal_values_are_chosen_among_by_chance():
    counts = torch.zeros(20)
    for seed in range(400):
        counts[nearest_to(torch.ones(20), 0.5, 5, torch.Generator().manual_seed(seed))] += 1
    assert counts.min() > 60  # 100 expected of each
    assert counts.max() < 140


def test_wrong_calls_are_refused():
    random = torch.Generator()
    with pytest.raises(ValueError, match="finite"):
        nearest_to(torch.tensor([0.1, torch.nan]), 0.5, 1, random)
    with pytest.raises(ValueError, match="cannot choose 3 of 2"):
        nearest_to(torch.tensor([0.1, 0.2]), 0.5, 3, random)


@pytest.mark.parametrize(
    ("rate", "samples", "useful"),
    [
        (0.1, 4, 0.343800),
        (0.1, 16, 0.814698),
        (0.3, 4, 0.751800),
        (0.5, 4, 0.875000),
        (0.5, 8, 0.992188),
    ],
)
def test_why_a_half_is_sought_groups_with_a_difference(rate, samples, useful):
    """The share of groups in which centred advantages are not all zero is 1 - p^n - (1 - p)^n."""
    assert 1 - rate**samples - (1 - rate) ** samples == pytest.approx(useful, abs=1e-6)
    random = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4000 * samples, generator=random) < rate).float()
    group = torch.arange(4000).repeat_interleave(samples)
    advantages = group_mean_centred(rewards, group).view(4000, samples)
    assert float(advantages.any(1).float().mean()) == pytest.approx(useful, abs=0.025)


# The method --------------------------------------------------------------------------------------


def test_with_a_pool_of_the_batch_all_prompts_come_once_an_epoch():
    method = made(pool_factor=1)
    seen = [i for step in range(6) for i in method.choose(step)]
    assert sorted(seen) == list(range(len(ROWS)))


def test_the_value_model_reads_the_prompt_at_its_last_token():
    method = made()
    with torch.no_grad():
        method.values.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    method._level = 0.25
    prompts = method.prompts[:3]
    ids = torch.stack(prompts)
    states = method.values.network.get_decoder()(input_ids=ids).last_hidden_state[:, -1]
    expected = 0.25 + method.values.head(states).squeeze(1)
    torch.testing.assert_close(method._values(prompts), expected.detach(), atol=1e-5, rtol=1e-4)


def test_the_value_loss_is_the_squared_error_to_the_mean_reward_and_spares_the_policy():
    method = made()
    batch = method.collect(0)
    method._level = 0.5
    prompts = _by_prompt(batch)
    assert prompts.target.equal(batch.reward.view(8, 4).mean(1))
    loss, _ = method.value_loss(prompts)
    assert loss.item() == pytest.approx(float((0.5 - prompts.target).square().mean()), abs=1e-6)
    loss.backward()
    assert all(p.grad is None for p in method.policy.parameters())
    assert bool(method.values.head.weight.grad.any())
    exact = prompts.with_fields(target=torch.full((8,), 0.5))
    method.values.zero_grad()
    method.value_loss(exact)[0].backward()
    assert not bool(method.values.head.weight.grad.any())


def test_it_learns_to_find_the_prompts_that_are_solved_half_of_the_time():
    method = made(value_rate=3.0, pool_factor=3)
    found = list(fitted(method, 30))
    first, last = found[:3], found[-5:]
    shares = [
        sum(share_of_middling(method, batch.row.tolist()) for batch, _, _ in part) / len(part)
        for part in (first, last)
    ]
    assert shares[0] < 0.6
    assert shares[1] > 0.9
    degenerate = [
        sum(m["reward/degenerate_groups"] for _, m, _ in p) / len(p) for p in (first, last)
    ]
    assert degenerate[1] < 0.1 < degenerate[0]
    assert sum(m["value/error"] for _, m, _ in last) / 5 < 0.15
    # where all responses to every prompt are alike, only the value model learns
    values = method._values(method.prompts)
    means = [float(values[k::3].mean()) for k in range(3)]
    assert means[1] < means[2] < means[0]


def test_groups_that_are_all_alike_teach_the_value_model_alone():
    method = made(lambda prompts, completions: [float(p[0] == "e") for p in prompts])
    before = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
    head = method.values.head.weight.detach().clone()
    next(fitted(method, 1))
    assert all(p.equal(before[n]) for n, p in method.policy.named_parameters())
    assert not method.values.head.weight.equal(head)


def test_some_prompts_can_be_drawn_whatever_their_value():
    method = made(uniform_share=0.5, pool_factor=6)
    method._level = 0.5
    with torch.no_grad():
        method.values.head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    chosen = method.choose(0)
    assert len(set(chosen)) == 8
    distances = (method._values(method.prompts).clamp(0, 1) - 0.5).abs()
    assert distances[chosen[:4]].max() <= distances.sort().values[3]
    assert distances[chosen[4:]].mean() > distances[chosen[:4]].mean()


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert_resumes("pcl", tmp_path, data=data, reward=f"{reward}:kinds", **SMALL, **SHORT)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert {"value/loss", "value/distance", "value/error"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_factor": 0}, "pool_factor: .*greater than 0"),
        ({"target": 1.0}, "target: .*less than 1"),
        ({"batch_size": 64}, "batch_size: 64 prompts cannot be chosen among the 48"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .*at least 2 samples, got 1"),
        ({"reward_range": (1.0, 1.0)}, "reward_range: must rise, got 1 to 1"),
        (
            {"reward": lambda completions: [2.0] * len(completions)},
            "reward_range: rewards must lie between 0 and 1, got 2 to 2",
        ),
    ],
)
def test_faults_are_named_in_one_line(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": kinds, **settings}
    with pytest.raises(PostgradError, match=message) as caught:
        train("pcl", steps=1, output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
