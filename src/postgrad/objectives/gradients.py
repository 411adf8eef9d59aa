"""Update directions that are made of several gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """<first, second>, a number, of two directions given parameter by parameter."""
    if len(first) != len(second) or not first:
        raise ValueError(f"two directions of {len(first)} and {len(second)} tensors do not fit")
    products = [(a * b).sum(dtype=torch.float64) for a, b in zip(first, second, strict=True)]
    return torch.stack(products).sum()


def without_lowering(
    direction: Sequence[Tensor], gradient: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """The direction without its part against `gradient`, and how much of `gradient` that took.

    d - min(0, <d, g>)/||g||^2 g: along it, the quantity that g is the gradient of does not fall, to
    first order. A direction that does not lower it stays as it is (0 is taken).
    """
    along = inner_product(direction, gradient)
    size = inner_product(gradient, gradient)
    if not (along < 0 and size > 0):
        return list(direction), 0.0
    share = float(-along / size)
    return [d + share * g for d, g in zip(direction, gradient, strict=True)], share


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[:count]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(slopes[0] * gradient for gradient in ctx.gradients)
        return (None, None, *(None for _ in gradients), *gradients)


def with_gradient(
    value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """The number `value`, whose gradient with respect to `parameters` is what is given."""
    if [p.shape for p in parameters] != [g.shape for g in gradients]:
        raise ValueError("every parameter needs a gradient of its own shape")
    result: Tensor = _WithGradient.apply(value.detach(), len(gradients), *gradients, *parameters)
    return result
