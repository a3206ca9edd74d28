"""Numbers that lie on a device before they are asked for."""

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def constant(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of numbers, the same one at every call: to copy them to a GPU, the host waits for it. Not to be changed.

    Args:
        values: A tuple of numbers or of such tuples.
        device: Of the tensor.
        dtype: Of the tensor.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)
