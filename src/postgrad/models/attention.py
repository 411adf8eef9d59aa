"""One attention implementation for transformers that lets a *layout* decide what attends to what.

A network whose attention is set to `IMPLEMENTATION` is called with all its tokens in one row,
`input_ids [1, tokens]`, their `position_ids`, and a `layout`. Every layer then asks the layout for
attention; the rest of the network works token by token and never learns how tokens belong
together. Without a layout the network attends as usual (scaled dot product, transformers' masks).

This is the contract by which transformers serves packed tokens to inference engines: attention is
looked up by name, keyword arguments of the forward pass reach it, a four-dimensional mask is
passed through untouched.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "postgrad"


@dataclass(frozen=True)
class AttentionForm:
    """How a layer turns queries and keys into weights.

    Attributes:
        scale: factor on query · key; None for 1/√(head dimension).
        window: a query sees itself and the `window - 1` tokens before it; None for all.
        softcap: weights' logits x become cap · tanh(x / cap); None for none.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


class UnsupportedAttention(Exception):
    """A layer asks for attention of a form that a layout cannot give."""


class Layout(Protocol):
    """Knows which of the tokens in the row attend to which."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """Attention output `[tokens, heads, d]` from query `[tokens, heads, d]` and key and value
        `[tokens, key heads, d]`."""


# Arguments that transformers passes to every attention function and that do not change its result
_NEUTRAL = {"position_ids", "position_embeddings", "cache_position", "use_cache"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    form = AttentionForm(scaling, sliding_window, softcap)
    if layout is None:
        if softcap is None:
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
            )
        else:
            causal = attention_mask is None and query.shape[2] > 1
            output = masked_attention(query, key, value, attention_mask, form, causal)
            output = output.transpose(1, 2)
        return output, None
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttention("its attention is not causal")
    unknown = [
        name for name, argument in others.items() if argument is not None and name not in _NEUTRAL
    ]
    if unknown:
        raise UnsupportedAttention(f"its attention takes {unknown[0]!r}")
    row = layout.attend(
        module,
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        form,
    )
    return row.unsqueeze(0), None


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    form: AttentionForm,
    causal: bool = False,
) -> Tensor:
    """Attention output `[n, heads, T, d]` of padded sequences.

    Args:
        query: `[n, heads, T, d]`.
        key, value: `[n, key heads, K, d]`; the heads are a multiple of the key heads.
        mask: `[n or 1, 1, T, K]` bool, True where a query sees a key; None for all (or `causal`).
        form: scale and soft cap; the window must already be in the mask.
        causal: query t sees keys 0..t only.
    """
    repeats = query.shape[1] // key.shape[1]
    # on GPUs the kernels that take a mask take no grouped heads: one that holds all weights would
    # be chosen
    if repeats > 1 and (form.softcap is not None or (mask is not None and query.is_cuda)):
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)
        repeats = 1
    if form.softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=form.scale, enable_gqa=repeats > 1
        )
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    scores = query @ key.transpose(2, 3) * (form.scale or query.shape[-1] ** -0.5)
    scores = form.softcap * torch.tanh(scores / form.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


# A mask of four dimensions tells transformers to make none; layouts know better than any mask.
def no_mask(device: torch.device) -> Tensor:
    """The placeholder that stops transformers from building a mask over the row of tokens."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
