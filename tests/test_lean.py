"""The lean parts against the modules whose place they take."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from postgrad.models.lean import make_lean


def llama_part(kind):
    torch.manual_seed(0)
    if kind is LlamaRMSNorm:
        part = LlamaRMSNorm(16, eps=1e-5)
        nn.init.uniform_(part.weight, 0.5, 1.5)
        return part
    return LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))


def outcome(part, states, rounded):
    states = states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        output = part(states)
    slope = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [states, *part.parameters()], slope)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_values_and_gradients_are_the_modules_own(kind, rounded):
    own, lean = llama_part(kind), llama_part(kind)
    make_lean(lean)
    assert "forward" in vars(lean)
    states = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        outcome(lean, states, rounded), outcome(own, states, rounded), strict=True
    ):
        assert got.dtype == want.dtype
        if rounded and kind is LlamaMLP:
            assert (
                torch.cosine_similarity(got.float().flatten(), want.float().flatten(), 0) > 0.9999
            )
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_less_is_kept_for_the_backward_pass():
    def kept(part):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _output = part(torch.randn(1, 30, 16, requires_grad=True))
        return sum(sizes.values())

    for kind in (LlamaRMSNorm, LlamaMLP):
        lean = llama_part(kind)
        make_lean(lean)
        assert kept(lean) < 0.8 * kept(llama_part(kind))


def test_what_computes_otherwise_is_left_alone():
    """Gemma's norm multiplies by one plus the weight, its MLP has another gate."""
    config = GemmaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)
    for part in (GemmaRMSNorm(16), GemmaMLP(config)):
        make_lean(part)
        assert "forward" not in vars(part)


def test_frozen_weights_get_no_gradient():
    lean = llama_part(LlamaMLP)
    make_lean(lean)
    lean.up_proj.weight.requires_grad_(False)
    lean(torch.randn(3, 16)).sum().backward()
    assert lean.up_proj.weight.grad is None
    assert lean.gate_proj.weight.grad is not None
