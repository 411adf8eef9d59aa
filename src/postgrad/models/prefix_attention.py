"""Attention of completions to their shared prompts and to themselves, for CPUs.

Scaled dot product attention on a CPU has a backward pass in bfloat16 that is many times slower than
the matrix products in it. Here a few sequences at a time are taken through all steps, so that their
attention weights stay in the processor's cache; only these have their prompt's keys copied next to
their own. Weights are computed again in the backward pass instead of being kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WEIGHTS = 2**19  # attention weights held at once, 2 MiB in float32, but for …
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
        continued: the prompt of every sequence; empty if there are no prompts.
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
        grouped = _by_key_head(query, key.shape[1])
        # as [n, T, heads, d] in memory: what follows is a product over heads · d of each token
        output = query.new_empty(n, length, heads, width).transpose(1, 2)
        written = _by_key_head(output, key.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            for some in _few_at_once(grouped.shape, continued):
                keys = _with_prompt(key, prompt_key, some)
                values = _with_prompt(value, prompt_value, some)
                for rows in _rows(grouped.shape, some):
                    seen = some.size + rows.stop
                    part = _part(grouped, some, rows) * scale
                    weights = _weights(part, keys[:, :seen], rows)
                    mixed = torch.bmm(weights.to(query.dtype), values[:, :seen])
                    _set_part(written, some, rows, mixed)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prompt_key, prompt_value = ctx.saved_tensors
        continued, scale = ctx.settings
        dtype = query.dtype
        exact = torch.promote_types(dtype, torch.float32)
        grouped = _by_key_head(query, key.shape[1])
        slopes = _by_key_head(gradients[0], key.shape[1])
        grad_query = torch.empty_like(query)
        grad_grouped = _by_key_head(grad_query, key.shape[1])
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        grad_prompt_key = torch.zeros_like(prompt_key, dtype=exact)
        grad_prompt_value = torch.zeros_like(prompt_value, dtype=exact)
        with torch.autocast(query.device.type, enabled=False):
            for some in _few_at_once(grouped.shape, continued):
                keys = _with_prompt(key, prompt_key, some)
                values = _with_prompt(value, prompt_value, some)
                grad_keys: Tensor | None = None
                # the last queries see all keys, so what comes after them is added to theirs
                for rows in reversed(_rows(grouped.shape, some)):
                    seen = some.size + rows.stop
                    part = _part(grouped, some, rows) * scale
                    slope = _part(slopes, some, rows)
                    weights = _weights(part, keys[:, :seen], rows)
                    # ∂/∂weights, then through the softmax
                    change = torch.bmm(slope, values[:, :seen].transpose(1, 2)).to(exact)
                    change = torch.ops.aten._softmax_backward_data(change, weights, -1, exact)
                    weights, change = weights.to(dtype), change.to(dtype)
                    grad_part = torch.bmm(change, keys[:, :seen])
                    _set_part(grad_grouped, some, rows, grad_part.mul_(scale))
                    to_keys = torch.bmm(change.transpose(1, 2), part)
                    to_values = torch.bmm(weights.transpose(1, 2), slope)
                    if grad_keys is None:
                        grad_keys, grad_values = to_keys.to(exact), to_values.to(exact)
                    else:
                        grad_keys[:, :seen] += to_keys
                        grad_values[:, :seen] += to_values
                assert grad_keys is not None
                _hand_back(grad_keys, grad_key, grad_prompt_key, some)
                _hand_back(grad_values, grad_value, grad_prompt_value, some)
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_prompt_key.to(dtype),
            grad_prompt_value.to(dtype),
            None,
            None,
        )


def _by_key_head(query: Tensor, key_heads: int) -> Tensor:
    """`[n, h, r, T, d]` of `[n, heads, T, d]`: r query heads share each of the h key heads."""
    return query.unflatten(1, (key_heads, query.shape[1] // key_heads))


def _few_at_once(shape: torch.Size, continued: tuple[Continued, ...]) -> Iterator[Continued]:
    """All sequences, a few of one prompt at a time, so that their weights stay within bounds."""
    n, key_heads, repeats, length, _ = shape
    for whole in continued or (Continued(0, n, 0, 0),):
        each = key_heads * repeats * length * (whole.size + length)
        count = whole.stop - whole.start
        count = -(-count // -(-count // max(1, _WEIGHTS // each)))  # parts of about the same size
        for start in range(whole.start, whole.stop, count):
            stop = min(start + count, whole.stop)
            yield Continued(start, stop, whole.prompt, whole.size)


def _rows(shape: torch.Size, some: Continued) -> list[slice]:
    """Positions 0..T, cut so that the weights stay within bounds where one sequence is long."""
    _, key_heads, repeats, length, _ = shape
    each = (some.stop - some.start) * key_heads * repeats * (some.size + length)
    count = max(_LEAST_ROWS, _WEIGHTS // each)
    return [slice(start, min(start + count, length)) for start in range(0, length, count)]


def _with_prompt(own: Tensor, of_prompts: Tensor, some: Continued) -> Tensor:
    """`[n · h, P + T, d]`: the prompt's keys (or values), then those of each sequence."""
    mine = own[some.start : some.stop]
    if some.size == 0:
        return mine.flatten(0, 1)
    shared = of_prompts[some.prompt, :, : some.size].expand(len(mine), -1, -1, -1)
    return torch.cat([shared, mine], 2).flatten(0, 1)


def _hand_back(gradient: Tensor, own: Tensor, of_prompts: Tensor, some: Continued) -> None:
    """Gradients of what `_with_prompt` has put together, to where it came from."""
    apart = gradient.unflatten(0, (some.stop - some.start, own.shape[1]))
    own[some.start : some.stop] = apart[:, :, some.size :]
    if some.size:
        of_prompts[some.prompt, :, : some.size] += apart[:, :, : some.size].sum(0)


def _part(grouped: Tensor, some: Continued, rows: slice) -> Tensor:
    """`[n · h, r · rows, d]` of `[n, h, r, T, d]`."""
    part = grouped[some.start : some.stop, :, :, rows]
    return part.reshape(-1, part.shape[2] * part.shape[3], part.shape[4])


def _set_part(grouped: Tensor, some: Continued, rows: slice, part: Tensor) -> None:
    target = grouped[some.start : some.stop, :, :, rows]
    target.copy_(part.view(target.shape))


def _weights(part: Tensor, keys: Tensor, rows: slice) -> Tensor:
    """Attention weights `[n · h, r · rows, P + stop]` of the queries at `rows`, in float32 or
    better."""
    scores = torch.bmm(part, keys.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    count = rows.stop - rows.start
    later = torch.ones(count, count, dtype=torch.bool, device=part.device).triu(1)
    own = scores.unflatten(1, (-1, count))[..., keys.shape[1] - count :]
    own.masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1)
