"""A causal language model as a text encoder: the rendering and pooling that its methods share."""

from collections.abc import Sequence

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from postgrad.errors import PostgradError
from postgrad.models.language import LanguagePolicy

INSTRUCTION = "Read the text and say in one plain sentence what it does."
# texts of which no two begin with the same token
_PROBES = ("Hello", "a = 1", "7 days", "(x)")


class TextEncoder:
    """Texts as prompts under one instruction, and embeddings as means of last hidden states.

    The instruction is the system message and the text the user's turn; a template that refuses a
    system message gets both in the user's turn, and a model without chat template plain lines. An
    embedding (GRACE, arXiv:2510.04506) averages over everything after the instruction: the text's
    tokens, the template's tail, and the tokens of a rationale if there is one. `prefix_length` is
    how many leading tokens it leaves out: they are the same for every text.
    """

    def __init__(
        self, policy: LanguagePolicy, *, instruction: str = INSTRUCTION, max_text_tokens: int = 128
    ):
        self.policy = policy
        self.instruction = instruction
        self.max_text_tokens = max_text_tokens
        rendered = [self._rendered(probe).tolist() for probe in _PROBES]
        self.prefix_length = _common_prefix(rendered)
        self.prefix = torch.tensor(rendered[0][: self.prefix_length], dtype=torch.long)
        longest = max(map(len, rendered)) + max_text_tokens
        if longest > policy.context_length:
            raise PostgradError(
                f"max_text_tokens: {max_text_tokens} and the instruction do not fit into the "
                f"model's context of {policy.context_length} tokens"
            )

    def render(self, text: str) -> Tensor:
        """Prompt ids `[P]` of a text, cut to `max_text_tokens` tokens. An empty text is an error."""
        if not text.strip():
            raise PostgradError("a text to embed is empty")
        return self._rendered(self._cut(text.strip()))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N, d]` of texts without rationales, not normalised, with gradients."""
        prompts = [self.render(text) for text in texts]
        # the instruction as a shared prompt: its keys and values are computed once
        beginnings = [ids[: self.prefix_length] for ids in prompts]
        texts_proper = [ids[self.prefix_length :] for ids in prompts]
        return self.policy.embed(beginnings, texts_proper, skip=self.prefix_length)

    def _cut(self, text: str) -> str:
        ids = self.policy.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= self.max_text_tokens:
            return text
        cut = self.policy.tokenizer.decode(ids[: self.max_text_tokens], skip_special_tokens=True)
        return cut.rstrip("\N{REPLACEMENT CHARACTER}").strip()

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


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading elements all sequences share."""
    columns = zip(*sequences, strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)
