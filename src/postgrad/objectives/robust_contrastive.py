"""iSogCLR's robust global contrastive loss with one temperature per sample (arXiv 2305.11965).

For an anchor i with negatives j, h_ij = sim(i, j) - sim(i, positive of i). The objective is

    F_i(w, tau) = tau log( (1/m) sum_j exp(h_ij / tau) ) + tau rho,

the dual of re-weighting the negatives adversarially within KL(p || uniform) <= rho. The encoder w
is trained by autograd; tau_i by hand, with moving averages per sample, so that a batch gives an
estimate over all negatives of the data set. `eta` = 0 keeps tau fixed, which is SogCLR
(arXiv 2202.12387).

The average of the normaliser, s, is kept as log s. The paper's bimodal code keeps s relative to a
running maximum against overflow; that is the same number, and in logarithms needs no maximum.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.contrastive import cosine_similarities
from postgrad.objectives.shapes import expect_dimensions, expect_numbers, expect_same_shape


def robust_global_objective(h: Tensor, tau: Tensor | float, rho: float) -> Tensor:
    """F `[...]` of h `[..., m]` at temperatures tau `[...]` or one number; convex in tau > 0."""
    tau = torch.as_tensor(tau, dtype=h.dtype, device=h.device)
    return tau * log_normaliser(h, tau) + tau * rho


def log_normaliser(h: Tensor, tau: Tensor) -> Tensor:
    """log g = log( (1/m) sum_j exp(h_j / tau) ) `[...]`, which overflows at no tau > 0 `[...]`."""
    return torch.logsumexp(h / tau.unsqueeze(-1), dim=-1) - math.log(h.shape[-1])


def temperature_gradient(h: Tensor, tau: Tensor, rho: float, log_s: Tensor) -> Tensor:
    """The estimate of dF/dtau `[...]` from h `[..., m]`, tau `[...]` and log s `[...]`.

    log s + rho - (1/m) sum_j W_j h_j / tau with W_j = exp(h_j / tau) / s. With s = g it is the
    exact derivative, rho - KL(p || uniform), where p_j = W_j / m.
    """
    scaled = h / tau.unsqueeze(-1)
    weights = torch.exp(scaled - log_s.unsqueeze(-1))
    return log_s + rho - (weights * scaled).mean(-1)


def tau_star(h: Tensor, rho: float, *, lowest: float = 1e-4, highest: float = 1e4) -> Tensor:
    """The temperature `[...]` that minimises F for h `[..., m]`: KL(p || uniform) = rho there.

    Found by bisection in float64 within [lowest, highest]. KL falls as tau grows; if it is below
    rho everywhere (all h equal, or rho >= log m) the result is `lowest`.
    """
    _expect_positive(rho=rho, lowest=lowest)
    expect_numbers(h=h)
    scores = h.double()
    low = torch.full(h.shape[:-1], math.log(lowest), dtype=torch.float64, device=h.device)
    high = torch.full_like(low, math.log(highest))
    for _ in range(80):
        middle = (low + high) / 2
        log_p = torch.log_softmax(scores / middle.exp().unsqueeze(-1), dim=-1)
        divergence = (log_p.exp() * (log_p + math.log(h.shape[-1]))).sum(-1)
        too_peaked = divergence > rho
        low, high = torch.where(too_peaked, middle, low), torch.where(too_peaked, high, middle)
    return ((low + high) / 2).exp().to(h.dtype)


@dataclass(frozen=True, kw_only=True)
class RobustSettings:
    """The constants of the algorithm; symbols as in the paper.

    - `rho`: the KL radius in nats, in (0, log of the number of negatives in the data set).
    - `gamma`: weight of the new value in the moving average s, in (0, 1].
    - `beta`: weight of the new value in the average of tau's gradient, in (0, 1].
    - `eta`: step size of tau; 0 gives SogCLR.
    - `tau_min`, `tau_max`: range of tau.
    - `gradient_limit`: tau's gradient is clipped to +- this.
    - `form`: "h" averages exp(h / tau), as in the paper. "sim" averages exp(sim / tau) instead, as
      the authors' unimodal code does; the encoder's gradients agree only for gamma = 1.
    """

    rho: float
    gamma: float
    beta: float
    eta: float
    tau_min: float
    tau_max: float
    gradient_limit: float
    form: Literal["h", "sim"] = "h"

    def __post_init__(self) -> None:
        _expect_positive(rho=self.rho, tau_min=self.tau_min, gradient_limit=self.gradient_limit)
        if self.tau_max < self.tau_min:
            raise ValueError(f"tau_max {self.tau_max} is below tau_min {self.tau_min}")
        for name, value in (("gamma", self.gamma), ("beta", self.beta)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0, got {self.eta}")
        if self.form not in ("h", "sim"):
            raise ValueError(f"form must be 'h' or 'sim', got {self.form!r}")


class PerSampleState:
    """What the algorithm remembers of each of `count` samples, by its index in the data set.

    `tau` the temperature, `log_s` the moving average of the normaliser (-inf until the first visit,
    which takes the first value as it is), `u` the moving average of tau's gradient; each `[count]`.
    """

    def __init__(self, count: int, tau_init: float, device: torch.device | str = "cpu"):
        _expect_positive(tau_init=tau_init)
        self.tau = torch.full((count,), tau_init, device=device)
        self.log_s = torch.full((count,), -torch.inf, device=device)
        self.u = torch.zeros(count, device=device)

    def __len__(self) -> int:
        return len(self.tau)

    def check(self, index: Tensor) -> Tensor:
        """`index` on this state's device; ValueError unless `[B]` distinct integers in range."""
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index must be integers [B], got {index.dtype} {list(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"sample indices must lie in [0, {len(self)}), got {int(index.min())} to "
                f"{int(index.max())}"
            )
        if len(torch.unique(index)) < len(index):
            raise ValueError("a sample occurs twice in one batch: its last update would win")
        return index.to(self.tau.device)

    def averaged(self, index: Tensor, log_g: Tensor, gamma: float) -> Tensor:
        """log( (1 - gamma) s + gamma g ) `[..., B]`; log g itself where a sample is seen first."""
        previous = self.log_s[index].to(log_g)
        if gamma == 1:
            return log_g
        mixed = torch.logaddexp(previous + math.log1p(-gamma), log_g + math.log(gamma))
        return torch.where(previous.isneginf(), log_g, mixed)

    def update(
        self, index: Tensor, log_s: Tensor, gradient: Tensor, settings: RobustSettings
    ) -> None:
        """Store log s `[B]` and take one step of tau with the new gradient `[B]`."""
        u = (1 - settings.beta) * self.u[index] + settings.beta * gradient.to(self.u)
        tau = self.tau[index] - settings.eta * u
        self.log_s[index] = log_s.to(self.log_s)
        self.u[index] = u
        self.tau[index] = tau.clamp(settings.tau_min, settings.tau_max)

    def state_dict(self) -> dict[str, Tensor]:
        return {"tau": self.tau.clone(), "log_s": self.log_s.clone(), "u": self.u.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        expect_same_shape(current=self.tau, **state)
        self.tau.copy_(state["tau"])
        self.log_s.copy_(state["log_s"])
        self.u.copy_(state["u"])


def robust_two_view_step(
    view_a: Tensor, view_b: Tensor, index: Tensor, state: PerSampleState, settings: RobustSettings
) -> tuple[Tensor, dict[str, float]]:
    """One modality: the encoder's loss `[B]` for two views `[B, d]`, summed over the two views.

    A view's negatives are the 2B - 2 views of the other items. The two views of an item share its
    tau and s: `state` (indexed by `index` `[B]`) is updated once, with their averages. The loss is
    a surrogate: its gradient estimates that of F, its value does not; F of the batch is the metric
    `objective`.
    """
    index = _checked(state, index, settings, per_item=2, view_a=view_a, view_b=view_b)
    count = len(view_a)
    views = torch.cat([view_a, view_b])
    similarities = cosine_similarities(views, views)
    same_item = torch.eye(count, dtype=torch.bool, device=views.device).repeat(2, 2)
    negatives = similarities[~same_item].view(2, count, 2 * count - 2)
    positives = similarities[:count, count:].diagonal().expand(2, count)
    return _encoder_loss(negatives, positives, index, state, settings)


def robust_bimodal_step(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    left_state: PerSampleState,
    right_state: PerSampleState,
    settings: RobustSettings,
) -> tuple[Tensor, dict[str, float]]:
    """Two modalities: the encoders' loss `[B]` for pairs `[B, d]`, left and right anchors summed.

    An anchor's negatives are the other items' embeddings of the other modality. Each modality has
    temperatures and averages of its own. Loss and metrics as in `robust_two_view_step`, the metrics
    averaged over the two modalities.
    """
    index = _checked(left_state, index, settings, per_item=1, left=left, right=right)
    if len(right_state) != len(left_state):
        raise ValueError(f"states of {len(left_state)} and {len(right_state)} samples do not pair")
    count = len(left)
    similarities = cosine_similarities(left, right)
    others = ~torch.eye(count, dtype=torch.bool, device=left.device)
    positives = similarities.diagonal().unsqueeze(0)
    from_left = similarities[others].view(1, count, count - 1)
    from_right = similarities.T[others].view(1, count, count - 1)
    loss_l, metrics_l = _encoder_loss(from_left, positives, index, left_state, settings)
    loss_r, metrics_r = _encoder_loss(from_right, positives, index, right_state, settings)
    return loss_l + loss_r, {name: (metrics_l[name] + metrics_r[name]) / 2 for name in metrics_l}


def _encoder_loss(
    negatives: Tensor,
    positives: Tensor,
    index: Tensor,
    state: PerSampleState,
    settings: RobustSettings,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and update for V views of B anchors: negatives `[V, B, m]`, positives `[V, B]`."""
    h = negatives - positives.unsqueeze(-1)
    contrast = h if settings.form == "h" else negatives
    with torch.no_grad():
        tau = state.tau[index].to(contrast).expand_as(positives)
        log_s = state.averaged(index, log_normaliser(contrast, tau), settings.gamma)
        weights = torch.exp(contrast / tau.unsqueeze(-1) - log_s.unsqueeze(-1))
        gradient = temperature_gradient(contrast, tau, settings.rho, log_s).mean(0)
        gradient = gradient.clamp(-settings.gradient_limit, settings.gradient_limit)
        mean_log_s = torch.logsumexp(log_s, dim=0) - math.log(len(log_s))
        state.update(index, mean_log_s, gradient, settings)
        metrics = {
            "objective": float(robust_global_objective(h, tau, settings.rho).mean()),
            "tau": float(tau.mean()),
            "tau_gradient": float(gradient.mean()),
        }
    surrogate = (weights * contrast).mean(-1)
    if settings.form == "sim":
        surrogate = surrogate - positives
    return surrogate.sum(0), metrics


def _checked(
    state: PerSampleState,
    index: Tensor,
    settings: RobustSettings,
    per_item: int,
    **embeddings: Tensor,
) -> Tensor:
    """The checks that both steps share; another item gives an anchor `per_item` negatives."""
    expect_dimensions(2, **embeddings)
    expect_same_shape(**embeddings)
    count = len(next(iter(embeddings.values())))
    if count < 2:
        raise ValueError("a batch of one item has no negatives: at least 2 are needed")
    if len(index) != count:
        raise ValueError(f"{count} items but {len(index)} indices")
    index = state.check(index)
    negatives = per_item * (len(state) - 1)
    if settings.rho >= math.log(negatives):
        raise ValueError(
            f"rho {settings.rho} can never be reached: the KL of {negatives} negatives is at most "
            f"{math.log(negatives):.3f} (every temperature would fall to tau_min)"
        )
    in_batch = per_item * (count - 1)
    if settings.gamma == 1 and settings.rho >= math.log(in_batch):
        warnings.warn(
            f"with gamma = 1 the KL is at most log {in_batch}, below rho {settings.rho}: every "
            "temperature will fall to tau_min",
            stacklevel=3,
        )
    return index


def _expect_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
