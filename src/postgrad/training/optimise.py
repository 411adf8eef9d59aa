"""One optimiser step: micro-batches, precision, clipping, schedule; stops on non-finite values."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from postgrad import processes
from postgrad.batch import Batch
from postgrad.config import LoopSettings
from postgrad.errors import NonFinite, PostgradError
from postgrad.methods.base import LossFunction, Method, Metrics
from postgrad.timing import timed


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing in fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def native_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for its products, fp32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return "bf16" if native else "fp32"


def evaluated(method: Method, precision: str) -> Metrics:
    """The method's metrics on held-out data, without gradients."""
    with torch.no_grad(), autocast(precision, method.place.device):
        return method.evaluate()


def learning_rate_factor(settings: LoopSettings, step: int) -> float:
    """The share of the peak learning rate at collected batch `step` (from 0)."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def _sum_by(module: nn.Module, divisor: int) -> None:
    """Have the gradients of sharded weights summed over processes and divided by so many."""
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(float(divisor))


class Optimisers:
    """AdamW for every trainable module; the loop's implementation of `methods.base.Optimise`.

    `rates` are multiples of the run's learning rate by module; 1 where not given.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        settings: LoopSettings,
        device: torch.device,
        rates: Mapping[str, float] | None = None,
    ):
        self._settings = settings
        self._device = device
        self._rates = rates or {}
        self._parameters = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in modules.items()
        }
        self._optimisers = {
            name: torch.optim.AdamW(
                parameters,
                lr=settings.learning_rate * self._rates.get(name, 1.0),
                betas=settings.adam_betas,
                eps=settings.adam_epsilon,
                weight_decay=settings.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )
            for name, parameters in self._parameters.items()
            if parameters
        }
        if not self._optimisers:
            raise PostgradError("nothing to train: no module has trainable parameters")
        self._modules = dict(modules)
        self._first = next(iter(self._optimisers))
        self._rate = settings.learning_rate
        self.tokens = 0  # response tokens that optimiser steps have learnt from, repeats included

    def set_step(self, step: int) -> None:
        """Set the learning rate of collected batch `step`."""
        self._rate = self._settings.learning_rate * learning_rate_factor(self._settings, step)
        for name, optimiser in self._optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self._rate * self._rates.get(name, 1.0)

    def __call__(self, loss: LossFunction, batch: Batch, module: str | None = None) -> Metrics:
        name = module or self._first
        optimiser = self._optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        parts = self._parts(batch)
        # a loss that needs the whole batch at once is computed by every process
        divided = processes.dividing() and len(parts) > 1
        own = parts[processes.rank() :: processes.count()] if divided else parts
        # sharded weights are gathered layer by layer, so all processes need the same number of
        # parts; what is left over is computed and not counted
        sharded = any(map(processes.in_shares, self._parameters[name]))
        rounds = math.ceil(len(parts) / processes.count()) if divided and sharded else len(own)
        idle = parts[: rounds - len(own)]
        if sharded:
            _sum_by(self._modules[name], 1 if divided else processes.count())
        shares = processes.gathered(lambda: self._backward(loss, own, idle, len(batch)))
        metrics: Metrics = {}
        for share in shares if divided else shares[:1]:
            for key, number in share.items():
                metrics[key] = metrics.get(key, 0.0) + number
        if divided and not sharded:
            with timed("exchange"):
                processes.sum_gradients(self._parameters[name])
        with timed("optimiser"):
            norm = self._clip(name, batch)
            optimiser.step()
        self.tokens += batch.tokens
        return {**metrics, "gradient_norm": norm, "learning_rate": self._rate}

    def _parts(self, batch: Batch) -> list[Batch]:
        """Micro-batches within the token budget, and if they can be one for each process."""
        budget = self._settings.token_budget
        if "cost" in batch and processes.dividing():
            share = math.ceil(float(torch.as_tensor(batch.cost).sum()) / processes.count())
            budget = min(share, budget or share)
        return list(batch.split(budget))

    def _backward(
        self, loss: LossFunction, parts: Sequence[Batch], idle: Sequence[Batch], items: int
    ) -> Metrics:
        """Add the gradients of `parts` of a batch of so many `items`; their loss and metrics.

        `idle` parts take part in what is exchanged and add nothing.
        """
        metrics: Metrics = {"loss": 0.0}
        bad: NonFinite | None = None
        for number, part in enumerate([*parts, *idle]):
            counts = number < len(parts)
            with timed("loss"), autocast(self._settings.precision, self._device):
                value, part_metrics = loss(part)
            if counts and not torch.isfinite(value):
                bad = bad or NonFinite(f"the loss is {value.item()}", part.fields())
                if processes.count() == 1:
                    break
            with timed("backward"):
                (value if counts else 0 * value).backward()
            if counts:
                metrics["loss"] += value.item()
                share = len(part) / items
                for key, found in part_metrics.items():
                    metrics[key] = metrics.get(key, 0.0) + share * float(found)
        if bad is not None:
            raise bad
        return metrics

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of losses, for what a method computes between steps."""
        return autocast(self._settings.precision, self._device)

    @contextmanager
    def looking_ahead(
        self, module: str | None = None, *, share: float | None = None
    ) -> Iterator[None]:
        """Steps of `module` inside are taken back at the end: weights and optimiser state."""
        name = module or self._first
        optimiser, parameters = self._optimisers[name], self._parameters[name]
        weights = [parameter.detach().clone() for parameter in parameters]
        state = copy.deepcopy(optimiser.state_dict())
        if share is not None:
            for group in optimiser.param_groups:
                group["lr"] = share * self._settings.learning_rate * self._rates.get(name, 1.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            optimiser.state.clear()  # a first step inside made state that there was none of before
            optimiser.load_state_dict(state)

    def _clip(self, name: str, batch: Batch) -> float:
        limit = self._settings.clip_norm or math.inf
        total = nn.utils.clip_grad_norm_(self._parameters[name], limit)
        norm = float(processes.whole(total))
        if not math.isfinite(norm):
            raise NonFinite(f"the gradient norm of {name!r} is {norm}", batch.fields())
        return norm

    def state_dict(self) -> dict[str, dict[str, object]]:
        return {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        for name, optimiser in self._optimisers.items():
            own = state[name]
            # moments lie in shares as their parameters do
            moments = {
                number: {
                    key: processes.like(parameter, value)
                    if value.shape == parameter.shape
                    else value
                    for key, value in own["state"][number].items()
                }
                for number, parameter in enumerate(self._parameters[name])
                if number in own["state"]
            }
            optimiser.load_state_dict({**own, "state": moments})
