"""Regularized Preference Optimization: its identities, and real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.claims.rpo import BETA, LOSSES, ThreeArms
from postgrad.config import validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.dpo import DPO
from postgrad.methods.language.preference.rpo import RPO
from postgrad.objectives.pairwise import logistic, margin, negative_likelihood, pair_weight, rpo
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, no doubt"}
    for i in range(20)
]


def made(kind=RPO, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


def random_pairs(size=9, seed=0):
    """log pi(y_w), log pi(y_l) with gradients, and the reference's two, all `[B]` float64."""
    random = torch.Generator().manual_seed(seed)
    values = -20 * torch.rand(4, size, generator=random, dtype=torch.float64)
    return values[0].requires_grad_(), values[1].requires_grad_(), values[2], values[3]


# The pure functions ------------------------------------------------------------------------------


def test_the_worked_example():
    """beta 0.1, eta 0.005, coef 0.2; log pi(y_w) = -12 in 8 tokens, h = 0.13."""
    logp_w, logp_l, ref_w, ref_l = torch.tensor(
        [[-12.0], [-14.0], [-12.5], [-13.2]], dtype=torch.float64
    )
    logp_w.requires_grad_()
    h = 0.1 * margin(logp_w, logp_l, ref_w, ref_l)
    cumulative = rpo(h, logp_w, 0.005 * 0.1)
    assert float(cumulative.detach()) == pytest.approx(0.636258, abs=1e-6)
    (push,) = torch.autograd.grad(cumulative.sum(), logp_w, retain_graph=True)
    assert float(push) == pytest.approx(-0.047255, abs=1e-6)
    (plain,) = torch.autograd.grad(logistic(h).sum(), logp_w, retain_graph=True)
    assert float(plain) == pytest.approx(-0.046755, abs=1e-6)
    average = rpo(h, logp_w, 0.2, torch.tensor([8]))
    assert float(average.detach()) == pytest.approx(0.930258, abs=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.005, 3.0])
def test_the_chosen_keeps_a_push_that_never_vanishes(eta):
    """Equation 6: -beta (sigma(-h) + eta) on the chosen, and beta sigma(-h) on the rejected."""
    beta = 0.3
    logp_w, logp_l, ref_w, ref_l = random_pairs()
    h = beta * margin(logp_w, logp_l, ref_w, ref_l)
    rpo(h, logp_w, eta * beta).sum().backward()
    torch.testing.assert_close(logp_w.grad, -beta * (pair_weight(h.detach()) + eta))
    torch.testing.assert_close(logp_l.grad, beta * pair_weight(h.detach()))


def test_its_limits_are_dpo_and_sft():
    logp_w, logp_l, ref_w, ref_l = random_pairs()
    h = 0.1 * margin(logp_w, logp_l, ref_w, ref_l)
    torch.testing.assert_close(rpo(h, logp_w, 0.0), logistic(h), atol=0, rtol=0)
    heavy = rpo(h, logp_w, 1e9) / 1e9
    torch.testing.assert_close(heavy, negative_likelihood(logp_w), atol=1e-6, rtol=0)


def test_the_two_forms_agree_when_all_chosen_have_one_length():
    eta, beta, tokens = 0.01, 0.2, 7
    logp_w, logp_l, ref_w, ref_l = random_pairs()
    h = beta * margin(logp_w, logp_l, ref_w, ref_l)
    lengths = torch.full((9,), tokens)
    torch.testing.assert_close(
        rpo(h, logp_w, eta * beta), rpo(h, logp_w, eta * beta * tokens, lengths)
    )


def test_a_constant_of_the_prompt_moves_the_sft_term_alone():
    """DPO's loss cannot see c(x) in the implicit reward; the likelihood of the chosen can."""
    logp_w, logp_l, ref_w, ref_l = random_pairs()
    c = torch.linspace(-3, -1, 9, dtype=torch.float64)
    before = rpo(0.1 * margin(logp_w, logp_l, ref_w, ref_l), logp_w, 0.05)
    after = rpo(0.1 * margin(logp_w + c, logp_l + c, ref_w, ref_l), logp_w + c, 0.05)
    torch.testing.assert_close(after - before, -0.05 * c)


def test_its_minimiser_solves_the_max_min_problem():
    """Two responses, a grid of rewards: the theorem that makes the SFT term an adversary.

    max over pi of min over R of eta E[R(y1) - R(y0) - beta KL(pi || pi_ref)] + L_D(R), with y1 of
    pi and y0 of the baseline policy, which is the distribution of the chosen responses.
    """
    beta, eta, wins = 0.7, 0.4, 0.8  # P(first preferred to second)
    reference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)  # pi(first)
    gap = torch.linspace(-6, 6, 4801, dtype=torch.float64)  # R(first) - R(second)
    policies = torch.stack([p, 1 - p], 1)
    kl = (policies * (policies / reference).log()).sum(1)
    fit = wins * logistic(gap) + (1 - wins) * logistic(-gap)
    # R(second) cancels: E[R(y1)] - E[R(y0)] = (pi(first) - base(first)) gap
    game = eta * ((p - wins)[:, None] * gap - beta * kl[:, None]) + fit
    adversarial = p[game.min(1).values.argmax()]

    log_policy, log_reference = policies.log(), reference.log()
    h = beta * ((log_policy[:, 0] - log_reference[0]) - (log_policy[:, 1] - log_reference[1]))
    loss = wins * rpo(h, log_policy[:, 0], eta * beta) + (1 - wins) * rpo(
        -h, log_policy[:, 1], eta * beta
    )
    best = p[loss.argmin()]
    assert float(best) == pytest.approx(float(adversarial), abs=0.003)
    dpo = p[(wins * logistic(h) + (1 - wins) * logistic(-h)).argmin()]
    assert abs(float(dpo) - float(best)) > 0.003 * 3  # the term makes a difference here


def test_wrong_calls_of_the_functions():
    h = torch.zeros(2)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        rpo(h, h, -1.0)
    with pytest.raises(ValueError, match="one shape"):
        rpo(h, torch.zeros(2, 1), 1.0)
    with pytest.raises(ValueError, match="without tokens"):
        rpo(h, h, 1.0, torch.tensor([3, 0]))


# The method --------------------------------------------------------------------------------------


def gradient(method):
    loss, metrics = method.loss(method.collect(0))
    loss.backward()
    return loss.item(), metrics, {name: p.grad for name, p in method.policy.named_parameters()}


@pytest.mark.parametrize("variant", ["average", "cumulative"])
def test_the_loss_is_dpos_plus_the_weighted_likelihood(variant):
    weight = {"average": {"coef": 0.3}, "cumulative": {"eta": 0.03}}[variant]
    method = moved(made(variant=variant, beta=0.4, **weight))
    loss, metrics, _ = gradient(method)
    batch = method.collect(0)
    with torch.no_grad():
        scores = method.policy.score(batch.prompts, [chosen for chosen, _ in batch.responses])
    per_token = [row[mask] for row, mask in zip(scores.logprobs, scores.mask, strict=True)]
    if variant == "average":
        nll = -torch.stack([row.mean() for row in per_token]).mean()
        expected = 0.3 * float(nll)
    else:
        nll = -torch.stack([row.sum() for row in per_token]).mean()
        expected = 0.03 * 0.4 * float(nll)
    plain = made(DPO, beta=0.4)
    plain.policy.load_state_dict(method.policy.state_dict())
    preference, _, _ = gradient(plain)
    assert metrics["loss/preference"] == pytest.approx(preference, abs=1e-5)
    assert metrics["loss/nll"] == pytest.approx(float(nll), abs=1e-4)
    assert loss == pytest.approx(preference + expected, abs=1e-5)


def test_without_weight_it_is_dpo_value_and_gradient():
    method, plain = moved(made(coef=0.0, beta=0.1)), made(DPO, beta=0.1)
    plain.policy.load_state_dict(method.policy.state_dict())
    (value, _, got), (expected_value, _, expected) = gradient(method), gradient(plain)
    assert value == expected_value
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-9, rtol=1e-6)


def test_it_learns_and_does_not_give_up_the_chosen(tmp_path):
    """The paper's figure: the likelihood of the chosen falls under DPO and rises under RPO."""
    settings = {**SMALL, "data": ROWS, "steps": 40, "batch_size": 20, "beta": 0.1}
    train("dpo", output=tmp_path / "dpo", **settings)
    train("rpo", coef=1.0, output=tmp_path / "rpo", **settings)
    dpo, found = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("dpo", "rpo"))
    assert found[-1]["rewards/accuracy"] == 1.0
    assert found[-1]["loss/preference"] < found[0]["loss/preference"]
    assert found[-1]["logprobs/chosen"] > found[0]["logprobs/chosen"]
    assert dpo[-1]["logprobs/chosen"] < found[-1]["logprobs/chosen"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    settings = {
        **SMALL, "data": data, "batch_size": 8, "variant": "cumulative", "schedule": "constant",
        "save_every": 2,
    }  # fmt: skip
    assert_resumes("rpo", tmp_path, **settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"coef": -0.1}, "coef: .*greater than or equal to 0, got -0.1"),
        ({"variant": "cumulative", "eta": -1}, "eta: .*greater than or equal to 0"),
        ({"variant": "mean"}, "variant: .*'average' or 'cumulative', got 'mean'"),
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"eta": 0.005}, "eta: belongs to variant=cumulative; .*expected coef, got eta=0.005"),
        ({"coef": 0.2, "variant": "cumulative"}, "coef: belongs to variant=average; .*eta, got"),
        ({"coef": 0.2, "eta": 0.005}, "eta: belongs to variant=cumulative"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("rpo", data=ROWS, output=run, **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()


# The claim's world -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eta", "reward"), [(0.0, -0.998), (0.005, -0.997), (0.2, -0.024), (0.5, 0.503), (2.0, 0.602)]
)
def test_the_three_arms_of_infinite_data(eta, reward):
    world = ThreeArms()
    log_policy = world.fitted(lambda delta, won: rpo(BETA * delta, won, eta * BETA), world.wins)
    assert world.true_reward(log_policy) == pytest.approx(reward, abs=1e-3)


def test_dpo_puts_all_on_the_arm_without_data_and_rpo_does_not():
    world = ThreeArms()
    assert world.true_reward(world.log_reference) == pytest.approx(0.470)
    dpo = world.fitted(LOSSES["DPO"], world.wins)
    assert dpo.exp().tolist() == pytest.approx([0.0011, 0.0000, 0.9989], abs=1e-4)
    assert world.divergence(dpo) == pytest.approx(3.900, abs=1e-3)
    found = world.fitted(LOSSES["RPO"], world.wins)
    assert world.true_reward(found) == pytest.approx(0.595, abs=1e-3)
    assert world.divergence(found) == pytest.approx(0.268, abs=1e-3)
    # the margin of the data is DPO's alone: there, it fits the labels exactly
    ratio = dpo - world.log_reference
    assert float(BETA * (ratio[0] - ratio[1])) == pytest.approx(1.0, abs=1e-4)
