"""What the methods on flow models share: their settings, and how a policy and prompts are found."""

import os
from pathlib import Path
from typing import Any, Literal

from postgrad.config import Settings, setting
from postgrad.errors import PostgradError, unknown
from postgrad.methods.base import Place
from postgrad.methods.data import DataSettings, find_data
from postgrad.models.adapters import LoraSettings
from postgrad.models.diffusers_flow import load_diffusers_flow
from postgrad.models.flow import FlowPolicy, digits_flow, load_class_flow
from postgrad.tasks import Examples

_CODE = "flow_grpo code"


class FlowSettings(Settings):
    """Settings of the policy-gradient methods on flow models."""

    model: str = setting(
        "digits-flow",
        "digits-flow, a run's model folder, a diffusers folder or Hugging Face id (SD3, FLUX)",
    )
    data: DataSettings | None = setting(None, "prompts; the model's own classes when empty")
    eval_data: DataSettings | None = setting(None, "held-out prompts; those of data when empty")
    reward: str | list[str | dict[str, Any]] = setting(
        "left-ink", "left-ink, ink, module:function or file.py:function, or several with weights"
    )
    reward_time_limit: float = setting(60.0, "seconds a reward function may take a call", gt=0)
    prompts: int = setting(10, "distinct prompts a step", gt=0)
    samples: int = setting(16, "images a prompt (the group)", ge=2)
    sampling_steps: int = setting(10, "steps of the stochastic sampler", ge=2, source=_CODE)
    noise_level: float = setting(0.7, "a in sigma = a sqrt(t / (1 - t))", gt=0, source=_CODE)
    trained_fraction: float = setting(
        0.99, "first share of a trajectory's steps that is trained on", gt=0, le=1, source=_CODE
    )
    updates: int = setting(2, "optimiser steps a collected batch", gt=0, source=_CODE)
    clip: float | None = setting(
        None,
        "ratios are clipped to [1 - clip, 1 + clip]; when empty it follows the latents' dimensions",
        source=f"{_CODE} at SD3's 65,536 dimensions; a fifth of first ratios clipped at 64",
        gt=0,
        lt=1,
    )
    advantage_clip: float = setting(5.0, "largest size of an advantage", gt=0, source=_CODE)
    kl_coefficient: float = setting(0.0, "weight of the KL to the initial model", ge=0)
    average_decay: float = setting(
        0.98, "decay of the averaged weights that are evaluated and saved", ge=0, lt=1
    )
    rollout_batch: int = setting(256, "images sampled at a time", gt=0)
    evaluation_steps: int = setting(40, "steps of the deterministic sampler", gt=0, source=_CODE)
    evaluation_prompts: int = setting(64, "prompts an evaluation uses at most", gt=0)
    evaluation_samples: int = setting(8, "images a prompt in an evaluation", ge=2)
    guidance: float = setting(4.5, "guidance of diffusers models", ge=0, source=_CODE)
    resolution: int = setting(512, "pixels of a side, diffusers models", gt=0, source=_CODE)
    tune: Literal["full", "lora"] | None = setting(
        None, "what is trained; when empty lora for diffusers models, full for digits-flow"
    )
    lora: LoraSettings = setting(LoraSettings(rank=32, alpha=64), "adapters", source=_CODE)
    frozen_precision: Literal["fp32", "bf16"] = setting(
        "fp32", "precision of the weights that stay frozen, diffusers models"
    )
    trust_remote_code: bool = setting(False, "run code that a model repository brings along")


def find_flow(config: FlowSettings, place: Place, model: FlowPolicy | None = None) -> FlowPolicy:
    """The flow policy that `config` names, on its device, or the one passed from Python."""
    if model is not None:
        return model.to(place.device)
    name, folder = config.model, Path(config.model)
    if name == "digits-flow" or os.path.isfile(folder / "flow.json"):
        if config.tune == "lora":
            raise PostgradError(
                f"tune: {name} is small and trained in full, 'lora' is for diffusers"
            )
        small = digits_flow() if name == "digits-flow" else load_class_flow(folder)
        return small.to(place.device)
    if not os.path.isdir(folder) and "/" not in name:
        raise unknown("model", name, ["digits-flow"])
    return load_diffusers_flow(
        name,
        resolution=config.resolution,
        guidance=config.guidance,
        adapters=None if config.tune == "full" else config.lora,
        precision=config.frozen_precision,
        device=place.device,
        trust_remote_code=config.trust_remote_code,
    )


def find_prompts(
    data: DataSettings | None,
    place: Place,
    policy: FlowPolicy,
    rows: Examples | list[dict[str, Any]] | None,
) -> Examples:
    """The prompts that a run takes; the policy can be conditioned on each of them."""
    if data is None and rows is None:
        if not policy.own_prompts:
            raise PostgradError(
                "data: this model needs prompts: a file or data set with a column prompt"
            )
        rows = [{"prompt": name} for name in policy.own_prompts]
    examples = find_data(data or DataSettings(name="rows"), place, "prompts", rows)
    for number, row in enumerate(examples.rows):
        if not isinstance(row["prompt"], str):
            raise PostgradError(f"{examples.where(number)}: an image's prompt must be plain text")
        policy.require(row["prompt"], examples.where(number))
    return examples
