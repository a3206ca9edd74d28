"""Parameters, gradients and the optimiser's state in shards: each process of a run keeps its own (FSDP2)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from cim_models.backbones.tokens import blocks
from cim_models.pretext.model import CIM


def shard(cim: CIM, processes: int) -> None:
    """Leaves each process its shard of every parameter, in place; a block is whole only while it computes.

    Both encoders are sharded alike, so that the moving average is one of shards.
    """
    mesh = init_device_mesh(next(cim.parameters()).device.type, (processes,))
    for encoder in (cim.online, cim.target):
        for block in blocks(encoder) if encoder is not None else ():
            fully_shard(block, mesh=mesh)
    fully_shard(cim, mesh=mesh)
    register_fsdp_forward_method(cim, "locate")


@contextlib.contextmanager
def gathered(cim: CIM) -> Iterator[None]:
    """Parts of the model can be called by themselves for a while, by all processes; nothing where it isn't sharded."""
    if not isinstance(cim, FSDPModule):
        yield
        return
    cim.unshard()
    try:
        yield
    finally:
        cim.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(values: Any) -> Any:
    """Nested dicts with whole tensors on the CPU in place of shards, for the first process; all of them ask for it."""
    if isinstance(values, dict):
        return {name: whole(value) for name, value in values.items()}
    if not isinstance(values, DTensor):
        return values
    tensor = full(values).detach()
    return tensor.cpu() if torch.distributed.get_rank() == 0 else None


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, sharded like another one of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
