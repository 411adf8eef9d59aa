"""Tensors in shares on disk: each process writes and reads its own, by torch's own means.

The files are safetensors that know which part of a tensor they hold, so that any other number of
processes, or one, can read them; torch's metadata of its own, which is a pickle, is never written.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty

from postgrad import processes


def write_shares(folder: Path, tensors: dict[str, Tensor]) -> None:
    """By all processes: the share of each in a file of its own, a whole tensor in one of them.

    Raises:
        OSError: in all processes, what the disk answered one of them.
    """
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from error


def read_shares(folder: Path, in_shares: bool) -> dict[str, Tensor]:
    """The tensors that are there, on the CPU: whole, or of what several wrote a share of its own.

    With `in_shares` all processes must call it; a tensor that one process wrote is read whole.
    """
    reader = HuggingFaceStorageReader(str(folder))
    mesh = init_device_mesh("cpu", (processes.count(),)) if in_shares else None
    into: dict[str, Tensor] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)  # safetensors hold nothing else
        kind = found.properties.dtype
        if mesh is not None and len(found.chunks) > 1:
            into[name] = empty(found.size, dtype=kind, device_mesh=mesh, placements=[Shard(0)])
        else:
            into[name] = torch.empty(found.size, dtype=kind)
    with warnings.catch_warnings():  # that it is one process alone
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(into, storage_reader=reader, no_dist=processes.count() == 1)
    return into
