"""Nested state as one safetensors file and one JSON structure: exact, and free of pickle."""

from typing import Any

import numpy
import torch
from torch import Tensor

from postgrad import processes


def flatten(tree: Any, name: str = "root") -> tuple[Any, dict[str, Tensor]]:
    """Split `tree` into a JSON-ready structure and its tensors by name.

    Dictionaries (with string or integer keys), lists, tuples, tensors, NumPy arrays and plain
    scalars are understood; anything else is an error that names where it stands. Tensors are
    copied, but those that processes hold in shares stay what and where they are.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = (
                value.detach()
                if processes.in_shares(value)
                else value.detach().to("cpu", copy=True).contiguous()
            )
            return {"tensor": path}
        if isinstance(value, numpy.ndarray):
            tensors[path] = torch.from_numpy(value.copy())
            return {"array": path}
        if isinstance(value, dict):
            return {"dict": [[key, visit(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(f"state at {path} holds a {type(value).__name__}, which cannot be saved")

    return visit(tree, name), tensors


def unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content}
    if kind == "list":
        return [unflatten(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(unflatten(item, tensors) for item in content)
    return content
