"""Decoder layers of Llama's kind with fewer calls, to sample with.

A decoding step multiplies few rows, so that the number of calls counts as much as the work in them.
Here query, key and value are one packed product, and gate and up another; queries and keys are
rotated together. A layer is replaced only where it gives what its own code gives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from postgrad.models.attention import AttentionForm, Layout, no_mask
from postgrad.models.lean import is_gated_mlp, is_linear, is_norm
from postgrad.products import PackedLinear

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_TOLERANCE = {torch.float32: 1e-5}  # of the norm; in bfloat16: _ROUGH
_ROUGH = 2e-2


class RotaryPair:
    """Cosines and signed sines `[rows, 1, d]` of one step, the same for all layers."""

    def __init__(self) -> None:
        self._of: Any = None
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._found is None or self._of is not embeddings[0]:
            cos, sin = (table[0].unsqueeze(1) for table in embeddings)
            first, second = sin.chunk(2, -1)
            self._of = embeddings[0]
            self._found = cos, torch.cat([-first, second], -1)
        return self._found


@dataclass
class LeanLayer:
    """The forward pass of one decoder layer, on one row of tokens `[1, tokens, d]`."""

    attention: Any
    form: AttentionForm
    heads: int
    key_heads: int
    norms: tuple[Any, Any]
    query_key_value: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    rotary: RotaryPair

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype, rotary: RotaryPair) -> Self | None:
        """A layer's own lean form, its matrices in `dtype`, or None where it is of another kind."""
        if not _is_of_this_kind(layer):
            return None
        attention, mlp = layer.self_attn, layer.mlp
        witness = _Witness()
        states, embeddings = _example(attention, next(layer.parameters()))
        try:
            expected = _called(layer, states, embeddings, witness)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return None  # it wants to be called in another way
        if witness.form is None:
            return None  # its attention is not asked of a layout
        lean = cls(
            attention,
            witness.form,
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            (layer.input_layernorm, layer.post_attention_layernorm),
            _together([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
            _together([attention.o_proj], dtype),
            _together([mlp.gate_proj, mlp.up_proj], dtype),
            _together([mlp.down_proj], dtype),
            rotary,
        )
        actual = _called(lean, states, embeddings, _Witness())
        same = (actual - expected).norm() <= _TOLERANCE.get(dtype, _ROUGH) * expected.norm()
        return lean if actual.dtype == expected.dtype and bool(same) else None

    def __call__(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        layout: Layout,
        **others: Any,
    ) -> Tensor:
        rows = hidden_states[0]
        count, heads = len(rows), self.heads + self.key_heads
        joint = self.query_key_value(_normed(rows, self.norms[0]))
        joint = joint.view(count, heads + self.key_heads, -1)
        cos, sin = self.rotary(position_embeddings)
        turning, value = joint[:, :heads], joint[:, heads:]
        turned = torch.addcmul(turning * cos, turning.roll(turning.shape[-1] // 2, -1), sin)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        attended = layout.attend(self.attention, query, key, value, self.form)
        rows = rows + self.output(attended.reshape(count, -1))
        gate, up = self.gate_up(_normed(rows, self.norms[1])).chunk(2, -1)
        rows = rows + self.down(silu(gate).mul_(up))
        return rows[None]


def _is_of_this_kind(layer: Any) -> bool:
    children = dict(layer.named_children())
    return (
        children.keys() == _LAYER
        and dict(layer.self_attn.named_children()).keys() == _ATTENTION
        and all(is_linear(child) for child in layer.self_attn.children())
        and isinstance(getattr(layer.self_attn, "head_dim", None), int)
        and is_gated_mlp(layer.mlp)
        and all(is_norm(children[name]) for name in _LAYER if name.endswith("norm"))
    )


def _together(layers: list[nn.Linear], dtype: torch.dtype) -> PackedLinear:
    biases = [layer.bias for layer in layers]
    known = [bias for bias in biases if bias is not None]
    assert len(known) in (0, len(biases))
    return PackedLinear([layer.weight for layer in layers], known or None, dtype)


def _normed(rows: Tensor, norm: Any) -> Tensor:
    return rms_norm(rows, (rows.shape[-1],), norm.weight, norm.variance_epsilon)


class _Witness:
    """A layout that tells the form of attention, and attends by a simple rule of its own."""

    form: AttentionForm | None = None

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        self.form = form
        repeats = query.shape[1] // key.shape[1]
        return query + (key + value).repeat_interleave(repeats, 1)


def _example(attention: Any, like: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1, 3, attention.q_proj.in_features, generator=random).to(like)
    angles = torch.rand(1, 3, attention.head_dim // 2, generator=random).repeat(1, 1, 2)
    return states, (angles.cos().to(like), angles.sin().to(like))


def _called(
    layer: Any, states: Tensor, embeddings: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    output: Any = layer(
        states,
        attention_mask=no_mask(states.device),
        position_embeddings=embeddings,
        layout=layout,
    )
    assert isinstance(output, Tensor)
    return output


def lean_layers(network: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Any, LeanLayer]]:
    """Name, module and lean form of every layer of the network that has one."""
    rotary = RotaryPair()
    for name, module in network.named_modules():
        lean = LeanLayer.of(module, dtype, rotary)
        if lean is not None:
            yield name, module, lean
