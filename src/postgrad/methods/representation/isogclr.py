"""iSogCLR: contrastive learning with a temperature of its own for every sample."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from postgrad.batch import Batch
from postgrad.config import setting
from postgrad.errors import PostgradError
from postgrad.evaluation.probes import spearman
from postgrad.methods.base import Metrics, Place
from postgrad.methods.representation.base import Contrast, ContrastSettings
from postgrad.methods.representation.sources import ImageViews
from postgrad.objectives.robust_contrastive import (
    PerSampleState,
    RobustSettings,
    robust_bimodal_step,
    robust_two_view_step,
)

_BY_KIND = "authors' recipes: two views | pairs of texts"


class ISogCLRSettings(ContrastSettings):
    rho: float | None = setting(
        None,
        "KL radius of the adversary in nats; empty: 0.3 | 0.4 of the largest KL, log(n - 1)",
        source="recommended 0.1-0.5 | the authors' 6.0 on the 2.9 million pairs of CC3M",
        gt=0,
    )
    tau_init: float | None = setting(
        None, "temperature at the start; empty: 0.1 | 0.01", source=_BY_KIND, gt=0
    )
    tau_min: float | None = setting(
        None, "lowest temperature; empty: 0.05 | 0.005", source=_BY_KIND, gt=0
    )
    tau_max: float = setting(1.0, "highest temperature", source="authors' code", gt=0)
    eta: float = setting(
        0.03, "step size of the temperatures; 0 is SogCLR", source="authors' recipes", ge=0
    )
    gamma: float = setting(
        0.8, "weight of the new normaliser in its moving average", source="readme", gt=0, le=1
    )
    beta: float = setting(
        0.9, "weight of the new temperature gradient in its average", source="code", gt=0, le=1
    )
    gradient_limit: float | None = setting(
        None, "temperature gradients are clipped to +- this; empty: 3 | 5", source=_BY_KIND, gt=0
    )
    form: Literal["h", "sim"] = setting(
        "h", "what the moving average is taken of: h (paper), or sim (authors' unimodal code)"
    )


class ISogCLR(Contrast):
    """Not All Semantics are Created Equal: Automatic Temperature Individualization (2305.11965).

    A frequent sample has many near neighbours among its negatives and wants a large temperature, a
    rare one a small. With h_ij = sim(i, j) - sim(i, positive of i), weighing the negatives
    adversarially within KL(p || uniform) <= rho makes the temperature a dual variable per sample:

        min_w,tau (1/n) sum_i tau_i log( (1/m) sum_j exp(h_ij / tau_i) ) + tau_i rho.

    The encoder follows autograd. tau_i follows its own gradient, rho - KL(p_i || uniform), averaged
    by `beta` and kept in [tau_min, tau_max]. The normaliser of each sample is a moving average over
    its visits (`gamma`), so that small batches do. `eta = 0` keeps the temperatures: SogCLR
    (arXiv:2202.12387). The two views of an image share temperature and normaliser; the anchor and
    the positive of a pair of texts have their own.

    Deviations: AdamW, not SGD with momentum; the h form by default for images too, where the
    authors' code uses sim; the pair itself is not among its negatives, as it is in the authors'
    bimodal code; a sample seen first takes its normaliser as it is, whatever the epoch.
    """

    Config = ISogCLRSettings
    config: ISogCLRSettings

    def __init__(self, config: ISogCLRSettings, place: Place, *, data: Any = None):
        super().__init__(config, place, data=data)
        two = not self.source.bimodal
        tau_init = _or(config.tau_init, 0.1 if two else 0.01)
        tau_min = _or(config.tau_min, 0.05 if two else 0.005)
        if config.tau_max < tau_min:
            raise PostgradError(
                f"tau_max: expected at least tau_min {tau_min}, got {config.tau_max}"
            )
        if not tau_min <= tau_init <= config.tau_max:
            raise PostgradError(
                f"tau_init: expected in [{tau_min}, {config.tau_max}] (tau_min, tau_max), "
                f"got {tau_init}"
            )
        reachable = math.log((2 if two else 1) * (len(self.source) - 1))
        rho = _or(config.rho, 0.3 if two else 0.4 * reachable)
        if rho >= reachable:
            raise PostgradError(
                f"rho: expected below {reachable:.2f}, the largest KL over the negatives of "
                f"{len(self.source)} samples, got {rho}"
            )
        self._robust = RobustSettings(
            rho=rho,
            gamma=config.gamma,
            beta=config.beta,
            eta=config.eta,
            tau_min=tau_min,
            tau_max=config.tau_max,
            gradient_limit=_or(config.gradient_limit, 3.0 if two else 5.0),
            form=config.form,
        )
        sides = ("both",) if two else ("anchor", "positive")
        self.temperatures = {
            side: PerSampleState(len(self.source), tau_init, place.device) for side in sides
        }

    def contrast(self, left: Tensor, right: Tensor, index: Tensor) -> tuple[Tensor, Metrics]:
        if self.source.bimodal:
            own = self.temperatures["anchor"], self.temperatures["positive"]
            loss, metrics = robust_bimodal_step(left, right, index, *own, self._robust)
        else:
            shared = self.temperatures["both"]
            loss, metrics = robust_two_view_step(left, right, index, shared, self._robust)
        return loss, {name: float(value) for name, value in metrics.items()}

    def tau(self) -> Tensor:
        """The temperature `[n]` of every sample, averaged over the two sides of a pair."""
        return torch.stack([state.tau for state in self.temperatures.values()]).mean(0).cpu()

    def tau_by_class(self) -> Tensor:
        """Mean temperature of each class `[classes]`, for images."""
        if not isinstance(self.source, ImageViews):
            raise ValueError("only images have classes")
        totals = torch.bincount(self.source.labels.cpu(), weights=self.tau().double())
        return totals / self.source.frequencies()

    def evaluate(self) -> Metrics:
        metrics = super().evaluate()
        tau = self.tau()
        metrics |= {"tau_mean": float(tau.mean()), "tau_deviation": float(tau.std())}
        if isinstance(self.source, ImageViews):
            frequencies = self.source.frequencies()
            metrics["tau_frequency_correlation"] = spearman(self.tau_by_class(), frequencies)
        return metrics

    def samples(self, batch: Batch) -> list[dict[str, Any]]:
        tau = self.tau()
        rows = super().samples(batch)
        return [
            {**row, "tau": float(tau[i])}
            for row, i in zip(rows, batch.index.tolist(), strict=False)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {side: state.state_dict() for side, state in self.temperatures.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for side, own in self.temperatures.items():
            own.load_state_dict(state[side])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
