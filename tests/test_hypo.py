"""HyPO: the gradient of the reverse KL by samples, and what it adds to DPO on real runs."""

import itertools

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.claims import hypo
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.preference.dpo import DPO
from postgrad.methods.language.preference.hypo import HyPO
from postgrad.objectives.divergence import reverse_kl_surrogate
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [
    {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(20)
]
SHORT = {"batch_size": 4, "rollout": {"samples": 2, "max_new_tokens": 5}}


# The surrogate ------------------------------------------------------------------------------


def of_responses(logprobs, reference, estimator="rloo"):
    """The surrogate of responses of one token, `[B, k]`."""
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    several = (x.unsqueeze(2) for x in (logprobs, reference, mask))
    return reverse_kl_surrogate(*several, estimator)


def test_the_worked_example():
    logprobs = torch.tensor([[-5.0, -6.0]], dtype=torch.float64, requires_grad=True)
    log_ratio = torch.tensor([[0.4, -0.1]], dtype=torch.float64)
    value = of_responses(logprobs, logprobs.detach() - log_ratio)
    value.sum().backward()
    assert value.item() == pytest.approx(0.25, abs=1e-9)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.25, -0.25]]).double())


@pytest.mark.parametrize(
    ("estimator", "samples"), [("reinforce", 1), ("reinforce", 2), ("rloo", 2), ("rloo", 3)]
)
def test_averaged_over_all_samples_the_gradient_is_that_of_the_kl(estimator, samples):
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = policy.log().requires_grad_()
    log_policy = logits.log_softmax(0)
    drawn = torch.tensor(list(itertools.product(range(3), repeat=samples)))
    chance = policy[drawn].prod(1)
    surrogate = of_responses(log_policy[drawn], reference.log()[drawn], estimator)
    (got,) = torch.autograd.grad((chance * surrogate).sum(), logits)
    expected = torch.tensor([0.175945, -0.098118, -0.077827], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    divergence = float((policy * (policy / reference).log()).sum())
    assert divergence == pytest.approx(0.085123, abs=1e-6)


def test_of_two_tokens_each_estimator_has_the_gradient_of_the_kl_of_sequences():
    """Three first tokens, then two second ones that depend on the first; token 2 ends at once."""
    random = torch.Generator().manual_seed(0)
    numbers = [torch.randn(s, generator=random, dtype=torch.float64) for s in (3, (2, 2))]
    reference = [torch.randn(s, generator=random, dtype=torch.float64) for s in (3, (2, 2))]
    parameters = [x.requires_grad_() for x in numbers]
    sequences = [(a, b) for a in (0, 1) for b in (0, 1)] + [(2, None)]

    def tokens(tables):
        first, second = tables[0].log_softmax(0), tables[1].log_softmax(1)
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [torch.stack([first[a], zero if b is None else second[a, b]]) for a, b in sequences]
        )

    mask = torch.tensor([[True, b is not None] for _, b in sequences])
    now, before = tokens(parameters), tokens(reference)
    chance = now.sum(1).detach().exp()
    exact = (now.sum(1).exp() * (now - before).sum(1)).sum()
    expected = torch.autograd.grad(exact, parameters, retain_graph=True)
    for estimator in ("reinforce", "token"):
        values = reverse_kl_surrogate(
            now.unsqueeze(1), before.unsqueeze(1), mask.unsqueeze(1), estimator
        )
        got = torch.autograd.grad((chance * values).sum(), parameters, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_a_constant_of_the_prompt_changes_nothing_with_peers():
    logprobs, reference = -5 * torch.rand(2, 4, 3, dtype=torch.float64)
    constant = torch.randn(4, 1, dtype=torch.float64)
    torch.testing.assert_close(
        of_responses(logprobs, reference + constant), of_responses(logprobs, reference)
    )


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "token"])
def test_padding_reaches_neither_value_nor_gradient(estimator):
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    tokens = -torch.rand(1, 2, 3, dtype=torch.float64)
    reference = -torch.rand(1, 2, 3, dtype=torch.float64)
    poisoned = torch.where(mask, tokens, torch.nan).requires_grad_()
    value = reverse_kl_surrogate(
        poisoned, torch.where(mask, reference, -torch.inf), mask, estimator
    )
    value.sum().backward()
    torch.testing.assert_close(value, reverse_kl_surrogate(tokens, reference, mask, estimator))
    assert poisoned.grad[~mask].eq(0).all()
    assert poisoned.grad[mask].ne(0).any()


def test_wrong_calls_are_refused():
    one = torch.zeros(2, 1, 3)
    mask = torch.ones_like(one, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least 2 samples a prompt, got 1"):
        reverse_kl_surrogate(one, one, mask)
    with pytest.raises(ValueError, match="one shape"):
        reverse_kl_surrogate(one, one[:1], mask, "token")
    with pytest.raises(ValueError, match="must be boolean"):
        reverse_kl_surrogate(one, one, one)
    with pytest.raises(ValueError, match=r"estimator must be .* got 'k3'"):
        reverse_kl_surrogate(one, one, mask, "k3")


# The method ---------------------------------------------------------------------------------


def made(kind=HyPO, **config):
    short = SHORT if kind is HyPO else {"batch_size": 4}
    values = {"model": "tiny", "beta": 0.1, **short, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


def gradient(method, batch, budget=None):
    """Loss and gradient as the loop computes them, of parts of at most `budget` tokens."""
    method.policy.zero_grad()
    total = 0.0
    for part in batch.split(budget):
        loss, _ = method.loss(part)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def test_without_weight_it_is_dpo_and_nothing_is_sampled():
    hybrid, plain = moved(made(kl_weight=0)), moved(made(DPO))
    batch = hybrid.collect(0)
    assert "own" not in batch
    assert hybrid.describe_batch(batch) == {}
    (value, got), (expected_value, expected) = (
        gradient(hybrid, batch),
        gradient(plain, plain.collect(0)),
    )
    assert value == expected_value
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce", "token"])
def test_the_first_step_is_dpos(estimator):
    """At the reference all log-ratios are 0, and with them the KL's gradient."""
    hybrid, plain = made(kl_weight=1.0, estimator=estimator), made(DPO)
    batch = hybrid.collect(0)
    (value, got), (expected_value, expected) = (
        gradient(hybrid, batch),
        gradient(plain, plain.collect(0)),
    )
    assert value == pytest.approx(expected_value, abs=1e-4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=1e-3)


def test_the_loss_is_dpos_and_the_surrogate_of_the_samples():
    method = moved(made(kl_weight=0.3))
    batch = method.collect(0)
    assert [len(several) for several in batch.own] == [2] * 4
    with torch.no_grad():
        loss, metrics = method.loss(batch)
        surrogates, ratios = [], []
        for prompt, several in zip(batch.prompts, batch.own, strict=True):
            now = method.policy.score([prompt] * 2, several).logprobs.sum(1)
            with method.policy.reference():
                before = method.policy.score([prompt] * 2, several).logprobs.sum(1)
            ratio = now - before
            advantages = torch.stack([ratio[0] - ratio[1], ratio[1] - ratio[0]])
            surrogates.append((advantages * now).mean())
            ratios.append(ratio.mean())
        pairs = method.losses(method.compared(batch)).mean()
    expected = pairs + 0.3 * torch.stack(surrogates).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert metrics["loss/pairs"] == pytest.approx(float(pairs), rel=1e-5)
    assert metrics["kl/own_samples"] == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)


def test_micro_batches_add_up_to_the_whole():
    method = moved(made(kl_weight=0.3, estimator="token"))
    batch = method.collect(0)
    whole, expected = gradient(method, batch)
    assert len(list(batch.split(1))) == 4
    parts, got = gradient(method, batch, budget=1)
    assert parts == pytest.approx(whole, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-3)


def test_a_large_weight_leads_back_to_the_reference():
    """From a policy that has moved away, the KL alone brings the samples' log-ratios down."""
    rollout = {"samples": 8, "max_new_tokens": 5}
    method = moved(made(kl_weight=10.0, batch_size=10, rollout=rollout), 0.03)
    loop = LoopSettings(learning_rate=1e-3)
    optimise = Optimisers(method.modules(), loop, torch.device("cpu"))
    measured = [
        method.update(method.collect(step), optimise)["kl/own_samples"] for step in range(15)
    ]
    assert measured[0] > 0.3
    assert sum(measured[-5:]) / 5 < measured[0] / 2


def test_it_learns_the_pairs(tmp_path):
    train(
        "hypo",
        data=ROWS,
        steps=20,
        output=tmp_path / "run",
        **{**SMALL, **SHORT, "batch_size": 20, "beta": 0.5, "kl_weight": 0.01},
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["rewards/accuracy"] > 0.9
    assert rows[-1]["loss/pairs"] < rows[0]["loss/pairs"]
    assert 0 <= rows[-1]["response/truncated"] <= 1


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    settings = {**SMALL, **SHORT, "data": data, "kl_weight": 0.1, "save_every": 2}
    assert_resumes("hypo", tmp_path, **settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kl_weight": -0.1}, "kl_weight: .*greater than or equal to 0"),
        ({"rollout": {"samples": 1}}, "rollout.samples: estimator=rloo .* at least 2 .* got 1"),
        ({"rollout": {"samples": 0}}, "rollout.samples: .*greater than 0"),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature: expected 1, got 0.7: the KL"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p: expected 1, got 0.9"),
        ({"estimator": "k3"}, "estimator: .*'rloo', 'reinforce' or 'token'"),
    ],
)
def test_a_bad_setting_is_named(setting, message, tmp_path):
    with pytest.raises(PostgradError, match=message) as caught:
        train("hypo", data=ROWS, output=tmp_path / "run", **{**SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_sample_does_for_the_other_estimators():
    for estimator in ("reinforce", "token"):
        method = made(estimator=estimator, rollout={"samples": 1, "max_new_tokens": 5})
        loss, _ = method.loss(method.collect(0))
        assert loss.isfinite()


# The claim ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "reward", "divergence"),
    [(0.0, -0.998, 3.900), (0.03, 0.471, 0.616), (0.05, 0.594, 0.274), (0.1, 0.583, 0.076)],
)
def test_the_exact_minima_of_the_three_arms(weight, reward, divergence):
    found = hypo.judged(hypo.exact_minimum(weight))
    assert found == pytest.approx((reward, divergence), abs=6e-4)


def test_samples_find_the_exact_minimum():
    expected, _ = hypo.judged(hypo.exact_minimum(0.05))
    outcome = hypo.on_three_arms(0.1, 0.05, seed=1, steps=600)
    assert outcome.values[hypo.METRIC] == pytest.approx(expected, abs=0.03)
    assert hypo.on_three_arms(0.1, 0.0, seed=1, steps=600).values[hypo.METRIC] < -0.9
