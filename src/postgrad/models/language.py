"""Language policies by name: an embedded model, a local folder, or a model of the Hub."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from postgrad.errors import MissingExtra, PostgradError, unknown
from postgrad.models.adapters import LoraSettings, named_layers
from postgrad.models.embedded import EMBEDDED, smollm2_source, tiny_network, tiny_tokenizer
from postgrad.models.policy import LanguagePolicy
from postgrad.models.scalar import is_reward_model

__all__ = ["LanguagePolicy", "LoraSettings", "load_policy"]


def load_policy(
    name: str,
    *,
    tune: Literal["full", "lora"] = "full",
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> LanguagePolicy:
    """Load a language policy.

    Args:
        name: "smollm2", "tiny", a local folder, or the Hub id of any causal language model.
        tune: train all weights, or only a low-rank adapter.
        lora: the adapter's settings where `tune` is "lora".
        dtype: of the weights.
        device: where they lie.
        trust_remote_code: allow code that comes with a model to run.
        seed: of the random initial weights (of `tiny` and of an adapter).

    Raises:
        PostgradError: there is no such model, or it cannot be loaded.
        MissingExtra: an optional package is needed.
    """
    network, tokenizer = _load(name, dtype, trust_remote_code, seed)
    network.to(device)
    if tune == "lora":
        network = _adapt(network, lora or LoraSettings(), seed)
    elif tune == "full":
        network.requires_grad_(True)
    else:
        raise unknown("kind of tuning", tune, ("full", "lora"))
    return LanguagePolicy(network, tokenizer)


def _load(
    name: str, dtype: torch.dtype, trust_remote_code: bool, seed: int
) -> tuple[nn.Module, Any]:
    if name == "tiny":
        tokenizer = tiny_tokenizer()
        return tiny_network(tokenizer, seed).to(dtype), tokenizer
    source = smollm2_source() if name == "smollm2" else _checked(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise PostgradError(f"model {name!r} cannot be loaded: {reason[0]}") from problem
    return network, tokenizer


def _checked(name: str) -> str:
    """The name of a folder with a model in it, or what looks like a Hub id."""
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise PostgradError(
                f"folder {name!r} has no config.json: expected a model in Hugging Face format"
            )
        if is_reward_model(str(folder)):
            raise PostgradError(
                f"folder {name!r} holds a reward model, not a language model: it is named by "
                "reward=…"
            )
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise unknown("model", name, EMBEDDED)
    return name


def _adapt(network: nn.Module, settings: LoraSettings, seed: int) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("peft", "lora")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=named_layers(network, settings) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(network, config)
