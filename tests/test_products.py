"""Products by oneDNN against PyTorch's own, in every memory order that autograd comes up with."""

import gc
import weakref

import pytest
import torch
from torch import nn

from postgrad import products
from postgrad.models.language import load_policy
from postgrad.products import PackedLinear, can_pack, product
from postgrad.sampling.generation import SamplingSettings, generate

onednn = pytest.mark.skipif(
    not can_pack(torch.float32, torch.device("cpu")), reason="oneDNN's functions are missing here"
)


def order(rows, columns):
    """The same matrix shape, laid out in memory in different ways."""
    draw = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    yield draw
    yield draw.t().contiguous().t()
    yield torch.cat([draw, draw], 1)[:, :columns]
    yield torch.cat([draw, draw], 0)[::2]
    yield draw[:1].expand(rows, columns)


@pytest.mark.parametrize("slow", [True, False])
def test_products_are_those_of_pytorch(slow, monkeypatch):
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: slow)
    for left in order(70, 90):
        for right in order(60, 90):
            exact = (left.double() @ right.double().t()).float()
            torch.testing.assert_close(product(left, right), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_pytorch(dtype):
    left, right = torch.randn(70, 90).to(dtype), torch.randn(60, 90).to(dtype)
    assert torch.equal(product(left, right), left @ right.t())


@pytest.mark.parametrize(("maker", "slow"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_mkl_multiplies_on_its_makers_processors(maker, slow, monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "Path", lambda name: told)
    products._mkl_is_slow.cache_clear()
    assert products._mkl_is_slow() is slow
    monkeypatch.undo()
    products._mkl_is_slow.cache_clear()


def test_without_onednn_products_are_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda: None)
    left, right = torch.randn(70, 90), torch.randn(60, 90)
    assert torch.equal(product(left, right), left @ right.t())
    assert not can_pack(torch.float32, torch.device("cpu"))


@pytest.fixture(params=[pytest.param(True, marks=onednn), False], ids=["packed", "plain"])
def packing(request, monkeypatch):
    """Both ways of a `PackedLinear`: by oneDNN, and by PyTorch's products as on a GPU."""
    if not request.param:
        monkeypatch.setattr(products, "can_pack", lambda *about: False)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_layer(dtype, bias):
    layer = nn.Linear(24, 40, bias=bias)
    packed = PackedLinear([layer.weight], [layer.bias] if bias else None, dtype)
    for rows in (1, 5, 33):
        states = torch.randn(2, rows, 24)
        with torch.no_grad():
            expected = layer.to(dtype)(states.to(dtype))
            assert packed(states).dtype == dtype
        rough = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(packed(states), expected, rtol=rough, atol=rough)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_several_packed_layers_give_their_outputs_side_by_side(dtype, bias):
    layers = [nn.Linear(24, width, bias=bias) for width in (40, 16, 8)]
    biases = [layer.bias for layer in layers] if bias else None
    packed = PackedLinear([layer.weight for layer in layers], biases, dtype)
    states = torch.randn(3, 5, 24)
    with torch.no_grad():
        expected = torch.cat([layer.to(dtype)(states.to(dtype)) for layer in layers], -1)
    rough = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed(states), expected, rtol=rough, atol=rough)


def test_without_packing_matrices_of_that_precision_are_not_copied(monkeypatch):
    monkeypatch.setattr(products, "can_pack", lambda *about: False)
    layers = [nn.Linear(24, width) for width in (40, 16)]
    linear = PackedLinear([layer.weight for layer in layers], None, torch.float32)
    states = torch.randn(3, 24)
    before = linear(states)
    with torch.no_grad():
        layers[1].weight.zero_()
    assert torch.equal(linear(states)[:, :40], before[:, :40])
    assert linear(states)[:, 40:].abs().sum() == 0 < before[:, 40:].abs().sum()


def test_sampling_is_the_same_with_and_without_packing(monkeypatch):
    """Greedy tokens and their log-probabilities; the network itself is left as it was."""
    policy = load_policy("tiny")
    prompts = [policy.render("An apple"), policy.render("12+34=")]
    settings = SamplingSettings(max_new_tokens=12, temperature=0.0)
    before = [type(module) for module in policy.network.modules()]
    packed = generate(policy, prompts, settings, seeds=[0, 1])
    assert [type(module) for module in policy.network.modules()] == before
    monkeypatch.setattr("postgrad.products.can_pack", lambda *about: False)
    plain = generate(policy, prompts, settings, seeds=[0, 1])
    assert packed.texts == plain.texts
    for one, other in zip(packed.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_packing_follows_the_weights():
    policy = load_policy("tiny")
    prompt = [policy.render("An apple")]
    settings = SamplingSettings(max_new_tokens=4)
    first = generate(policy, prompt, settings, seeds=[0]).logprobs[0]
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(generate(policy, prompt, settings, seeds=[0]).logprobs[0][:1], first[:1])


@onednn
def test_the_packed_copy_is_gone_after_sampling():
    policy = load_policy("tiny")
    gc.disable()
    try:
        with policy.sampling_network() as network:
            layers = [weakref.ref(m) for m in network.modules() if isinstance(m, PackedLinear)]
        assert layers
        del network
        assert not any(layer() for layer in layers)
    finally:
        gc.enable()
