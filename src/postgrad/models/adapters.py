"""Low-rank adapters, of language models and of flow models."""

from torch import nn

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError
from postgrad.models.network import linear_layers


class LoraSettings(Settings):
    """Low-rank adapters (LoRA, arXiv:2106.09685): a target W becomes W + (alpha / rank) B A."""

    rank: int = setting(16, "rows of A and columns of B", gt=0)
    alpha: int = setting(32, "scale: the update is multiplied by alpha / rank", gt=0)
    targets: str | list[str] = setting("all-linear", "which layers: all-linear, or their names")


def named_layers(network: nn.Module, settings: LoraSettings) -> list[str] | None:
    """The targets by name, or None where they are all linear layers.

    A name that no linear layer has is a `PostgradError` that lists the layers there are.
    """
    if settings.targets == "all-linear":
        return None
    targets = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    linear = [name for name, _ in linear_layers(network)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))
            raise PostgradError(
                f"lora.targets: no linear layer of this model is called {target!r}: expected "
                f"all-linear or some of {known}"
            )
    return targets
