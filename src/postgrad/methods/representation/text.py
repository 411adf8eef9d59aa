"""A causal language model as a text encoder: the rendering and pooling that its methods share."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.models.embedding_format import save_embedding_model
from postgrad.models.language import LanguagePolicy

INSTRUCTION = "Read the text and say in one plain sentence what it does."
# texts of which no two begin or end with the same token
_PROBES = ("Hello", "a = 1", "7 days", "(x)")
_AT_ONCE = 32  # texts in one forward pass without gradients


class TextEncoder:
    """Texts as prompts under one instruction, and embeddings as means of last hidden states.

    The instruction is the system message and the text the user's turn; a template that refuses a
    system message gets both in the user's turn, and a model without chat template plain lines. What
    comes before the text is the same for all texts and has no part in embeddings; with a rationale
    (GRACE, arXiv:2510.04506) they average over text, the template's tail and the rationale.

    Attributes:
        prefix: the ids `[prefix_length]` before every text.
        tail: the ids after every text, up to where the assistant's answer begins.
    """

    def __init__(
        self, policy: LanguagePolicy, *, instruction: str = INSTRUCTION, max_text_tokens: int = 128
    ):
        self.policy = policy
        self.instruction = instruction
        self.max_text_tokens = max_text_tokens
        rendered = [self._rendered(probe) for probe in _PROBES]
        self.prefix_length = _common_prefix([ids.tolist() for ids in rendered])
        tail_length = _common_prefix([ids.flip(0).tolist() for ids in rendered])
        first = rendered[0]
        self.prefix, self.tail = first[: self.prefix_length], first[len(first) - tail_length :]
        longest = self.prefix_length + max_text_tokens + tail_length
        if longest > policy.context_length:
            raise PostgradError(
                f"max_text_tokens: {max_text_tokens} do not fit into the model's context of "
                f"{policy.context_length} tokens beside {longest - max_text_tokens} of instruction"
            )

    def render(self, text: str) -> Tensor:
        """Prompt ids `[P]`: prefix, the text cut to `max_text_tokens`, tail.

        An empty text is a `PostgradError`.
        """
        return torch.cat([self.prefix, self._own(text), self.tail])

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N, d]` of texts without rationales: means over the texts' own tokens.

        They are not normalised; gradients flow to the trainable weights.
        """
        own = [self._own(text) for text in texts]
        # the prefix as a prompt that all share: its keys and values are computed once
        return self.policy.embed([self.prefix] * len(own), own, skip=self.prefix_length)

    @torch.no_grad()
    def embed_all(self, texts: Sequence[str]) -> Tensor:
        """The same without gradients, on the CPU, for any number of texts."""
        parts = [self.embed(part).float().cpu() for part in parts_of(texts)]
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """Write the model so that sentence-transformers loads it with this rendering and pooling.

        There it embeds texts without rationales.
        """
        save_embedding_model(
            self.policy, folder, prefix=self.prefix, max_text_tokens=self.max_text_tokens
        )

    def _own(self, text: str) -> Tensor:
        if not text.strip():
            raise PostgradError("a text to embed is empty")
        ids = self._rendered(text.strip())
        own = ids[self.prefix_length : len(ids) - len(self.tail)]
        return own[: self.max_text_tokens]

    def _rendered(self, text: str) -> Tensor:
        if not self.policy.tokenizer.chat_template:
            return self.policy.render(f"{self.instruction}\n\n{text}\n")
        user = {"role": "user", "content": text}
        try:
            return self.policy.render([{"role": "system", "content": self.instruction}, user])
        except TemplateError:
            return self.policy.render(
                [{"role": "user", "content": f"{self.instruction}\n\n{text}"}]
            )


def parts_of(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Any number of texts, as many at a time as one forward pass takes."""
    for start in range(0, len(texts), _AT_ONCE):
        yield texts[start : start + _AT_ONCE]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading elements all sequences share."""
    columns = zip(*sequences, strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)
