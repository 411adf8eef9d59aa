"""The CPU's attention over shared prompts against torch's own over copied ones."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from postgrad.models import prefix_attention as module
from postgrad.models.prefix_attention import Continued, prefix_attention

SIZES = (5, 3)  # lengths of the prompts, padded to 5
CONTINUED = (Continued(0, 2, 0, 5), Continued(2, 5, 1, 3))


def inputs(dtype=torch.float64, heads=6, key_heads=2, length=7):
    random = torch.Generator().manual_seed(0)
    shapes = [(5, heads, length), (5, key_heads, length), (5, key_heads, length)]
    shapes += [(2, key_heads, 5), (2, key_heads, 5)]
    return [
        torch.randn(*shape, 4, generator=random, dtype=dtype).requires_grad_() for shape in shapes
    ]


def copied(query, key, value, prompt_key, prompt_value, scale):
    """Each sequence with its prompt's keys beside its own, one at a time."""
    outputs = []
    for c in CONTINUED:
        for i in range(c.start, c.stop):
            keys = torch.cat([prompt_key[c.prompt, :, : c.size], key[i]], 1)
            values = torch.cat([prompt_value[c.prompt, :, : c.size], value[i]], 1)
            mask = torch.ones(query.shape[2], keys.shape[1], dtype=torch.bool).tril(c.size)
            outputs.append(
                scaled_dot_product_attention(
                    query[i][None],
                    keys[None],
                    values[None],
                    mask,
                    scale=scale,
                    enable_gqa=True,
                )
            )
    return torch.cat(outputs)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_values_and_gradients_are_those_of_copied_prompts(rows, monkeypatch):
    monkeypatch.setattr(module, "_WEIGHTS", 1)
    monkeypatch.setattr(module, "_LEAST_ROWS", rows)
    tensors = inputs()
    expected = copied(*tensors, 0.7)
    actual = prefix_attention(*tensors, CONTINUED, 0.7)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad(expected, tensors, slope)
    for got, want in zip(torch.autograd.grad(actual, tensors, slope), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_without_a_prompt_it_is_causal_attention():
    query, key, value, *_ = inputs()
    none = key[:, :, :0]
    actual = prefix_attention(query, key, value, none, none, (), 0.5)
    expected = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    (got,) = torch.autograd.grad(actual.square().sum(), query)
    (want,) = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_bfloat16_sums_in_float32():
    exact = inputs(torch.float32, length=40)
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    one, other = (prefix_attention(*t, CONTINUED, 0.5) for t in (exact, rough))
    assert other.dtype == torch.bfloat16
    torch.testing.assert_close(other.float(), one, rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(o.sum(), t) for o, t in ((one, exact), (other, rough))]
    for got, want in zip(*grads, strict=True):
        assert torch.cosine_similarity(got.flatten(), want.float().flatten(), 0) > 0.999
