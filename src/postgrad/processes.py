"""Several processes that run one program: which one this is, and what they do for each other.

Every process takes the same steps with the same data, seeds and weights. What is dear is divided:
each draws, scores and learns from a share, and all get what every one of them has found. So a
method sees whole batches and knows nothing of processes, and results do not depend on their number.

With one process nothing here does anything. Functions that exchange something must be called by all
processes, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count as count_from
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from postgrad.errors import PostgradError

Item = TypeVar("Item")
Value = TypeVar("Value")

_BUCKET = 2**24  # numbers in one exchange of gradients
_PATIENCE = timedelta(minutes=30)  # how long one waits for the others
_alone = False  # this process is busy with work of its own (see `apart`)
_joins = count_from(1)  # how often this process has met the others


def launched() -> bool:
    """Whether a launcher, torchrun say, has started several processes of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes files and speaks to people."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that a launcher started know each other; nothing where there is one.

    They may part and meet again, as in a program that trains twice.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # each time under a name of its own, or who is early finds what the others left there
    place, rank, world = _meeting()
    store = dist.distributed_c10d.PrefixStore(f"postgrad-{next(_joins)}", place)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@cache
def _meeting() -> tuple[Any, int, int]:
    """The store where processes find each other, kept as long as they live; rank; how many."""
    from torch.distributed.rendezvous import rendezvous

    met: tuple[Any, int, int] = next(rendezvous("env://", timeout=_PATIENCE))  # type: ignore[no-untyped-call]
    return met


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works on its own share: what it computes is not divided again."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def dividing() -> bool:
    """Whether work is to be divided here: there are several processes, and all come by."""
    return count() > 1 and not _alone


def divided(
    items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Value]]
) -> list[Value]:
    """`compute(items)`, one value an item, of which every process computes an even share.

    Raises:
        PostgradError: in all processes, if it was raised in one.
    """
    if not dividing() or len(items) < 2:
        return list(compute(items))
    bounds = [len(items) * i // count() for i in range(count() + 1)]
    own = items[bounds[rank()] : bounds[rank() + 1]]
    with apart():
        shares = _exchanged(lambda: list(compute(own)) if own else [])
    return [value for share in shares for value in share]


def agreed(compute: Callable[[], Value]) -> Value:
    """What the first process computes; for what may come out differently, or must be done once.

    Raises:
        PostgradError: in all processes, if it was raised in the first.
    """
    if not dividing():
        return compute()
    with apart():
        return _exchanged(compute if first() else lambda: None)[0]  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Whether it is true in any of the processes."""
    return any(_exchanged(lambda: flag)) if dividing() else flag


def gathered(compute: Callable[[], Value]) -> list[Value]:
    """What each process computes by itself, in their order.

    Raises:
        PostgradError: in all processes, if it was raised in one.
    """
    if not dividing():
        return [compute()]
    with apart():
        return _exchanged(compute)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Put the sum over all processes in place of every gradient; one without counts as zero."""
    if not dividing():
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket
        ])  # fmt: skip
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def in_shares(tensor: Tensor) -> bool:
    """Whether processes hold a tensor in shares (FSDP2's), which one process alone never does."""
    if count() == 1:  # what knows of shares takes half a second to import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Any) -> Tensor:
    """A tensor gathered from its shares by all processes, or the tensor itself if it has none."""
    found: Tensor = tensor.full_tensor() if in_shares(tensor) else tensor
    return found


def like(target: Any, value: Tensor) -> Tensor:
    """`value`, in shares as `target` is if that is so."""
    if not in_shares(target):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor):  # on other devices perhaps, but cut at the same places
        return DTensor.from_local(
            value.to_local().to(target.device, target.dtype),
            target.device_mesh,
            target.placements,
            shape=target.shape,
            stride=target.stride(),
        )
    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type and device that have at most `_BUCKET` numbers, or one."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        fits = bucket and kind == (bucket[0].dtype, bucket[0].device)
        if bucket and (not fits or size + parameter.numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _exchanged(compute: Callable[[], Value]) -> list[Value]:
    """What every process has computed; a mistake that one found stops them all."""
    value: Value | None = None
    error: PostgradError | None = None
    try:
        value = compute()
    except PostgradError as raised:
        error = raised
    told: list[Any] = [None] * count()
    dist.all_gather_object(told, (_on_cpu(value), None if error is None else str(error)))
    if error is not None:
        raise error
    for number, (_, message) in enumerate(told):
        if message is not None:
            raise PostgradError(message if number == 0 else f"process {number}: {message}")
    return [each for each, _ in told]


def _on_cpu(value: Any) -> Any:
    """The same with tensors on the CPU, so that they arrive whatever the devices are."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_cpu, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return value
