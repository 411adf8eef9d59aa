"""What the engine needs to know of a transformers network: its decoder and its output layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.models.attention import Layout, no_mask
from postgrad.objectives.projection import LogitTransform
from postgrad.products import PackedLinear


def is_adapted(network: nn.Module) -> bool:
    """Whether the network is an adapter (peft) around a transformers model."""
    return hasattr(network, "get_base_model")


def base_of(network: Any) -> Any:
    """The transformers model inside an adapter (peft), or the network itself."""
    return network.get_base_model() if is_adapted(network) else network


@dataclass(frozen=True)
class OutputLayer:
    """The linear map from hidden states to logits, and what is done to the logits after it.

    `linear` is what the network has there, or takes its place while it samples.
    """

    linear: nn.Linear | PackedLinear
    transform: LogitTransform

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias


def output_layer(network: nn.Module) -> OutputLayer | None:
    """The output layer, or None where it is not a plain linear map."""
    base = base_of(network)
    linear = base.get_output_embeddings()
    if type(linear) not in (nn.Linear, PackedLinear):
        return None
    config = base.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputLayer(linear, LogitTransform(scale / divisor, softcap))


def packed_hidden(network: nn.Module, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Last hidden states `[tokens, d]` (after the final normalisation) of one row of tokens."""
    decoder = base_of(network).get_decoder()
    output: Any = decoder(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=no_mask(tokens.device),
        use_cache=False,
        layout=layout,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def linear_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of what multiplies the tokens' states with a matrix, GPT-2's kind too."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def pad_right(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded ids `[N, T]` and the mask `[N, T]` of the real ones."""
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    sizes = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    return ids, torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
