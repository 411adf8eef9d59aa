"""Token-wise parts of transformers networks that are faster or keep less for the backward pass.

transformers writes them for reading: autograd then keeps every intermediate value. The norm and the
MLP here keep their inputs (and the MLP its two halves before they are multiplied) and compute the
rest again, which is a few element-wise operations; half of a step's memory goes with it. Linear
layers multiply by `postgrad.products`. A part is replaced only where it gives what the module's own
code gives.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from postgrad.products import product

_TOLERANCE = 1e-5  # of the norm, in float32


def make_lean(network: nn.Module) -> None:
    """Replace what can be: linear layers, root mean square norms, MLPs gated by SiLU."""
    part: Any
    for part in network.modules():
        if is_norm(part) and _agree(part, _norm, len(part.weight)):
            part.forward = MethodType(_norm, part)
        elif is_linear(part):
            part.forward = MethodType(_linear, part)
        elif is_gated_mlp(part) and _agree(part, _gated_mlp, part.gate_proj.in_features):
            part.forward = MethodType(_gated_mlp, part)


def is_linear(module: Any) -> bool:
    """Whether it is a linear layer and nothing more."""
    return type(module) is nn.Linear


def is_norm(module: Any) -> bool:
    """Whether it looks like a root mean square norm."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def is_gated_mlp(module: Any) -> bool:
    """Whether it looks like an MLP gated by an activation, without biases."""
    layers: list[Any] = [
        getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    return hasattr(module, "act_fn") and all(
        is_linear(layer) and layer.bias is None for layer in layers
    )


@torch.no_grad()
def _agree(module: Any, lean: Callable[..., Tensor], width: int) -> bool:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(4, width, generator=random).to(next(module.parameters()))
    expected = module(states)
    with torch.enable_grad():  # the MLP is its own self without
        actual = lean(module, states)
    tolerance = _TOLERANCE if expected.dtype == torch.float32 else 1e-2
    return actual.dtype == expected.dtype and bool(
        (actual - expected).norm() <= tolerance * expected.norm()
    )


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    output: Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
    return output


class _Norm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + ε), in float32 up to the product with the weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = states.float()
        size = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = (size.square_() / exact.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return (exact * inverse).to(states.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, inverse = ctx.saved_tensors
        normed = states.float() * inverse
        slope = gradients[0].float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            over = tuple(range(states.dim() - 1))
            grad_weight = (slope * normed).sum(over).to(weight.dtype)
        slope = slope * weight
        along = torch.linalg.vecdot(slope, normed).unsqueeze(-1) / normed.shape[-1]
        grad_states = slope.sub_(normed.mul_(along)).mul_(inverse)
        return grad_states.to(states.dtype), grad_weight, None


def _linear(self: Any, input: Tensor) -> Tensor:
    device = input.device.type
    if (
        device != "cpu"
        or input.dim() == 1
        or not input.dtype == self.weight.dtype == torch.float32
        or torch.is_autocast_enabled(device)
    ):
        return nn.Linear.forward(self, input)
    output: Tensor = _Linear.apply(input, self.weight, self.bias)
    return output


class _Linear(torch.autograd.Function):
    """x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        result = _times(states, weight)
        return result if bias is None else result.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad
        slope = gradients[0]
        return (
            _times(slope, weight.t()) if wants_states else None,
            _outer(slope, states) if wants_weight else None,
            slope.flatten(0, -2).sum(0) if wants_bias else None,
        )


def _gated_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        # without a backward pass nothing is kept, and the layers may be others than its own
        return type(self).forward(self, hidden_states)
    weights = [self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight]
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states = hidden_states.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
    output: Tensor = _GatedMLP.apply(hidden_states, *weights)
    return output


class _GatedMLP(torch.autograd.Function):
    """(silu(x Gᵀ) · x Uᵀ) Dᵀ."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            gated, lifted = _times(states, gate), _times(states, up)
            ctx.save_for_backward(states, gate, up, down, gated, lifted)
            return _times(silu(gated).mul_(lifted), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, gate, up, down, gated, lifted = ctx.saved_tensors
        wants_states, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        slope = gradients[0]
        with torch.autocast(states.device.type, enabled=False):
            activated = silu(gated)
            grad_down = _outer(slope, activated * lifted) if wants_down else None
            slope = _times(slope, down.t())
            grad_lifted = activated.mul_(slope)
            grad_gated = torch.ops.aten.silu_backward(slope.mul_(lifted), gated)
            grad_gate = _outer(grad_gated, states) if wants_gate else None
            grad_up = _outer(grad_lifted, states) if wants_up else None
            grad_states = None
            if wants_states:
                grad_states = _times(grad_gated, gate.t())
                grad_states += _times(grad_lifted, up.t())
        return grad_states, grad_gate, grad_up, grad_down


def _times(states: Tensor, matrix: Tensor) -> Tensor:
    """`[..., b]` from states `[..., a]` and a matrix `[b, a]`."""
    return product(states.flatten(0, -2), matrix).view(*states.shape[:-1], len(matrix))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ over tokens of left ⊗ right: `[a, b]` from `[..., a]` and `[..., b]`."""
    return product(left.flatten(0, -2).t(), right.flatten(0, -2).t())
