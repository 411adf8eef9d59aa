"""A pretended GPU, for machines without one: tensors that say they lie on cuda:0.

They compute on the CPU, but next to a tensor of the CPU they are refused as on a GPU, so that what
was left on the wrong device shows. Autocast, kernels and timing are not pretended.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from postgrad.models import decoding
from postgrad.models.recording import obstacle_to_recording

CUDA = torch.device("cuda:0")
_ATEN = torch.ops.aten
_MOVING = (_ATEN._to_copy, _ATEN.copy_)
# a GPU's tensor may be indexed by places on the CPU
_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)


class OnGpu(torch.Tensor):
    """Holds a tensor of the CPU. For PyTorch itself, which would look for a driver, it is meta."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """An operation in which a tensor on the GPU takes part, or that makes one."""
    flat = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    ours = [one for one in flat if isinstance(one, OnGpu)]
    packet, device = func.overloadpacket, kwargs.get("device")
    beside = flat
    if packet in _MOVING:
        beside = []
    elif packet in _INDEXING:
        beside = [args[0], *tree_flatten(args[2:])[0]]
    strange = [one for one in beside if isinstance(one, torch.Tensor) and _on_cpu(one)]
    if ours and strange:
        shapes = [list(one.shape) for one in strange]
        raise RuntimeError(f"{func}: all tensors must be on one device, but on the CPU is {shapes}")
    plain, named = tree_map_only(OnGpu, lambda one: one.held, (args, kwargs))
    if _is_gpu(device):
        named = {**named, "device": torch.device("cpu")}
    result = func(*plain, **named)
    if _is_gpu(device) if device is not None else isinstance((beside or flat)[0], OnGpu):
        result = tree_map_only(torch.Tensor, OnGpu, result)
    in_place = [
        one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns
    ]
    if ours and in_place and all(in_place):
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def _on_cpu(tensor):
    return not isinstance(tensor, OnGpu) and tensor.dim() > 0


def _is_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_gpu(kwargs.get("device")) or any(
            isinstance(one, OnGpu) for one in tree_flatten((args, kwargs))[0]
        ):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Answers what names a device, before PyTorch looks for its driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor):
            if name == "to":
                return _moved(*args, **kwargs)
            if name in ("cpu", "cuda"):
                return _moved(args[0], name)
        if not isinstance(kwargs.get("device"), torch.device | str) or not _is_gpu(
            kwargs["device"]
        ):
            return func(*args, **kwargs)
        wants_gradient = kwargs.pop("requires_grad", False)
        made = func(*args, **{**kwargs, "device": "cpu"}).detach()
        return _ToGpu.apply(made).requires_grad_(wants_gradient)


def _moved(tensor, *wanted, device=None, dtype=None, copy=False, **others):
    before = tensor
    for one in wanted:
        if isinstance(one, torch.Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.device | str):
            device = one
        elif isinstance(one, torch.dtype):
            dtype = one
    if device is not None and _is_gpu(device) != tensor.is_cuda:
        tensor = (_ToCpu if tensor.is_cuda else _ToGpu).apply(tensor)
    if dtype not in (None, tensor.dtype):
        tensor = tensor.type(dtype)
    return tensor.clone() if copy and tensor is before else tensor


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx, slope):
        return slope.held


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.detach().held.clone()

    @staticmethod
    def backward(ctx, slope):
        return OnGpu(slope)


def _moved_module(module, *wanted, **named):
    """`nn.Module.to`, after which parameters that were one are one."""
    places = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            places.setdefault(parameter, []).append((part, name))
    _OWN_TO(module, *wanted, **named)
    for (first, first_name), *others in places.values():
        for part, name in others:
            part._parameters[name] = first._parameters[first_name]
    return module


_OWN_TO = torch.nn.Module.to


def _step_that_can_be_recorded(step, given):
    obstacle = obstacle_to_recording(step, given)
    assert obstacle is None, obstacle
    return step


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, this thread finds a GPU."""
    with pytest.MonkeyPatch.context() as patches, _Operations(), _Calls():
        for name, answer in {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "is_bf16_supported": True,
            "get_rng_state_all": [],
            "set_rng_state_all": None,
            "synchronize": None,
            "_lazy_init": None,
        }.items():
            patches.setattr(torch.cuda, name, lambda *given, answer=answer, **named: answer)
        patches.setattr(torch, "inference_mode", torch.no_grad)  # holds no tensors of this kind
        patches.setattr(torch.nn.Module, "to", _moved_module)
        patches.setattr(decoding, "recorded", _step_that_can_be_recorded)
        # files are told of storages, which these tensors have not
        patches.setattr("safetensors.torch._find_shared_tensors", lambda tensors: [])
        patches.setattr("postgrad.api._save_model", lambda *given: None)
        yield
