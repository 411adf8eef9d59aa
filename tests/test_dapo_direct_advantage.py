"""Direct advantage policy optimisation: its tables, its steps, and real runs of the tiny model."""

import math
import shutil

import pytest
import torch

from language_runs import SMALL, assert_same_run, moved, write_rows
from postgrad.advantages.steps import balanced, clear_states, state_means, step_advantages
from postgrad.api import resume, train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.prefixes import Splitter, flattened, restored, tried_steps
from postgrad.methods.language.verifiable.dapo_direct_advantage import DirectAdvantage
from postgrad.models.language import load_policy
from postgrad.objectives.advantage_regression import (
    advantage_regression,
    regression_minimiser,
    step_improvement,
    success_loss,
)
from postgrad.sampling.steps import step_ends
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i:02d}+{i:02d}="} for i in range(12)]
SMALLER = {
    "batch_size": 4,
    "rollout": {"samples": 6, "max_new_tokens": 4},
    "solutions": 4,
    "selected": 2,
    "delimiter": "",
    "gather_steps": 2,
    "states": 8,
    "critic_rate": 1.0,
    "least_gap": 0.0,
}
REWARD = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / 4 for text in completions]
"""
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ADVANTAGES = torch.tensor([0.21, -0.09, -0.39], dtype=torch.float64)


def letters(completions):
    return [sum(c.isalpha() for c in text) / 4 for text in completions]


def made(steps=4, reward=letters, rows=ROWS, seed=0, **config):
    values = {"model": "tiny", **SMALLER, **config}
    kind = DirectAdvantage
    return kind(validated(kind.Config, values), Place(seed, steps=steps), data=rows, reward=reward)


def optimisers(method, **settings):
    return Optimisers(
        method.modules(),
        LoopSettings(clip_norm=0, **{"learning_rate": 1e-3, **settings}),
        torch.device("cpu"),
        method.rates(),
    )


def gathered(method):
    """The method after its steps of gathering."""
    optimise = optimisers(method)
    for step in range(method.config.gather_steps):
        method.update(method.collect(step), optimise)
    return method


# The objective ------------------------------------------------------------------------------


def test_the_worked_example_of_the_regression():
    values = torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.long)
    advantages = step_advantages(values, one, torch.zeros(3, dtype=torch.long))
    assert advantages.tolist() == pytest.approx([0.3, 0, -0.3])
    u = torch.tensor([0.4, -0.1, -0.6], dtype=torch.float64, requires_grad=True)
    losses = advantage_regression(u - 1.0, torch.full_like(u, -1.0), advantages, 0.5)
    assert losses.tolist() == pytest.approx([0.02, 0.005, 0.0], abs=1e-9)
    losses.mean().backward()
    assert float(losses.detach().mean()) == pytest.approx(0.008333, abs=1e-6)
    assert u.grad.tolist() == pytest.approx([-0.066667, -0.033333, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "policy", "improvement"),
    [
        (None, (0.677404, 0.234325, 0.088271), 0.048936),
        ((1 / 3,) * 3, (0.670381, 0.239487, 0.090132), 0.048680),
    ],
)
def test_the_worked_example_of_the_minimiser(weights, policy, improvement):
    weights = weights and torch.tensor(weights, dtype=torch.float64)
    got = regression_minimiser(REFERENCE, ADVANTAGES, 0.5, weights)
    assert got.tolist() == pytest.approx(policy, abs=1e-6)
    assert float(step_improvement(got, REFERENCE, ADVANTAGES, 0.5)) == pytest.approx(
        improvement, abs=1e-6
    )


def test_the_minimiser_is_stationary_and_no_softmax():
    got = regression_minimiser(REFERENCE, ADVANTAGES, 0.5)
    u = (got / REFERENCE).log()
    losses = advantage_regression(got.log(), REFERENCE.log(), ADVANTAGES, 0.5)
    assert float((REFERENCE * losses).sum()) == pytest.approx(0.004202, abs=1e-6)
    multipliers = (ADVANTAGES / 0.5 - u) / u.exp()
    assert multipliers.tolist() == pytest.approx([0.085873] * 3, abs=1e-6)
    softmax = (REFERENCE.log() + ADVANTAGES / 0.5).softmax(0)
    assert softmax.tolist() == pytest.approx([0.689767, 0.227131, 0.083102], abs=1e-6)
    best = float(step_improvement(softmax, REFERENCE, ADVANTAGES, 0.5))
    assert best == pytest.approx(0.049127, abs=1e-6)
    for step in 0.01 * torch.randn(5, 3, dtype=torch.float64):
        near = (got.log() + step).softmax(0)
        worse = advantage_regression(near.log(), REFERENCE.log(), ADVANTAGES, 0.5)
        assert float((REFERENCE * worse).sum()) > 0.004202
        near = (softmax.log() + step).softmax(0)
        assert float(step_improvement(near, REFERENCE, ADVANTAGES, 0.5)) < best


@pytest.mark.parametrize("beta", [0.003, 0.1, 2.0])
def test_no_state_gets_worse_whoever_chose_the_actions(beta):
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 5, generator=random, dtype=torch.float64).softmax(-1)
    weights = torch.randn(40, 5, generator=random, dtype=torch.float64).softmax(-1)
    values = torch.rand(40, 5, generator=random, dtype=torch.float64)
    values[0] = 0.7  # nothing to choose between
    advantages = values - (reference * values).sum(-1, keepdim=True)
    policy = regression_minimiser(reference, advantages, beta, weights)
    torch.testing.assert_close(policy.sum(-1), torch.ones(40, dtype=torch.float64))
    gain = step_improvement(policy, reference, advantages, beta)
    assert float(gain[0]) == pytest.approx(0, abs=1e-12)
    assert bool((gain[1:] > 0).all())
    u = (policy / reference).log()
    slopes = weights * (advantages / beta - u)  # proportional to the policy
    torch.testing.assert_close(slopes, slopes.sum(-1, keepdim=True) * policy, atol=1e-8, rtol=0)


def test_its_limits():
    near = regression_minimiser(REFERENCE, ADVANTAGES, 1e9)
    torch.testing.assert_close(near, REFERENCE)
    nothing = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(regression_minimiser(REFERENCE, nothing, 0.1), REFERENCE)


def test_at_the_reference_its_gradient_is_the_policy_gradient_over_beta():
    logits = REFERENCE.log().requires_grad_()
    logp = logits.log_softmax(0)
    losses = advantage_regression(logp, REFERENCE.log(), ADVANTAGES, 0.1)
    (got,) = torch.autograd.grad((REFERENCE * losses).sum(), logits, retain_graph=True)
    surrogate = (REFERENCE * ADVANTAGES * logp).sum()
    (expected,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    torch.testing.assert_close(got, -expected / 0.1)
    # and of the regularised improvement, times -beta
    gain = step_improvement(logp.exp(), REFERENCE, ADVANTAGES, 0.1)
    (slope,) = torch.autograd.grad(gain, logits)
    torch.testing.assert_close(slope, -0.1 * got)


def test_the_critics_loss():
    logits = torch.logit(torch.tensor([0.6, 0.75], dtype=torch.float64))
    success = torch.tensor([0.75, 0.75], dtype=torch.float64)
    losses = success_loss(logits, success)
    assert float(losses[0]) == pytest.approx(0.612192, abs=1e-6)
    assert float(losses[1]) < float(losses[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: advantage_regression(a, a, a, 0.0), "beta must be positive"),
        (lambda a: advantage_regression(a, a[:2], a, 0.1), "one shape"),
        (lambda a: advantage_regression(a[None], a[None], a[None], 0.1), "1 dimension"),
        (lambda a: success_loss(a, a + 1), r"lie in \[0, 1\]"),
        (lambda a: regression_minimiser(REFERENCE, a - 1, 0.1), "must not be below 0"),
        (lambda a: regression_minimiser(REFERENCE, a, -1.0), "beta must be positive"),
        (lambda a: step_advantages(a, a.long(), a.long()), "at least once"),
        (lambda a: step_advantages(a, a[:2], a), "one length"),
        (lambda a: clear_states(a, a.long(), -0.1), "least_gap must be at least 0"),
        (lambda a: balanced(a, 4, torch.Generator()), "cannot take 4"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(ADVANTAGES)


# Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "delimiter", "ends"),
    [
        (["a", "\n", "b", "\n", ""], "\n", [2, 4, 5]),
        (["a.\n", "b"], "\n", [1, 2]),
        (["a", "\n", "\n", "b", "\n"], "\n", [2, 5]),
        (["\n", "a", "", "\n", "b"], "\n", [4, 5]),
        (["a", "\n\n", "b", "\n", "\n", "c"], "\n\n", [2, 5, 6]),
        (["a", "b", ""], "", [1, 2, 3]),
        (["a", "b"], "\n", [2]),
        ([], "\n", []),
    ],
)
def test_where_steps_end(pieces, delimiter, ends):
    assert step_ends(pieces, delimiter) == ends


def test_steps_of_a_beginning_are_steps_of_the_whole():
    pieces = list("\n ab\n\nc\nd\n\n\ne")
    whole = step_ends(pieces, "\n")
    for place in range(1, len(pieces)):
        assert step_ends(pieces[:place], "\n")[:-1] == [end for end in whole if end < place]
        # what follows a whole step is split as it is within the response
        if place in whole:
            rest = step_ends(pieces[place:], "\n")
            assert [place + end for end in rest] == [end for end in whole if end > place]


def test_beginnings_are_those_before_steps_once():
    policy = load_policy("tiny")
    ends = Splitter(policy, "\n")
    one, other = (policy.encode_response(text) for text in ("a\nb\nc", "a\nd\nc"))
    got = [policy.decode(ids) for ids in ends.beginnings([one, other], 20)]
    assert got == ["", "a\n", "a\nb\n", "a\nd\n"]
    assert [len(ids) for ids in ends.beginnings([one], 4)] == [0, 2]


def test_steps_tried_in_states():
    """Three completions of two states; equal steps are one, with the mean of their outcomes."""
    policy = load_policy("tiny")
    prompts = [policy.render("p"), policy.render("q")]
    prefixes = [prompts[0][:0], policy.encode_response("x\n", end=False)]
    texts = ["a\nb", "a\nc", "d", "b\n", "b\n", "b\nc"]
    completed = [policy.encode_response(text) for text in texts]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 0.0])
    got = tried_steps(prompts, prefixes, completed, rewards, Splitter(policy, "\n"))
    assert [policy.decode(p) for p in got.prompts] == ["p", "p", "qx\n"]
    assert [policy.decode(r) for r in got.responses] == ["a\n", "d", "b\n"]
    assert got.state.tolist() == [0, 0, 1]
    assert got.counts.tolist() == [2, 1, 3]
    assert got.outcomes.tolist() == pytest.approx([0.5, 1.0, 1 / 6])
    assert got.final.tolist() == [False, True, False]
    assert int(got.responses[1][-1]) == policy.tokenizer.eos_token_id
    again = restored(flattened(got), policy.device)
    assert again.fields().keys() == got.fields().keys()
    for name, values in got.fields().items():
        assert all(map(torch.equal, values, again.fields()[name]))


def test_advantages_are_over_all_that_was_tried():
    state = torch.tensor([0, 0, 1, 1, 1])
    values = torch.tensor([1.0, 0.0, 0.2, 0.5, 0.5])
    counts = torch.tensor([3, 1, 2, 1, 1])
    assert state_means(values, counts, state).tolist() == pytest.approx([0.75, 0.35])
    advantages = step_advantages(values, counts, state)
    sums = torch.zeros(2).index_add_(0, state, counts * advantages)
    torch.testing.assert_close(sums, torch.zeros(2), atol=1e-6, rtol=0)
    assert clear_states(advantages, state, 0.5).tolist() == [True, True, False, False, False]
    assert clear_states(advantages, state, 0.2).all()
    assert clear_states(torch.zeros(3), torch.tensor([0, 1, 1]), 0.0).tolist() == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("rewards", "right"), [([1, 1, 1, 1, 0, 0, 0], 2), ([1, 0, 0, 0, 0], 1), ([1, 1, 1, 1, 0], 3)]
)
def test_right_and_wrong_solutions_are_selected_alike(rewards, right):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    found = {tuple(balanced(rewards, 4, torch.Generator().manual_seed(seed))) for seed in range(20)}
    assert len(found) > 1 or len(rewards) == 5 - right + 1
    for chosen in found:
        assert len(set(chosen)) == 4
        assert float(rewards[list(chosen)].sum()) == right


# The method ---------------------------------------------------------------------------------


def test_what_it_gathers():
    method = made()
    batch = method.collect(0)
    index = method.order.indices(0).tolist()
    assert batch.group.unique().tolist() == [0, 1, 2, 3]
    assert torch.zeros(int(batch.state[-1]) + 1).long().index_add_(
        0, batch.state, batch.counts
    ).tolist() == [6] * (int(batch.state[-1]) + 1)
    for i in range(len(batch)):
        prompt = method.prompts[index[int(batch.group[i])]]
        assert torch.equal(batch.prompts[i][: len(prompt)], prompt)
        assert len(batch.responses[i]) == 1
        begun = len(batch.prompts[i]) - len(prompt)
        ended = int(batch.responses[i][-1]) in method.policy.end_tokens
        assert bool(batch.final[i]) == (ended or begun == 3)
        if batch.final[i]:
            text = method.policy.decode(torch.cat([batch.prompts[i], batch.responses[i]]))
            assert float(batch.outcomes[i]) == pytest.approx(letters([text[6:]])[0])
    again = made().collect(0)
    assert all(map(torch.equal, batch.responses, again.responses))
    assert not torch.equal(batch.outcomes, made(seed=1).collect(0).outcomes)


@pytest.mark.parametrize("values", ["critic", "outcomes"])
def test_the_regression_is_that_of_the_gathered_steps(values):
    """Against the definition, state by state."""
    least_gap = 0.05 if values == "critic" else 0.3
    method = gathered(made(values=values, least_gap=least_gap))
    tried = method._steps
    worth = tried.outcomes.clone()
    with torch.no_grad():
        if values == "critic":
            said = method.critic.rewards(tried.prompts, tried.responses).sigmoid()
            worth = torch.where(tried.final, worth, said)
        reference = torch.cat(
            [
                method.policy.score([p], [r]).logprobs.sum(1)
                for p, r in zip(tried.prompts, tried.responses, strict=True)
            ]
        )
    batch = method.collect(2)
    moved(method, 0.05)
    loss, metrics = method.loss(batch)
    kept, expected = [], {}
    for state in range(int(tried.state[-1]) + 1):
        rows = (tried.state == state).nonzero().squeeze(1)
        mean = (tried.counts[rows] * worth[rows]).sum() / 6
        advantages = worth[rows] - mean
        if len(rows) > 1 and float(advantages.max() - advantages.min()) >= least_gap:
            new = method.policy.score(
                [tried.prompts[i] for i in rows], [tried.responses[i] for i in rows]
            ).logprobs.sum(1)
            gaps = advantages / 0.01 - (new.detach() - reference[rows])
            expected[len(kept)] = float(gaps.square().mean() / 2)
            kept.append(state)
    assert 8 < len(kept) < int(tried.state[-1]) + 1
    chosen = batch.state.unique().tolist()
    assert len(chosen) == 8
    mean = sum(expected[state] for state in chosen) / 8
    assert float(loss.detach()) == pytest.approx(mean, rel=1e-4)
    assert metrics["log_ratio/above"] != 0


def test_at_the_reference_log_ratios_are_zero():
    method = gathered(made())
    _, metrics = method.loss(method.collect(2))
    assert metrics["log_ratio/above"] == pytest.approx(0, abs=1e-5)
    assert metrics["log_ratio/below"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 60])
def test_micro_batches_add_up(budget):
    method = moved(gathered(made()))
    batch = method.collect(2)

    def gradients(budget):
        optimise = optimisers(method, learning_rate=1e-12, token_budget=budget)
        metrics = method.update(batch, optimise)
        return metrics["loss"], [p.grad.clone() for p in method.policy.parameters()]

    (whole, expected), (parts, got) = gradients(None), gradients(budget)
    assert parts == pytest.approx(whole, rel=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_states_come_in_epochs_with_all_their_steps():
    method = gathered(made(steps=9))
    batches = [method.collect(step) for step in range(2, 9)]
    number = int(method._steps.state[-1]) + 1
    each = number // 8
    seen = torch.cat([batch.state.unique() for batch in batches[:each]])
    assert len(seen.unique()) == len(seen) == 8 * each
    for batch in batches:
        assert float(batch.weights.sum()) == pytest.approx(1)
        for state in batch.state.unique():
            own = int((method._steps.state == state).sum())
            assert int((batch.state == state).sum()) == own


def test_the_policy_waits_for_the_critic():
    method = made()
    before = {name: p.clone() for name, p in method.policy.named_parameters()}
    gathered(method)
    assert all(torch.equal(before[n], p) for n, p in method.policy.named_parameters())
    assert float(method.critic.head.weight.detach().abs().sum()) > 0


def test_the_critic_learns_the_chance_of_success():
    """Which the first letter decides: its loss comes near the least there is."""

    def begins(completions):
        return [float(text[:1].isalpha()) for text in completions]

    method = made(reward=begins)
    optimise, tried = optimisers(method), method.collect(0)
    found = [method._learn_values(tried, optimise) for _ in range(30)]
    assert found[0]["critic/loss"] == pytest.approx(math.log(2), abs=1e-6)
    excess = [metrics["critic/loss"] - metrics["critic/least_loss"] for metrics in found]
    assert excess[-1] < 0.3 * excess[0]


@pytest.mark.parametrize("values", ["critic", "outcomes"])
def test_it_learns_to_say_letters_from_steps_gathered_before(tmp_path, values):
    train(
        "dapo-direct-advantage", data=ROWS * 8, reward=letters, output=tmp_path / "run", steps=30,
        eval_data=ROWS, **{
            **SMALL, **SMALLER, "batch_size": 12, "gather_steps": 5, "values": values,
            "beta": 0.1, "states": 48,
        },
    )  # fmt: skip
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["evaluation/reward"] for row in rows if "evaluation/reward" in row]
    assert rewards[-1] > rewards[0] + 0.2
    learnt = [row for row in rows if "log_ratio/above" in row]
    assert len(learnt) == 25
    assert learnt[-1]["log_ratio/above"] > learnt[-1]["log_ratio/below"]


@pytest.mark.parametrize("gather_steps", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, gather_steps):
    """From the second of four steps: while it learns, and while it gathers."""
    (tmp_path / "letters.py").write_text(REWARD)
    settings = {
        **SMALL,
        **SMALLER,
        "data": write_rows(tmp_path / "rows.jsonl", ROWS),
        "reward": f"{tmp_path / 'letters.py'}:letters",
        "gather_steps": gather_steps,
        "save_every": 2,
        "steps": 4,
    }
    for name in ("whole", "parts"):
        train("dapo-direct-advantage", output=tmp_path / name, **settings)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "parts" / "model")
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_iteration_gathers_with_the_policy_of_the_first(tmp_path):
    method = gathered(made(steps=8, iterations=2))
    optimise = optimisers(method)
    for step in range(2, 4):
        method.update(method.collect(step), optimise)
    first = method._steps
    batch = method.collect(4)
    assert int(batch.counts.sum()) == 6 * (int(batch.state[-1]) + 1)
    method.update(batch, optimise)
    method.update(method.collect(5), optimise)
    second = method.collect(6)
    assert method._steps is not first
    _, metrics = method.loss(second)
    assert metrics["log_ratio/above"] == pytest.approx(0, abs=1e-5)


def test_without_a_difference_there_is_nothing_to_learn():
    method = gathered(made(values="outcomes", reward=lambda completions: [1.0] * len(completions),
                           least_gap=0.1))  # fmt: skip
    with pytest.raises(PostgradError, match=r"least_gap: in none of \d+ states .* 0.1 apart"):
        method.collect(2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.0}, "beta: .*greater than 0"),
        ({"selected": 5}, r"selected: at most as many as there are solutions \(4\), got 5"),
        ({"rollout": {"samples": 1}}, "rollout.samples: .*at least 2 completions of a state"),
        ({"gather_steps": 4}, r"steps: expected more than gather_steps = 4 .*got 4"),
        ({"iterations": 2}, r"steps: .*gather_steps = 2 in each of 2 iteration\(s\)"),
        ({"critic_minibatches": 5}, "minibatches: 5 optimiser steps cannot share"),
        ({"values": "judge"}, "values: .*'critic' or 'outcomes', got 'judge'"),
        ({"reward": None}, "reward: .*brings no verifier"),
        ({"critic": "no/such-model"}, "reward model 'no/such-model' cannot be loaded"),
    ],
)
def test_a_fault_is_named_before_anything_is_written(setting, message, tmp_path):
    values = {"data": ROWS, "reward": letters, "steps": 4, **SMALL, **SMALLER, **setting}
    with pytest.raises(PostgradError, match=message) as caught:
        train("dapo-direct-advantage", output=tmp_path / "run", **values)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rewards_that_are_no_chances_are_named():
    method = made(reward=lambda completions: [2.0] * len(completions))
    with pytest.raises(PostgradError, match="from 0 to 1, got 2 to 2"):
        method.collect(0)
