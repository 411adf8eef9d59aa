"""Rewards of images by name. An image is a tensor `[C, H, W]` in [0, 1], bright where there is ink.

They follow the calling convention of every reward function: `(prompts, completions, **columns)`,
where the completions are the images, to a list with one number an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from postgrad.errors import unknown
from postgrad.rewards.functions import RewardSet, load_rewards

_HERE = "postgrad.rewards.images"
_PLACES = {"ink": f"{_HERE}:ink", "left-ink": f"{_HERE}:left_ink"}


def ink(completions: Sequence[Tensor], **_: Any) -> list[float]:
    """Mean brightness of each image."""
    return [float(image.mean()) for image in completions]


def left_ink(completions: Sequence[Tensor], **_: Any) -> list[float]:
    """Mean brightness of each image's left half: a proxy that asks for no digit at all."""
    return [float(image[..., : image.shape[-1] // 2].mean()) for image in completions]


def load_image_rewards(specs: Any, *, time_limit: float = 60.0) -> RewardSet:
    """A reward of this module by name, a user's function, or several, as `load_rewards` does."""
    listed = specs if isinstance(specs, list) else [specs]
    loaded = load_rewards([_resolved(spec) for spec in listed], time_limit=time_limit)
    own = {place: name for name, place in _PLACES.items()}
    terms = [replace(term, name=own.get(term.name, term.name)) for term in loaded.terms]
    return RewardSet(terms, time_limit)


def _resolved(spec: Any) -> Any:
    """`spec` with a name of this module's replaced by `module:function`, a weight kept."""
    if isinstance(spec, dict) and "name" in spec:
        return {**spec, "name": _resolved(spec["name"])}
    if not isinstance(spec, str) or ":" in spec:
        return spec
    name, star, weight = (part.strip() for part in spec.partition("*"))
    if name not in _PLACES:
        raise unknown("image reward", name, [*_PLACES, "module:function", "file.py:function"])
    return _PLACES[name] + star + weight
