"""Sampling for networks that cannot share prompts: transformers' own cache, a prompt at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PlainDecoder:
    """The interface of `decoding.Decoder` by the network's own forward and cache.

    Samples of one prompt form a batch without padding, so any causal architecture, recurrent ones
    included, computes exactly what it would for the sample alone. Finished rows stay.
    """

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor], owners: Sequence[int]):
        self._network = network
        self._members = [
            [i for i, owner in enumerate(owners) if owner == prompt]
            for prompt in range(len(prompts))
        ]
        self.order = [i for members in self._members for i in members]
        self._kept = torch.arange(len(self.order), device=prompts[0].device)
        self._caches: list[Any] = []
        outputs = []
        for prompt, members in zip(prompts, self._members, strict=True):
            output = network(input_ids=prompt.repeat(len(members), 1), use_cache=True)
            self._caches.append(_cache(output))
            outputs.append(output.logits[:, -1].float())
        self._logits = torch.cat(outputs)

    def __len__(self) -> int:
        return len(self.order)

    def logits(self) -> Tensor:
        """`[rows, V]` in float32, of the next token."""
        return self._logits[self._kept]

    def feed(self, tokens: Tensor) -> None:
        """Append a token `[rows]` to each sample."""
        batch = tokens.new_zeros(sum(map(len, self._members)))
        batch[self._kept] = tokens
        outputs = []
        parts = batch.split([len(members) for members in self._members])
        for group, part in enumerate(parts):
            output = self._network(
                input_ids=part[:, None], use_cache=True, **self._caches[group]
            )
            self._caches[group] = _cache(output)
            outputs.append(output.logits[:, -1].float())
        self._logits = torch.cat(outputs)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (increasing positions `[n]`)."""
        self.order = [self.order[i] for i in rows.tolist()]
        self._kept = self._kept[rows]


def _cache(output: Any) -> dict[str, Any]:
    """What the next call needs: attention's cache, or a recurrent network's state."""
    for name in ("past_key_values", "cache_params"):
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    raise ValueError(f"{type(output).__name__} holds no cache to continue from")
