"""`torch.compile` for the encoders and the head of a run."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from cim_models.backbones.tokens import blocks
from cim_models.errors import ConfigError
from cim_models.pretext.model import CIM

VARIANTS = 64
"""Graphs that one piece of code may become in this process: a block for each depth, whose share of dropped paths
differs."""


def compile_parts(cim: CIM, backend: Any = "inductor") -> None:
    """Compiles the encoders, block by block, and the head, in place: names in the state dict stay as they are.

    Shapes are static, and a graph that breaks is an error. Blocks that are alike share what was compiled; between them
    gradients are sent and activations dropped as without compiling.

    Args:
        cim: The model, not wrapped.
        backend: Of `torch.compile`.

    Raises:
        ConfigError: If nothing can be compiled here.
    """
    options = torch._dynamo.config
    limit = "recompile_limit" if hasattr(options, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    setattr(options, limit, max(VARIANTS, getattr(options, limit)))
    options.optimize_ddp = False  # it would cut each part up, to send gradients from within
    _check(next(cim.parameters()).device, backend)
    encoders = [encoder for encoder in (cim.online, cim.target) if encoder is not None]
    for part in [*(block for encoder in encoders for block in blocks(encoder)), cim.head]:
        whole = not any(isinstance(module, nn.SyncBatchNorm) for module in part.modules())  # which waits for others
        part.compile(fullgraph=whole, dynamic=False, backend=backend)


def eager(compiled: bool) -> AbstractContextManager[Any]:
    """For a while nothing that is compiled is used: for sizes and modes that are rare."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _check(device: torch.device, backend: Any) -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        torch.compile(add, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # each backend has its own kinds
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"compile is true, but torch.compile fails here: {reason}; it needs a C++ compiler for CPUs and Triton for "
            "GPUs; install it, or leave compile out"
        ) from error
