"""The training loop of everything that is fine-tuned: exact to resume, the best weights chosen on held-out images."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cim_models.backbones.modes import evaluation_mode
from cim_models.errors import CheckpointError, ConfigError
from cim_models.evaluation.batches import Example, Steps, collate, step_seed
from cim_models.evaluation.recipe import Plan, TrainConfig
from cim_models.files import replacing
from cim_models.precision import autocast, used_precision
from cim_models.processes import none_is_lost
from cim_models.state import differences, flat, load_state, save_state
from cim_models.workers import usable_workers

STATE, LOG = "last.pt", "training.jsonl"


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise decay of the learning rate (`lr_scale`), by timm's grouping of layers.

    Each parameter that takes a gradient is in one group; vectors, and what the model exempts, have no weight decay.
    """
    exempt: Any = getattr(model, "no_weight_decay", set)()
    return param_groups_layer_decay(model, weight_decay, exempt, layer_decay=layer_decay)


@dataclass
class Task:
    """What is trained, on what, and how it is measured."""

    model: nn.Module
    """On its device; its own `train` says what of it trains."""
    groups: list[dict[str, Any]]
    """Of AdamW, with `lr_scale` where a layer learns more slowly."""
    examples: Dataset[Example]
    """Of keys (epoch, index): random as `image_seed` says, and never without an image."""
    images: int
    """How many there are."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs in fp32, targets) → mean over the images."""
    measure: Callable[[nn.Module], tuple[dict[str, float], list[str]]] | None
    """A model in evaluation mode → numbers of the held-out images, of which the first is a score, and `loss`, and
    `path: reason` of those that could not be read; None without any."""
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda inputs, targets: (inputs, targets)
    """What is done to a whole batch of a process."""


@dataclass
class Trained:
    """What a run leaves."""

    last: dict[str, Tensor]
    """State dict on the CPU; the moving average if there is one."""
    best: dict[str, Tensor]
    epoch: float = 0.0
    """When the best one was there."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per epoch, as in the log."""
    unreadable: list[str] = field(default_factory=list)
    """Training images that were replaced by others, and held-out ones that were left out."""

    def course(self, plan: Plan, metric: str) -> dict[str, Any]:
        """For the result of a report: how long it took, and what was measured on the way."""
        epochs, score = plan.steps / plan.steps_per_epoch, f"held_out_{metric}"
        return {
            "images_seen": plan.steps * plan.batch,
            "epochs": epochs,
            "best_epoch": self.epoch or epochs,
            "history": [
                {"epoch": line["epoch"], "images_seen": line["images_seen"], "score": line[score]}
                for line in self.history
                if score in line
            ],
        }


def settings_of(config: TrainConfig, plan: Plan, used: int, held: int) -> dict[str, Any]:
    """For the settings of a report: the recipe, and what became of it with so many images to train on and held out."""
    return {
        **{name: value for name, value in asdict(config).items() if name != "workers"},
        "precision": used_precision(config.precision),
        "optimiser": "AdamW",
        "training_images": used,
        "held_out_images": held,
        "images_per_step": plan.batch,
        "steps": plan.steps,
        "peak_lr": plan.lr,
    }


def fit(
    task: Task, config: TrainConfig, plan: Plan, accelerator: Accelerator, out: Path, run: dict[str, Any], resume: bool
) -> Trained:
    """Trains, and looks at the held-out images after every epoch.

    Args:
        task: What is trained; its model ends with the last weights.
        config: The recipe.
        plan: What `make_plan` made of it.
        accelerator: Of this process.
        out: Run directory, for `last.pt` and `training.jsonl`.
        run: What the run is, as plain data; that of a checkpoint must be the same.
        resume: Go on from the checkpoint.

    Raises:
        CheckpointError: If there is no checkpoint to resume, it is damaged or of another run, or there is one already.
        ConfigError: If the loss stops being finite.
    """
    check_new(out, resume)
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    run = {**run, "config": {**asdict(config), "workers": None}, "plan": list(plan)}
    optimiser = torch.optim.AdamW(task.groups, lr=plan.lr, betas=config.betas)
    scheduler = CosineLRScheduler(
        optimiser,
        max(2, plan.steps - plan.warmup),
        lr_min=min(config.min_lr, plan.lr),
        warmup_t=plan.warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    average = ModelEmaV3(task.model, config.ema, use_warmup=True) if config.ema else None
    kept: nn.Module = average.module if average is not None else task.model
    start, score, trained = 0, (-math.inf, 0.0), Trained({}, {})
    if resume:
        start, score, trained = _resume(out / STATE, run, task.model, average, optimiser)
    model, optimiser = accelerator.prepare(task.model, optimiser)
    trainable = [parameter for group in task.groups for parameter in group["params"]]
    loader = DataLoader(
        task.examples,
        batch_sampler=Steps(task.images, plan, config.seed, start, rank, processes),
        num_workers=usable_workers(config.workers),
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    losses: list[Tensor] = []
    failed: list[str] = []
    task.model.train()

    bar = tqdm(
        total=plan.steps, initial=start, unit_scale=plan.batch, unit="image", disable=None if rank == 0 else True
    )
    with none_is_lost(processes), bar:
        for step, (inputs, targets, unreadable) in enumerate(loader, start):
            scheduler.step_update(step + 1)
            failed += unreadable
            with step_seed(config.seed, step, rank):
                inputs, targets = task.augment(*(x.to(device, non_blocking=True) for x in (inputs, targets)))
                losses += _backward(model, task.loss, inputs, targets, config, accelerator)
            if config.clip is not None:
                accelerator.clip_grad_norm_(trainable, config.clip)
            optimiser.step()
            optimiser.zero_grad()
            if average is not None:
                average.update(task.model, step + 1)
            bar.update()

            done = step + 1
            if done % plan.steps_per_epoch and done < plan.steps:
                continue
            logged = trained.history[-1]["step"] if trained.history else 0
            lr = max(group["lr"] for group in optimiser.param_groups)
            loss = accelerator.reduce(torch.stack(losses).sum() / (done - logged), "mean")
            if not loss.isfinite():
                raise ConfigError(
                    f"the loss is {float(loss)} after step {done} of {plan.steps}; {out / STATE}, if it is there, is "
                    "the last good checkpoint: try a lower lr, a longer warm-up or clip"
                )
            for statistics in kept.buffers():  # of the images of each process: those of the first one are saved
                broadcast(statistics)
            numbers, left_out = _measured(task, kept)
            record = {
                "epoch": done / plan.steps_per_epoch, "step": done, "images_seen": done * plan.batch,
                "loss": float(loss), "lr": lr, **{f"held_out_{name}": value for name, value in numbers.items()},
            }  # fmt: skip
            trained.history.append(record)
            trained.unreadable = sorted({*trained.unreadable, *gather_object(failed), *left_out})
            new = (next(iter(numbers.values())), -numbers["loss"]) if numbers else (-math.inf, float(done))
            if new > score:
                score, trained.best, trained.epoch = new, _copy(kept), record["epoch"]
            if accelerator.is_main_process:
                _save(out, run, done, task.model, average, optimiser, score, trained)
            accelerator.wait_for_everyone()
            bar.set_postfix({"loss": f"{float(loss):.3f}", **{k: f"{v:.3f}" for k, v in numbers.items()}})
            losses.clear()
            failed.clear()
    trained.last = _copy(kept)
    return trained


def check_new(out: Path, resume: bool) -> None:
    """Raises CheckpointError if `out` holds a run and none is to be resumed, or the other way round."""
    if not resume and (out / STATE).exists():
        raise CheckpointError(f"{out} holds a run; give --resume to go on with it, or another --out")
    if resume and not (out / STATE).exists():
        raise CheckpointError(f"{out / STATE}: no checkpoint to resume; leave --resume out to start a run here")


def _backward(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    config: TrainConfig,
    accelerator: Accelerator,
) -> list[Tensor]:
    """Adds up the gradient of a step over parts that fit the device; the share that each has in the loss."""
    device = accelerator.device
    losses: list[Tensor] = []
    parts = list(zip(inputs.split(config.device_batch), targets.split(config.device_batch), strict=True))
    for number, (some, wanted) in enumerate(parts, start=1):
        together = contextlib.nullcontext() if number == len(parts) else accelerator.no_sync(model)
        with together, autocast(device, config.precision), _attention(device):
            output = model(some)
        loss = loss_of(output.float(), wanted) * len(some) / len(inputs)
        loss.backward()
        losses.append(loss.detach())
    return losses


def _attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The attention that is fastest forward and backward: on a CPU the plain one."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _measured(task: Task, model: nn.Module) -> tuple[dict[str, float], list[str]]:
    if task.measure is None:
        return {}, []
    with evaluation_mode(model), torch.no_grad():
        return task.measure(model)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _save(
    out: Path,
    run: dict[str, Any],
    step: int,
    model: nn.Module,
    average: ModelEmaV3 | None,
    optimiser: Any,
    score: tuple[float, float],
    trained: Trained,
) -> None:
    """Writes the checkpoint and the log, each whole or not at all."""
    state = {
        "format": 1,
        "run": run,
        "step": step,
        "model": model.state_dict(),
        "average": average.module.state_dict() if average is not None else None,
        "optimiser": optimiser.state_dict(),
        "score": list(score),
        "best": trained.best,
        "epoch": trained.epoch,
        "history": trained.history,
        "unreadable": trained.unreadable,
    }
    save_state(state, out / STATE)
    with replacing(out / LOG, CheckpointError) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in trained.history), encoding="utf-8")


def _resume(
    path: Path, run: dict[str, Any], model: nn.Module, average: ModelEmaV3 | None, optimiser: Any
) -> tuple[int, tuple[float, float], Trained]:
    """Restores a run; CheckpointError naming each difference if the checkpoint is of another one."""
    state = load_state(path, "a fine-tuning run")
    before, now = (flat(json.loads(json.dumps(values))) for values in (state.get("run", {}), run))
    if different := differences(before, now):
        raise CheckpointError(f"{path} is of another run: {different}")
    try:
        model.load_state_dict(state["model"])
        if average is not None:
            average.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        score = (float(state["score"][0]), float(state["score"][1]))
        trained = Trained({}, state["best"], state["epoch"], state["history"], state["unreadable"])
        return state["step"], score, trained
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the model of its own run: {error}") from error
