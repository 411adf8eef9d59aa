"""Prompts and completions packed into one row of tokens; a prompt's tokens occur only once."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.models.attention import AttentionForm, masked_attention
from postgrad.models.prefix_attention import Continued, prefix_attention
from postgrad.models.row_attention import row_attention, row_mask

_MASK_ELEMENTS = 2**22  # a block's mask holds at most this many
_ROUGH = 2e-2  # of the norm, between two kernels in half precision


class Block:
    """Some sequences of similar length that lie one after the other in the row of tokens.

    The token-wise part of a network never sees padding; attention sees the block padded on the
    right to its longest sequence.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device):
        self.start = start
        self.lengths = list(lengths)
        self.longest = max(lengths)
        self.stop = start + sum(lengths)
        self.uniform = min(lengths) == self.longest
        sizes = torch.tensor(self.lengths, device=device)
        steps = torch.arange(self.longest, device=device)
        inside = steps < sizes[:, None]
        first = sizes.cumsum(0) - sizes
        # padding repeats the last token of its sequence: nothing outside the block is touched
        steps = torch.minimum(steps, sizes[:, None] - 1)
        self._padded_rows = (first[:, None] + steps).flatten()
        self._kept = inside.flatten().nonzero().squeeze(1)

    def pad(self, row: Tensor) -> Tensor:
        """`[n, heads, longest, d]` from the whole row `[tokens, heads, d]`."""
        part = row[self.start : self.stop]
        if not self.uniform:
            part = _rows(part, self._padded_rows)
        return part.view(len(self.lengths), self.longest, *part.shape[1:]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The block's part `[stop - start, heads, d]` of the row, from `[n, heads, longest, d]`."""
        flat = padded.transpose(1, 2).flatten(0, 1)
        return flat if self.uniform else _rows(flat, self._kept)


def _rows(row: Tensor, index: Tensor) -> Tensor:
    """`row[index]`, by the whole width at once, whose backward pass is the faster one."""
    return row.flatten(1).index_select(0, index).view(len(index), *row.shape[1:])


@dataclass
class _Completions:
    """A block of completions and the prompt (of one prompt block) that each continues."""

    block: Block
    owners: Tensor  # [n] position in the block of prompts, rising
    continued: tuple[Continued, ...]
    prompt_lengths: Tensor  # [n], or [1] where all are the same
    masks: dict[int | None, Tensor]  # by window


class SharedPrefixes:
    """The layout of distinct prompts and their completions in one row of tokens.

    Each prompt attends causally to itself, each completion to its prompt and causally to itself.
    Prompts come first in the row; both are sorted into blocks of similar length.

    Args:
        prompts: distinct prompts, each `[P]` with P ≥ 1.
        completions: each `[L]`, L ≥ 0.
        owners: for each completion, the position of its prompt.

    Attributes:
        tokens, positions: `[tokens]`, what the network is called with.
        prompt_rows, completion_rows: where each sequence lies in the row, as (start, stop).
        prompt_blocks: the blocks of prompts, in the order of the row.
        prompt_order: the prompts' positions in the order of the row.
    """

    def __init__(
        self, prompts: Sequence[Tensor], completions: Sequence[Tensor], owners: Sequence[int]
    ):
        device = prompts[0].device
        self.prompt_rows = [(0, 0)] * len(prompts)
        self.completion_rows = [(0, 0)] * len(completions)
        self.prompt_blocks: list[Block] = []
        self.prompt_order: list[int] = []
        self._completions: list[list[_Completions]] = []
        self._row_masks: dict[int | None, Any] = {}  # by window
        sequences: list[tuple[int, int, int]] = []  # number, that of the prompt, length
        pieces: list[Tensor] = []
        positions: list[Tensor] = []
        end = 0

        buckets = _buckets(range(len(prompts)), [len(p) for p in prompts])
        for members in buckets:
            self.prompt_order += members
            block = Block(end, [len(prompts[i]) for i in members], device)
            for i in members:
                self.prompt_rows[i] = (end, end + len(prompts[i]))
                end += len(prompts[i])
                sequences.append((i, i, len(prompts[i])))
                pieces.append(prompts[i])
                positions.append(torch.arange(len(prompts[i]), device=device))
            self.prompt_blocks.append(block)

        lengths = [len(c) for c in completions]
        for block, members in zip(self.prompt_blocks, buckets, strict=True):
            place = {prompt: position for position, prompt in enumerate(members)}
            theirs = [i for i, owner in enumerate(owners) if owner in place and lengths[i] > 0]
            parts = []
            for members_by_length in _buckets(theirs, lengths, prefix=block.longest):
                bucket = sorted(members_by_length, key=lambda i: place[owners[i]])
                part = Block(end, [lengths[i] for i in bucket], device)
                sizes = [len(prompts[owners[i]]) for i in bucket]
                for i, size in zip(bucket, sizes, strict=True):
                    self.completion_rows[i] = (end, end + lengths[i])
                    end += lengths[i]
                    sequences.append((len(prompts) + i, owners[i], lengths[i]))
                    pieces.append(completions[i])
                    positions.append(torch.arange(size, size + lengths[i], device=device))
                same = len(set(sizes)) == 1
                places = [place[owners[i]] for i in bucket]
                parts.append(
                    _Completions(
                        part,
                        torch.tensor(places, device=device),
                        _continued(places, block),
                        torch.tensor(sizes[:1] if same else sizes, device=device),
                        {},
                    )
                )
            self._completions.append(parts)
        self.tokens = torch.cat(pieces)
        self.positions = torch.cat(positions)
        self._sequences = sequences

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if device == "cuda" and _row_attention_works(
            query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2], form
        ):
            return self.attend_in_row(query, key, value, form)
        return self.attend_in_blocks(query, key, value, form)

    def attend_in_row(
        self, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """By one kernel for the whole row."""
        if form.window not in self._row_masks:
            numbers, prompts, lengths = torch.tensor(self._sequences).int().unbind(1)
            self._row_masks[form.window] = row_mask(
                numbers.repeat_interleave(lengths).to(query.device),
                prompts.repeat_interleave(lengths).to(query.device),
                self.positions,
                form.window,
            )
        return row_attention(query, key, value, self._row_masks[form.window], form)

    def attend_in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """Block by block, each padded to its longest sequence."""
        on_cpu = query.device.type == "cpu" and form.softcap is None and form.window is None
        to_itself, with_prompts = (
            (_own_on_cpu, _continued_on_cpu) if on_cpu else (_own_masked, _continued_masked)
        )
        prompt_outputs, completion_outputs = [], []
        for block, parts in zip(self.prompt_blocks, self._completions, strict=True):
            keys, values = block.pad(key), block.pad(value)
            prompt_outputs.append(block.unpad(to_itself(block.pad(query), keys, values, form)))
            for part in parts:
                own = part.block.pad(query), part.block.pad(key), part.block.pad(value)
                completion_outputs.append(
                    part.block.unpad(with_prompts(part, *own, keys, values, form))
                )
        return torch.cat(prompt_outputs + completion_outputs)


@cache
def _row_attention_works(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
    form: AttentionForm,
) -> bool:
    """Whether the kernel for whole rows gives there what padded blocks give, and their gradients.

    In half precision only: in float32 it would round more than they do.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    random = torch.Generator().manual_seed(0)
    prompts = [torch.zeros(size, dtype=torch.long, device=device) for size in (150, 20)]
    responses = [torch.zeros(size, dtype=torch.long, device=device) for size in (40, 7, 90)]
    layout = SharedPrefixes(prompts, responses, [0, 0, 1])
    shapes = [(len(layout.tokens), count, width) for count in (heads, key_heads, key_heads, heads)]
    query, key, value, slope = (
        torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes
    )
    found = []
    try:
        for attend in (layout.attend_in_blocks, layout.attend_in_row):
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                output = attend(query, key, value, form)
                found.append([output, *torch.autograd.grad(output, (query, key, value), slope)])
    except Exception as error:  # noqa: BLE001  a compiler fails in many ways; blocks do the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"no kernel for whole rows of tokens here: {reason}", stacklevel=2)
        return False
    return all(
        bool((row - block).float().norm() <= _ROUGH * block.float().norm())
        for block, row in zip(*found, strict=True)
    )


def _own_masked(query: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
    """Causal attention of prompts to themselves."""
    length = query.shape[2]
    windowed = form.window is not None and form.window < length
    mask = _window_mask(length, form.window, keys.device) if windowed else None
    return masked_attention(query, keys, values, mask, form, causal=not windowed)


def _continued_masked(
    part: _Completions,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    form: AttentionForm,
) -> Tensor:
    """Attention of completions to a copy of their prompts and to themselves."""
    return masked_attention(
        query,
        torch.cat([_of_owners(keys, part.owners), key], 2),
        torch.cat([_of_owners(values, part.owners), value], 2),
        _completion_mask(part, keys.shape[2], form.window),
        form,
    )


def _own_on_cpu(query: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
    none = keys[:, :, :0]
    return prefix_attention(query, keys, values, none, none, (), _scale(query, form))


def _continued_on_cpu(
    part: _Completions,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    form: AttentionForm,
) -> Tensor:
    return prefix_attention(query, key, value, keys, values, part.continued, _scale(query, form))


def _scale(query: Tensor, form: AttentionForm) -> float:
    return query.shape[-1] ** -0.5 if form.scale is None else form.scale


def _buckets(members: Sequence[int], lengths: Sequence[int], prefix: int = 0) -> list[list[int]]:
    """Members sorted by falling length, cut where lengths differ much or masks would grow large."""
    buckets: list[list[int]] = []
    longest = 0
    for i in sorted(members, key=lambda member: -lengths[member]):
        area = (len(buckets[-1]) + 1) * longest * (longest + prefix) if buckets else 0
        if not buckets or longest > 1.5 * lengths[i] + 16 or area > _MASK_ELEMENTS:
            buckets.append([])
            longest = lengths[i]
        buckets[-1].append(i)
    return buckets


def _continued(places: Sequence[int], prompts: Block) -> tuple[Continued, ...]:
    """Runs of equal places among those (rising) of a block's completions."""
    runs, start = [], 0
    for place, run in groupby(places):
        stop = start + len(list(run))
        runs.append(Continued(start, stop, place, prompts.lengths[place]))
        start = stop
    return tuple(runs)


def _of_owners(padded: Tensor, owners: Tensor) -> Tensor:
    """Each completion's prompt `[n, heads, P, d]` from the block of prompts `[g, heads, P, d]`."""
    if len(padded) == 1:
        return padded.expand(len(owners), -1, -1, -1)
    return padded.index_select(0, owners)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """`[1, 1, length, length]`: causal, and no further back than the window."""
    steps = torch.arange(length, device=device)
    return _sees(steps[:, None], steps, window)[None, None]


def _completion_mask(part: _Completions, prefix: int, window: int | None) -> Tensor:
    """`[n or 1, 1, T, prefix + T]`: all of the prompt without its padding, and causally itself."""
    if window not in part.masks:
        device = part.owners.device
        steps = torch.arange(part.block.longest, device=device)
        columns = torch.arange(prefix, device=device)
        sizes = part.prompt_lengths[:, None, None]
        to_prompt = _sees(sizes + steps[:, None], columns, window) & (columns < sizes)
        to_itself = _sees(steps[:, None], steps, window).expand(len(sizes), -1, -1)
        part.masks[window] = torch.cat([to_prompt, to_itself], -1)[:, None]
    return part.masks[window]


def _sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    causal = key <= query
    return causal if window is None else causal & (key > query - window)
