"""What a sample is drawn from: the policy, its reference, or a geometric mixture of both."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.models.decoding import Decoder
from postgrad.models.plain_decoding import PlainDecoder
from postgrad.models.policy import LanguagePolicy
from postgrad.objectives.game import geometric_mixture


class Decoding(Protocol):
    """Samples in progress; `rows[i]` of every tensor is about the caller's sample `order[i]`."""

    order: list[int]

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


class MixedDecoder:
    """Two decoders of the same samples, stepped together; the next token is drawn between them.

    Its distribution is first^(1 - c) second^c / Z, token by token. For whole responses this only
    approximates the geometric mixture, whose normaliser would run over all of them.
    """

    def __init__(self, first: Decoding, second: Decoding, coefficient: float):
        assert first.order == second.order
        self._both = (first, second)
        self._coefficient = coefficient
        self.order = first.order

    def __len__(self) -> int:
        return len(self.order)

    def logits(self) -> Tensor:
        first, second = (decoder.logits() for decoder in self._both)
        return geometric_mixture(first, second, self._coefficient)

    def feed(self, tokens: Tensor) -> None:
        for decoder in self._both:
            decoder.feed(tokens)

    def keep(self, rows: Tensor) -> None:
        for decoder in self._both:
            decoder.keep(rows)
        self.order = self._both[0].order


@contextmanager
def decoding(
    policy: LanguagePolicy, prompts: Sequence[Tensor], owners: Sequence[int], mixture: float = 0.0
) -> Iterator[Decoding]:
    """Samples in progress after distinct prompts, `owners` naming the prompt of each.

    `mixture` is the reference's share: at 0 the policy alone is asked, at 1 the reference alone.

    Raises:
        PostgradError: the mixture is outside [0, 1].
    """
    if not 0 <= mixture <= 1:
        raise PostgradError(f"mixture: must lie in [0, 1], got {mixture}")
    decoder = Decoder if policy.shares_prefixes else PlainDecoder
    with ExitStack() as networks:
        found: list[Decoding] = []
        if mixture < 1:
            network = networks.enter_context(policy.sampling_network())
            found.append(decoder(network, prompts, owners))
        if mixture > 0:
            with policy.reference():
                network = networks.enter_context(policy.sampling_network())
                found.append(decoder(network, prompts, owners))
        yield found[0] if len(found) == 1 else MixedDecoder(found[0], found[1], mixture)
