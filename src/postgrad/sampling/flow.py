"""Samples from flow policies: stochastic trajectories to learn from, deterministic to judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from postgrad.models.flow import FlowPolicy
from postgrad.objectives.flow import flow_sde_step, gaussian_step_logprob


@dataclass(frozen=True)
class Trajectories:
    """N stochastic paths of T steps, with what the policy that drew them thought of every step."""

    path: Tensor  # [N, T + 1, ...]: latents from noise to data
    means: Tensor  # [N, T, ...]: mean of each step under the sampling policy
    logprobs: Tensor  # [N, T]: log-probability of each step, averaged over dimensions
    times: Tensor  # [T + 1]: the schedule, from 1 to 0
    deviations: Tensor  # [T]: standard deviation of each step's noise


@torch.no_grad()
def stochastic_trajectories(
    policy: FlowPolicy,
    prompts: Sequence[str],
    steps: int,
    noise_level: float,
    random: torch.Generator,
) -> Trajectories:
    """One path for every prompt by Flow-GRPO's stochastic sampler (arXiv 2505.05470, eq. 9).

    All noise comes from `random`, a CPU generator. `steps` must be at least 2.
    """
    device = _device(policy)
    times = policy.times(steps).to(device)
    x = _noise(policy, len(prompts), random)
    path, means, logprobs, deviations = [x], [], [], []
    for now, following in pairwise(times):
        time, next_time = now.expand(len(prompts)), following.expand(len(prompts))
        velocity = policy.velocity(x, time, prompts)
        mean, std = flow_sde_step(x, velocity, time, next_time, noise_level)
        noise = _noise(policy, len(prompts), random)
        x = mean + std.view(-1, *[1] * (x.ndim - 1)) * noise
        path.append(x)
        means.append(mean)
        logprobs.append(gaussian_step_logprob(x, mean, std))
        deviations.append(std[0])
    return Trajectories(
        path=torch.stack(path, 1),
        means=torch.stack(means, 1),
        logprobs=torch.stack(logprobs, 1),
        times=times,
        deviations=torch.stack(deviations),
    )


@torch.no_grad()
def deterministic_samples(
    policy: FlowPolicy, prompts: Sequence[str], steps: int, random: torch.Generator
) -> Tensor:
    """Latents `[N, ...]` at time 0 by Euler's method: the sampler that users of the model run."""
    times = policy.times(steps).to(_device(policy))
    x = _noise(policy, len(prompts), random)
    for now, following in pairwise(times):
        x = x + policy.velocity(x, now.expand(len(prompts)), prompts) * (following - now)
    return x


def _noise(policy: FlowPolicy, number: int, random: torch.Generator) -> Tensor:
    return torch.randn(number, *policy.latent_shape, generator=random).to(_device(policy))


def _device(policy: FlowPolicy) -> torch.device:
    return next(policy.parameters()).device
