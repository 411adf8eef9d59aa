"""RiskPO: bundles, the mixed value at risk and its gradient, quantiles that follow, and runs."""

import itertools

import pytest
import torch

from language_runs import SMALL, assert_resumes, untimed, write_rows
from postgrad.advantages.risk import (
    QuantileTracker,
    averaged_value_at_risk,
    bundle_scores,
    bundles,
    mixed_value_at_risk,
    shared_out,
)
from postgrad.api import train
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.methods.language.verifiable.riskpo import RiskPO, RiskPOSettings
from postgrad.seeding import generator
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {
    "rollout": {"samples": 4, "max_new_tokens": 5},
    "batch_size": 4,
    "advantage": {"name": "riskpo", "bundle": 2},
}
SCORES = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0])


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def made(kind=RiskPO, **advantage):
    own = {"name": "riskpo", "bundle": 2, **advantage}
    values = {"model": "tiny", **SHORT, "advantage": own}
    return kind(validated(kind.Config, values), Place(), data=ROWS, reward=letters)


# Advantages --------------------------------------------------------------------------------------


def test_the_worked_example():
    found = mixed_value_at_risk(SCORES, 1.0, 4.0, 0.5)
    assert found.tolist() == [-4.5, -3, -2, -1, 0]
    levels = (0.2, 0.8)
    alone = averaged_value_at_risk(SCORES, 1.0, 4.0, levels, 0.0)
    assert alone.tolist() == pytest.approx([-5, -5, -3.333333, -1.666667, 0], abs=1e-6)
    mixed = averaged_value_at_risk(SCORES, 1.0, 4.0, levels, 1.5)
    assert mixed.tolist() == pytest.approx([-5, -2, -1.333333, -0.666667, 0], abs=1e-6)
    tail = (2.5 * mixed - alone) / 1.5
    assert tail.tolist() == pytest.approx([-5, 0, 0, 0, 0], abs=1e-5)
    without = averaged_value_at_risk(SCORES, 1.0, 4.0, levels, 1.5, baseline=False)
    assert without.tolist() == pytest.approx([-3, 0, 0.666667, 1.333333, 2], abs=1e-6)


def test_seeking_risk_rewards_the_upper_tail():
    found = averaged_value_at_risk(SCORES, 1.0, 4.0, (0.2, 0.8), 1.5, tail="upper")
    assert found.tolist() == pytest.approx([-2, -2, -4 / 3, -2 / 3, 1.5 * 5 / 2.5])


def test_both_writings_of_the_advantage_agree():
    scores = torch.linspace(-2, 7, 91)
    low, high, omega = 1.3, 4.1, 0.7
    g = (scores - low).clamp(min=0) - (scores - high).clamp(min=0) + low - high
    expected = -(1 + omega) * (low - scores).clamp(min=0) + g
    found = mixed_value_at_risk(scores, low, high, omega)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(g, scores.clamp(low, high) - high)
    slopes = (found[1:] - found[:-1]) / 0.1
    below, between, above = scores[:-1] < low - 0.1, scores[1:] > low + 0.1, scores[:-1] > high
    assert slopes[below].tolist() == pytest.approx([1.7] * int(below.sum()), abs=1e-4)
    inside = between & (scores[1:] < high)
    assert slopes[inside].tolist() == pytest.approx([1.0] * int(inside.sum()), abs=1e-4)
    assert not slopes[above].any()


def test_without_a_tail_it_is_a_conditional_value_at_risk_and_above_all_scores_the_mean():
    found = mixed_value_at_risk(SCORES, 1.0, 4.0, 0.0)
    torch.testing.assert_close(found, -(4.0 - SCORES).clamp(min=0))
    torch.testing.assert_close(mixed_value_at_risk(SCORES, 1.0, 5.0, 0.0), SCORES - 5)


def test_it_is_the_gradient_of_the_mixed_value_at_risk():
    """Questions of different success rates, all outcomes enumerated: E[A grad log p] = grad MVaR.

    MVaR is an integral of the quantile function, which for so few scores is a sum over atoms.
    """
    logits = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    low, high, omega = 0.2, 0.8, 0.5
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    logprobs = (
        outcomes * torch.nn.functional.logsigmoid(logits)
        + (1 - outcomes) * torch.nn.functional.logsigmoid(-logits)
    ).sum(1)
    scores = outcomes.sum(1)
    atoms = torch.arange(4, dtype=torch.float64)
    mass = torch.stack([logprobs.exp()[scores == atom].sum() for atom in atoms])
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])

    def integral(first, last):
        """The quantile function between two levels."""
        inside = edges[1:].clamp(first, last) - edges[:-1].clamp(first, last)
        return (inside * atoms).sum()

    objective = (1 + omega) * integral(0.0, low) + integral(low, high)
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    quantiles = [float(atoms[(edges[1:] >= level).nonzero()[0]]) for level in (low, high)]
    advantages = mixed_value_at_risk(scores, *quantiles, omega)
    (got,) = torch.autograd.grad((logprobs.exp().detach() * advantages * logprobs).sum(), logits)
    torch.testing.assert_close(got, expected)
    assert quantiles == [1.0, 2.0]


# Bundles -----------------------------------------------------------------------------------------


def test_every_response_is_in_one_bundle_with_one_of_each_prompt():
    groups = torch.arange(6).repeat_interleave(4)
    bundle = bundles(groups, 3, random())
    assert bundle.unique().tolist() == list(range(8))
    for number in range(8):
        own = groups[bundle == number]
        assert own.tolist() == ([0, 1, 2] if number < 4 else [3, 4, 5])
    assert not bundle.equal(bundles(groups, 3, random(1)))
    rewards = torch.rand(24, generator=random())
    scores = bundle_scores(rewards, bundle)
    assert scores.shape == (8,)
    assert float(scores.sum()) == pytest.approx(float(rewards.sum()))
    assert float(scores[5]) == pytest.approx(float(rewards[bundle == 5].sum()))


def test_the_order_of_the_responses_does_not_matter():
    groups = torch.arange(4).repeat_interleave(3)
    order = torch.randperm(12, generator=random())
    bundle = bundles(groups[order], 2, random())
    for number in range(6):
        own = sorted(groups[order][bundle == number].tolist())
        assert own == ([0, 1] if number < 3 else [2, 3])


def test_credit_within_a_bundle():
    """Two prompts with two responses each; bundles (0, 2) and (1, 3)."""
    groups, bundle = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    advantages = torch.tensor([-1.0, -2.0])

    def credit(how):
        return shared_out(advantages, bundle, rewards, groups, how).tolist()

    assert credit("uniform") == [-1, -2, -1, -2]
    assert credit("score") == [-0.5, -3, -0.5, -1]
    assert credit("std") == pytest.approx([-(2**0.5), -2 * 2**0.5, -1, -2])
    assert credit("sum-mean") == [-1, -2, 0, 0]
    alike = shared_out(advantages, bundle, torch.ones(4), groups, "sum-mean")
    assert alike.tolist() == [-0.5, -1, -0.5, -1]


# Quantiles ---------------------------------------------------------------------------------------


def test_a_step_of_the_tracker_by_hand():
    tracker = QuantileTracker([0.2], 0.1)
    tracker.load_state_dict({"values": torch.tensor([2.0], dtype=torch.float64)})
    tracker.update(SCORES)
    assert tracker.values.tolist() == pytest.approx([1.98])


def test_the_tracker_starts_at_the_first_samples_and_follows_the_distribution():
    tracker = QuantileTracker([0.2, 0.8], 0.1)
    assert not tracker.started
    tracker.update(SCORES)
    assert tracker.values.tolist() == pytest.approx([0.8, 3.4])
    stream = random()
    for _ in range(800):
        tracker.update(10 + torch.randn(200, generator=stream))
    normal = torch.distributions.Normal(10.0, 1.0).icdf(torch.tensor([0.2, 0.8]))
    assert tracker.values.tolist() == pytest.approx(normal.tolist(), abs=0.05)
    other = QuantileTracker([0.2, 0.8], 0.1)
    other.load_state_dict(tracker.state_dict())
    assert other.values.equal(tracker.values)


def test_quantiles_do_not_cross():
    tracker = QuantileTracker([0.2, 0.8], 1.0)
    tracker.load_state_dict({"values": torch.tensor([1.9, 2.1], dtype=torch.float64)})
    tracker.update(torch.full((5,), 2.0))
    low, high = tracker.values.tolist()
    assert low <= high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bundles(torch.arange(5), 2, random()), "5 groups do not make whole bundles of 2"),
        (lambda: bundles(torch.tensor([0, 0, 1]), 2, random()), "one number of responses"),
        (lambda: bundles(torch.zeros(2, 2), 1, random()), r"groups \[N\]"),
        (lambda: bundle_scores(torch.zeros(3), torch.zeros(2).long()), r"must both be \[N\]"),
        (lambda: mixed_value_at_risk(SCORES, 2.0, 1.0, 0.5), "must not be above"),
        (lambda: mixed_value_at_risk(SCORES, 1.0, 2.0, -0.5), "omega must be at least 0"),
        (lambda: averaged_value_at_risk(SCORES, 1.0, 2.0, (0.8, 0.2), 1.0), "0 < a < b < 1"),
        (lambda: averaged_value_at_risk(SCORES, 1, 2, (0.2, 0.8), 1, tail="left"), "tail must be"),
        (lambda: QuantileTracker([0.8, 0.2], 0.1), "levels must rise"),
        (lambda: QuantileTracker([0.2], 0.0), "rate must be above 0"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The method --------------------------------------------------------------------------------------


def test_the_first_step_measures_by_its_own_quantiles_the_next_by_earlier_ones():
    method = made(scale="none")
    first = method.collect(0)
    bundle = bundles(first.group, 2, _stream(0))
    scores = bundle_scores(first.reward, bundle)
    quantiles = scores.double().quantile(torch.tensor([0.2, 0.8]).double())
    expected = mixed_value_at_risk(scores, *quantiles, 0.5)[bundle]
    torch.testing.assert_close(first.advantages, expected)
    second = method.collect(1)
    bundle = bundles(second.group, 2, _stream(1))
    scores = bundle_scores(second.reward, bundle)
    expected = mixed_value_at_risk(scores, *quantiles, 0.5)[bundle]
    torch.testing.assert_close(second.advantages, expected)
    below = torch.tensor([float((scores < q).float().mean()) for q in quantiles])
    moved = quantiles + 0.1 * (torch.tensor([0.2, 0.8]) - below)
    found = method.describe_batch(second)
    assert found["bundle/quantile_low"] == pytest.approx(float(moved[0]), abs=1e-6)
    assert found["bundle/quantile_high"] == pytest.approx(float(moved[1]), abs=1e-6)
    assert found["bundle/without_advantage"] == float((expected == 0).float().mean())


def _stream(step):
    return generator(0, "bundles", step)


def test_the_released_form_takes_quantiles_and_deviation_of_the_same_prompts():
    method = made(form="code", omega=1.5, quantiles="set", scale="set")
    batch = method.collect(0)
    bundle = bundles(batch.group, 2, _stream(0))
    sets = bundle_scores(batch.reward, bundle).view(2, 4)
    for number, scores in enumerate(sets):
        low, high = scores.quantile(torch.tensor([0.2, 0.8]))
        expected = averaged_value_at_risk(scores, low, high, (0.2, 0.8), 1.5) / scores.std()
        found = torch.stack([batch.advantages[bundle == 4 * number + j][0] for j in range(4)])
        torch.testing.assert_close(found, expected)


def test_bundles_that_are_all_alike_do_not_explode():
    values = {"model": "tiny", **SHORT}
    same = RiskPO(
        validated(RiskPOSettings, values), Place(), data=ROWS, reward=lambda completions: [
            0.0 for _ in completions
        ],
    )  # fmt: skip
    same.load_state_dict({"advantage": {"values": torch.tensor([0.5, 1.5]).double()}})
    advantages = same.collect(0).advantages
    assert bool(advantages.isfinite().all())
    assert float(advantages.abs().max()) == pytest.approx((0.5 * 0.5 + 1.5) / 1e-3)


def test_the_ratio_is_of_whole_responses():
    method = made()
    batch = method.collect(0)
    loss, metrics = method.loss(batch)
    assert metrics["ratio/mean"] == 1.0
    assert method.estimator.gradient.whole_responses
    assert loss.item() == pytest.approx(-float(batch.advantages.mean()), rel=1e-5)
    assert loss.item() > 0.1


def test_it_composes_and_a_group_may_be_of_one():
    config = {
        "model": "tiny",
        **SHORT,
        "rollout": {"samples": 1, "max_new_tokens": 5},
        "mask": "none",
        "denominator": "policy",
    }
    method = PolicyGradient(
        validated(PolicyGradient.Config, config), Place(), data=ROWS, reward=letters
    )
    assert bool(method.collect(0).advantages.isfinite().all())


def test_the_mean_reward_rises(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 3e-3}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 5}
    train("riskpo", data=ROWS, reward=letters, steps=40, output=tmp_path / "run", **settings)
    rewards = [r["reward"] for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert sum(rewards[-8:]) / 8 - sum(rewards[:8]) / 8 > 0.15


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    data = write_rows(tmp_path / "prompts.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "reward": f"{reward}:letters", "minibatches": 2}
    assert_resumes("riskpo", tmp_path, **settings, save_every=2)
    quantiles = [r["bundle/quantile_low"] for r in untimed(tmp_path / "whole") if "reward" in r]
    assert len(set(quantiles)) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 6, "advantage": {"bundle": 4}},
            "batch_size: expected a multiple of advantage.bundle, 4, got 6: use 8 prompts",
        ),
        ({"advantage": {"low": 0.9}}, "advantage.high: must be above advantage.low, 0.9, got 0.8"),
        ({"advantage": {"low": 0.0}}, r"^advantage.low: .*greater than 0"),
        ({"advantage": {"omega": -1}}, r"^advantage.omega: .*greater than or equal to 0"),
        ({"advantage": {"credit": "sum"}}, r"^advantage.credit: .*'sum-mean'"),
    ],
)
def test_a_bad_setting_is_named(settings, message, tmp_path):
    given = {"data": ROWS, "reward": letters, **SMALL, **SHORT, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("riskpo", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
