"""Token log-probabilities from hidden states, without ever holding `[tokens, vocabulary]`.

For a token with hidden state h, the logits are z = c(scale · (W h + b)) / temperature, where
c(x) = cap · tanh(x / cap) if the architecture caps its logits and c(x) = x otherwise. Wanted are

    log p_y = z_y - logsumexp(z)        and        H = logsumexp(z) - Σ_v p_v z_v.

Both are computed for a part of the vocabulary at a time, for all tokens, with running sums; so a
part of the weight's gradient is written once, however many tokens there are. The backward pass
applies

    ∂ log p_y / ∂ z_v = 1[v = y] - p_v        ∂ H / ∂ z_v = -p_v (log p_v + H)

and computes the logits again for it, a quarter of all products here, unless they take so little
memory that they are kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postgrad.products import product

_CHUNK_ELEMENTS = 2**21  # logits held at once: 8 MiB in float32, which a processor's cache holds …
_CHUNK_ELEMENTS_ON_GPU = 2**26  # … and 256 MiB on a GPU, which wants few large products
_LEAST_WIDTH = 1024  # narrower parts of the vocabulary make slow products
_KEPT_BYTES = 2**26  # products W h of up to this size are kept for the backward pass


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
    _expect_positive(temperature)
    logprobs, entropies = _Projection.apply(
        hidden, weight, bias, targets, temperature, transform, entropy
    )
    return logprobs, entropies if entropy else None


def _expect_positive(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def project_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform = IDENTITY,
    temperature: float = 1.0,
) -> Tensor:
    """Logits `[M, V]` in at least float32, of hidden states `[M, d]` of the weight's precision.

    Not differentiable: it works in place. For a few rows.
    """
    _expect_positive(temperature)
    return _logits(product(hidden, weight), bias, transform, temperature)


def differentiable_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform = IDENTITY
) -> Tensor:
    """The same at temperature 1, for gradients to flow through: again for a few rows."""
    dtype = _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        projected = hidden.to(dtype) @ weight.to(dtype).t()
    logits = projected.to(_sum_dtype(dtype))
    if bias is not None:
        logits = logits + bias
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = (logits / transform.softcap).tanh() * transform.softcap
    return logits


def _logits(
    projected: Tensor, bias: Tensor | None, transform: LogitTransform, temperature: float
) -> Tensor:
    """Logits in at least float32 from W h, whose memory they may take."""
    logits = projected.to(_sum_dtype(projected.dtype))
    if bias is not None:
        logits += bias
    return transform(logits, temperature)


def _vocabulary_parts(tokens: int, vocabulary: int, device: str) -> list[slice]:
    elements = _CHUNK_ELEMENTS if device == "cpu" else _CHUNK_ELEMENTS_ON_GPU
    width = max(_LEAST_WIDTH, elements // max(1, tokens))
    return [slice(start, start + width) for start in range(0, vocabulary, width)]


class _RunningSoftmax:
    """logsumexp(z) and Σ p z of each token, while the vocabulary goes by in parts."""

    def __init__(self, tokens: int, like: Tensor, weighted: bool):
        self._largest = like.new_full((tokens, 1), -torch.inf)
        self._total = like.new_zeros(tokens, 1)
        self._weighted = like.new_zeros(tokens, 1) if weighted else None

    def add(self, logits: Tensor) -> None:
        """Count in `[M, part]`; the logits are lost."""
        largest = torch.maximum(self._largest, logits.amax(-1, keepdim=True))
        shrink = (self._largest - largest).exp_()
        self._largest = largest
        if self._weighted is None:
            self._total = self._total * shrink + logits.sub_(largest).exp_().sum(-1, keepdim=True)
            return
        masses = (logits - largest).exp_()
        self._total = self._total * shrink + masses.sum(-1, keepdim=True)
        self._weighted = self._weighted * shrink + masses.mul_(logits).sum(-1, keepdim=True)

    def normaliser(self) -> Tensor:
        """logsumexp(z) `[M]`."""
        return (self._total.log() + self._largest).squeeze(-1)

    def mean_logit(self) -> Tensor:
        """Σ p z `[M]`."""
        assert self._weighted is not None
        return (self._weighted / self._total).squeeze(-1)


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
        parts = _vocabulary_parts(len(hidden), len(weight), hidden.device.type)
        size = len(hidden) * len(weight) * dtype.itemsize
        keep = any(ctx.needs_input_grad[:3]) and size <= _KEPT_BYTES
        kept = []
        with torch.autocast(hidden.device.type, enabled=False):
            states, cast_weight = hidden.to(dtype), weight.to(dtype)
            chosen = torch.empty(len(hidden), dtype=_sum_dtype(dtype), device=hidden.device)
            softmax = _RunningSoftmax(len(hidden), chosen, weighted=entropy)
            for part in parts:
                projected = product(states, cast_weight[part])
                if keep:
                    kept.append(projected)
                    projected = projected.to(chosen.dtype, copy=True)
                logits = _logits(projected, _of(bias, part), transform, temperature)
                rows, places = _targets_in(part, targets)
                chosen[rows] = logits[rows, places]
                softmax.add(logits)
        normalisers = softmax.normaliser()
        logprobs = chosen - normalisers
        entropies = normalisers - softmax.mean_logit() if entropy else logprobs.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, *kept)
        ctx.settings = (dtype, parts, temperature, transform, entropy)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = gradients
        hidden, weight, bias, targets, normalisers, entropies, *kept = ctx.saved_tensors
        dtype, parts, temperature, transform, entropy = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=normalisers.dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            states, cast_weight = hidden.to(dtype), weight.to(dtype)
            for number, part in enumerate(parts):
                if kept:
                    projected = kept[number].to(normalisers.dtype, copy=True)
                else:
                    projected = product(states, cast_weight[part])
                logits = _logits(projected, _of(bias, part), transform, temperature)
                capped = _slope_of_cap(logits, transform, temperature)
                # `gradient` becomes ∂/∂z, then ∂/∂(W h + b), in the logits' memory
                if entropy:
                    log_probabilities = logits.sub_(normalisers[:, None])
                    surprise = log_probabilities + entropies[:, None]
                    probabilities = log_probabilities.exp_()
                    weights = surprise.mul_(grad_entropies[:, None])
                    weights += grad_logprobs[:, None]
                    gradient = probabilities.mul_(weights).neg_()
                else:
                    probabilities = logits.sub_(normalisers[:, None]).exp_()
                    gradient = probabilities.mul_(-grad_logprobs[:, None])
                rows, places = _targets_in(part, targets)
                gradient[rows, places] += grad_logprobs[rows]
                if capped is not None:
                    gradient.mul_(capped)
                if transform.scale != temperature:
                    gradient.mul_(transform.scale / temperature)
                if grad_bias is not None:
                    grad_bias[part] = gradient.sum(0)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden += product(gradient, cast_weight[part].t())
                if grad_weight is not None:
                    grad_weight[part] = product(gradient.t(), states.t())
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            grad_bias,
            None,
            None,
            None,
            None,
        )


def _of(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


def _targets_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens whose target lies in this part of the vocabulary, and its place there."""
    rows = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - part.start


def _slope_of_cap(logits: Tensor, transform: LogitTransform, temperature: float) -> Tensor | None:
    """1 - tanh², the derivative of the soft cap, from the capped and tempered logits."""
    if transform.softcap is None:
        return None
    tanh = logits * (temperature / transform.softcap)
    return tanh.square_().neg_().add_(1.0)
