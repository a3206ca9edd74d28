"""The processes of a run: what they agree on, and what the others say when one of them is gone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cim_models.errors import CimModelsError


def agreement(processes: int) -> Callable[[int], int]:
    """The greatest of a number over all processes, which all of them have to ask for.

    It goes through the processors and their network: the accelerators are not waited for.
    """
    if processes == 1:
        return lambda number: number
    group: Any = torch.distributed.new_group(backend="gloo")

    def greatest(number: int) -> int:
        tensor = torch.tensor(number)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=group)
        return int(tensor)

    return greatest


@contextlib.contextmanager
def none_is_lost(processes: int) -> Iterator[None]:
    """Says in one line that another process has ended, where the network says it in its own way.

    Raises:
        CimModelsError: If so.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        if processes == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise CimModelsError(
            "another process of the run has ended, hence this one too; the first message of the other ones says why. "
            "--resume goes on from the last checkpoint"
        ) from error
