"""A loss that is not finite ends a run, before anything of it is saved, with the batch that did it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cim_models.errors import ConfigError
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.state import save_state


def check_finite(
    losses: Sequence[Tensor],
    norms: Sequence[Tensor],
    done: int,
    rank: int,
    read: Callable[[int], dict[str, Any]],
    directory: Path,
    config: PretrainConfig,
) -> None:
    """Looks at the steps since the last line of the log, all at once: one wait for the device.

    The batch is read again for the report; it is a function of the seed and the step.

    Args:
        losses: Of each backward pass of these steps.
        norms: Of the gradient, one for each step.
        done: The last of these steps, counted from 1 as in the log.
        rank: This process.
        read: Gives the batch of a backward pass, counted from 0 over the whole run.
        directory: Of the run.
        config: The run.

    Raises:
        ConfigError: If a number is not finite: naming its step, and where the batch is.
    """
    values = torch.stack([torch.stack(list(losses)).unflatten(0, (len(norms), -1)).mean(1), torch.stack(list(norms))])
    wrong = ~values.isfinite().all(dim=0)
    if not wrong.any():
        return
    first = int(wrong.int().argmax())
    step, passes = done - len(norms) + 1 + first, config.optimiser.accumulation
    of_step, norm = torch.stack(list(losses[first * passes :][:passes])).tolist(), float(norms[first])
    bad = next((i for i, loss in enumerate(of_step) if not torch.tensor(loss).isfinite()), None)
    name, value = ("norm of the gradient", norm) if bad is None else ("loss", of_step[bad])
    path = directory / f"nonfinite-step{step}-rank{rank}.pt"
    kept = {"step": step, "losses": of_step, "grad_norm": norm, "config": to_dict(config)}
    save_state({**kept, **read((step - 1) * passes + (bad or 0))}, path)
    seen = f", seen at step {done}" if done > step else ""
    raise ConfigError(
        f"the {name} is {value} at step {step}{seen}: the batch is saved as {path}, and last.pt beside it, if there is "
        "one, is the last good checkpoint; try a lower optimiser.lr, a longer warm-up or optimiser.clip"
    )
