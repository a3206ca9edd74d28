"""The processes of a run: what they agree on, what they send each other, what they say when one of them is gone."""

import atexit
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from cim_models.errors import CimModelsError, DataError

Item = TypeVar("Item")

RESUME = ". --resume goes on from the last checkpoint"
PATIENCE = timedelta(days=1)
"""How long processes wait for one that computes alone. One that has ended is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """The processes that a launcher started, of which this is one; by default it is the only one.

    They exchange objects through the processors and their network, so the accelerators are not waited for. Whoever
    calls a method, all have to call it.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    """Where this process computes, if its launcher says so."""
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Gives the first process the items of all, in the order of their ranks, and the others nothing.

        Raises:
            CimModelsError: If another process has ended.
        """
        if self.count == 1:
            return [item]
        items: Any = [None] * self.count if self.first else None
        with none_is_lost(self.count, ""):
            torch.distributed.gather_object(item, items, dst=0, group=self.group)
        return items or []

    def gather_for_all(self, item: Item) -> list[Item]:
        """The items of all processes, in the order of their ranks, once all have given theirs.

        Raises:
            CimModelsError: If another process has ended.
        """
        items: Any = [item] * self.count
        if self.count > 1:
            with none_is_lost(self.count, ""):
                torch.distributed.all_gather_object(items, item, group=self.group)
        return items

    def by_first(self, work: Callable[[], Item]) -> Item:
        """Does what one process is enough for, while the others wait for its result.

        What it raises ends the first process, and with it all.

        Raises:
            CimModelsError: If another process has ended.
        """
        if self.count == 1:
            return work()
        result: list[Any] = [work() if self.first else None]
        with none_is_lost(self.count, ""):
            torch.distributed.broadcast_object_list(result, src=0, group=self.group)
        return result[0]

    def greatest(self, number: int) -> int:
        """The greatest of a number over all processes. In a run, `none_is_lost` around it says what to do."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def check_same(self, value: object, what: str) -> None:
        """Makes sure that all processes have the same, such as what they found on the disks of their machines.

        Raises:
            DataError: In the first process, saying what differs.
        """
        if self.count == 1:
            return
        digests = self.gather(hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise DataError(
                f"{what}: process {odd[0]} does not find there what the first one does; all must see the same"
            )


ALONE = Processes()


@functools.cache
def launched() -> Processes:
    """The processes that torchrun or `accelerate launch` started, or this one alone."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or without_gpus())
    if state.num_processes == 1:
        return ALONE
    atexit.register(state.destroy_process_group)
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, str(state.device), group)


def without_gpus() -> bool:
    """Whether several processes were started where there is no GPU: told so, Accelerate takes none for the only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


@contextlib.contextmanager
def none_is_lost(processes: int, advice: str = RESUME) -> Iterator[None]:
    """Says in one line that another process has ended, where the network says it in its own way.

    Raises:
        CimModelsError: If so; the message ends with the advice.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        if processes == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise CimModelsError(
            "another process of the run has ended, hence this one too; the first message of the other ones says why"
            f"{advice}"
        ) from error
