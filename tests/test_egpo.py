"""EGPO: the exact step, its loss as a regression, the look-ahead, and real runs."""

import inspect

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.games.egpo import EGPO, EGPOSettings
from postgrad.models.language import load_policy
from postgrad.objectives.game import (
    divergence,
    extragradient_step,
    mirror_step,
    nash_policy,
    online_ipo,
    wins_against,
)
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PI = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
BETA, ETA = 0.5, 0.4
FIRST, SECOND = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
ROWS = [{"prompt": f"{i:02d}+{i:02d}=", "answer": str(2 * i)} for i in range(24)]


def prefer(first, second):
    def letters(text):
        return sum(c.isalpha() for c in text) / max(len(text), 1)

    pairs = [(letters(a), letters(b)) for a, b in zip(first, second, strict=True)]
    return [0.9 if one > other else 0.1 if one < other else 0.5 for one, other in pairs]


def made(preference=prefer, **config):
    rollout = {"samples": 2, "max_new_tokens": 5, "temperature": 2.0, "top_k": 10}
    values = {"model": "tiny", "batch_size": 4, "rollout": rollout, **config}
    return EGPO(
        validated(EGPOSettings, values), Place(), data=ROWS, eval_data=ROWS, preference=preference
    )


def optimisers(method, **settings):
    loop = LoopSettings(**{"learning_rate": 1e-2, "clip_norm": 0, **settings})
    return Optimisers(method.modules(), loop, torch.device("cpu"))


def weights(method):
    return {name: p.detach().clone() for name, p in method.policy.named_parameters()}


# Tables -----------------------------------------------------------------------------------------


def close(found, numbers):
    torch.testing.assert_close(found, torch.tensor(numbers).double(), atol=1e-6, rtol=0)


def test_the_worked_example():
    ahead = mirror_step(P, PI.log(), PI, REF.log(), BETA, ETA).exp()
    close(ahead, (0.258493, 0.466723, 0.274783))
    close(wins_against(P, ahead), (0.604254, 0.479038, 0.437531))
    after = extragradient_step(P, PI.log(), REF.log(), BETA, ETA).exp()
    close(after, (0.258752, 0.462503, 0.278745))
    target = nash_policy(P, REF, BETA)
    close(target, (0.527119, 0.230675, 0.242205))
    distances = [float(divergence(target, policy)) for policy in (PI, ahead, after)]
    assert distances == pytest.approx([0.280556, 0.182474, 0.180575], abs=1e-6)
    assert float(table_loss(PI.log(), PI)) == pytest.approx(1.249091, abs=1e-6)
    assert float(table_loss(PI.log(), ahead)) == pytest.approx(1.234304, abs=1e-6)


def table_loss(theta, opponent):
    """Over all ordered pairs, uniformly."""
    ratio = theta.log_softmax(-1) - REF.log()
    wins = wins_against(P, opponent)
    return online_ipo(ratio[FIRST] - ratio[SECOND], wins[FIRST], wins[SECOND], BETA).mean()


def descended(theta, opponent, rate):
    theta = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(table_loss(theta, opponent), theta)
    return (theta - rate * slope).detach()


def test_gradient_descent_on_the_loss_is_the_closed_form():
    """At the rate eta beta K / 4 = 0.15."""
    rate = ETA * BETA * 3 / 4
    assert rate == pytest.approx(0.15)
    ahead = descended(PI.log(), PI, rate).softmax(-1)
    expected = mirror_step(P, PI.log(), PI, REF.log(), BETA, ETA).exp()
    torch.testing.assert_close(ahead, expected, atol=1e-12, rtol=0)
    after = descended(PI.log(), ahead, rate).softmax(-1)
    expected = extragradient_step(P, PI.log(), REF.log(), BETA, ETA).exp()
    torch.testing.assert_close(after, expected, atol=1e-12, rtol=0)


def test_one_opponent_is_enough_on_average():
    theta = PI.log().requires_grad_()
    ratio = theta.log_softmax(-1) - REF.log()
    delta = ratio[FIRST] - ratio[SECOND]
    sampled = sum(
        PI[m] * online_ipo(delta, P[FIRST, m], P[SECOND, m], BETA).mean() for m in range(3)
    )
    (found,) = torch.autograd.grad(sampled, theta)
    theta = PI.log().requires_grad_()
    (expected,) = torch.autograd.grad(table_loss(theta, PI), theta)
    torch.testing.assert_close(found, expected)


def test_among_equals_the_policy_returns_to_the_reference_geometrically():
    even = torch.full((3, 3), 0.5, dtype=torch.float64)
    log_policy = PI.log()

    def distance():
        ratio = log_policy - REF.log()
        return ratio - ratio.mean()

    start = distance()
    for _ in range(5):
        log_policy = extragradient_step(even, log_policy, REF.log(), BETA, ETA)
    torch.testing.assert_close(distance(), (1 - ETA * BETA) ** 5 * start)


def test_the_equilibrium_is_where_it_stays():
    target = nash_policy(P, REF, 0.1)
    for _ in range(10):
        moved_on = extragradient_step(P, target.log(), REF.log(), 0.1, 0.2).exp()
        torch.testing.assert_close(moved_on, target, atol=1e-6, rtol=0)


def test_where_self_play_circles_it_arrives():
    cycle = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], dtype=torch.float64)
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    ahead = circling = PI.log()
    for _ in range(3000):
        ahead = extragradient_step(cycle, ahead, even.log(), 0.01, 0.5)
        circling = mirror_step(cycle, circling, circling.exp(), even.log(), 0.01, 0.5)
    assert float(divergence(even, ahead.exp())) < 1e-9
    assert float(divergence(even, circling.exp())) > 0.1


def test_the_order_of_a_pair_does_not_matter():
    delta, wins, others = torch.randn(4), torch.rand(4), torch.rand(4)
    one = online_ipo(delta, wins, others, 0.3)
    torch.testing.assert_close(one, online_ipo(-delta, others, wins, 0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"wins": torch.tensor([1.5])}, r"\[0, 1\]"),
        ({"other_wins": torch.tensor([float("nan")])}, r"\[0, 1\]"),
        ({"delta": torch.zeros(2)}, "one shape"),
    ],
)
def test_a_wrong_call_says_why(change, message):
    half = torch.tensor([0.5])
    arguments = {"delta": half, "wins": half, "other_wins": half, "beta": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        online_ipo(**arguments)


def test_a_step_that_forgets_the_policy_is_refused():
    with pytest.raises(ValueError, match="eta tau must be below 1"):
        extragradient_step(P, PI.log(), REF.log(), 0.5, 2.0)


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_the_regression_of_log_ratios_at_temperature_one(normalised):
    asked = []

    def judge(first, second):
        asked.append((first, second))
        return prefer(first, second)

    method = moved(made(judge, beta=0.5, length_normalised=normalised))
    batch = method.collect(0)
    own, others = asked[0]  # the judge is asked in both orders; these are the first
    assert own[0::2] != own[1::2]
    assert others[0::2] == others[1::2]
    expected = []
    for i, (prompt, pair) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        texts = [method.policy.decode(response) for response in pair]
        assert sorted(texts) == sorted(own[2 * i : 2 * i + 2])
        wins = prefer(texts, [others[2 * i]] * 2)
        assert wins[0] >= wins[1]
        now = method.policy.score([prompt] * 2, pair).logprobs.sum(1)
        with method.policy.reference():
            before = method.policy.score([prompt] * 2, pair).logprobs.sum(1)
        ratio = now - before
        if normalised:
            ratio = ratio / torch.tensor([len(response) for response in pair])
        expected.append((ratio[0] - ratio[1] - (wins[0] - wins[1]) / 0.5).square())
    loss, _ = method.loss(batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)


def test_opponents_are_drawn_at_temperature_one_from_everything():
    settings = made().opponent_rollout.sampling()
    assert (settings.temperature, settings.top_k, settings.top_p) == (1.0, 0, 1.0)
    method = moved(made(mixture=1.0), 0.1)
    asked = []
    method.preference = lambda rows, first, second: asked.append(second) or [0.5] * len(first)
    method.collect(0)
    with method.policy.reference():
        method.config.mixture = 0.0
        method.collect(0)
    assert asked[0] == asked[1]


def test_the_step_is_made_from_the_old_weights_against_the_policy_ahead():
    method = made()
    optimise = optimisers(method)
    method.update(method.collect(0), optimise)  # so that the optimiser remembers something
    start = weights(method)
    state = optimise.state_dict()["policy"]["state"]
    memory = [{name: value.clone() for name, value in one.items()} for one in state.values()]
    batch = method.collect(1)
    metrics = method.update(batch, optimise)
    found = weights(method)

    again = made()
    by_hand = optimisers(again)

    def as_before():
        with torch.no_grad():
            for name, parameter in again.policy.named_parameters():
                parameter.copy_(start[name])
        values = {
            i: {name: value.clone() for name, value in one.items()} for i, one in enumerate(memory)
        }
        groups = by_hand.state_dict()["policy"]["param_groups"]
        by_hand.load_state_dict({"policy": {"state": values, "param_groups": groups}})

    as_before()
    tried = by_hand(again.loss, batch)
    ahead = again.drawn(1, "ahead")
    as_before()
    made_from = by_hand(again.loss, ahead)
    for name, parameter in again.policy.named_parameters():
        assert torch.equal(parameter, found[name])
    assert metrics["look_ahead/loss"] == tried["loss"]
    assert metrics["loss"] == made_from["loss"]
    drawn = [tuple(r.tolist()) for pair in ahead.responses for r in pair]
    assert drawn != [tuple(r.tolist()) for pair in batch.responses for r in pair]


def test_without_looking_ahead_it_is_one_plain_step():
    method, plain = made(look_ahead=False), made()
    method.update(method.collect(0), optimisers(method))
    optimisers(plain)(plain.loss, plain.collect(0))
    found = weights(method)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, found[name])


def test_both_halves_are_sampled_in_the_loops_precision():
    precise = []

    class Watched(EGPO):
        def drawn(self, step, half):
            precise.append(torch.is_autocast_enabled("cpu"))
            return super().drawn(step, half)

    method = Watched(
        made().config, Place(), data=ROWS, eval_data=ROWS, preference=prefer, model=made().policy
    )
    optimise = optimisers(method, precision="bf16")
    with optimise.autocast():
        batch = method.collect(0)
    method.update(batch, optimise)
    assert precise == [True, True]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    (tmp_path / "judge.py").write_text(inspect.getsource(prefer))
    settings = {
        **SMALL,
        "batch_size": 4,
        "rollout": {"samples": 4, "max_new_tokens": 5},
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "preference": f"{tmp_path / 'judge.py'}:prefer",
        "save_every": 2,
    }
    assert_resumes("egpo", tmp_path, **settings)


def test_an_adapter_is_looked_ahead_with_and_trained(tmp_path):
    rollout = {"samples": 2, "max_new_tokens": 5}
    run = train(
        "egpo",
        data=ROWS,
        preference=prefer,
        tune="lora",
        steps=2,
        batch_size=4,
        rollout=rollout,
        output=tmp_path / "run",
        **SMALL,
    )
    now = dict(run.method.policy.named_parameters())
    start = dict(load_policy("tiny", tune="lora").named_parameters())
    changed = {name for name in now if not torch.equal(now[name], start[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_it_learns_to_say_letters(tmp_path):
    settings = {**SMALL, "learning_rate": 1e-2}
    train(
        "egpo",
        data=ROWS,
        preference=prefer,
        eval_data=ROWS[:12],
        output=tmp_path / "run",
        steps=15,
        rollout={"samples": 4, "max_new_tokens": 5},
        batch_size=8,
        evaluate_every=15,
        frontier={"max_new_tokens": 5, "samples": 4},
        **settings,
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wins = [row["evaluation/win_rate"] for row in rows if "evaluation/win_rate" in row]
    assert wins[-1] > 0.6 > wins[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollout": {"samples": 3}}, "rollout.samples: .*even number, got 3"),
        ({"mixture": 1.5}, "mixture: .*less than or equal to 1, got 1.5"),
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"epochs": 2}, "epochs: .*1, got 2"),
        ({"minibatches": 2}, "minibatches: .*1, got 2"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    with pytest.raises(PostgradError, match=message) as caught:
        train("egpo", data=ROWS, preference=prefer, output=tmp_path / "run", **SMALL, **setting)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
