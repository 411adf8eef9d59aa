"""A network's weights as a checkpoint of its own model would name them, for other programs."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from postgrad.models.network import base_of
from postgrad.models.text_network import TextNetwork

_WRAPPED = ".base_layer"  # what peft puts between an adapted layer and its own weights
_ADAPTER = ".lora_"


def exported_weights(network: nn.Module) -> dict[str, Tensor]:
    """The present weights by name, without gradients; an output layer tied to the embeddings too.

    What an adapter adds is merged in, into a copy of the matrices it adds to. All other tensors are
    the network's own: whoever keeps them copies them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base: Any = base_of(network)
    weights = {}
    for name, parameter in base.named_parameters():
        if _ADAPTER in name:
            continue
        value = parameter.detach()
        owner, wrapped, tensor = name.rpartition(f"{_WRAPPED}.")
        if wrapped and tensor == "weight":
            layer = base.get_submodule(owner)
            for adapter in layer.active_adapters:
                value = value + layer.get_delta_weight(adapter).detach().to(value)
        weights[name.replace(_WRAPPED, "")] = value
    output = base.get_output_embeddings()
    for name, module in base.named_modules(remove_duplicate=False):
        if module is output and f"{name}.weight" not in weights:
            embeddings = base.get_input_embeddings().weight
            (tied,) = [n for n, parameter in base.named_parameters() if parameter is embeddings]
            weights[f"{name}.weight"] = weights[tied.replace(_WRAPPED, "")]
    exported: dict[str, Tensor] = revert_weight_conversion(base, weights)
    return exported


def is_tied(network: nn.Module) -> bool:
    """Whether the output layer is the embeddings' own matrix."""
    base: Any = base_of(network)
    output = base.get_output_embeddings()
    return output is not None and output.weight is base.get_input_embeddings().weight


def untied_config(network: nn.Module) -> Any:
    """A copy of the model's configuration, in which the output layer is not tied to embeddings."""
    config = copy.deepcopy(base_of(network).config)
    config.tie_word_embeddings = False
    config.get_text_config(decoder=True).tie_word_embeddings = False
    return config


def save_untied(policy: TextNetwork, folder: str | Path) -> None:
    """Write a model as one whose output layer is its own matrix, equal to the embeddings."""
    untied_config(policy.whole_network).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    save_weights(policy.whole_network, Path(folder) / "model.safetensors")


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the exported weights as safetensors."""
    # every name has memory of its own: the format refuses tensors that share it
    weights = {
        name: value.to("cpu", copy=True).contiguous()
        for name, value in exported_weights(network).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def checksum(network: nn.Module) -> tuple[float, ...]:
    """A number for each trainable weight, by which one sees that any of them has changed.

    It is of the values, as weights are also changed by pointing parameters at other tensors.
    """
    sums = [
        parameter.detach().sum(dtype=torch.float64)
        for parameter in network.parameters()
        if parameter.requires_grad
    ]
    return tuple(torch.stack(sums).tolist()) if sums else ()
