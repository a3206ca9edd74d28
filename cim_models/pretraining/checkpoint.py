"""What a run keeps: `last.pt` to go on from, and its encoders as safetensors."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cim_models.errors import CheckpointError
from cim_models.files import replacing
from cim_models.pretext.model import CIM
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.pretraining.initial import located
from cim_models.pretraining.sharding import spread, whole
from cim_models.state import differences, flat, load_state, save_state

NOT_COMPARED = (
    "out", "resume", "log_every", "save_every", "save_minutes", "keep", "tensorboard", "data.workers", "data.path",
    "diagnostics.every", "compile", "shard",
)  # fmt: skip
"""Settings that may change between a run and its continuation."""
BEFORE = {"diagnostics.held_out": 0}
"""What checkpoints that do not know these settings were made with, where that was not the default."""


PARTS = ("online", "target", "head")
"""What a run exports, by the names of the files."""


class Order(NamedTuple):
    """What decides which images a step sees, however they are split over processes and backward passes."""

    per_step: int
    """Images of an optimiser step."""
    per_epoch: int
    """Images of an epoch: all but those of a last, incomplete backward pass of all processes."""


class States(NamedTuple):
    """What a checkpoint holds of a model and of its optimiser: whole tensors, in the first process of a run."""

    model: dict[str, Tensor]
    optimiser: dict[str, Any]

    @classmethod
    def of(cls, cim: CIM, optimiser: torch.optim.Optimizer) -> "States":
        """Asked for by all processes where the model is sharded."""
        return cls(whole(cim.state_dict()), whole(optimiser.state_dict()))


def save(
    directory: Path,
    states: States,
    step: int,
    steps: int,
    config: PretrainConfig,
    order: Order,
) -> None:
    """Writes `last.pt`: plain data that `torch.load(weights_only=True)` reads.

    With `config.keep` above 1 it stays as `step-….pt` after the next one; older ones are removed.

    Raises:
        CheckpointError: If it cannot be written; what was there before is kept.
    """
    state = {
        "format": 1,
        "step": step,
        "steps": steps,
        "model": states.model,
        "optimiser": states.optimiser,
        "config": to_dict(config),
        "order": list(order),
    }
    save_state(state, directory / "last.pt")
    if config.keep > 1:
        _link(directory / "last.pt", directory / f"step-{step:08}.pt")
        for path in [path for path in kept(directory) if _step(path) <= step][: -config.keep]:
            path.unlink()


def kept(directory: Path) -> list[Path]:
    """The checkpoints that stay beside `last.pt`, oldest first."""
    return sorted(directory.glob("step-" + 8 * "[0-9]" + ".pt"), key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _link(path: Path, name: Path) -> None:
    """Gives a file a second name, and a second body only where the file system has no such names."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with replacing(name, CheckpointError) as temporary:
            shutil.copyfile(path, temporary)


def load(
    directory: Path,
    cim: CIM,
    optimiser: torch.optim.Optimizer,
    steps: int,
    config: PretrainConfig,
    order: Order,
) -> int:
    """Restores a run from `last.pt`, on any number of processes that gives the same order of images.

    Returns:
        Steps done, of `steps`.

    Raises:
        CheckpointError: If there is none, it cannot be read, or it is of another run.
    """
    path = directory / "last.pt"
    try:
        state = load_state(path, "a pretraining run")
    except CheckpointError as error:
        older = "".join(f"; {other.name} is older, copy it there" for other in kept(directory)[-2:-1])
        raise CheckpointError(f"{error}{older}") from error
    try:
        saved, step, total = state["config"], state["step"], state.get("steps", steps)
    except KeyError as error:
        raise CheckpointError(f"{path}: not a checkpoint of a pretraining run, or damaged: no {error}") from error
    now = flat(to_dict(config))
    before = {**flat(to_dict(PretrainConfig())), **BEFORE, **flat(saved)}  # a newer field was unset
    for values in (now, before):
        values["data.cache"] = values["data.cache"].replace("ram", "none")  # which gives the same batches
        values["init"] = located(values["init"])  # by whatever path
    known = state.get("order")  # unless an older version wrote it
    if known == list(order):
        for name in ("optimiser.batch_size", "optimiser.accumulation"):  # another split of the same steps
            before[name] = now[name]
    if different := differences(before, now, ignored=NOT_COMPARED):
        raise CheckpointError(f"{path} is of another configuration: {different}")
    if total != steps:
        raise CheckpointError(
            f"{path} is of a run of {total} steps, now there would be {steps}: the images or the number of processes "
            "are not the same"
        )
    if known and known != list(order):
        raise CheckpointError(
            f"{path} is of a run of {known[0]} images a step and {known[1]} an epoch, now there would be "
            f"{order.per_step} and {order.per_epoch}: the images or the number of processes are not the same"
        )
    try:
        shards = cim.state_dict()
        cim.load_state_dict({name: spread(tensor, shards.get(name, tensor)) for name, tensor in state["model"].items()})
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for index, values in state["optimiser"]["state"].items():
            values.update({name: spread(tensor, parameters[index]) for name, tensor in values.items()})
        for group in state["optimiser"]["param_groups"]:
            group["fused"] = optimiser.defaults["fused"]  # of this device, not of the one before
        optimiser.load_state_dict(state["optimiser"])
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the model of its own configuration: {error}") from error
    return step


def export(directory: Path, model: dict[str, Tensor], config: PretrainConfig, step: int, images_seen: int) -> None:
    """Writes the bare encoders (timm's key names) and the correlation head as safetensors.

    Args:
        directory: Of the run.
        model: The tensors of its `CIM`.
        config: The run.
        step: Steps done.
        images_seen: In these steps.

    Raises:
        CheckpointError: If a file cannot be written; what was there before is kept.
    """
    model_args = {} if config.model.startswith("cim_resnet") else {"img_size": config.backbone.img_size}
    metadata = {
        "format": "pt",
        "architecture": config.model,
        "model_args": json.dumps(model_args),
        "pretext": json.dumps(asdict(config.pretext)),
        "views": json.dumps(asdict(config.views)),
        "step": str(step),
        "images_seen": str(images_seen),
    }
    for name in PARTS:
        of_part = [key for key in model if key.startswith(f"{name}.")]
        tensors = {key.removeprefix(f"{name}."): model[key].detach().cpu().contiguous() for key in of_part}
        if not tensors:
            continue
        with replacing(directory / f"{name}.safetensors", CheckpointError) as file:
            save_file(tensors, file, metadata=metadata)
