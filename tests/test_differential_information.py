"""Differential information: the paper's identities in tables, and DPO-PG on the tiny model."""

import math

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.differential_information import (
    ProjectedDPO,
    measure_information,
)
from postgrad.methods.language.preference.dpo import DPO
from postgrad.objectives.gradients import inner_product, with_gradient, without_lowering
from postgrad.objectives.information import (
    differential_information,
    entropy,
    margins_in_order,
    power_law,
    preference_probabilities,
    rejected_distribution,
    sampled_did_entropy,
)
from postgrad.objectives.pairwise import logistic
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
TARGET = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(20)
]


def policies(size, count=2, seed=0):
    """Log-probabilities of random policies over `size` responses."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=random, dtype=torch.float64).log_softmax(-1)


# The theory ---------------------------------------------------------------------------------


def test_the_worked_example():
    q = differential_information(TARGET, REFERENCE)
    assert q.exp().tolist() == pytest.approx([0.444444, 0.370370, 0.185185], abs=1e-6)
    assert float(entropy(q)) == pytest.approx(1.040581, abs=1e-6)
    assert float((TARGET - REFERENCE).exp().sum()) == pytest.approx(2.7)
    assert float(entropy(REFERENCE)) == pytest.approx(1.029653, abs=1e-6)
    assert float(entropy(TARGET)) == pytest.approx(0.897946, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "rejected", "over_second", "over_third"),
    [
        (1.0, (0.373134, 0.268657, 0.358209), 0.545455, 0.705882),
        (0.5, (0.439185, 0.288662, 0.272153), 0.522774, 0.607719),
    ],
)
def test_the_worked_example_of_rejected_responses(beta, rejected, over_second, over_third):
    found = rejected_distribution(REFERENCE, TARGET, beta)
    assert found.exp().tolist() == pytest.approx(rejected, abs=1e-6)
    wins = preference_probabilities(REFERENCE, found)
    assert float(wins[0, 1]) == pytest.approx(over_second, abs=1e-6)
    assert float(wins[0, 2]) == pytest.approx(over_third, abs=1e-6)


def test_the_distribution_of_information():
    policy, reference = policies(9)
    q = differential_information(policy, reference)
    assert float(q.exp().sum()) == pytest.approx(1)
    # the policy is recovered from the reference and what was learnt
    torch.testing.assert_close((reference + q).log_softmax(-1), policy)
    back = differential_information(reference, policy)
    torch.testing.assert_close((-q).log_softmax(-1), back)
    nothing = differential_information(policy, policy)
    assert float(entropy(nothing)) == pytest.approx(math.log(9))
    assert float(entropy(q)) < math.log(9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_rejected_responses_make_the_labels_encode_it(beta):
    target, reference = policies(7)
    rejected = rejected_distribution(reference, target, beta)
    scores = beta * (target - reference)
    torch.testing.assert_close(
        preference_probabilities(reference, rejected),
        torch.sigmoid(scores[:, None] - scores[None, :]),
    )
    # DPO's gradient vanishes at the target, in expectation over pairs, and nowhere near
    pairs = reference.exp()[:, None] * rejected.exp()[None, :]

    def slope(policy):
        logits = policy.clone().requires_grad_()
        h = beta * (logits.log_softmax(-1) - reference)
        (pairs * logistic(h[:, None] - h[None, :])).sum().backward()
        return float(logits.grad.abs().max())

    assert slope(target) < 1e-12
    assert slope(target + 0.1 * policies(7, 1, seed=1)[0]) > 1e-5
    # the three policies are ordered by margins, in the paper's proportion
    found = power_law(rejected, reference, target)
    assert float(found.beta) == pytest.approx(beta)
    assert float(found.residual) == pytest.approx(0, abs=1e-12)
    first, second = torch.triu_indices(7, 7, 1)
    low, middle, high = (p[first] - p[second] for p in (rejected, reference, target))
    torch.testing.assert_close(middle, (low + beta * high) / (1 + beta))
    several = [torch.stack([p[first], p[second]], -1) for p in (rejected, reference, target)]
    assert bool(margins_in_order(*several).all())
    assert bool(margins_in_order(*reversed(several)).all())
    low, middle, high = several
    assert not bool(margins_in_order(middle, low, high).all())


def test_another_way_of_rejecting_leaves_a_residual():
    target, reference, rejected = policies(8, 3)
    found = power_law(rejected, reference, target)
    assert float(found.residual) > 0.1
    first, second = torch.triu_indices(8, 8, 1)
    pairs = [torch.stack([p[first], p[second]], -1) for p in (rejected, reference, target)]
    assert 0 < float(margins_in_order(*pairs).double().mean()) < 1


def test_reaching_the_target_lowers_the_chosen_likelihood():
    target, reference = policies(6)
    change = (reference.exp() * (target - reference)).sum()
    divergence = (reference.exp() * (reference - target)).sum()
    assert float(change) == pytest.approx(-float(divergence), abs=1e-15)
    assert change < 0


@pytest.mark.parametrize("proposal", ["policy", "reference"])
def test_the_entropy_from_samples(proposal):
    """Against the exact one; the standard error is what repeated estimates scatter by."""
    policy, reference = policies(6, seed=3)
    exact = float(entropy(differential_information(policy, reference)))
    source = policy if proposal == "policy" else reference
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(source.exp(), 400 * 500, replacement=True, generator=random)
    drawn = drawn.view(400, 500)
    found = sampled_did_entropy(policy[drawn], reference[drawn], proposal)
    assert float(found.entropy.mean()) == pytest.approx(exact, abs=0.01)
    assert float(found.entropy.std()) == pytest.approx(float(found.error.mean()), rel=0.2)
    assert bool(((found.effective_samples > 1) & (found.effective_samples <= 500)).all())


def test_one_sample_may_be_all_there_is():
    logp_ref = torch.tensor([-10.0, -300.0, -5.0])
    found = sampled_did_entropy(logp_ref + torch.tensor([1.0, 2.0, 0.5]), logp_ref)
    assert float(found.effective_samples) == pytest.approx(1)
    assert float(found.entropy) == pytest.approx(300 - math.log(3) - 2)
    same = torch.full((4,), -2.0)
    assert float(sampled_did_entropy(same, same).effective_samples) == pytest.approx(4)


def test_wrong_calls():
    target, reference = policies(4)
    with pytest.raises(ValueError, match="logp must be log-probabilities of all responses"):
        differential_information(target - 1, reference)
    with pytest.raises(ValueError, match="probability 0 the ratio is infinite"):
        differential_information(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log())
    with pytest.raises(ValueError, match="beta must be positive"):
        rejected_distribution(reference, target, 0.0)
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1"):
        sampled_did_entropy(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"proposal must be .*'uniform'"):
        sampled_did_entropy(target, reference, "uniform")
    with pytest.raises(ValueError, match=r"pairs must be \[..., 2\], got \[4\]"):
        margins_in_order(target, reference, target)
    with pytest.raises(ValueError, match="one shape"):
        power_law(target, reference[:3], target)


# The projected gradient ---------------------------------------------------------------------


def test_a_direction_that_lowers_is_projected_and_others_stay():
    g = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])]
    lowering = [torch.tensor([-3.0, 1.0]), torch.tensor([[0.5]])]
    got, share = without_lowering(lowering, g)
    assert share == pytest.approx(2 / 5)
    assert float(inner_product(got, g)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(got[0], torch.tensor([-2.6, 1.0]))
    same, share = without_lowering([-d for d in lowering], g)
    assert share == 0
    assert all(torch.equal(a, -b) for a, b in zip(same, lowering, strict=True))
    nothing, share = without_lowering(lowering, [torch.zeros_like(d) for d in g])
    assert share == 0
    assert all(torch.equal(a, b) for a, b in zip(nothing, lowering, strict=True))


def test_a_number_with_a_given_gradient():
    parameters = [torch.randn(3).requires_grad_(), torch.randn(2, 2).requires_grad_()]
    gradients = [torch.randn(3), torch.randn(2, 2)]
    value = with_gradient(torch.tensor(1.5), parameters, gradients)
    (2 * value).backward()
    assert value.item() == 1.5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with pytest.raises(ValueError, match="gradient of its own shape"):
        with_gradient(torch.tensor(1.5), parameters, gradients[::-1])
    with pytest.raises(ValueError, match="do not fit"):
        inner_product(gradients, gradients[:1])


def made(kind=ProjectedDPO, **config):
    values = {"model": "tiny", "batch_size": 8, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS, eval_data=ROWS[:6])


def step(method, budget=None):
    """Metrics and gradients of one step of the loop."""
    method.policy.zero_grad(set_to_none=True)
    settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
    optimise = Optimisers(method.modules(), settings, torch.device("cpu"))
    metrics = method.update(method.collect(0), optimise)
    return metrics, {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def chosen_gradient(method):
    """g_w, by a pass of its own over the chosen responses."""
    batch = method.collect(0)
    beta = method.config.beta
    method.policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        weights = beta * torch.sigmoid(-beta * method.compared(batch).delta)
    scores = method.policy.score(batch.prompts, [chosen for chosen, _ in batch.responses])
    (weights * scores.logprobs.sum(1)).mean().backward()
    return {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def after_dpo():
    """A method whose margins have grown as in training, so that weights differ."""
    return moved(made(beta=0.5), 0.05)


def test_the_step_is_dpos_with_the_chosen_part_taken_back():
    method = after_dpo()
    plain = made(DPO, beta=0.5)
    plain.policy.load_state_dict(method.policy.state_dict())
    metrics, got = step(method)
    plain_metrics, descent = step(plain)
    up = chosen_gradient(method)
    for name in ("loss", "rewards/margin", "logprobs/chosen"):
        assert metrics[name] == pytest.approx(plain_metrics[name], abs=1e-5)
    names = list(up)
    along = -float(inner_product([descent[n] for n in names], [up[n] for n in names]))
    size = float(inner_product([up[n] for n in names], [up[n] for n in names]))
    share = max(0.0, -along / size)
    assert metrics["projection"] == pytest.approx(share, abs=1e-4)
    for name in names:
        torch.testing.assert_close(got[name], descent[name] - share * up[name], atol=1e-5, rtol=0)
    assert -inner_product([got[n] for n in names], [up[n] for n in names]) > -1e-5


def lowering():
    """A step in which DPO lowers the chosen responses: they begin with the rejected ones' tokens.

    Repeating the rejected response makes its gradient the larger of the two.
    """
    rows = [{"prompt": f"{i}: ", "chosen": "abc", "rejected": "abc" * 3 + "abd"} for i in range(8)]
    values = {"model": "tiny", "batch_size": 8, "beta": 0.5}
    return ProjectedDPO(validated(ProjectedDPO.Config, values), Place(), data=rows)


def test_where_dpo_would_lower_the_chosen_responses_it_does_not():
    method = lowering()
    metrics, got = step(method)
    up = chosen_gradient(method)
    assert metrics["projection"] > 0.05
    sides = [got[n] for n in up], [up[n] for n in up]
    size = float(inner_product(sides[1], sides[1]))
    assert abs(float(inner_product(*sides))) < 1e-3 * size


@pytest.mark.parametrize("budget", [1, 60])
@pytest.mark.parametrize("make", [after_dpo, lowering])
def test_micro_batches_add_up_to_the_same_step(make, budget):
    whole, expected = step(make())
    parts, got = step(make(), budget)
    for name in ("loss", "projection", "rewards/margin"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)


def test_it_learns_and_keeps_the_chosen_responses(tmp_path):
    rows = {}
    for slug in ("dpo", "differential-information"):
        settings = {**SMALL, "data": ROWS, "batch_size": 20, "beta": 0.5, "steps": 30}
        train(slug, output=tmp_path / slug, **settings)
        rows[slug] = [r for r in read_rows(tmp_path / slug / "metrics.jsonl") if "loss" in r]
    ours, plain = rows["differential-information"], rows["dpo"]
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert ours[-1]["rewards/accuracy"] == 1.0
    assert ours[-1]["loss"] < 0.5
    assert ours[-1]["logprobs/chosen"] > plain[-1]["logprobs/chosen"]
    assert max(row["projection"] for row in ours) > 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    settings = {**SMALL, "data": data, "batch_size": 8, "save_every": 2, "token_budget": 60}
    assert_resumes("differential-information", tmp_path, **settings)


def test_evaluation_measures_what_was_learnt():
    method = made(information_samples=4, max_response_tokens=6)
    with torch.no_grad():
        start = method.evaluate()
        assert start == method.evaluate()  # the same draws
        moved(method, 0.1)
        changed = method.evaluate()
    assert {"accuracy", "information/entropy", "information/error", "entropy"} <= start.keys()
    assert 1 <= start["information/effective_samples"] <= 4
    assert changed["information/entropy"] != start["information/entropy"]
    prompts = method.held_out.prompts
    found = measure_information(method.policy, prompts, 4, 6, 0)
    assert found["entropy"] == pytest.approx(changed["entropy"], abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0}, "beta: .*greater than 0"),
        ({"information_samples": 1}, "information_samples: .*at least 2 samples, got 1"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("differential-information", data=ROWS, output=run, **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
