"""Attention within one row of tokens by a single kernel, for GPUs: PyTorch's flex attention.

Sequences of any lengths lie one after the other, without padding; of the tiles of 128 x 128 tokens
the kernel visits those in which somebody sees somebody.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from postgrad.models.attention import AttentionForm

_TILE = 128
_AT_ONCE = 2**26  # pairs of tokens whose visibility is held at once


def row_mask(
    sequences: Tensor, prompts: Tensor, positions: Tensor, window: int | None = None
) -> BlockMask:
    """What each token of the row sees: what is not later in its sequence and in its prompt.

    Args:
        sequences: `[tokens]`, the number of the sequence that a token belongs to.
        prompts: `[tokens]`, the number of the sequence that this one continues, or its own.
        positions: `[tokens]`, from the start of the prompt.
        window: a query sees itself and the `window - 1` positions before it; None for all.
    """

    def sees(query: Tensor, key: Tensor) -> Tensor:
        mine = (sequences[query] == sequences[key]) | (prompts[query] == sequences[key])
        back = positions[query] - positions[key]
        near = back >= 0 if window is None else (back >= 0) & (back < window)
        return mine & near

    tokens = len(sequences)
    some, every = _tiles(sees, tokens, sequences.device)
    partly = _listed(some & ~every)
    fully = _listed(every)
    return BlockMask.from_kv_blocks(
        *partly,
        *fully,
        BLOCK_SIZE=_TILE,
        mask_mod=lambda batch, head, query, key: sees(query, key),
        seq_lengths=(tokens, tokens),
    )


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, form: AttentionForm
) -> Tensor:
    """Attention output `[tokens, heads, d]` of query `[tokens, heads, d]`, key and value
    `[tokens, key heads, d]`; the window must already be in the mask."""
    cap = form.softcap
    attend = _kernel() if query.device.type == "cuda" else flex_attention
    output = attend(
        *(part.transpose(0, 1)[None] for part in (query, key, value)),
        score_mod=None if cap is None else _capped(cap),
        block_mask=mask,
        scale=form.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    row: Tensor = output[0].transpose(0, 1)
    return row


@cache
def _kernel() -> Any:
    # one for all lengths of rows
    return torch.compile(flex_attention, dynamic=True)


def _capped(cap: float) -> Callable[..., Tensor]:
    return lambda score, batch, head, query, key: cap * torch.tanh(score / cap)


def _tiles(
    sees: Callable[[Tensor, Tensor], Tensor], tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of all tiles, in which somebody sees somebody and in which everybody everybody."""
    count = -(-tokens // _TILE)
    some = torch.empty(count, count, dtype=torch.bool, device=device)
    every = torch.empty_like(some)
    places = torch.arange(count * _TILE, device=device)
    real, places = places < tokens, places.clamp(max=tokens - 1)
    step = max(1, _AT_ONCE // (_TILE * _TILE * count))
    for start in range(0, count, step):
        rows = slice(start * _TILE, (start + step) * _TILE)
        seen = sees(places[rows, None], places) & real[rows, None] & real
        tiles = seen.view(-1, _TILE, count, _TILE)
        some[start : start + step] = tiles.any(3).any(1)
        every[start : start + step] = tiles.all(3).all(1)
    return some, every


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are in, and which, those first: `[1, 1, n]`, `[1, 1, n, n]`."""
    chosen = tiles.int()
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[None, None], order.int()[None, None]
