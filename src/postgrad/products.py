"""Matrix products on CPUs by oneDNN, which PyTorch ships with but asks for bfloat16 only.

For float32 PyTorch asks MKL, which on processors other than Intel's has less than half of oneDNN's
speed; on Intel's it is the faster one. For the few rows of a decoding step, packing a matrix once
into oneDNN's own order gains as much again, in both precisions. Both are float32 all the way:
nothing is rounded.

The two functions of PyTorch used here serve its compiler; where they are missing or do not work,
products are PyTorch's usual ones.
"""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_WORK = 2**18  # multiplications below which the call itself counts for more
_PACKED_FOR = 32  # rows; the order is good for fewer and for many more


@cache
def _onednn() -> tuple[Any, Any] | None:
    """The functions that multiply and pack, if they work here."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        multiply, pack = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        left, right = torch.arange(24.0).view(4, 6), torch.arange(18.0).view(3, 6)
        expected = left @ right.t()
        for matrix in (right, pack(right, _PACKED_FOR)):
            if not torch.allclose(multiply(left, matrix, None, "none", [], ""), expected):
                return None
    except (AttributeError, RuntimeError):
        return None
    return multiply, pack


@cache
def _mkl_is_slow() -> bool:
    """By its maker, as a choice by measured time would not be the same in every run."""
    told = Path("/proc/cpuinfo")
    maker = told.read_text(encoding="utf-8") if told.exists() else platform.processor()
    return "GenuineIntel" not in maker


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left · rightᵀ` `[M, N]` of `[M, K]` and `[N, K]`. Not differentiable."""
    if (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and _mkl_is_slow()
        and left.shape[0] * left.shape[1] * right.shape[0] >= _LEAST_WORK
        and (functions := _onednn()) is not None
    ):
        result: Tensor = functions[0](_dense(left), _dense(right), None, "none", [], "")
        return result
    return left @ right.t()


def _dense(matrix: Tensor) -> Tensor:
    """Itself, or a copy if it is neither row by row nor column by column in memory."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


class PackedLinear(nn.Module):
    """A linear layer to decode with, or several of one input: as they are now, in one precision.

    The outputs of several lie side by side. On CPUs the matrices are packed by oneDNN; elsewhere
    those that had to be rounded are put together, and others, which would take their memory a
    second time, are multiplied one after the other. It makes no gradients, and does not follow
    later changes of the layers.
    """

    def __init__(
        self, matrices: Sequence[Tensor], biases: Sequence[Tensor] | None, dtype: torch.dtype
    ):
        """The matrices are `[out, in]`, the biases `[out]`."""
        super().__init__()
        self.weight = matrices[0]
        self.bias = None if biases is None else biases[0]
        self._dtype = dtype
        self._rounded_bias = None if biases is None else torch.cat([*biases]).detach().to(dtype)
        self._matrices = [matrix.detach().to(dtype) for matrix in matrices]
        packs = can_pack(dtype, self.weight.device)
        if packs or self.weight.dtype != dtype:
            self._matrices = [torch.cat(self._matrices)]
        self._width = sum(map(len, self._matrices))
        self._multiply: Any = None
        if packs and (functions := _onednn()) is not None:
            self._multiply, pack = functions
            self._matrices = [pack(matrix, _PACKED_FOR) for matrix in self._matrices]

    def forward(self, states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1]).to(self._dtype)
        product: Tensor
        if self._multiply is not None:
            [matrix] = self._matrices
            product = self._multiply(rows, matrix, self._rounded_bias, "none", [], "")
        elif len(self._matrices) == 1:
            product = nn.functional.linear(rows, self._matrices[0], self._rounded_bias)
        else:
            product = torch.cat([rows @ matrix.t() for matrix in self._matrices], -1)
            if self._rounded_bias is not None:
                product += self._rounded_bias
        return product.view(*states.shape[:-1], self._width)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN packs matrices of this precision there."""
    known = dtype in (torch.float32, torch.bfloat16)
    return known and device.type == "cpu" and _onednn() is not None
