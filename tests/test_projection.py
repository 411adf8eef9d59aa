"""The chunked projection equals the full softmax, and so do its gradients."""

import math

import pytest
import torch

from postgrad.objectives import projection
from postgrad.objectives.projection import LogitTransform, project_logprobs


def full(hidden, weight, targets, bias, temperature, transform):
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    table = (logits / temperature).log_softmax(-1)
    logprobs = table.gather(-1, targets[:, None]).squeeze(-1)
    return logprobs, -(table.exp() * table).sum(-1)


def inputs(dtype=torch.float64, tokens=37, width=8, vocabulary=23):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, targets


@pytest.fixture
def small_chunks(monkeypatch):
    """Nine words at a time, so that a vocabulary of 23 needs three uneven parts; none are kept."""
    monkeypatch.setattr(projection, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(projection, "_LEAST_WIDTH", 9)
    monkeypatch.setattr(projection, "_KEPT_BYTES", 0)


def test_uniform_distribution_by_hand():
    logprobs, entropies = project_logprobs(
        torch.zeros(1, 4), torch.ones(5, 4), torch.tensor([3]), entropy=True
    )
    assert logprobs.item() == pytest.approx(-math.log(5), abs=1e-6)
    assert entropies.item() == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.3), LogitTransform(1.5, 2.0)]
)
def test_values_and_gradients_equal_the_full_softmax(with_bias, temperature, transform):
    hidden, weight, bias, targets = inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)

    def gradients(logprobs, entropies):
        return torch.autograd.grad((weights * logprobs + weights.flip(0) * entropies).sum(), leaves)

    used = bias if with_bias else None
    expected = full(hidden, weight, targets, used, temperature, transform)
    actual = project_logprobs(
        hidden,
        weight,
        targets,
        bias=used,
        temperature=temperature,
        transform=transform,
        entropy=True,
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for one, other in zip(gradients(*actual), gradients(*expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_gradient_without_entropy_and_with_a_frozen_weight():
    hidden, weight, _, targets = inputs()
    expected, _ = full(hidden, weight.detach(), targets, None, 1.0, LogitTransform())
    actual, entropies = project_logprobs(hidden, weight.detach(), targets)
    assert entropies is None
    (one,) = torch.autograd.grad(actual.square().sum(), hidden)
    (other,) = torch.autograd.grad(expected.square().sum(), hidden)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept_bytes", [0, 37 * 23 * 8])
def test_only_parts_of_the_logits_are_ever_held(monkeypatch, kept_bytes):
    monkeypatch.setattr(projection, "_CHUNK_ELEMENTS", 37 * 9)
    monkeypatch.setattr(projection, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(projection, "_KEPT_BYTES", kept_bytes)
    shapes = []
    whole = projection._logits

    def watched(product, *rest):
        shapes.append(tuple(product.shape))
        return whole(product, *rest)

    monkeypatch.setattr(projection, "_logits", watched)
    hidden, weight, _, targets = inputs()
    logprobs, _ = project_logprobs(hidden, weight, targets)
    assert len(logprobs.grad_fn.saved_tensors) == (9 if kept_bytes else 6)
    logprobs.sum().backward()
    assert shapes == [(37, 9), (37, 9), (37, 5)] * 2


def test_kept_products_change_nothing(monkeypatch):
    results = []
    for kept_bytes in (0, 2**20):
        monkeypatch.setattr(projection, "_KEPT_BYTES", kept_bytes)
        hidden, weight, bias, targets = inputs()
        logprobs, entropies = project_logprobs(hidden, weight, targets, bias=bias, entropy=True)
        loss = (logprobs + entropies).square().sum()
        loss.backward(retain_graph=True)
        once = hidden.grad.clone()
        loss.backward()  # a second pass finds what was kept untouched
        torch.testing.assert_close(hidden.grad, 2 * once, rtol=1e-12, atol=1e-12)
        results.append((loss.detach(), once, weight.grad, bias.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_autocast_computes_in_bfloat16_and_sums_in_float32():
    hidden, weight, _, targets = inputs(torch.float32, tokens=64, width=32, vocabulary=500)
    exact, _ = project_logprobs(hidden, weight, targets, entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough, entropies = project_logprobs(hidden, weight, targets, entropy=True)
    assert rough.dtype == entropies.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2
    grads = [torch.autograd.grad(x.sum(), [hidden, weight]) for x in (rough, exact)]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.9995


def test_no_tokens_at_all():
    hidden, weight, _, _ = inputs()
    logprobs, entropies = project_logprobs(
        hidden[:0], weight, torch.empty(0, dtype=torch.long), entropy=True
    )
    assert logprobs.shape == entropies.shape == (0,)
    assert torch.autograd.grad(logprobs.sum(), weight)[0].abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, "do not fit"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, "targets"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(1, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(1, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        project_logprobs(**arguments)
