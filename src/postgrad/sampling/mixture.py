"""What a sample is drawn from: the policy, its reference, a geometric mixture of both, or the
policy within what another one holds likely."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.models.decoding import Decoder
from postgrad.models.plain_decoding import PlainDecoder
from postgrad.models.policy import LanguagePolicy
from postgrad.objectives.game import geometric_mixture


class Decoding(Protocol):
    """Samples in progress; `rows[i]` of every tensor is about the caller's sample `order[i]`.

    At a share of `worth_removing` finished rows it pays to go on without them.
    """

    order: list[int]
    worth_removing: float

    def __len__(self) -> int: ...

    def logits(self) -> Tensor:
        """`[rows, V]` in float32, of the next token."""
        ...

    def feed(self, tokens: Tensor) -> None:
        """Append a token `[rows]` to each sample."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (increasing positions `[n]`)."""
        ...


class JointDecoder:
    """Two decoders of the same samples, stepped together; `combine` makes one of their logits."""

    def __init__(
        self, first: Decoding, second: Decoding, combine: Callable[[Tensor, Tensor], Tensor]
    ):
        assert first.order == second.order
        self._both = (first, second)
        self._combine = combine
        self.order = first.order
        self.worth_removing = max(first.worth_removing, second.worth_removing)

    def __len__(self) -> int:
        return len(self.order)

    def logits(self) -> Tensor:
        first, second = (decoder.logits() for decoder in self._both)
        return self._combine(first, second)

    def feed(self, tokens: Tensor) -> None:
        for decoder in self._both:
            decoder.feed(tokens)

    def keep(self, rows: Tensor) -> None:
        for decoder in self._both:
            decoder.keep(rows)
        self.order = self._both[0].order


@dataclass(frozen=True)
class ActionMask:
    """Only tokens that another policy holds likely may be drawn (NLPO, arXiv 2210.01241).

    Attributes:
        policy: the other policy, of the same tokens.
        mass: its most probable tokens that together reach this probability are allowed,
        least: and at least so many,
        always: and these ids.
    """

    policy: LanguagePolicy
    mass: float = 0.9
    least: int = 1
    always: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not (0 < self.mass <= 1 and self.least >= 1):
            raise ValueError(
                f"mass must lie in (0, 1] and least be at least 1, got {self.mass}, {self.least}"
            )

    def apply(self, logits: Tensor, judged: Tensor) -> Tensor:
        """`logits` `[n, V]`, -inf where `judged` `[n, V]`, the other policy's, excludes a token."""
        ranked, order = judged.sort(-1, descending=True)
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        places = torch.arange(ranked.shape[-1], device=ranked.device)
        allowed = torch.zeros_like(judged, dtype=torch.bool).scatter(
            -1, order, (before < self.mass) | (places < self.least)
        )
        allowed[:, sorted(self.always)] = True
        return logits.masked_fill(~allowed, -torch.inf)


@contextmanager
def decoding(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    owners: Sequence[int],
    mixture: float = 0.0,
    mask: ActionMask | None = None,
) -> Iterator[Decoding]:
    """Samples in progress after distinct prompts, `owners` naming the prompt of each.

    `mixture` is the reference's share: at 0 the policy alone is asked, at 1 the reference alone.
    Between them the next token's distribution is policy^(1 - c) reference^c / Z, token by token.
    For whole responses this only approximates the geometric mixture, whose normaliser would run
    over all of them. What `mask` excludes is not drawn.

    Raises:
        PostgradError: the mixture is outside [0, 1].
    """
    if not 0 <= mixture <= 1:
        raise PostgradError(f"mixture: must lie in [0, 1], got {mixture}")
    kind = Decoder if policy.shares_prefixes else PlainDecoder
    with ExitStack() as networks:
        found: list[Decoding] = []
        if mixture < 1:
            network = networks.enter_context(policy.sampling_network())
            found.append(kind(network, prompts, owners))
        if mixture > 0:
            with policy.reference():
                network = networks.enter_context(policy.sampling_network())
                found.append(kind(network, prompts, owners))
        decoder = found[0]
        if len(found) == 2:
            decoder = JointDecoder(
                found[0], found[1], partial(geometric_mixture, coefficient=mixture)
            )
        if mask is not None:
            network = networks.enter_context(mask.policy.sampling_network())
            decoder = JointDecoder(decoder, kind(network, prompts, owners), mask.apply)
        yield decoder
