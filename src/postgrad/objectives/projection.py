"""Token log-probabilities from hidden states, without ever holding `[tokens, vocabulary]`.

For a token with hidden state h, the logits are z = c(scale · (W h + b)) / temperature, where
c(x) = cap · tanh(x / cap) if the architecture caps its logits and c(x) = x otherwise. Wanted are

    log p_y = z_y - logsumexp(z)        and        H = logsumexp(z) - Σ_v p_v z_v.

Both are computed for a chunk of tokens at a time; the backward pass computes the chunk's logits
again and applies

    ∂ log p_y / ∂ z_v = 1[v = y] - p_v        ∂ H / ∂ z_v = -p_v (log p_v + H).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class LogitTransform:
    """What happens to W h + b before the softmax: multiplied by `scale`, then soft-capped."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """The transformed logits divided by the temperature, in place where that is possible."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            logits = logits.div_(temperature)
        return logits


IDENTITY = LogitTransform()


def project_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` (and entropies) under softmax of the projected hidden states.

    Args:
        hidden: `[M, d]`, one hidden state per token.
        weight: `[V, d]`, the output embedding.
        targets: `[M]`, the token whose log-probability is wanted.
        bias: `[V]` or None.
        temperature: divides the logits; above 0.
        transform: scaling and soft-capping of the architecture.
        entropy: whether entropies are wanted too.

    Returns:
        Log-probabilities `[M]` and entropies `[M]` (None unless asked for), in nats and at least
        float32. The matrix products run in the autocast precision where autocast is on, all sums
        over the vocabulary in float32 or better. Gradients flow to `hidden`, `weight` and `bias`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden [M, d] and weight [V, d] do not fit: "
            f"{list(hidden.shape)}, {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logprobs, entropies = _Projection.apply(
        hidden, weight, bias, targets, temperature, transform, entropy
    )
    return logprobs, entropies if entropy else None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def project_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform = IDENTITY,
    temperature: float = 1.0,
) -> Tensor:
    """Logits `[M, V]` in at least float32, of hidden states `[M, d]` of the weight's precision.

    Not differentiable: it works in place. For the few rows of a decoding step or a chunk.
    """
    product = hidden @ weight.t()
    logits = product.to(_sum_dtype(product.dtype))
    if bias is not None:
        logits += bias
    return transform(logits, temperature)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        chunk = max(16, _CHUNK_ELEMENTS // weight.shape[0])
        cast_weight = weight.to(dtype)
        logprobs = torch.empty(len(hidden), dtype=_sum_dtype(dtype), device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                logits = project_logits(
                    hidden[part].to(dtype), cast_weight, bias, transform, temperature
                )
                normaliser = logits.logsumexp(-1)
                chosen = logits.gather(-1, targets[part, None]).squeeze(-1)
                normalisers[part] = normaliser
                logprobs[part] = chosen - normaliser
                if entropy:
                    probabilities = (logits - normaliser[:, None]).exp_()
                    entropies[part] = normaliser - probabilities.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        ctx.settings = (dtype, chunk, temperature, transform, entropy)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = gradients
        hidden, weight, bias, targets, normalisers, entropies = ctx.saved_tensors
        dtype, chunk, temperature, transform, entropy = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        cast_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        sum_dtype = normalisers.dtype
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                states = hidden[part].to(dtype)
                logits = project_logits(states, cast_weight, bias, transform, temperature)
                slope = _slope_of_cap(logits, transform, temperature)
                # `gradient` becomes ∂/∂z, then ∂/∂(W h + b), reusing the logits' memory
                if entropy:
                    log_probabilities = logits.sub_(normalisers[part, None])
                    surprise = log_probabilities + entropies[part, None]
                    probabilities = log_probabilities.exp_()
                    weights = surprise.mul_(grad_entropies[part, None])
                    weights += grad_logprobs[part, None]
                    gradient = probabilities.mul_(weights).neg_()
                else:
                    probabilities = logits.sub_(normalisers[part, None]).exp_()
                    gradient = probabilities.mul_(-grad_logprobs[part, None])
                gradient.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
                if slope is not None:
                    gradient.mul_(slope)
                if transform.scale != temperature:
                    gradient.mul_(transform.scale / temperature)
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ cast_weight
                if grad_weight is not None:
                    if dtype == sum_dtype:
                        grad_weight.addmm_(gradient.t(), states)
                    else:
                        grad_weight += gradient.t() @ states
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _slope_of_cap(logits: Tensor, transform: LogitTransform, temperature: float) -> Tensor | None:
    """1 - tanh², the derivative of the soft cap, from the capped and tempered logits."""
    if transform.softcap is None:
        return None
    tanh = logits * (temperature / transform.softcap)
    return tanh.square_().neg_().add_(1.0)
