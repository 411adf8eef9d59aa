"""Weights, gradients and optimiser state in shares, one on each process: torch's FSDP2."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from postgrad import processes


def split(root: nn.Module, device: torch.device) -> None:
    """Leave on this process its share of every parameter; a layer's are gathered while it is used.

    What uses parameters has to be called as `root(...)`. Gradients are summed over processes, as
    losses are shares of one loss.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    for layer in _repeated_layers(root):
        fully_shard(layer, mesh=mesh)
    # by default the root would stay whole after a forward pass, and in what follows another without
    # a backward pass be out of date
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)


def _repeated_layers(root: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of layers of one kind, layer by layer: a transformer's blocks."""
    for child in root.children():
        layers = list(child) if isinstance(child, nn.ModuleList) else []
        if len({type(layer) for layer in layers}) == 1 and any(True for _ in child.parameters()):
            yield from layers
        else:
            yield from _repeated_layers(child)


def skeleton_of(network: nn.Module) -> nn.Module:
    """A copy without the parameters' values; parameters that are one stay one."""
    memo = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, memo)


def filled(skeleton: nn.Module, network: nn.Module) -> nn.Module:
    """A copy of the skeleton with the values of `network`, gathered from all processes."""
    values = {
        name: nn.Parameter(processes.whole(p).detach(), requires_grad=p.requires_grad)
        for name, p in network.named_parameters()
    }
    memo = {id(parameter): values[name] for name, parameter in skeleton.named_parameters()}
    return copy.deepcopy(skeleton, memo)
