"""Steps of fixed shapes, recorded once and then launched as a whole (CUDA graphs).

A decoding step on a GPU is some twenty small kernels a layer. Launched one by one from Python they
take several times as long as they run; a recorded step is launched once.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[Tensor], Tensor]

_CHOOSING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def can_record(device: torch.device) -> bool:
    """Whether steps on this device are to be recorded, and so must have fixed shapes."""
    return device.type == "cuda"


def recorded(step: Step, given: Tensor) -> Step | None:
    """The step, to be replayed from a recording; None where it cannot be recorded.

    Args:
        step: reads and writes nothing but tensors that stay where they are, and may be run again
            for the same `given` without harm. It is called at once, up to two times.
        given: an example of what it is called with; the shape does not change.

    Returns:
        What gives the step's result, in a tensor that the next call writes over.
    """
    given = given.clone()
    # kernels are loaded, and memory that lasts is taken, before the recording: on a stream of its
    # own, as the libraries keep some of both for every stream
    warm = torch.cuda.Stream(given.device)
    warm.wait_stream(torch.cuda.current_stream(given.device))
    with torch.cuda.stream(warm):
        obstacle = obstacle_to_recording(step, given)
    torch.cuda.current_stream(given.device).wait_stream(warm)
    if obstacle is not None:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads may go on working: only this one's calls are recorded
        with torch.cuda.graph(graph, stream=warm, capture_error_mode="thread_local"):
            result = step(given)
    except RuntimeError as error:
        # a fault of the step itself shows again where it is run as it is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"decoding steps are not recorded: {reason}", stacklevel=2)
        return None

    def replay(given_now: Tensor) -> Tensor:
        given.copy_(given_now)
        graph.replay()
        return result

    return replay


def obstacle_to_recording(step: Step, given: Tensor) -> str | None:
    """The operation by which a step waits for its device or copies from another, if there is one.

    The step is run once.
    """
    with _Watch() as watch:
        step(given)
    return watch.found


class _Watch(TorchDispatchMode):
    """Notices the first operation that cannot be part of a recording."""

    found: str | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.found is None and _waits(func, args, result):
            self.found = str(func)
        return result


def _waits(func: Any, args: Sequence[Any], result: Any) -> bool:
    if func.overloadpacket in _CHOOSING:
        # places are computed on the device, but those of a mask have to be counted first
        return any(place.dtype in (torch.bool, torch.uint8) for place in _tensors(args[1]))
    return bool(_WAITING & set(func.tags)) or _crosses(args, result)


def _crosses(args: Sequence[Any], result: Any) -> bool:
    """Whether a tensor comes from one device and goes to another."""
    devices = {tensor.device for tensor in _tensors(args) if tensor.dim()}
    return len(devices | {tensor.device for tensor in _tensors([result])}) > 1


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
