"""The whole run: images in, a pretrained encoder out."""

import atexit
import dataclasses
import logging
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor
from tqdm import tqdm

from cim_models import precision
from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import replacing
from cim_models.plots import correlation_sheet
from cim_models.pretext import views as views_module
from cim_models.pretext.measures import location_prior
from cim_models.pretext.views import Views, denormalise, make_views
from cim_models.pretraining import checkpoint, schedules, sharding
from cim_models.pretraining.build import (
    adamw,
    build,
    find_batch_size,
    found_before,
    place,
    remember_positions,
    state_bytes,
)
from cim_models.pretraining.cache import OnDevice, SharedMemory
from cim_models.pretraining.compiling import eager
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.data import GlobalBatches, Pictures, Unreadable, batch_of, loader
from cim_models.pretraining.diagnostics import HeldOut, Probe, diagnose, hold_out
from cim_models.pretraining.log import Log
from cim_models.pretraining.memory import Meter, in_words
from cim_models.pretraining.nonfinite import check_finite
from cim_models.pretraining.readers import Records, Subset, open_records
from cim_models.pretraining.savepoints import SavePoints
from cim_models.pretraining.sharding import full, gathered
from cim_models.processes import launched, none_is_lost, without_gpus
from cim_models.workers import usable_workers

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, probe: Probe | None = None) -> Path:
    """Pretrains an encoder with CIM.

    Runs unchanged on one CPU, one GPU, or under `accelerate launch` / `torchrun`.

    Args:
        config: The run; see `cim_models.pretraining.config.load_recipe`.
        probe: Called with the model at every diagnosis (`diagnostics.every`); its numbers go into the log.

    Returns:
        The run directory: `config.yaml`, `log.jsonl`, `samples.png`, `last.pt`, `online.safetensors`,
        `target.safetensors`, `head.safetensors`.

    Raises:
        ConfigError: If the configuration cannot be run, or the loss stops being finite.
        DataError: If images are missing or too many cannot be read.
        CheckpointError: If the checkpoint to resume is missing, damaged or of another run.
    """
    config.check()
    directory = Path(config.out)
    there = (directory / "last.pt").exists()
    resume = there if config.resume == "auto" else config.resume
    if there and not resume:
        raise ConfigError(f"{directory} holds a run; give --resume to go on with it, or another --out")

    # One process of the run, its images, and how many steps they make
    accelerator = Accelerator(
        cpu=without_gpus(), mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )  # fmt: skip
    autocast = precision.autocast(accelerator.device, config.precision)
    rank, processes, optim = accelerator.process_index, accelerator.num_processes, config.optimiser
    records = open_records(config.data.path)
    trained_on, held_out = hold_out(len(records), config.diagnostics.held_out, config.seed)
    pictures = pictures_of(config, Subset(records, trained_on))
    batch_size = optim.batch_size
    if batch_size == "auto":
        settings = (accelerator.device, autocast, processes)
        batch_size = found_before(directory) if resume else find_batch_size(config, pictures, *settings)
        config = dataclasses.replace(config, optimiser=dataclasses.replace(optim, batch_size=batch_size))
        if accelerator.is_main_process:
            logger.info("optimiser.batch_size: auto is %d", batch_size)
    batches = GlobalBatches(len(pictures), batch_size, config.seed, rank, processes, total_steps=0)
    global_batch = batch_size * optim.accumulation * processes
    steps_per_epoch = batches.steps_per_epoch / optim.accumulation
    order = checkpoint.Order(global_batch, batches.steps_per_epoch * batch_size * processes)
    steps, warmup = round(optim.epochs * steps_per_epoch), round(optim.warmup_epochs * steps_per_epoch)
    if steps_per_epoch < 1 or steps < 1:
        raise ConfigError(
            f"a step takes {global_batch} images (batch_size × accumulation × processes), too many for "
            f"{optim.epochs} epochs of {len(pictures)}; lower optimiser.accumulation or raise optimiser.epochs"
        )
    if warmup > steps:
        raise ConfigError(
            f"optimiser.warmup_epochs is {optim.warmup_epochs}, more than optimiser.epochs {optim.epochs}: the "
            "learning rate would never reach its peak; lower the one or raise the other"
        )

    # The model and its optimiser
    torch.manual_seed(config.seed)
    prior = location_prior(config.views, config.data.size)
    cim = build(config, prior.log_odds)
    if config.init and not resume:
        checkpoint.start_from(Path(config.init), cim)
    cim = place(cim, config, accelerator.device, processes)
    sharded = config.shard and processes > 1
    optimiser = accelerator.prepare(adamw(cim, optim, accelerator.device))
    model = cim if sharded else accelerator.prepare(cim)
    unsynchronised = sharding.unsynchronised if sharded else accelerator.no_sync
    cim.gather = lambda x: (accelerator.gather(x), rank * len(x))
    trained = [p for p in cim.parameters() if p.requires_grad]
    start = checkpoint.load(directory, cim, optimiser, steps, config, order) if resume else 0
    if config.compile or sharded:
        with eager(config.compile):
            remember_positions(cim, config)

    # What goes in and what is written down
    workers = usable_workers(config.data.workers)
    batches.start_step, batches.total_steps = start * optim.accumulation, steps * optim.accumulation
    if config.data.cache == "ram":
        SharedMemory.of(pictures, workers, launched())
    elif config.data.cache == "device":
        pictures = OnDevice(pictures, config.data.cache_side or pictures.min_size, workers, accelerator.device)
    stream: Any = iter(loader(pictures, batches, workers))
    scale = global_batch / 256
    prior_loss = prior.loss * (config.views.exemplars.count if config.pretext.reduction == "sum" else 1)
    main = accelerator.is_main_process
    log = Log(directory, config, start, enabled=main)
    unreadable = Unreadable(len(pictures))
    unreadable.add(log.skipped)
    untrained = pictures_of(config, Subset(records, held_out))
    diagnosis = HeldOut(untrained, config, prior, accelerator.device, warmup if main else steps + 1, probe)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    failed: list[str] = []
    waited, clock = 0.0, time.perf_counter()

    meter = Meter(accelerator.device)
    points = SavePoints(config, steps, rank, processes)
    bar = tqdm(total=steps, initial=start, unit_scale=global_batch, unit="img", disable=not main)
    with none_is_lost(processes), closing(log), closing(bar), closing(stream), closing(meter), points:
        meter.start()
        for step in range(start, steps):
            done = step + 1
            lr = schedules.learning_rate(step, steps, warmup, optim.lr * scale, optim.min_lr * scale)
            momentum = schedules.momentum(step, steps, optim.momentum)
            torch.manual_seed(config.seed + (step * processes + rank) * 1_000_003)
            for group in optimiser.param_groups:
                group["lr"] = lr

            for micro in range(optim.accumulation):
                before = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - before
                failed += batch["failed"]
                source = pictures.sources(batch, accelerator.device)
                views = make_views(source, batch["uniforms"].to(source.device, non_blocking=True), config.views)
                last = micro == optim.accumulation - 1
                with nullcontext() if last else unsynchronised(model), autocast:
                    output = model(*views)
                accelerator.backward(output.loss / optim.accumulation)
                losses.append(output.loss.detach())

            if step == start:
                meter.stop(0 if start else state_bytes(trained))
                if main:
                    logger.info("%s", in_words(meter, batch_size))
            norms.append(full(accelerator.clip_grad_norm_(trained, optim.clip or float("inf"))))

            saves = points.reached(done)
            if saves or done % config.log_every == 0:
                check_finite(losses, norms, done, rank, partial(batch_of, pictures, batches), directory, config)
                for failure in unreadable.add(gather_object(failed)):
                    if main:
                        logger.warning("skipped %s", failure)
                    log.write({"step": done, "skipped": failure, "unreadable": len(unreadable)})
                with autocast, eager(config.compile), gathered(cim):
                    numbers = {"loss": torch.stack(losses).mean(), **diagnose(cim, output, views)}
                mean = accelerator.reduce(torch.stack([x.float() for x in numbers.values()]), "mean").tolist()
                elapsed = time.perf_counter() - clock
                log.write({
                    "step": done, "steps": steps, "epoch": round(done / steps_per_epoch, 4),
                    "images_seen": done * global_batch, **dict(zip(numbers, mean, strict=True)),
                    "prior_loss": prior_loss, "lr": lr, "momentum": momentum, "grad_norm": float(norms[-1]),
                    "images_per_second": len(losses) * batch_size * processes / elapsed,
                    "data_wait": waited / elapsed, "unreadable": len(unreadable), "peak_memory": meter.peak,
                })  # fmt: skip
                bar.set_postfix(loss=f"{mean[0]:.3f}", prior=f"{prior_loss:.3f}", gap=f"{mean[1]:.3f}")
                for values in (losses, norms, failed):
                    values.clear()
                waited, clock = 0.0, time.perf_counter()

            optimiser.step()
            optimiser.zero_grad()
            cim.update_target(momentum)
            bar.update()

            if (main or sharded) and diagnosis.due(done, steps):
                with autocast, eager(config.compile), gathered(cim):
                    log.write({"step": done, "images_seen": done * global_batch, **diagnosis(cim, done)})
            if saves and (main or sharded):
                states = checkpoint.States.of(cim, optimiser)
            if saves and main:
                try:
                    checkpoint.save(directory, states, done, steps, config, order)
                    checkpoint.export(directory, states.model, config, done, done * global_batch)
                    save_samples(directory, views, output.logits)
                except CheckpointError as error:  # a full disk may have room at the next save, but there is no next one
                    if done == steps or points.received:
                        raise
                    logger.warning("%s; the run goes on, what was not written is as before", error)
            if saves:
                accelerator.wait_for_everyone()
                points.end_if_asked()

    atexit.register(accelerator.state.destroy_process_group)  # the processes stay together for another run
    return directory


def pictures_of(config: PretrainConfig, records: Records) -> Pictures:
    """The samples of a run's records."""
    data, exemplars = config.data, config.views.exemplars
    return Pictures(
        records, data.size, data.crop_area, data.crop_ratio, data.flip, exemplars=exemplars.count,
        draws=views_module.DRAWS, seed=config.seed,
    )  # fmt: skip


def save_samples(directory: Path, views: Views, logits: Tensor, images: int = 6, exemplars: int = 3) -> None:
    """Writes `samples.png`: contexts, exemplars, true and predicted maps of the first images of a batch."""
    context, cut, maps = (x[:images].detach().float().cpu() for x in views)
    sheet = correlation_sheet(
        denormalise(context).clamp(0, 1),
        denormalise(cut[:, :exemplars]).clamp(0, 1),
        maps[:, :exemplars] > 0.5,
        logits[:images, :exemplars].detach().float().sigmoid().cpu(),
    )
    with replacing(directory / "samples.png", CheckpointError) as file:
        sheet.save(file, format="png")
