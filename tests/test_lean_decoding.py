"""Lean decoder layers: used where they give what the layer's own code gives, and only there."""

import pytest
import torch
from torch import nn

import architectures
from postgrad.models.lean_decoding import lean_layers
from postgrad.models.policy import LanguagePolicy


def sharing(name):
    """A network that takes layouts."""
    return LanguagePolicy(architectures.network(name), architectures.tiny_tokenizer()).network


LLAMAS = {"llama", "llama-untied-bias", "qwen2", "mistral", "granite"}


@torch.no_grad()
@pytest.mark.parametrize("name", architectures.SHARING)
def test_every_layer_of_llamas_kind_is_replaced_and_no_other(name):
    assert not list(lean_layers(architectures.network(name), torch.float32))  # takes no layouts
    found = list(lean_layers(sharing(name), torch.float32))
    assert len(found) == (3 if name in LLAMAS else 0)


@torch.no_grad()
def test_windows_and_scales_are_those_of_the_layer():
    layers = [lean for _, _, lean in lean_layers(sharing("mistral"), torch.float32)]
    assert [lean.form.window for lean in layers] == [5, 5, 5]
    assert [lean.form.scale for lean in layers] == [8**-0.5] * 3


@torch.no_grad()
def test_a_layer_that_does_something_more_keeps_its_own_code():
    network = sharing("llama")
    layer = network.model.layers[1]
    own = layer.forward
    layer.forward = lambda *given, **named: 1.5 * own(*given, **named)
    assert [name for name, _, _ in lean_layers(network, torch.float32)] == [
        "model.layers.0",
        "model.layers.2",
    ]
    network.model.layers[0].self_attn.q_norm = nn.Identity()
    assert len(list(lean_layers(network, torch.float32))) == 1


@torch.no_grad()
def test_the_network_itself_is_left_as_it_was():
    policy = LanguagePolicy(architectures.network("llama"), architectures.tiny_tokenizer())
    before = {name: module.forward for name, module in policy.network.named_modules()}
    with policy.sampling_network() as network:
        assert any("forward" in vars(module) for module in network.modules())
    after = {name: module.forward for name, module in policy.network.named_modules()}
    assert before == after
