"""Keys and values while sampling: those of a prompt once, those of each sample in its own buffer.

A step's attention is one softmax over two parts that are never joined in memory: the scores
against the prompt, computed for all samples of a prompt together, and those against the sample's
own tokens.

On a GPU steps are recorded: they then have fixed shapes, and see the whole of the samples' buffers,
what is not written yet being masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postgrad.models.attention import AttentionForm
from postgrad.models.network import output_layer, packed_hidden
from postgrad.models.packing import Block, SharedPrefixes
from postgrad.models.recording import Step, can_record, recorded

_FIRST_ROOM = 64  # tokens for which a sample's buffer has room at first; doubled when full
_FIRST_ROOM_RECORDED = 256  # a new size is a new recording
_WORTH_REMOVING = 1 / 8  # share of finished rows at which a smaller batch repays the copying …
_WORTH_RECORDING = 1 / 2  # … and a new recording


class _Prefill:
    """The layout of the prompts' forward pass, keeping every layer's keys and values."""

    def __init__(self, prompts: Sequence[Tensor]):
        self.packed = SharedPrefixes(prompts, [], [])
        self.blocks: list[Block] = self.packed.prompt_blocks
        self.keys: list[dict[nn.Module, Tensor]] = [{} for _ in self.blocks]
        self.values: list[dict[nn.Module, Tensor]] = [{} for _ in self.blocks]

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            keys[layer] = block.pad(key).float().contiguous()
            values[layer] = block.pad(value).float().contiguous()
        return self.packed.attend(layer, query, key, value, form)


@dataclass
class _Group:
    """The samples of one block of prompts: rows `start:stop` of the batch.

    Rows are dealt to a grid [prompts, width], so that each prompt's samples lie together.
    """

    start: int
    stop: int
    width: int
    slots: Tensor  # [stop - start] place of each row in the flattened grid
    full: bool  # the grid has no holes: rows are the grid


class Decoder:
    """Samples in progress: feeds one token per sample and returns the next hidden states.

    Args:
        network: takes layouts (`probing.enable_sharing`).
        prompts: distinct prompts.
        owners: the prompt of each sample, in the callers' order.

    Attributes:
        order: `rows[i]` of every tensor is about the caller's sample `order[i]`.
        worth_removing: the share of finished rows at which it pays to go on without them.
    """

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor], owners: Sequence[int]):
        self._network = network
        self._prefill = _Prefill(prompts)
        packed = self._prefill.packed
        hidden = packed_hidden(network, packed.tokens, packed.positions, self._prefill)
        device = hidden.device
        rank = {prompt: place for place, prompt in enumerate(packed.prompt_order)}
        self.order = sorted(range(len(owners)), key=lambda i: rank[owners[i]])
        self._prompts = torch.tensor([rank[owners[i]] for i in self.order], device=device)
        self._sizes = torch.tensor([len(prompts[owners[i]]) for i in self.order], device=device)
        last = torch.tensor(
            [packed.prompt_rows[owners[i]][1] - 1 for i in self.order], device=device
        )
        self._hidden = hidden[last]
        self._length = 0  # tokens fed so far, the same for all samples
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # the same, for recordings
        self._room = 0
        self._keys: dict[nn.Module, Tensor] = {}
        self._values: dict[nn.Module, Tensor] = {}
        self._block_sizes = [
            torch.tensor(block.lengths, device=device)[:, None] for block in self._prefill.blocks
        ]
        self._masks: dict[tuple[int | None, int | None], Tensor | None] = {}
        self._fixed = can_record(device)  # in shape
        self._replay: Step | None = None
        self._stale = True  # the recording, if there is one
        self.worth_removing = _WORTH_RECORDING if self._fixed else _WORTH_REMOVING
        self._regroup()

    def __len__(self) -> int:
        return len(self.order)

    def logits(self) -> Tensor:
        """`[rows, V]` in float32, of the next token."""
        layer = output_layer(self._network)
        assert layer is not None
        states = self._hidden.to(layer.weight.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return layer.transform(layer.linear(states).float())

    def feed(self, tokens: Tensor) -> None:
        """Append a token `[rows]` to each sample."""
        if self._length == self._room:
            first = _FIRST_ROOM_RECORDED if self._fixed else _FIRST_ROOM
            self._room, self._stale = 2 * self._room or first, True
        if self._fixed and self._stale:
            self._replay, self._stale = recorded(self._step, tokens), False
        self._hidden = (self._replay or self._step)(tokens)
        self._length += 1
        self._place += 1

    def _step(self, tokens: Tensor) -> Tensor:
        """The states `[rows, d]` after one more token; the same again if it is called again."""
        self._masks = {}
        return packed_hidden(self._network, tokens, self._sizes + self._place, self)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (increasing positions `[n]`)."""
        self.order = [self.order[i] for i in rows.tolist()]
        self._prompts = self._prompts[rows]
        self._sizes = self._sizes[rows]
        self._hidden = self._hidden[rows]
        for store in (self._keys, self._values):
            for layer, buffer in store.items():
                kept = buffer.new_zeros(len(rows), *buffer.shape[1:])
                kept[:, :, : self._length] = buffer[rows, :, : self._length]
                store[layer] = kept
        self._stale = True
        self._regroup()

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """The layout's part: every row of the batch is the newest token of one sample."""
        with torch.autocast(query.device.type, enabled=False):
            return self._attend(layer, query, key, value, form)

    def _attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        rows, heads, width = query.shape
        key_heads = key.shape[1]
        keys, values = self._store(layer, key, value)
        scale = width**-0.5 if form.scale is None else form.scale
        grouped = (query.float() * scale).view(rows, key_heads, heads // key_heads, width)
        own_scores = _capped(grouped @ keys.transpose(2, 3), form)
        unseen = self._own_unseen(keys.shape[2], form.window)
        if unseen is not None:
            own_scores.masked_fill_(unseen, -torch.inf)
        outputs = []
        for position, group in enumerate(self._groups):
            if group.start == group.stop:
                continue
            part = slice(group.start, group.stop)
            prompt_keys = self._prefill.keys[position][layer]
            scores = _capped(
                _to_grid(grouped[part], group, len(prompt_keys)) @ prompt_keys.transpose(2, 3), form
            )
            unseen = self._prompt_unseen(position, form.window)
            if unseen is not None:
                scores = scores.masked_fill(unseen, -torch.inf)
            scores = torch.cat([_to_rows(scores, group, grouped.shape[2]), own_scores[part]], -1)
            to_prompt, to_itself = scores.softmax(-1).split(
                [prompt_keys.shape[2], keys.shape[2]], -1
            )
            from_prompt = (
                _to_grid(to_prompt, group, len(prompt_keys)) @ self._prefill.values[position][layer]
            )
            outputs.append(
                _to_rows(from_prompt, group, grouped.shape[2]) + to_itself @ values[part]
            )
        return torch.cat(outputs).view(rows, heads, width).to(query.dtype)

    def _store(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest keys and values; all so far, `[rows, key heads, length + 1, d]`, or of
        fixed shape `[rows, key heads, room, d]`."""
        views = []
        for store, new in ((self._keys, key), (self._values, value)):
            buffer = store.get(layer)
            if buffer is None or buffer.shape[2] < self._room:
                # zeros, as what is masked is multiplied, too
                grown = torch.zeros(
                    len(new), new.shape[1], self._room, new.shape[2], device=new.device
                )
                if buffer is not None:
                    grown[:, :, : self._length] = buffer
                store[layer] = buffer = grown
            if self._fixed:
                buffer.index_copy_(2, self._place, new[:, :, None].to(buffer.dtype))
                views.append(buffer)
            else:
                buffer[:, :, self._length] = new
                views.append(buffer[:, :, : self._length + 1])
        return views[0], views[1]

    def _regroup(self) -> None:
        """Deal the rows to their prompts' blocks."""
        self._groups: list[_Group] = []
        first = start = 0
        for block in self._prefill.blocks:
            count = len(block.lengths)
            here = (self._prompts >= first) & (self._prompts < first + count)
            local = self._prompts[here] - first
            members = torch.bincount(local, minlength=count)
            width = int(members.max())
            ahead = members.cumsum(0) - members
            within = torch.arange(len(local), device=local.device) - ahead[local]
            full = bool((members == width).all())
            slots = local * width + within
            self._groups.append(_Group(start, start + len(local), width, slots, full))
            first += count
            start += len(local)

    def _own_unseen(self, columns: int, window: int | None) -> Tensor | None:
        """`[columns]`: which of a sample's own tokens this step's query does not see."""
        if not self._fixed and (window is None or columns <= window):
            return None
        if (None, window) not in self._masks:
            places = torch.arange(columns, device=self._place.device)
            unseen = places > self._place
            if window is not None:
                unseen |= places <= self._place - window
            self._masks[None, window] = unseen
        return self._masks[None, window]

    def _prompt_unseen(self, position: int, window: int | None) -> Tensor | None:
        """`[g, 1, 1, P]`: which of a block's padded prompt tokens this step's queries miss."""
        if (position, window) not in self._masks:
            block, sizes = self._prefill.blocks[position], self._block_sizes[position]
            self._masks[position, window] = None
            if not block.uniform or window is not None:
                columns = torch.arange(block.longest, device=sizes.device)
                unseen = columns >= sizes
                if window is not None:
                    unseen = unseen | (columns <= sizes + self._place - window)
                self._masks[position, window] = unseen[:, None, None]
        return self._masks[position, window]


def _capped(scores: Tensor, form: AttentionForm) -> Tensor:
    if form.softcap is None:
        return scores
    return form.softcap * torch.tanh(scores / form.softcap)


def _to_grid(rows: Tensor, group: _Group, prompts: int) -> Tensor:
    """`[prompts, key heads, width · repeats, d]` from rows `[n, key heads, repeats, d]`."""
    if not group.full:
        holes = rows.new_zeros(prompts * group.width, *rows.shape[1:])
        rows = holes.index_copy_(0, group.slots, rows)
    grid = rows.view(prompts, group.width, *rows.shape[1:])
    return grid.transpose(1, 2).flatten(2, 3)


def _to_rows(grid: Tensor, group: _Group, repeats: int) -> Tensor:
    """Rows `[n, key heads, repeats, d]` of a grid `[prompts, key heads, width · repeats, d]`."""
    prompts, key_heads, _, width = grid.shape
    cells = grid.view(prompts, key_heads, group.width, repeats, width)
    rows = cells.transpose(1, 2).flatten(0, 1)
    return rows if group.full else rows[group.slots]
