"""A GPU that is not there: tensors that have a shape and lie on it but hold no numbers, and what the host waits for."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cim_models.pretext.constants import constant

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten

if torch.__version__ < (2, 14):
    pytest.skip("this PyTorch asks the driver for the GPU that is faked", allow_module_level=True)


class FakeGPU(TorchDispatchMode):
    """While it is entered, everything on `cuda` can be computed, without numbers.

    Tensors of different devices that meet are an error, and so are shapes that depend on numbers, such as those of
    boolean masks. A number that the host asks for is 1, or False, and noted as a wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Numbers that the host asked the GPU for, and copies between the two that it waited for; and where."""
        self.copies: list[tuple[int, ...]] = []
        """Shapes of what was copied to the GPU without waiting."""
        self.operations = 0
        """On the GPU: about as many kernels as it would have been told to start."""

    def __enter__(self) -> "FakeGPU":
        constant.cache_clear()
        with contextlib.ExitStack() as stack:
            for name, value in (
                ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
                ("torch.cuda.is_bf16_supported", lambda *_, **__: True),
                ("torch.Tensor.backward", backward),
            ):
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            super().__enter__()
            self.entered = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.entered.close()
        constant.cache_clear()  # those of this GPU hold no numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self._wait("a number is asked for")
            return args[0].dtype.is_floating_point * 1.0 or args[0].dtype != torch.bool
        out = func(*args, **(kwargs or {}))
        source, there = (args[1], args[0]) if func is aten.copy_.default else (args and args[0], out)
        if isinstance(there, Tensor) and there.device.type == "cuda":
            self.operations += not func.is_view
        if func in (aten._to_copy.default, aten.copy_.default) and source.device != there.device:
            if not ((kwargs or {}).get("non_blocking") or func is aten.copy_.default and args[2:3] == (True,)):
                self._wait(f"a copy of {tuple(source.shape)} from {source.device.type} to {there.device.type}")
            self.copies.append(tuple(source.shape))
        return out

    def _wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        frame = [frame for frame in frames if frame.filename != __file__][-1]
        self.waits.append(f"{what}: {Path(frame.filename).name}, line {frame.lineno}: {frame.line}")

    def take(self) -> "FakeGPU":
        """What was noted since it was last taken."""
        noted = FakeGPU()
        for name in ("waits", "copies", "operations"):
            setattr(noted, name, getattr(self, name))
            setattr(self, name, getattr(FakeGPU(), name))
        return noted


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with numbers, where a GPU is faked."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return computed


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`loss.backward()`, node by node: torch's own engine asks the GPU for its streams."""
    root: Any = loss.grad_fn
    nodes, waiting = {root: None}, Counter[Any]()
    for node in (unvisited := [root]):
        for following in (following for following, _ in node.next_functions if following is not None):
            waiting[following] += 1
            if following not in nodes:
                nodes[following] = None
                unvisited.append(following)
    grads = {node: [None] * len(node._input_metadata) for node in nodes}
    grads[root][0], ready = torch.ones_like(loss), [root]
    while ready:
        node = ready.pop()
        given = grads.pop(node)
        found = [None] * len(node.next_functions) if given.count(None) == len(given) else node(*given)
        found = found if isinstance(found, tuple | list) else (found,)
        for (following, place), grad in zip(node.next_functions, found, strict=False):
            if following is None:
                continue
            if grad is not None:
                like = following._input_metadata[place]
                grad, before = grad.sum_to_size(like.shape).to(like.dtype), grads[following][place]
                grads[following][place] = grad if before is None else before + grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


class OnGPU(Accelerator):
    """The only process of a run on the GPU; the model, which is there, is left as it is."""

    device = torch.device("cuda")

    def prepare_model(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        return model


class Enough(Exception):
    """Ends a run."""
