"""One-Token Rollout: its identities, its draws, and real runs of the tiny model."""

import pytest
import torch

from language_runs import SMALL, assert_resumes, moved, write_rows
from postgrad.api import train
from postgrad.config import LoopSettings, validated
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.methods.language.supervised.sft import SFT
from postgrad.methods.language.verifiable.otr import OTR
from postgrad.models import scoring
from postgrad.objectives.one_token import expected_one_token_rollout, one_token_rollout
from postgrad.objectives.projection import (
    LogitTransform,
    differentiable_logits,
    project_logits,
    project_logprobs,
)
from postgrad.sampling.drawing import draw_several
from postgrad.training.optimise import Optimisers
from postgrad.training.record import read_rows

ROWS = [{"prompt": f"{i} + {i} = ", "completion": str(2**i)} for i in range(16)]
LOGITS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
DRAWN = torch.tensor([0, 0, 1, 0, 2, 1, 0, 0])
DFT = {"exact": True, "kappa": 1.0, "beta": 0.0, "aggregation": "token-mean"}


def target(*tokens):
    return torch.tensor(tokens)


def slope(loss, logits):
    """d(sum of losses)/d logits of a function of the logits."""
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def several(n=5, vocabulary=7):
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, vocabulary, generator=random, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (n,), generator=random)


# The objective ------------------------------------------------------------------------------


def test_the_worked_example_of_drawn_candidates():
    loss, gradient = slope(
        lambda z: one_token_rollout(z[None], target(0), DRAWN[None], -0.1), LOGITS
    )
    assert float(loss) == pytest.approx(0.189469, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-0.234171, 0.168778, 0.065393], abs=1e-6)


@pytest.mark.parametrize(
    ("kappa", "loss", "ascent"),
    [
        (1.3, 0.173226, [0.226370, -0.163562, -0.062808]),
        (1.0, None, [0.244965, -0.179084, -0.065881]),
    ],
)
def test_the_worked_example_of_the_expectation(kappa, loss, ascent):
    got, gradient = slope(
        lambda z: expected_one_token_rollout(z[None], target(0), -0.1, kappa), LOGITS
    )
    assert gradient.tolist() == pytest.approx([-number for number in ascent], abs=1e-6)
    if loss is not None:
        assert float(got) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("kappa", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("beta", [-0.3, 0.0, 0.5])
def test_the_expected_direction_is_the_written_one(kappa, beta):
    logits, x = several()
    _, gradient = slope(lambda z: expected_one_token_rollout(z, x, beta, kappa), logits)
    policy, sampling = logits.softmax(-1), (logits / kappa).softmax(-1)
    aim = torch.nn.functional.one_hot(x, 7)
    expected = (1 - beta) * sampling.gather(1, x[:, None]) * (aim - policy)
    expected += beta * (sampling - policy)
    torch.testing.assert_close(-gradient, expected)


@pytest.mark.parametrize("beta", [-0.5, 0.0, 0.9])
def test_at_temperature_one_it_is_dynamic_fine_tuning_whatever_beta(beta):
    logits, x = several()

    def dft(z):
        logp = z.log_softmax(-1).gather(1, x[:, None]).squeeze(1)
        return -logp.detach().exp() * logp

    loss, expected = slope(dft, logits)
    _, gradient = slope(lambda z: expected_one_token_rollout(z, x, beta), logits)
    torch.testing.assert_close(gradient / (1 - beta), expected)
    torch.testing.assert_close(expected_one_token_rollout(logits, x, 0.0), loss)


def test_the_mean_over_draws_is_the_expectation_and_its_variance_falls_with_k():
    """Enumerated for one draw; for eight the average of eight of those."""
    logits, x = several(1, 4)
    sampling = (logits / 1.3).softmax(-1)[0]
    _, expected = slope(lambda z: expected_one_token_rollout(z, x, -0.2, 1.3), logits)
    each = torch.cat(
        [
            slope(lambda z, a=a: one_token_rollout(z, x, target(a)[None], -0.2), logits)[1]
            for a in range(4)
        ]
    )
    torch.testing.assert_close((sampling[:, None] * each).sum(0, keepdim=True), expected)
    variance = float((sampling[:, None] * (each - expected).square()).sum())
    random = torch.Generator().manual_seed(1)
    for count in (1, 16):
        tokens = torch.multinomial(sampling, 4000 * count, True, generator=random)
        means = each[tokens].view(4000, count, 4).mean(1)
        found = float((means - expected).square().sum(1).mean())
        assert found == pytest.approx(variance / count, rel=0.1)


def test_a_sure_policy_and_an_impossible_target_teach_nothing():
    sure = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    loss, gradient = slope(lambda z: expected_one_token_rollout(z, target(0), -0.1), sure)
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-12
    for impossible in (-1000.0, -torch.inf):
        logits = torch.tensor([[1.0, 0.0, impossible]], dtype=torch.float64)
        loss, gradient = slope(lambda z: expected_one_token_rollout(z, target(2), 0.0), logits)
        assert float(loss) == float(gradient.abs().max()) == 0


def test_without_beta_hits_alone_count():
    logits, _ = several(1, 3)
    loss = one_token_rollout(logits, target(0), DRAWN[None], 0.0)
    assert float(loss) == pytest.approx(-5 / 8 * float(logits.log_softmax(-1)[0, 0]))


def test_misses_below_zero_sharpen_a_policy_that_is_drawn_from_above_temperature_one():
    """At a position whose target is never drawn, only the second part is left."""
    logits = torch.tensor([[2.0, 0.0, -1.0, -60.0]], dtype=torch.float64)
    for beta, sharper in ((-0.1, True), (0.1, False)):
        _, gradient = slope(
            lambda z, b=beta: expected_one_token_rollout(z, target(3), b, 1.3), logits
        )
        assert (float(gradient[0, 0]) < 0) == sharper


def test_logits_in_half_precision_are_taken_in_single():
    logits, x = several()
    half = logits.bfloat16()
    loss = expected_one_token_rollout(half, x, -0.1, 1.3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_one_token_rollout(half.float(), x, -0.1, 1.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, x: one_token_rollout(z, x, x[:, None], 1.0), "beta must be below 1"),
        (lambda z, x: expected_one_token_rollout(z, x, 1.5), "beta must be below 1"),
        (lambda z, x: expected_one_token_rollout(z, x, 0.0, 0.0), "kappa must be positive"),
        (lambda z, x: one_token_rollout(z, x, x[:, None][:, :0], 0.0), "K of at least 1"),
        (lambda z, x: one_token_rollout(z, x, x, 0.0), "candidates must be"),
        (lambda z, x: one_token_rollout(z, x[1:], x[1:, None], 0.0), "one shape"),
        (lambda z, x: expected_one_token_rollout(z, x - 100, 0.0), "leave masked positions out"),
        (lambda z, x: expected_one_token_rollout(z, x + 7, 0.0), "vocabulary of 7"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(*several())


# The draws ----------------------------------------------------------------------------------


def test_draws_have_the_tempered_law():
    logits = LOGITS[None].expand(2, 3)
    random = torch.Generator().manual_seed(0)
    uniforms = torch.rand(2, 40_000, generator=random, dtype=torch.float64)
    tokens = draw_several(logits, uniforms, 1.3)
    for row in tokens:
        shares = (row.bincount(minlength=3) / 40_000).tolist()
        assert shares == pytest.approx([0.595919, 0.276131, 0.127950], abs=0.01)
    assert draw_several(logits, torch.tensor([[0.0], [1.0 - 2**-53]]))[:, 0].tolist() == [0, 2]
    only = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert draw_several(only, torch.rand(1, 50)).unique().tolist() == [1]


# The method ---------------------------------------------------------------------------------


def made(kind=OTR, **config):
    values = {"model": "tiny", "batch_size": 8, "max_response_tokens": 16, **config}
    return kind(validated(kind.Config, values), Place(), data=ROWS)


def gradients(method, budget=None, step=0):
    method.policy.zero_grad(set_to_none=True)
    settings = LoopSettings(learning_rate=1e-12, clip_norm=0, token_budget=budget)
    optimise = Optimisers(method.modules(), settings, torch.device("cpu"))
    metrics = method.update(method.collect(step), optimise)
    return metrics, {name: p.grad.clone() for name, p in method.policy.named_parameters()}


def assert_same(got, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_loss_and_gradient_are_those_of_whole_logits(exact, aggregation):
    """Against the network's own logits of one demonstration at a time, and the same draws."""
    method = moved(made(exact=exact, aggregation=aggregation, candidates=8))
    metrics, got = gradients(method)
    batch = method.collect(0)
    method.policy.zero_grad(set_to_none=True)
    total, first = 0.0, 0
    uniforms = method._uniforms(batch)
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        logits = method.policy.network(input_ids=torch.cat([prompt, response])[None]).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        if exact:
            losses = expected_one_token_rollout(logits, response, -0.1, 1.3)
        else:
            own = uniforms[first : first + len(response)]
            candidates = draw_several(logits.detach(), own, 1.3)
            losses = one_token_rollout(logits, response, candidates, -0.1)
        first += len(response)
        size = batch.tokens if aggregation == "token-mean" else 8 * len(response)
        total = total + losses.sum() / size
    total.backward()
    assert metrics["loss"] == pytest.approx(float(total.detach()), abs=1e-6)
    assert_same(got, {name: p.grad for name, p in method.policy.named_parameters()})


def test_a_few_tokens_at_a_time_give_the_same_step(monkeypatch):
    whole, expected = gradients(moved(made(candidates=16)))
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 300)  # three tokens of a hundred
    parts, got = gradients(moved(made(candidates=16)))
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert parts["candidates/hits"] == pytest.approx(whole["candidates/hits"])
    assert_same(got, expected)


def test_a_network_that_cannot_share_prompts_gives_the_same_step():
    _, expected = gradients(moved(made(candidates=16)))
    plain = moved(made(candidates=16))
    plain.policy.sharing = "plain: as asked for by this test"
    _, got = gradients(plain)
    assert_same(got, expected)


def test_scaled_and_capped_logits_are_those_of_sampling():
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=random) for n in (3, 5))
    bias, transform = torch.randn(5, generator=random), LogitTransform(0.7, 2.0)
    hidden.requires_grad_()
    logits = differentiable_logits(hidden, weight, bias, transform)
    expected = project_logits(hidden.detach(), weight, bias, transform)
    torch.testing.assert_close(logits.detach(), expected)
    logits.log_softmax(-1)[:, 0].sum().backward()
    got = hidden.grad.clone()
    hidden.grad = None
    zeros = torch.zeros(3, dtype=torch.long)
    project_logprobs(hidden, weight, zeros, bias=bias, transform=transform)[0].sum().backward()
    torch.testing.assert_close(got, hidden.grad)


@pytest.mark.parametrize("budget", [1, 50])
@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_micro_batches_draw_the_same_and_add_up(budget, aggregation):
    settings = {"candidates": 16, "aggregation": aggregation}
    whole, expected = gradients(moved(made(**settings)))
    parts, got = gradients(moved(made(**settings)), budget)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert_same(got, expected)


def test_another_step_draws_anew():
    method = made()
    assert not torch.equal(method.collect(0).seeds, method.collect(1).seeds)
    assert torch.equal(method.collect(1).seeds, made().collect(1).seeds)
    assert len(set(method.collect(0).seeds.tolist())) == 8


def test_its_settings_make_it_dynamic_fine_tuning():
    """SFT in which every token's gradient is multiplied by its probability."""
    _, got = gradients(moved(made(**DFT)))
    sft = moved(made(SFT))
    batch = sft.collect(0)
    scores = sft.policy.score(batch.prompts, batch.responses)
    weights = scores.logprobs.detach().exp()
    (-(weights * scores.logprobs)[scores.mask].sum() / batch.tokens).backward()
    assert_same(got, {name: p.grad for name, p in sft.policy.named_parameters()})


def test_many_draws_are_near_the_expectation():
    _, expected = gradients(moved(made(exact=True)))

    def error(candidates):
        _, got = gradients(moved(made(candidates=candidates)))
        return sum(float((got[name] - expected[name]).square().sum()) for name in expected)

    assert error(2048) < error(32) / 20


def test_it_reports_what_sft_would():
    otr, _ = gradients(moved(made(aggregation="token-mean")))
    sft, _ = gradients(moved(made(SFT)))
    assert otr["likelihood/loss"] == pytest.approx(sft["loss"], abs=1e-5)
    assert 0 < otr["candidates/hits"] < otr["likelihood/target"] + 0.05


def test_it_learns_what_the_policy_already_says_sometimes(tmp_path):
    run = tmp_path / "run"
    train(
        "otr", data=ROWS, steps=60, batch_size=16, max_response_tokens=16, output=run,
        **SMALL,
    )  # fmt: skip
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["likelihood/loss"] < 0.6 * rows[0]["likelihood/loss"]
    assert rows[-1]["candidates/hits"] > 3 * rows[0]["candidates/hits"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = {
        **SMALL,
        "data": write_rows(tmp_path / "demonstrations.jsonl", ROWS),
        "batch_size": 6,
        "max_response_tokens": 16,
        "candidates": 8,
        "save_every": 2,
        "schedule": "constant",
    }
    assert_resumes("otr", tmp_path, **settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 1.0}, "beta: .*less than 1"),
        ({"kappa": 0}, "kappa: .*greater than 0"),
        ({"candidates": 0}, "candidates: .*greater than 0"),
        ({"aggregation": "sum"}, "aggregation: .*'sequence-mean' or 'token-mean', got 'sum'"),
        ({"data": [{"prompt": "a", "completion": ""}]}, "row 1: column 'completion' is empty"),
    ],
)
def test_a_fault_is_named(setting, message, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PostgradError, match=message) as caught:
        train("otr", output=run, **{"data": ROWS, **SMALL, **setting})
    assert "\n" not in str(caught.value)
    assert not run.exists()
