"""Token log-probabilities by a fused kernel (cut-cross-entropy), on GPUs where that is faster.

The kernel never writes logits to memory. It is asked for log-probabilities alone, and to skip
nothing, however small a gradient is. Before it is used it is compared, on this device and with
matrices of the network's size, to the projection in parts of the vocabulary: in what it computes,
and in time.
"""

import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from postgrad.objectives.projection import IDENTITY, LogitTransform
from postgrad.objectives.projection import project_logprobs as project_in_parts

_ROUGH = 2e-2  # of the norm, between two ways of rounding to half precision
_TOKENS, _TURNS = 2048, 3  # of the comparison

Project = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """As `objectives.projection.project_logprobs`, by whichever way is the faster one here."""
    device = hidden.device
    after_cap = transform.softcap is not None and temperature != 1
    if device.type == "cuda" and bias is None and not entropy and not after_cap:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        if fused_is_faster(device, dtype, weight.shape[1], weight.shape[0], transform.softcap):
            factor = transform.scale / temperature
            return _fused(hidden, weight, targets, dtype, factor, transform.softcap), None
    return project_in_parts(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        transform=transform,
        entropy=entropy,
    )


def _fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    factor: float,
    softcap: float | None,
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    with torch.autocast(hidden.device.type, enabled=False):
        states = (hidden if factor == 1 else hidden.float() * factor).to(dtype)
        losses: Tensor = linear_cross_entropy(
            states, weight.to(dtype), targets, softcap=softcap, reduction="none", filter_eps=None
        )
    return -losses.float()


@cache
def fused_is_faster(
    device: torch.device, dtype: torch.dtype, width: int, vocabulary: int, softcap: float | None
) -> bool:
    """Whether the kernel is installed, gives there what the projection in parts gives, and sooner.

    In half precision only. It is measured once for every device and size.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if not half or find_spec("cut_cross_entropy") is None:
        return False
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, width, generator=random).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=random).to(device, dtype) / width**0.5
    weight = weight.requires_grad_()
    targets = torch.randint(vocabulary, (_TOKENS,), generator=random).to(device)
    slope = torch.randn(_TOKENS, generator=random).to(device)

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return _fused(hidden, weight, targets, dtype, 1.0, softcap)

    def parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        transform = LogitTransform(softcap=softcap)
        return project_in_parts(hidden, weight, targets, transform=transform)[0]

    def run(project: Project) -> tuple[list[Tensor], float]:
        """What it computes, and the seconds of the fastest turn after the first."""
        seconds = []
        for _ in range(1 + _TURNS):
            started = time.perf_counter()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                logprobs = project(hidden, weight, targets)
                found = [logprobs, *torch.autograd.grad(logprobs, (hidden, weight), slope)]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return found, min(seconds[1:])

    expected, ours = run(parts)
    try:
        found, theirs = run(fused)
    except Exception as error:  # noqa: BLE001  a compiler fails in many ways; parts do the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"cut-cross-entropy is not used: {reason}", stacklevel=2)
        return False
    agrees = all(
        bool((one.float() - other.float()).norm() <= _ROUGH * other.float().norm())
        for one, other in zip(found, expected, strict=True)
    )
    return agrees and theirs < ours
