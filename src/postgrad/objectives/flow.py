"""Policy gradients for flow-matching generators: stochastic steps, their ratios and losses.

A rectified flow goes from noise at time 1 to data at time 0. Flow-GRPO (arXiv 2505.05470) makes
each step a Gaussian, x' = mu + s eps, whose log-probability can be differentiated. GRPO-Guard
(arXiv 2510.22319) normalises the log-ratio of such a step and weights the step by 1/D_j, where D_j
is its length in time. A latent is `[B, ...]`, a time, step length or standard deviation `[B]`.
Log-probabilities are MEANS over a latent's dimensions, computed in float32 or better.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from postgrad.objectives.policy_gradient import clipped_surrogate
from postgrad.objectives.shapes import expect_dimensions, expect_same_shape


def flow_times(steps: int) -> Tensor:
    """The uniform schedule `[steps + 1]` from time 1 (noise) to 0 (data)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return torch.linspace(1.0, 0.0, steps + 1)


def flow_sde_step(
    x: Tensor, velocity: Tensor, time: Tensor, next_time: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean `[B, ...]` and standard deviation `[B]` of the step from `time` to `next_time` `[B]`.

    Flow-GRPO, arXiv 2505.05470, eq. 9: sigma = a sqrt(t / (1 - t)), dt = next_time - time < 0,
    mu = x (1 + sigma^2/(2t) dt) + v (1 + sigma^2 (1 - t)/(2t)) dt and s = sigma sqrt(-dt). At
    t = 1, where sigma would be infinite, its 1 - t is that of the next time (authors' code).
    """
    expect_same_shape(x=x, velocity=velocity)
    expect_same_shape(time=time, next_time=next_time)
    _expect_per_item(x, time=time)
    if not noise_level > 0:
        raise ValueError(
            f"noise_level must be positive, got {noise_level}: a deterministic step has no ratio"
        )
    if not bool(((time <= 1) & (next_time < time) & (next_time >= 0)).all()):
        raise ValueError("times must satisfy 1 >= time > next_time >= 0")
    if bool(((time == 1) & (next_time == 0)).any()):
        raise ValueError("one step from 1 to 0 has no finite noise: use at least 2 steps")
    remaining = 1 - torch.where(time == 1, next_time, time)
    sigma = noise_level * (time / remaining).sqrt()
    dt = next_time - time
    keep = 1 + sigma.square() / (2 * time) * dt
    push = (1 + sigma.square() * (1 - time) / (2 * time)) * dt
    mean = x * _over_dimensions(keep, x) + velocity * _over_dimensions(push, x)
    return mean, sigma * (-dt).sqrt()


def gaussian_step_logprob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """lp `[B]`: log N(x_next; mean, std^2 I), averaged over dimensions (Flow-GRPO's code).

    lp = mean_d[ -(x'_d - mu_d)^2 / (2 s^2) ] - log s - log sqrt(2 pi).
    """
    squares = _mean_square(x_next, mean, std)
    std = std.to(squares.dtype)
    return -squares / (2 * std.square()) - std.log() - math.log(2 * math.pi) / 2


def gaussian_step_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL `[B]` between two steps of one standard deviation, averaged over dimensions.

    mean_d[(mu - mu_ref)^2] / (2 s^2): Flow-GRPO's KL term (arXiv 2505.05470, eq. 11).
    """
    squares = _mean_square(mean, reference_mean, std)
    return squares / (2 * std.to(squares.dtype).square())


def ratio_norm(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    bias_reduce: Literal["sample", "batch"] = "sample",
) -> Tensor:
    """GRPO-Guard's normalised log-ratio of a step, `[B]` (arXiv 2510.22319, RatioNorm).

    s (lp - lp_old + mean_d[(mu - mu_old)^2] / (2 s^2)) = mean_d[(mu - mu_old) eps], of mean 0 and
    the same spread at every noise level. `old_mean` is the mean at rollout. The gradient flows
    through `logprobs` and through the bias term: both contain `mean`.

    `bias_reduce` "sample" averages the squared difference over a sample's own dimensions, as in the
    paper; "batch" over the whole batch too, as the authors' code does.
    """
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, std=std)
    squares = _mean_square(mean, old_mean.detach(), std)
    if bias_reduce == "batch":
        squares = squares.mean().expand_as(squares)
    elif bias_reduce != "sample":
        raise ValueError(f"bias_reduce must be 'sample' or 'batch', got {bias_reduce!r}")
    bias = squares / (2 * std.square())
    return std * (logprobs - old_logprobs.detach() + bias)


def regulated_step_loss(
    log_ratio: Tensor, advantages: Tensor, step_length: Tensor, clip: float
) -> Tensor:
    """GRPO-Guard's loss `[B]` of one step: PPO's clipped surrogate divided by D_j = t_j - t_{j+1}.

    `log_ratio` `[B]` from `ratio_norm`. (1/D_j) max(-A r, -A clip(r, 1 - clip, 1 + clip)).
    """
    expect_dimensions(1, log_ratio=log_ratio)
    expect_same_shape(log_ratio=log_ratio, advantages=advantages, step_length=step_length)
    if not bool((step_length > 0).all()):
        raise ValueError("step lengths must be positive")
    return clipped_surrogate(log_ratio.exp(), advantages, clip, clip) / step_length


def _mean_square(a: Tensor, b: Tensor, std: Tensor) -> Tensor:
    """mean_d[(a - b)^2] `[B]` of two latents, in float32 or better (bfloat16 loses the ratio)."""
    expect_same_shape(first=a, second=b)
    _expect_per_item(a, std=std)
    if not bool((std > 0).all()):
        raise ValueError("std must be positive: a deterministic step has no log-probability")
    precision = torch.promote_types(a.dtype, torch.float32)
    return (a.to(precision) - b.to(precision)).square().flatten(1).mean(1)


def _expect_per_item(x: Tensor, **values: Tensor) -> None:
    for name, value in values.items():
        if x.ndim < 2 or value.shape != x.shape[:1]:
            raise ValueError(
                f"{name} must be one number per item of {list(x.shape)}, got {list(value.shape)}"
            )


def _over_dimensions(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
