"""Checks on entry, so that a wrong call stops before it silently broadcasts."""

import torch
from torch import Tensor


def expect_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all named tensors have one shape."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"expected tensors of one shape, got {found}")


def expect_dimensions(number: int, **tensors: Tensor) -> None:
    """Raise ValueError unless every named tensor has `number` dimensions."""
    for name, tensor in tensors.items():
        if tensor.ndim != number:
            raise ValueError(
                f"{name} must have {number} dimension(s), got shape {list(tensor.shape)}"
            )


def expect_numbers(**tensors: Tensor) -> None:
    """Raise ValueError if a named tensor holds NaN: for what chooses, and cannot show it."""
    for name, tensor in tensors.items():
        if bool(tensor.isnan().any()):
            raise ValueError(f"{name} must not hold NaN")


def expect_tokens(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless `mask` is boolean `[N, T]` and the others have its shape."""
    expect_dimensions(2, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    expect_same_shape(mask=mask, **tensors)
