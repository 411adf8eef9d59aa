"""Attention of completions to their shared prompts and to themselves, for CPUs.

Scaled dot product attention on a CPU has a backward pass in bfloat16 that is many times slower than
the matrix products in it, and wants each completion's prompt copied next to its own keys. Here all
completions of a prompt meet its keys in one product, weights are computed again in the backward
pass instead of being kept, and nothing is copied per completion.

Inside, tensors are ordered by key head first: queries `[h, n, r, T, d]`, where r query heads share
each of the h key heads, and keys and values `[h, n, T, d]`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WEIGHTS = 2**20  # attention weights held at once, 4 MiB in float32, but for …
_LEAST_ROWS = 64  # … fewer queries at once than these make slow products


@dataclass(frozen=True)
class Continued:
    """A prompt (its place in the block of prompts, and its length) and who continues it: the
    sequences `start:stop`."""

    start: int
    stop: int
    prompt: int
    size: int


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    continued: tuple[Continued, ...],
    scale: float,
) -> Tensor:
    """Causal attention `[n, heads, T, d]` of n sequences to themselves and to all of their prompts.

    Args:
        query: `[n, heads, T, d]`.
        key, value: `[n, key heads, T, d]`; the heads are a multiple of the key heads.
        prompt_key, prompt_value: `[g, key heads, P, d]` of g prompts, padded on the right.
        continued: the prompt of every sequence; empty if there are no prompts (P = 0).
        scale: factor on query · key.

    Products run in the precision of the tensors, the softmax in float32 or better.
    """
    output: Tensor = _PrefixAttention.apply(
        query, key, value, prompt_key, prompt_value, continued, scale
    )
    return output


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        continued: tuple[Continued, ...],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value)
        ctx.settings = (continued, scale)
        n, heads, length, width = query.shape
        with torch.autocast(query.device.type, enabled=False):
            queries = _by_key_head(query, key.shape[1], scale)
            keys, values = _head_first(key), _head_first(value)
            output = torch.empty_like(queries)
            for rows in _chunks(queries, prompt_key.shape[2]):
                part = queries[:, :, :, rows].flatten(2, 3)
                weights = _weights(part, keys[:, :, : rows.stop], prompt_key, continued, rows)
                own, to_prompt = _split(weights.to(query.dtype), rows.stop)
                mixed = _each(own, values[:, :, : rows.stop])
                for c in continued:
                    here = slice(c.start, c.stop)
                    mixed[:, here] += _together(
                        to_prompt[:, here, :, : c.size], prompt_value[c.prompt, :, : c.size]
                    )
                output[:, :, :, rows] = mixed.view(output[:, :, :, rows].shape)
        # as [n, T, heads, d] in memory: what follows is a product over heads · d of each token
        return output.permute(1, 3, 0, 2, 4).reshape(n, length, heads, width).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prompt_key, prompt_value = ctx.saved_tensors
        continued, scale = ctx.settings
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            queries = _by_key_head(query, key.shape[1], scale)
            slopes = _by_key_head(gradients[0], key.shape[1], 1.0)
            keys, values = _head_first(key), _head_first(value)
            grad_queries = torch.empty_like(queries)
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            grad_prompt_key = torch.zeros_like(prompt_key)
            grad_prompt_value = torch.zeros_like(prompt_value)
            for rows in _chunks(queries, prompt_key.shape[2]):
                part = queries[:, :, :, rows].flatten(2, 3)
                slope = slopes[:, :, :, rows].flatten(2, 3)
                own_keys, own_values = keys[:, :, : rows.stop], values[:, :, : rows.stop]
                weights = _weights(part, own_keys, prompt_key, continued, rows)
                # ∂/∂weights, then through the softmax
                change = _products(slope, own_values, prompt_value, continued, weights.shape[-1])
                change = torch.ops.aten._softmax_backward_data(change, weights, -1, weights.dtype)
                own, to_prompt = _split(weights.to(dtype), rows.stop)
                own_change, prompt_change = _split(change.to(dtype), rows.stop)
                grad_part = _each(own_change, own_keys)
                grad_keys[:, :, : rows.stop] += _each(own_change.transpose(2, 3), part)
                grad_values[:, :, : rows.stop] += _each(own.transpose(2, 3), slope)
                for c in continued:
                    here = slice(c.start, c.stop)
                    inside = prompt_change[:, here, :, : c.size]
                    grad_part[:, here] += _together(inside, prompt_key[c.prompt, :, : c.size])
                    grad_prompt_key[c.prompt, :, : c.size] += _summed(inside, part[:, here])
                    grad_prompt_value[c.prompt, :, : c.size] += _summed(
                        to_prompt[:, here, :, : c.size], slope[:, here]
                    )
                grad_queries[:, :, :, rows] = grad_part.view(grad_queries[:, :, :, rows].shape)
            grad_query = grad_queries.mul_(scale).permute(1, 0, 2, 3, 4).flatten(1, 2)
        return (
            grad_query,
            grad_keys.transpose(0, 1),
            grad_values.transpose(0, 1),
            grad_prompt_key,
            grad_prompt_value,
            None,
            None,
        )


def _by_key_head(query: Tensor, key_heads: int, factor: float) -> Tensor:
    """`[h, n, r, T, d]` from `[n, heads, T, d]`, times a factor."""
    n, heads, length, width = query.shape
    grouped = query.view(n, key_heads, heads // key_heads, length, width).transpose(0, 1)
    ordered = torch.empty(grouped.shape, dtype=query.dtype, device=query.device)
    return torch.mul(grouped, factor, out=ordered)


def _head_first(padded: Tensor) -> Tensor:
    """`[h, n, T, d]` from `[n, h, T, d]`."""
    return padded.transpose(0, 1).contiguous()


def _chunks(queries: Tensor, prompt_length: int) -> list[slice]:
    """Positions 0..T cut so that a chunk's attention weights stay within bounds."""
    h, n, repeats, length, _ = queries.shape
    rows = max(_LEAST_ROWS, _WEIGHTS // (h * n * repeats * (prompt_length + length)))
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _weights(
    part: Tensor,
    keys: Tensor,
    prompt_key: Tensor,
    continued: tuple[Continued, ...],
    rows: slice,
) -> Tensor:
    """Attention weights `[h, n, r · rows, stop + P]` of the queries at `rows`: first to the
    sequence's own tokens so far, then to its prompt."""
    scores = _products(part, keys, prompt_key, continued, rows.stop + prompt_key.shape[2])
    for c in continued:
        scores[:, c.start : c.stop, :, rows.stop + c.size :] = -torch.inf
    count = rows.stop - rows.start
    later = torch.ones(count, count, dtype=torch.bool, device=part.device).triu(1)
    repeats = part.shape[2] // count
    scores[..., rows].unflatten(2, (repeats, count)).masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1)


def _products(
    left: Tensor,
    right: Tensor,
    prompt_right: Tensor,
    continued: tuple[Continued, ...],
    columns: int,
) -> Tensor:
    """`left · rightᵀ` of every sequence with its own and with its prompt's, in float32 or better;
    0 in the columns beyond a prompt's end."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    own = right.shape[2]
    result = torch.empty(*left.shape[:3], columns, dtype=dtype, device=left.device)
    result[..., :own] = _each(left, right.transpose(2, 3))
    for c in continued:
        here = slice(c.start, c.stop)
        factor = prompt_right[c.prompt, :, : c.size].transpose(1, 2)
        result[:, here, :, own : own + c.size] = _together(left[:, here], factor)
        result[:, here, :, own + c.size :] = 0
    return result


def _split(weights: Tensor, own: int) -> tuple[Tensor, Tensor]:
    return weights[..., :own], weights[..., own:]


def _each(left: Tensor, right: Tensor) -> Tensor:
    """Each sequence's own product: `[h, n, a, c]` from `[h, n, a, b]` and `[h, n, b, c]`."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _together(left: Tensor, right: Tensor) -> Tensor:
    """One product for all: `[h, n, a, c]` from `[h, n, a, b]` and `[h, b, c]`."""
    return torch.bmm(left.flatten(1, 2), right).unflatten(1, left.shape[1:3])


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Σ over sequences of leftᵀ · right: `[h, b, c]` from `[h, n, a, b]` and `[h, n, a, c]`."""
    return torch.bmm(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2))
