"""The model of a run while it trains: in its precision, on its device, in its processes, compiled or in shards."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor

from cim_models import precision
from cim_models.pretext.model import CIM, Output
from cim_models.pretext.views import Views
from cim_models.pretraining import sharding
from cim_models.pretraining.build import adamw, place, remember_positions, state_bytes
from cim_models.pretraining.checkpoint import States
from cim_models.pretraining.compiling import eager
from cim_models.pretraining.config import PretrainConfig


class Trainer:
    """A model, its optimiser, and what a training step does with them.

    Args:
        cim: The untrained model; `self.cim` takes its place.
        config: The run.
        accelerator: The processes and the device.

    Raises:
        ConfigError: If the model is to be compiled and cannot be.
    """

    def __init__(self, cim: CIM, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.autocast = precision.autocast(device, config.precision)
        self.sharded = config.shard and processes > 1
        self.cim = place(cim, config, device, processes)
        self.cim.gather = lambda x: (gather(x), rank * len(x))
        self.optimiser = accelerator.prepare(adamw(self.cim, config.optimiser, device))
        self.model = self.cim if self.sharded else accelerator.prepare(self.cim)
        self.trained = [p for p in self.cim.parameters() if p.requires_grad]

    def ready(self) -> None:
        """Computes once what the first step would, where that step could not."""
        if self.config.compile or self.sharded:
            with eager(self.config.compile):
                remember_positions(self.cim, self.config)

    def backward(self, views: Views, last: bool) -> Output:
        """A pass forward and back, which adds its share of the gradient.

        The last one of a step averages it over the processes; each does where the model is sharded: none has room for
        the whole of it.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.model), self.autocast:
            output = self.model(*views)
        (output.loss / self.config.optimiser.accumulation).backward()
        return output

    def clip(self) -> Tensor:
        """The norm of the gradient, which is clipped if the run says so."""
        return sharding.full(self.accelerator.clip_grad_norm_(self.trained, self.config.optimiser.clip or float("inf")))

    def update(self, lr: float, momentum: float) -> None:
        """Takes the step: of the trained parameters, then of the target encoder."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.cim.update_target(momentum)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[CIM]:
        """The model for other sizes and modes than a step's; where it is sharded, all processes ask for it."""
        with self.autocast, eager(self.config.compile), sharding.gathered(self.cim):
            yield self.cim

    def mean(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Numbers, averaged over the processes."""
        stacked = torch.stack([number.float() for number in numbers.values()])
        return dict(zip(numbers, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def states(self) -> States:
        """What a checkpoint holds; where the model is sharded, all processes ask for it."""
        return States.of(self.cim, self.optimiser)

    def coming(self) -> int:
        """Bytes that the optimiser will hold after its first step and does not before."""
        return state_bytes(self.trained)
