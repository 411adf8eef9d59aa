"""Sampling for networks that cannot share prompts: transformers' own cache, a prompt at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class PlainDecoder:
    """The interface of `decoding.Decoder` by the network's own forward and cache.

    Samples of one prompt form a batch without padding, so any causal architecture, recurrent ones
    included, computes exactly what it would for the sample alone. A finished row stays in its
    batch until all of the batch have finished.
    """

    worth_removing = 1 / 8

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor], owners: Sequence[int]):
        self._network = network
        self.order: list[int] = []
        self._groups: list[_Group] = []
        for place, prompt in enumerate(prompts):
            members = [i for i, owner in enumerate(owners) if owner == place]
            self.order += members
            rows = torch.arange(len(members), device=prompt.device)
            self._groups.append(_Group(len(members), rows, {}, prompt.new_empty(0)))
            self._run(self._groups[-1], prompt.repeat(len(members), 1))

    def __len__(self) -> int:
        return len(self.order)

    def logits(self) -> Tensor:
        """`[rows, V]` in float32, of the next token."""
        return torch.cat([group.logits[group.kept] for group in self._groups])

    def feed(self, tokens: Tensor) -> None:
        """Append a token `[rows]` to each sample."""
        parts = tokens.split([len(group.kept) for group in self._groups])
        for group, part in zip(self._groups, parts, strict=True):
            batch = tokens.new_zeros(group.size, 1)
            batch[group.kept, 0] = part
            self._run(group, batch)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (increasing positions `[n]`)."""
        self.order = [self.order[i] for i in rows.tolist()]
        stays = torch.zeros(sum(len(g.kept) for g in self._groups), dtype=torch.bool)
        stays[rows.cpu()] = True
        parts = stays.split([len(group.kept) for group in self._groups])
        for group, part in zip(self._groups, parts, strict=True):
            group.kept = group.kept[part.to(group.kept.device)]
        self._groups = [group for group in self._groups if len(group.kept)]

    def _run(self, group: "_Group", ids: Tensor) -> None:
        output = self._network(input_ids=ids, use_cache=True, **group.cache)
        group.cache = _cache(output)
        group.logits = output.logits[:, -1].float()


@dataclass
class _Group:
    """The samples of one prompt: a batch of `size` rows, of which `kept` `[n]` are in progress."""

    size: int
    kept: Tensor
    cache: dict[str, Any]
    logits: Tensor  # [size, V]


def _cache(output: Any) -> dict[str, Any]:
    """What the next call needs: attention's cache, or a recurrent network's state."""
    for name in ("past_key_values", "cache_params"):
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    raise ValueError(f"{type(output).__name__} holds no cache to continue from")
