"""Checks on entry of what chooses: a place or a truth value cannot show that NaN led to it."""

from torch import Tensor


def expect_numbers(**tensors: Tensor) -> None:
    """Raise ValueError if a named tensor holds NaN."""
    for name, tensor in tensors.items():
        if bool(tensor.isnan().any()):
            raise ValueError(f"{name} must not hold NaN")
