"""BNPO: the normaliser and its limits, reward terms one by one, and runs of the method."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, write_rows
from postgrad.advantages.beta_normalised import (
    beta_normalised,
    beta_weights,
    fit_normaliser,
    normalised_variance,
)
from postgrad.advantages.group import group_mean_centred, group_standardised
from postgrad.api import train
from postgrad.batch import Batch
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.parts.base import Around
from postgrad.methods.language.verifiable.bnpo import BetaNormalisation, BetaNormalised
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 4, "max_new_tokens": 5}, "batch_size": 4}


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def solved(*counts, samples=4):
    """Rewards and groups of prompts of which the first `counts` responses are right."""
    rewards = torch.tensor([float(j < n) for n in counts for j in range(samples)])
    return rewards, torch.arange(len(counts)).repeat_interleave(samples)


# The normaliser ----------------------------------------------------------------------------------


def test_the_worked_example():
    rewards, groups = solved(1, 2, 3, 4)
    advantages, fit = beta_normalised(rewards, groups)
    assert fit.mean == 0.625
    assert fit.variance == pytest.approx(0.104167, abs=1e-6)
    assert (fit.a, fit.b) == pytest.approx((0.781250, 0.468750), abs=1e-6)
    assert (fit.alpha, fit.beta) == pytest.approx((1.260417, 1.156250), abs=1e-6)
    rates = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    weights = beta_weights(rates, fit.alpha, fit.beta)
    expected = torch.tensor([1.006100, 0.894874, 0.897307, 1e6], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    right, wrong = advantages[rewards == 1].unique(), advantages[rewards == 0].unique()
    expected = torch.tensor([0.0, 0.224327, 0.447437, 0.754575])
    torch.testing.assert_close(right, expected, atol=1e-6, rtol=0)
    expected = torch.tensor([-0.672980, -0.447437, -0.251525])
    torch.testing.assert_close(wrong, expected, atol=1e-6, rtol=0)


def test_parameters_of_one_are_the_mean_baseline_and_of_three_halves_grpo():
    rates = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert beta_weights(rates, 1.0, 1.0).tolist() == pytest.approx([1.0] * 19)
    deviation = (rates * (1 - rates)).sqrt()
    torch.testing.assert_close(beta_weights(rates, 1.5, 1.5), math.pi / 8 / deviation)


def test_difficulty_spread_as_in_grpos_case_gives_grpo():
    """Success rates with the moments of Beta(3/2, 3/2): mean 1/2, variance 1/16."""
    rewards, groups = solved(5, 11, samples=16)  # rates 1/2 -+ 3/16
    spread = fit_normaliser(torch.tensor([0.5 - 0.125 * 2**0.5, 0.5 + 0.125 * 2**0.5]))
    assert (spread.alpha, spread.beta) == pytest.approx((1.5, 1.5), abs=1e-5)
    weights = beta_weights(torch.tensor([5 / 16, 11 / 16]), spread.alpha, spread.beta)
    normalised = group_mean_centred(rewards, groups) * weights[groups]
    grpo = group_standardised(rewards, groups, "population", eps=0.0)
    torch.testing.assert_close(normalised, 0.392699 * grpo, atol=1e-5, rtol=1e-4)


def test_without_spread_the_mean_baseline_is_left():
    for counts in ((2, 2, 2), (1,), (4, 4)):
        rewards, groups = solved(*counts)
        advantages, fit = beta_normalised(rewards, groups)
        assert (fit.alpha, fit.beta) == (1.0, 1.0)
        torch.testing.assert_close(advantages, group_mean_centred(rewards, groups))


def test_more_spread_than_a_beta_can_have_is_held_at_one():
    rewards, groups = solved(0, 4)  # the unbiased variance 1/2 is above m (1 - m)
    advantages, fit = beta_normalised(rewards, groups)
    assert fit.a < 0
    assert (fit.alpha, fit.beta) == (1.0, 1.0)
    assert not advantages.any()


def test_groups_without_a_difference_have_zero_where_the_density_is_zero():
    advantages, fit = beta_normalised(*solved(0, 1, 2, 3, 4))
    assert fit.alpha > 1
    assert not advantages[:4].any()
    assert not advantages[-4:].any()
    sums = advantages.view(-1, 4).sum(1)
    torch.testing.assert_close(sums, torch.zeros(5), atol=1e-6, rtol=0)


def test_a_tighter_limit_holds_rare_successes():
    rewards, groups = solved(1, *[8] * 20, 9, samples=16)
    free, fit = beta_normalised(rewards, groups)
    held, _ = beta_normalised(rewards, groups, limit=10.0)
    assert float(free.max()) > 100
    assert float(held.max()) == pytest.approx(10 * 15 / 16)
    assert fit.alpha > 5


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.5), (1.5, 1.5), (3.0, 1.0), (6.0, 9.0)])
def test_the_variance_in_closed_form_and_its_minimum(a, b):
    p = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    density = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double())
    least = (1 + a / 3, 1 + b / 3)
    weights = beta_weights(p, *least, limit=math.inf)
    integrated = float((density.log_prob(p).exp() * p * (1 - p) * weights**2).mean())
    assert normalised_variance(a, b, *least) == pytest.approx(integrated, rel=1e-3)
    for da, db in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05), (0.05, 0.05), (-0.05, 0.05)):
        near = normalised_variance(a, b, least[0] + da, least[1] + db)
        assert near > normalised_variance(a, b, *least)
    assert normalised_variance(a, b, (a + 3) / 2, 1.0) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: beta_normalised(*reversed(solved(1))), "floating point"),
        (lambda: beta_normalised(2 * solved(1)[0], solved(1)[1]), r"in \[0, 1\], got 0 to 2"),
        (lambda: fit_normaliser(torch.tensor([0.5, 1.5])), "success rates"),
        (lambda: fit_normaliser(torch.zeros(0)), "success rates"),
        (lambda: beta_weights(torch.tensor([0.5]), 0.5, 1.0), "at least 1"),
        (lambda: normalised_variance(0.0, 1.0, 1.0, 1.0), "positive"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The part ----------------------------------------------------------------------------------------


def part(**config):
    return BetaNormalised(validated(BetaNormalisation, config), Around(prompts=4, samples=4))


def batch(reward, groups, **terms):
    named = {f"reward/{name}": values for name, values in terms.items()}
    return Batch(reward=reward, group=groups, **named)


def test_reward_terms_are_normalised_one_by_one():
    right, groups = solved(1, 2, 3, 4)
    form = solved(3, 3, 4, 2)[0].roll(1)
    estimate = part()
    advantages = estimate(batch(right + form, groups, right=right, form=form))
    expected = (beta_normalised(right, groups)[0] + beta_normalised(form, groups)[0]) / 2
    torch.testing.assert_close(advantages, expected)
    assert estimate.describe()["normaliser/alpha/right"] == pytest.approx(1.260417, abs=1e-6)
    together = part(decompose=False, high=2.0)(batch(right + form, groups, right=right, form=form))
    torch.testing.assert_close(together, beta_normalised((right + form) / 2, groups)[0])
    assert float((together - expected).abs().max()) > 0.01


def test_an_affine_change_of_rewards_and_range_changes_nothing():
    rewards, groups = solved(1, 2, 3, 4)
    moved = part(low=-3.0, high=-1.0)(batch(2 * rewards - 3, groups))
    torch.testing.assert_close(moved, part()(batch(rewards, groups)))


def test_what_cannot_be_normalised_is_said():
    rewards, groups = solved(1, 2, 3, 4)
    with pytest.raises(PostgradError, match=r"must lie in \[0, 1\], got 0 to 2"):
        part()(batch(2 * rewards, groups))
    with pytest.raises(PostgradError, match=r"rewards of 'b' must lie in \[0, 1\], got -1 to -?0"):
        part()(batch(0 * rewards, groups, a=rewards, b=-rewards))
    with pytest.raises(PostgradError, match=r"advantage.decompose: .* not their plain sum"):
        part()(batch(2 * rewards + rewards, groups, a=rewards, b=rewards))
    with pytest.raises(PostgradError, match=r"advantage.high: must be above advantage.low, 1, got"):
        part(low=1.0)


def test_one_prompt_a_batch_is_warned_of():
    with pytest.warns(UserWarning, match="batch_size: success rates of one prompt"):
        BetaNormalised(BetaNormalisation(), Around(prompts=1, samples=4))


# The method --------------------------------------------------------------------------------------


def test_it_composes_with_other_parts():
    config = validated(
        PolicyGradient.Config,
        {"model": "tiny", **SHORT, "advantage": "bnpo", "gradient": "sequence", "mask": "none"},
    )
    method = PolicyGradient(config, Place(), data=ROWS, reward=letters)
    found = method.collect(0)
    torch.testing.assert_close(found.advantages, beta_normalised(found.reward, found.group)[0])


def test_the_mean_reward_rises_and_the_normaliser_is_reported(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 3e-3}
    settings["rollout"] = {"samples": 8, "max_new_tokens": 5}
    train("bnpo", data=ROWS, reward=letters, steps=30, output=tmp_path / "run", **settings)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "gradient_norm" in row]
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-6:]) / 6 - sum(rewards[:6]) / 6 > 0.2
    assert all(row["normaliser/alpha"] >= 1 for row in rows)
    assert len({row["normaliser/alpha"] for row in rows}) > 20


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions):\n"
        "    return [sum(c.isalpha() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    data = write_rows(tmp_path / "prompts.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "reward": f"{reward}:letters", "minibatches": 2}
    assert_resumes("bnpo", tmp_path, **settings, save_every=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"samples": 1}}, "rollout.samples: a group's success rate .* at least 2"),
        ({"advantage": {"limit": 0}}, r"^advantage.limit: .*greater than 0"),
        ({"advantage": {"limt": 1}}, "advantage: unknown key 'limt': did you mean 'limit'"),
    ],
)
def test_a_bad_setting_is_named(settings, message, tmp_path):
    given = {"data": ROWS, "reward": letters, **SMALL, **SHORT, "model": "no-such-folder"}
    with pytest.raises(PostgradError, match=message) as caught:
        train("bnpo", output=tmp_path / "run", **{**given, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
