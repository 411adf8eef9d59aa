"""A transformers network with its tokenizer: what policies, reward models and critics share."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from postgrad.errors import PostgradError
from postgrad.models.network import base_of, is_adapted
from postgrad.models.probing import Output, enable_sharing
from postgrad.models.sharding import filled, skeleton_of, split

Message = dict[str, str]

_SHARED = "shared prefix"
_UNLIMITED = 2**30


class TextNetwork(nn.Module):
    """A causal transformer and its tokenizer.

    The network stays in evaluation mode, so that dropout never changes what it says. Items are
    aligned lists of token ids on any device; equal prompts are recognised and computed once.

    Attributes:
        network: the transformers model, with a peft adapter around it if there is one.
        tokenizer: its tokenizer.
        context_length: how many tokens prompt and response may have together.
        sharing: "shared prefix", or "plain: " and the reason why prompts cannot be shared.
    """

    network: Any  # transformers' and peft's models have no common type that names what is used
    _skeleton: tuple[nn.Module, ...] = ()  # of a sharded network: it without its weights
    _whole: tuple[nn.Module, ...] = ()  # inside `whole()`: the sharded network in one piece

    def __init__(self, network: nn.Module, tokenizer: Any, output: Output):
        super().__init__()
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.adapted = is_adapted(network)
        obstacle = enable_sharing(network, output)
        self.sharing = _SHARED if obstacle is None else f"plain: {obstacle}"
        self.context_length = _context_length(base_of(network).config, tokenizer)

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(*arguments)`: where the weights are sharded, they are gathered for it."""
        return compute(*arguments)

    def shard(self) -> None:
        """Split the weights over all processes (FSDP2); to be called by all, before training."""
        self._skeleton = (skeleton_of(self.network),)
        split(self, self.device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all processes have the sharded weights in one piece, to sample by or to save."""
        if not self._skeleton or self._whole:
            yield
            return
        self._whole = (filled(self._skeleton[0], self.network),)
        try:
            yield
        finally:
            self._whole = ()

    @property
    def whole_network(self) -> Any:
        """The network; of a sharded one the copy in one piece, inside `whole()`."""
        return self._whole[0] if self._whole else self.network

    def merged(self) -> Any:
        """The whole network; of an adapted one a copy, with the adapter merged into its weights."""
        network = self.whole_network
        return copy.deepcopy(network).merge_and_unload() if self.adapted else network

    def save(self, folder: str | Path) -> None:
        """Write configuration, weights (safetensors), tokenizer and generation settings.

        The folder loads with the `from_pretrained` of the network's transformers class; an adapter
        is merged into the weights of a copy.
        """
        self.merged().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def shares_prefixes(self) -> bool:
        return self.sharing == _SHARED

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    def train(self, mode: bool = True) -> Self:
        """Like `nn.Module.train`, but the network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def render(self, prompt: str | list[Message]) -> Tensor:
        """Token ids `[P]` of a prompt.

        Messages go through the chat template, up to where the assistant's answer begins. A string
        is tokenised as it is, with the special tokens that the tokenizer itself puts before text.

        Raises:
            PostgradError: the prompt is empty, or there are messages but no chat template.
        """
        if not prompt:
            raise PostgradError("a prompt is empty: expected text or messages")
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers end every text; a prompt is to be continued
        else:
            if not self.has_chat_template:
                raise PostgradError(
                    "the prompt is a list of messages but the model has no chat template: "
                    "use plain text prompts or a chat model"
                )
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
        if not ids:
            raise PostgradError("a prompt is empty: expected text or messages")
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def encode_response(self, text: str, end: bool = True) -> Tensor:
        """Token ids `[L]` of a response, closed by the end token unless `end` is False."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if end:
            if self.tokenizer.eos_token_id is None:
                raise PostgradError("the model's tokenizer has no end token to close a response by")
            ids = [*ids, self.tokenizer.eos_token_id]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def decode(self, ids: Tensor) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def checked(
        self, prompts: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The items on the network's device; an error where one has no prompt or is too long."""
        if len(prompts) != len(responses) or not prompts:
            raise ValueError(
                f"prompts and responses must be aligned and not empty: {len(prompts)}, "
                f"{len(responses)}"
            )
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if len(prompt) == 0:
                raise ValueError(f"the prompt of item {i} has no tokens")
            if len(prompt) + len(response) > self.context_length:
                raise PostgradError(
                    f"item {i} has {len(prompt)} prompt and {len(response)} response tokens, more "
                    f"than the model's context of {self.context_length}: shorten it"
                )
        device = self.device
        return [p.to(device) for p in prompts], [r.to(device) for r in responses]


def _context_length(config: Any, tokenizer: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config.get_text_config(decoder=True), name, None)
        if isinstance(length, int):
            return length
    return min(int(tokenizer.model_max_length), _UNLIMITED)
