"""SFT by f-divergences: its dual, its identities, and real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.implicit_reward_sft import ImplicitRewardSFT
from postgrad.methods.language.supervised.sft import SFT
from postgrad.objectives.supervised import (
    conjugate,
    demonstration_weight,
    f_divergence,
    f_divergence_sft,
    implicit_reward,
    values_from_logits,
)
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

KINDS = ("tv", "pearson", "hellinger")
ROWS = [{"prompt": f"{i} + {i} = ", "completion": str(2**i)} for i in range(16)]
EXPERT = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)


def number(value):
    return torch.tensor([value], dtype=torch.float64)


# The objective ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loss", "weight"),
    [("pearson", -0.2775, 0.85), ("hellinger", -0.230769, 0.591716), ("tv", -0.3, 1.0)],
)
def test_the_worked_example(kind, loss, weight):
    """beta 0.1 and a log-ratio of 3, so that rho is 0.3."""
    logp = number(-2.0).requires_grad_()
    value = f_divergence_sft(logp, number(-5.0), kind, 0.1)
    value.sum().backward()
    assert float(0.1 * value.detach()) == pytest.approx(loss, abs=1e-6)
    assert float(-logp.grad) == pytest.approx(weight, abs=1e-6)
    rho = implicit_reward(logp.detach(), number(-5.0), 0.1)
    assert float(demonstration_weight(rho, kind)) == pytest.approx(weight, abs=1e-6)


def optimum(kind, beta, free_value=False):
    """Policy `[3]`, v and the loss at the minimum for the demonstrations of `EXPERT`."""
    logits = torch.zeros(3, dtype=torch.float64).requires_grad_()
    value = torch.zeros((), dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        logits.copy_(REFERENCE.log())
    variables = [logits, value] if free_value else [logits]
    optimiser = torch.optim.LBFGS(
        variables, max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        losses = f_divergence_sft(logits.log_softmax(0), REFERENCE.log(), kind, beta, value)
        loss = beta * (EXPERT * losses).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(0), float(value), float(closure().detach())


def divergence(policy):
    return float((policy * (policy / REFERENCE).log()).sum())


@pytest.mark.parametrize(
    ("kind", "beta", "policy", "kl"),
    [
        ("tv", 1.0, (0.8, 0.15, 0.05), 0.577),
        ("pearson", 1.0, (0.6585, 0.2303, 0.1112), 0.314),
        ("hellinger", 1.0, (0.4877, 0.2645, 0.2478), 0.085),
        ("pearson", 0.1, (0.7841, 0.1593, 0.0565), None),
        ("hellinger", 0.1, (0.7392, 0.1824, 0.0784), None),
    ],
)
def test_the_optimum_without_a_value(kind, beta, policy, kl):
    got, _, _ = optimum(kind, beta)
    assert got.tolist() == pytest.approx(policy, abs=6e-5)
    if kl is not None:
        assert divergence(got) == pytest.approx(kl, abs=6e-4)


@pytest.mark.parametrize(
    ("kind", "policy", "value", "primal"),
    [
        ("pearson", (0.685964, 0.215469, 0.098567), -0.541953, 0.449948),
        ("hellinger", (0.469207, 0.268475, 0.262318), -0.141505, 0.213632),
    ],
)
def test_with_a_free_value_the_dual_is_the_primal(kind, policy, value, primal):
    got, v, loss = optimum(kind, 1.0, free_value=True)
    assert got.tolist() == pytest.approx(policy, abs=1e-6)
    assert v == pytest.approx(value, abs=1e-6)
    assert -loss == pytest.approx(primal, abs=1e-6)
    # the primal objective at the same policy, which no neighbour improves
    assert float(f_divergence(got, EXPERT, kind)) + divergence(got) == pytest.approx(primal, 1e-6)
    for step in 0.01 * torch.randn(5, 3, dtype=torch.float64):
        near = (got.log() + step).softmax(0)
        assert float(f_divergence(near, EXPERT, kind)) + divergence(near) > primal - 1e-6
    if kind == "pearson":
        rho = (got / REFERENCE).log()
        assert v == pytest.approx(-float((EXPERT * rho).sum()), abs=1e-6)
        spread = float((EXPERT * rho.square()).sum()) - float((EXPERT * rho).sum()) ** 2
        assert loss == pytest.approx(-float((EXPERT * rho).sum()) + spread / 4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_conjugate_bounds_every_product(kind):
    """Fenchel-Young: f*(t) + f(u) >= t u, with equality at u = f*'(t)."""
    t = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64).requires_grad_()
    u = torch.linspace(0.01, 4, 41, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    costs = torch.stack([f_divergence(x[None], one, kind) for x in u])
    assert bool((conjugate(t, kind)[:, None] + costs >= t[:, None] * u - 1e-12).all())
    (slope,) = torch.autograd.grad(conjugate(t, kind).sum(), t)
    at = torch.stack([f_divergence(x[None], one, kind) for x in slope])
    torch.testing.assert_close(conjugate(t, kind) + at, t * slope)
    torch.testing.assert_close(demonstration_weight(-t, kind), slope)


def test_tv_is_sft_but_for_a_constant_whatever_the_reference():
    logp, first, second = torch.randn(3, 7, dtype=torch.float64)
    one, other = (f_divergence_sft(logp, ref, "tv", 0.3) for ref in (first, second))
    torch.testing.assert_close(one, -logp + first)
    torch.testing.assert_close(one - other, first - second)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_and_without_beta_all_are_sft(kind):
    logp = torch.randn(7, dtype=torch.float64).requires_grad_()
    at_reference = f_divergence_sft(logp, logp.detach(), kind, 0.7).sum()
    (slope,) = torch.autograd.grad(at_reference, logp)
    torch.testing.assert_close(slope, -torch.ones_like(slope))
    far = f_divergence_sft(logp, torch.randn(7, dtype=torch.float64), kind, 1e-9).sum()
    (slope,) = torch.autograd.grad(far, logp)
    torch.testing.assert_close(slope, -torch.ones_like(slope), atol=1e-7, rtol=0)


def test_where_the_pull_of_a_demonstration_ends():
    rho = torch.linspace(-0.9, 4, 50, dtype=torch.float64)
    pearson = demonstration_weight(rho, "pearson")
    assert float(demonstration_weight(number(2.0), "pearson")) == 0
    assert bool((pearson[rho < 2] > 0).all())
    assert bool((pearson[rho > 2] < 0).all())
    hellinger = demonstration_weight(rho, "hellinger")
    assert bool((hellinger > 0).all())
    assert bool((hellinger.diff() < 0).all())


def test_a_response_that_fell_too_far():
    fallen = number(-11.0).requires_grad_()
    with pytest.raises(ValueError, match=r"rho \+ v above -1, got -1.1"):
        f_divergence_sft(fallen, number(0.0), "hellinger", 0.1)
    loss = f_divergence_sft(fallen, number(0.0), "hellinger", 0.1, floor=-0.9)
    loss.sum().backward()
    assert float(loss) == pytest.approx(90.0)
    assert float(fallen.grad) == 0


def test_wrong_calls():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        f_divergence_sft(two, three, "pearson", 0.1)
    with pytest.raises(ValueError, match="beta must be positive"):
        f_divergence_sft(two, two, "pearson", 0.0)
    for call in (conjugate, demonstration_weight):
        with pytest.raises(ValueError, match=r"kind must be .*'renyi'"):
            call(two, "renyi")
    with pytest.raises(ValueError, match="kind must be"):
        f_divergence(two, two, "renyi")
    with pytest.raises(ValueError, match="beta must be positive"):
        values_from_logits(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), beta=0.0)
    with pytest.raises(ValueError, match="one shape"):
        values_from_logits(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


# Logits as values ---------------------------------------------------------------------------


def test_rewards_of_logits_telescope():
    beta = 0.7
    logits = 3 * torch.randn(4, 6, 9, dtype=torch.float64)
    actions = torch.randint(9, (4, 6))
    found = values_from_logits(logits, actions, beta)
    likely = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    torch.testing.assert_close(likely.sum(-1), (found.rewards.sum(-1) - found.values[:, 0]) / beta)
    # one step: log pi(a|s) = (r + V' - V)/beta
    following = torch.cat([found.values[:, 1:], torch.zeros(4, 1)], 1)
    torch.testing.assert_close(likely, (found.rewards + following - found.values) / beta)


def test_padding_has_no_values():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    actions = torch.randint(7, (2, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    logits[1, 3:] = torch.nan
    found = values_from_logits(logits, actions, mask=mask)
    alone = values_from_logits(logits[1:, :3], actions[1:, :3])
    torch.testing.assert_close(found.rewards[1:, :3], alone.rewards)
    torch.testing.assert_close(found.values[1:, :3], alone.values)
    assert found.rewards[1, 3:].tolist() == found.values[1, 3:].tolist() == [0, 0]


# The method ---------------------------------------------------------------------------------


def made(kind=ImplicitRewardSFT, **config):
    values = {"model": "tiny", "batch_size": 8, "max_response_tokens": 16, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


def gradients(method, budget=None):
    method.policy.zero_grad(set_to_none=True)
    settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
    optimise = Optimisers(method.modules(), settings, torch.device("cpu"))
    metrics = method.update(method.collect(0), optimise)
    return metrics, {name: p.grad.clone() for name, p in method.policy.named_parameters()}


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("divergence", ["pearson", "hellinger"])
def test_its_first_gradient_is_that_of_sft(divergence, level):
    metrics, got = gradients(made(divergence=divergence, level=level))
    _, expected = gradients(made(SFT))
    assert metrics["reward"] == pytest.approx(0, abs=1e-6)
    assert metrics["weight"] == pytest.approx(1, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_with_total_variation_it_is_sft():
    one, other = moved(made(divergence="tv")), moved(made(SFT))
    (one_metrics, got), (metrics, expected) = gradients(one), gradients(other)
    assert one_metrics == metrics
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not one.policy._frozen  # no reference is held or scored


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_loss_is_that_of_its_demonstrations(level):
    """Against log-probabilities of one response at a time."""
    method = moved(made(divergence="pearson", level=level, beta=0.5))
    batch = method.collect(0)
    total = 0.0
    with torch.no_grad():
        loss, metrics = method.loss(batch)
        for prompt, response in zip(batch.prompts, batch.responses, strict=True):
            now = method.policy.score([prompt], [response]).logprobs[0]
            with method.policy.reference():
                before = method.policy.score([prompt], [response]).logprobs[0]
            ratio = now - before
            ratio = ratio.sum(0, keepdim=True) if level == "sequence" else ratio
            total += float((-ratio + 0.5 * ratio.square() / 4).sum())
    assert float(loss) == pytest.approx(total / batch.tokens, abs=1e-5)
    assert metrics["clamped"] == 0


@pytest.mark.parametrize("budget", [1, 50])
def test_micro_batches_add_up_to_the_same_step(budget):
    whole, expected = gradients(moved(made(divergence="hellinger", beta=0.01)))
    parts, got = gradients(moved(made(divergence="hellinger", beta=0.01)), budget)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert parts["weight"] == pytest.approx(whole["weight"], abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_responses_that_fell_too_far_are_counted():
    method = moved(made(divergence="hellinger", beta=10.0), 0.1)
    loss, metrics = method.loss(method.collect(0))
    assert loss.isfinite()
    assert metrics["clamped"] > 0


def test_it_learns_and_the_reference_holds_it(tmp_path):
    """The same steps raise the demonstrations less where the reference is to stay near."""
    losses, rewards = {}, {}
    for name, settings in {
        "sft": {"divergence": "tv"},
        "loose": {"beta": 0.01},
        "tight": {"beta": 0.5},
    }.items():
        run = tmp_path / name
        train(
            "implicit-reward-sft", data=ROWS, steps=40, batch_size=16, max_response_tokens=16,
            output=run, **{**SMALL, "learning_rate": 5e-3, **settings},
        )  # fmt: skip
        rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
        losses[name] = rows
        rewards[name] = rows[-1].get("reward")
    assert losses["sft"][-1]["loss"] < 0.5 * losses["sft"][0]["loss"]
    assert rewards["loose"] > 0.05  # a log-ratio of more than 5 nats a response
    assert rewards["tight"] / 0.5 < 0.7 * rewards["loose"] / 0.01
    assert losses["tight"][-1]["weight"] < 0.5


def test_a_learned_value_evens_the_weights(tmp_path):
    """dL/dv = 1 - mean weight: at the optimum the weights have mean 1."""
    settings = {**SMALL, "data": ROWS, "steps": 25, "batch_size": 16, "max_response_tokens": 16}
    train("implicit-reward-sft", beta=0.1, output=tmp_path / "fixed", **settings)
    train("implicit-reward-sft", beta=0.1, value_rate=1.0, output=tmp_path / "free", **settings)
    fixed, free = (
        [row for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row][-1]
        for name in ("fixed", "free")
    )
    assert free["value"] < 0
    assert abs(free["weight"] - 1) < 0.5 * abs(fixed["weight"] - 1)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = {
        **SMALL,
        "data": write_rows(tmp_path / "demonstrations.jsonl", ROWS),
        "batch_size": 6,
        "max_response_tokens": 16,
        "save_every": 2,
        "schedule": "constant",
        "divergence": "hellinger",
        "value_rate": 0.1,
    }
    assert_resumes("implicit-reward-sft", tmp_path, **settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"divergence": "renyi"}, "divergence: .*'tv', 'pearson' or 'hellinger', got 'renyi'"),
        ({"level": "word"}, "level: .*'sequence' or 'token', got 'word'"),
        ({"value_rate": 0.1, "level": "token"}, "value_rate: .*needs level=sequence, got 0.1"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("implicit-reward-sft", data=ROWS, output=run, **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
