"""Single-stream policy optimisation: the tracker, the choice of prompts, and both in a run."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.advantages.group import batch_standardised
from postgrad.advantages.value_tracker import BetaValueTracker, kept_share, policy_shift
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.verifiable.policy_gradient import PolicyGradient
from postgrad.methods.language.verifiable.spo_single_stream import SPO
from postgrad.sampling.prompt_choice import draw_by_weight, uncertainty
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]
SHORT = {"rollout": {"samples": 1, "max_new_tokens": 5}, "batch_size": 8, "minibatches": 2}
REWARD = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""


def letters(completions):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def made(kind=SPO, reward=letters, **config):
    values = {"model": "tiny", **SHORT, "offline_samples": 2, **config}
    if kind is PolicyGradient:
        del values["offline_samples"]
    return kind(validated(kind.Config, values), Place(), data=ROWS, reward=reward)


def one_update(method, batch, rate=1e-3):
    loop = LoopSettings(learning_rate=rate)
    method.update(batch, Optimisers(method.modules(), loop, torch.device("cpu")))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# The tracker -------------------------------------------------------------------------------------


def started(successes, samples=8, weight=8.0):
    tracker = BetaValueTracker(1)
    tracker.start(numbers(successes), samples, weight)
    return tracker


def test_the_worked_example():
    tracker = started(3)
    torch.testing.assert_close(tracker.alpha, numbers(3.111111), atol=1e-6, rtol=0)
    torch.testing.assert_close(tracker.beta, numbers(4.888889), atol=1e-6, rtol=0)
    assert float(tracker.values()) == pytest.approx(0.388889, abs=1e-6)
    assert float(tracker.sizes()) == pytest.approx(8)
    keep = kept_share(numbers(0.01), 0.875, 0.96, 0.06)
    assert float(keep) == pytest.approx(0.890899, abs=1e-6)
    one = torch.tensor([0])
    tracker.update(one, numbers(1), keep)
    assert float(tracker.alpha) == pytest.approx(3.771685, abs=1e-6)
    assert float(tracker.values()) == pytest.approx(0.464082, abs=1e-6)
    other = started(3)
    other.update(one, numbers(0), keep)
    assert float(other.values()) == pytest.approx(0.341039, abs=1e-6)


def test_a_batch_of_the_worked_example():
    surprise = numbers(1, 0, 0, 1) - numbers(0.9, 0.5, 0.2, 0.388889)
    expected = numbers(0.205202, -1.061187, -0.427992, 1.283977)
    torch.testing.assert_close(batch_standardised(surprise), expected, atol=1e-6, rtol=0)
    weights = uncertainty(numbers(0.9, 0.5, 0.2, 0.388889), 0.05)
    torch.testing.assert_close(weights, numbers(0.35, 0.55, 0.45, 0.537498), atol=1e-6, rtol=0)
    expected = numbers(0.185431, 0.291391, 0.238411, 0.284767)
    torch.testing.assert_close(weights / weights.sum(), expected, atol=1e-6, rtol=0)


def test_what_is_kept_of_the_past():
    shifts = numbers(0.0, 0.06, 0.011558, 0.011560, 10.0)
    keep = kept_share(shifts, 0.875, 0.96, 0.06)
    assert keep.tolist()[:2] == [0.96, 0.875]
    assert float(keep[2]) > 0.875
    assert keep.tolist()[3:] == [0.875, 0.875]


def test_without_forgetting_the_parameters_are_counts():
    tracker = BetaValueTracker(2)
    random = torch.Generator().manual_seed(0)
    rewards = (torch.rand(400, generator=random) < 0.3).double()
    for reward in rewards:
        tracker.update(torch.tensor([1]), reward[None], torch.ones(1))
    assert tracker.alpha.tolist() == [0.5, 0.5 + float(rewards.sum())]
    assert float(tracker.values()[1]) == pytest.approx(float(rewards.mean()), abs=2e-3)
    assert float(tracker.values()[0]) == 0.5  # never seen


def test_with_constant_forgetting_the_value_finds_the_rate():
    """Of many prompts with one rate: the mean value is the rate, the size 1 / (1 - rho)."""
    tracker, everyone = BetaValueTracker(4000), torch.arange(4000)
    random = torch.Generator().manual_seed(0)
    for _ in range(120):
        rewards = (torch.rand(4000, generator=random) < 0.7).double()
        tracker.update(everyone, rewards, torch.full((4000,), 0.875))
    assert float(tracker.values().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(tracker.sizes().mean()) == pytest.approx(8, abs=1e-5)


def test_responses_to_one_prompt_in_one_batch_are_all_counted():
    tracker = started(3)
    tracker.update(torch.tensor([0, 0, 0]), numbers(1, 0, 1), torch.full((3,), 0.9))
    assert float(tracker.alpha) == pytest.approx(0.9 * 28 / 9 + 2)
    assert float(tracker.beta) == pytest.approx(0.9 * 44 / 9 + 1)


def test_the_baseline_leaves_the_gradient_unbiased():
    """E[(r - v) grad log pi] is the gradient of E[r], whatever v is: exactly, over all actions."""
    logits = torch.tensor([0.3, -0.4, 1.0], requires_grad=True, dtype=torch.float64)
    reward = numbers(1, 0, 0.5)
    probabilities = logits.softmax(0)
    (expected,) = torch.autograd.grad(probabilities @ reward, logits, retain_graph=True)
    for value in (0.0, 0.389, 0.9):
        surprise = (probabilities * (reward - value)).detach()
        (got,) = torch.autograd.grad(surprise @ logits.log_softmax(0), logits)
        torch.testing.assert_close(got, expected)


def test_the_shift_is_a_mean_over_a_responses_tokens():
    before = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -1.0, -1.5]])
    now = torch.tensor([[-1.2, -1.6, torch.nan], [-0.5, -1.0, -1.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(policy_shift(before, now, mask), torch.tensor([0.3, 0.0]))


def test_prompts_are_drawn_by_weight_without_repeats():
    random = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0])
    seen = torch.stack([draw_by_weight(weights, 1, random) for _ in range(2000)])
    shares = torch.bincount(seen.flatten(), minlength=5) / 2000
    torch.testing.assert_close(shares, weights / 5, atol=0.04, rtol=0)
    assert sorted(draw_by_weight(weights, 3, random).tolist()) == [1, 2, 4]
    assert len(draw_by_weight(weights, 7, random)) == 7  # more than there are: with repeats


def test_wrong_calls_are_refused():
    tracker, one = BetaValueTracker(2), torch.tensor([0])
    two = torch.zeros(1, 2)
    random = torch.Generator()
    for call, message in (
        (lambda: BetaValueTracker(0), "at least one prompt"),
        (lambda: tracker.start(numbers(1), 8, 8.0), r"must be \[2\]"),
        (lambda: tracker.start(numbers(1, 9), 8, 8.0), "between 0 and the 8"),
        (lambda: tracker.start(numbers(1, 1), 0, 8.0), "above 0"),
        (lambda: tracker.update(one, numbers(1.5), numbers(0.9)), "rewards must lie"),
        (lambda: tracker.update(one, numbers(1), numbers(1.1)), "shares"),
        (lambda: tracker.update(one, numbers(1, 1), numbers(0.9)), "must all be"),
        (lambda: kept_share(numbers(0), 0.96, 0.875, 0.06), "low < high"),
        (lambda: kept_share(numbers(0), 0.8, 0.9, 0.0), "half_life"),
        (lambda: policy_shift(two, two, torch.ones(1, 2)), "a boolean mask"),
        (lambda: uncertainty(numbers(1.2), 0.05), "between 0 and 1"),
        (lambda: draw_by_weight(numbers(0, 0), 1, random), "cannot draw 1 of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The method --------------------------------------------------------------------------------------


def test_values_start_from_samples_of_every_prompt():
    method = made()
    method.choose(0)
    tracker = method.credit.tracker
    assert tracker.sizes().tolist() == pytest.approx([8.0] * len(ROWS))
    assert len(set(tracker.values().tolist())) > 3
    flat = made(offline_samples=0)
    flat.choose(0)
    assert flat.credit.tracker.sizes().tolist() == [1.0] * len(ROWS)


def test_advantages_come_from_the_values_before_the_step():
    method = made()
    method.choose(0)
    before = method.credit.tracker.values().clone()
    batch = method.collect(0)
    expected = batch_standardised(batch.reward - before[batch.row].float())
    torch.testing.assert_close(batch.advantages, expected)
    assert method.credit.tracker.values().equal(before)
    one_update(method, batch)
    values = method.credit.tracker.values()
    untouched = torch.ones(len(ROWS), dtype=torch.bool)
    untouched[batch.row] = False
    assert values[untouched].equal(before[untouched])
    # every visited value has gone towards its reward; at a first visit 0.96 of the past stays
    start, sizes = before[batch.row], 8 * 0.96 + 1
    expected = start + (batch.reward - start) / sizes
    torch.testing.assert_close(values[batch.row], expected.double())


def test_the_past_is_forgotten_as_far_as_the_policy_has_moved():
    method = made(prompts="in turn", batch_size=24, offline_samples=0)
    one_update(method, method.collect(0), rate=1e-12)
    assert method.credit.tracker.sizes().tolist() == pytest.approx([0.96 + 1] * 24)
    one_update(method, method.collect(1), rate=1e-12)  # the policy has stayed where it was
    still = 0.96 * 1.96 + 1
    assert method.credit.tracker.sizes().tolist() == pytest.approx([still] * 24)
    batch = method.collect(2)
    moved(method, 0.2)
    one_update(method, batch, rate=1e-12)
    assert method.credit.tracker.sizes().tolist() == pytest.approx([0.875 * still + 1] * 24)


def test_constant_forgetting_stores_and_scores_nothing():
    method = made(advantage={"name": "single-stream", "forgetting": "constant"}, offline_samples=0)
    batch = method.collect(0)
    one_update(method, batch)
    assert method.credit.tracker.sizes(batch.row).tolist() == pytest.approx([1.875] * 8)
    assert set(method.credit.state_dict()) == {"alpha", "beta"}


def test_advantages_can_be_standardised_over_tokens():
    method = made(
        advantage={"name": "single-stream", "standardise": "tokens"},
        rollout={"samples": 1, "max_new_tokens": 6, "stop": list("abcdefghi")},
    )
    batch = method.collect(0)
    counted = batch.advantages[batch.mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6)
    assert float(counted.std()) == pytest.approx(1, abs=1e-5)
    lengths = batch.mask.sum(1)
    assert len(lengths.unique()) > 1
    one = batch.advantages[lengths == lengths.max()]
    assert one.equal(one[:, :1].expand_as(one))


def test_what_is_replayed_is_not_counted_again():
    method = made(prompts="in turn", offline_samples=0, replay=4)
    for step in range(2):
        one_update(method, method.collect(step), rate=1e-12)
    assert sorted(method.credit.tracker.sizes().tolist()) == pytest.approx([1.0] * 8 + [1.96] * 16)


def test_what_a_tool_says_does_not_move_the_policy():
    method = made(
        tool={"name": "calculator", "opening": "a", "closing": "e"}, offline_samples=0,
        prompts="in turn", batch_size=24, rollout={"samples": 1, "max_new_tokens": 40},
    )  # fmt: skip
    batch = method.collect(0)
    lengths = torch.tensor([len(response) for response in batch.responses])
    assert bool((batch.written.sum(1) < lengths).any())
    one_update(method, batch, rate=1e-12)
    for i, row in enumerate(batch.row.tolist()):
        _, logprobs = method.credit._visits[row]
        assert logprobs.isnan().equal(~batch.written[i, : len(logprobs)])
    one_update(method, method.collect(1), rate=1e-12)
    assert bool(method.credit.tracker.sizes().isfinite().all())


def test_uncertain_prompts_are_drawn_more_often():
    method = made(offline_samples=0, exploration=0.01)
    tracker = method.credit.tracker
    tracker.start(numbers(*[4] * 6, *[0] * 9, *[8] * 9), 8, 1000.0)
    seen = torch.tensor([method.choose(step) for step in range(60)])
    assert all(len(set(step)) == 8 for step in seen.tolist())
    # 0.25 if all were drawn alike
    assert float((seen < 6).float().mean()) > 0.32


def test_it_is_a_part_of_any_policy_gradient():
    settings = {"rollout": {"samples": 4, "max_new_tokens": 5}, "advantage": "single-stream"}
    method = made(PolicyGradient, gradient="sequence", **settings)
    one_update(method, method.collect(0))
    tracker = method.estimator.advantage.tracker
    visited = tracker.sizes() > 1
    assert int(visited.sum()) == 8
    assert tracker.sizes()[visited].tolist() == pytest.approx([0.96 + 4] * 8)


def test_the_reward_rises_and_no_response_is_wasted(tmp_path):
    settings = {**SMALL, **SHORT, "learning_rate": 3e-3, "batch_size": 16, "minibatches": 1}
    run = train(
        "spo-single-stream", data=ROWS, reward=letters, steps=30, offline_samples=4,
        output=tmp_path / "run", **settings,
    )  # fmt: skip
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    rewards = torch.tensor([row["reward"] for row in rows])
    first, last = rewards[:8], rewards[-8:]
    noise = float((first.var() / 8 + last.var() / 8).sqrt())
    assert float(last.mean() - first.mean()) > max(0.2, 4 * noise)
    assert all(row["advantage/spread"] == pytest.approx(1, abs=0.05) for row in rows)
    # the values follow the policy upwards
    assert rows[-1]["value/mean"] == pytest.approx(float(last.mean()), abs=0.15)
    assert run.method.credit.tracker.values().min() > 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "batch_size": 16, "offline_samples": 2}
    assert_resumes("spo-single-stream", tmp_path, data=data, reward=f"{reward}:letters", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": {"keep_low": 0.97}}, "advantage.keep_low: must be below .*0.96, got 0.97"),
        ({"advantage": {"keep_high": 1.0}}, "advantage.keep_high: .*less than 1"),
        ({"advantage": {"half_life": 0.0}}, "advantage.half_life: .*greater than 0"),
        ({"advantage": "batch"}, "advantage: spo-single-stream draws .* got 'batch'"),
        ({"batch_size": 1, "minibatches": 1}, "batch_size: .*at least 2 responses a step, got 1"),
        ({"reward": lambda completions: [2.0] * len(completions)}, "reward: .*got 2 to 2"),
        (
            {"reward": lambda completions: [-1.0] * len(completions), "offline_samples": 0},
            "reward: .*between 0 and 1, got -1 to -1",
        ),
        ({"prompts": "prioritized"}, "prompts: .*'prioritised'"),
    ],
)
def test_faults_are_named_in_one_line(settings, message, tmp_path):
    given = {**SMALL, **SHORT, "data": ROWS, "reward": letters, **settings}
    with pytest.raises(PostgradError, match=message) as caught:
        train("spo-single-stream", steps=1, output=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
