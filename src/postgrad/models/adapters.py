"""Low-rank adapters, of language models and of flow models."""

from postgrad.config import Settings, setting


class LoraSettings(Settings):
    """Low-rank adapters (LoRA, arXiv:2106.09685): a target W becomes W + (alpha / rank) B A."""

    rank: int = setting(16, "rows of A and columns of B", gt=0)
    alpha: int = setting(32, "scale: the update is multiplied by alpha / rank", gt=0)
    targets: str | list[str] = setting("all-linear", "which layers: all-linear, or their names")
