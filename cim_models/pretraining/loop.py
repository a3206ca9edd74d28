"""The whole run: images in, a pretrained encoder out."""

import atexit
import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor
from tqdm import tqdm

from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import replacing
from cim_models.plots import correlation_sheet
from cim_models.pretext.measures import location_prior
from cim_models.pretext.views import DRAWS, Views, denormalise, make_views
from cim_models.pretraining import checkpoint
from cim_models.pretraining.batch_size import with_batch_size
from cim_models.pretraining.build import build
from cim_models.pretraining.cache import cached
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.data import Pictures, Unreadable, batch_of, loader
from cim_models.pretraining.diagnostics import HeldOut, Probe, diagnose, hold_out
from cim_models.pretraining.initial import start_from
from cim_models.pretraining.log import Log
from cim_models.pretraining.memory import Meter, in_words
from cim_models.pretraining.nonfinite import check_finite
from cim_models.pretraining.plan import Plan
from cim_models.pretraining.readers import Records, Subset, open_records
from cim_models.pretraining.savepoints import SavePoints
from cim_models.pretraining.tally import Tally
from cim_models.pretraining.trainer import Trainer
from cim_models.processes import launched, none_is_lost, without_gpus
from cim_models.workers import usable_workers

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, probe: Probe | None = None) -> Path:
    """Pretrains an encoder with CIM.

    Runs unchanged on one CPU, one GPU, or under `accelerate launch` / `torchrun`; torch's generators are seeded anew at
    each step.

    Args:
        config: The run; see `cim_models.pretraining.config.load_recipe`.
        probe: Called with the model at every diagnosis (`diagnostics.every`); its numbers go into the log.

    Returns:
        The run directory: `config.yaml`, `log.jsonl`, `samples.png`, `last.pt`, `online.safetensors`,
        `target.safetensors`, `head.safetensors`.

    Raises:
        ConfigError: If the configuration cannot be run, or the loss stops being finite.
        WeightsError: If the weights to start from are missing, damaged or of another architecture.
        DataError: If images are missing or too many cannot be read.
        CheckpointError: If the checkpoint to resume is missing, damaged or of another run.
    """
    config.check()
    directory, resume = Path(config.out), goes_on(config)
    accelerator = Accelerator(
        cpu=without_gpus(), mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )  # fmt: skip
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process

    records = open_records(config.data.path)
    launched().check_same(len(records), config.data.path)
    trained_on, held_out = hold_out(len(records), config.diagnostics.held_out, config.seed)
    pictures = pictures_of(config, Subset(records, trained_on))
    config = with_batch_size(config, pictures, device, processes, resume)
    plan = Plan(config, len(pictures), processes)

    torch.manual_seed(config.seed)
    prior = location_prior(config.views, config.data.size)
    cim = build(config, prior.log_odds)
    if config.init and not resume:
        start_from(config, cim)
    trainer = Trainer(cim, config, accelerator)
    start = checkpoint.load(directory, trainer.cim, trainer.optimiser, plan.steps, config, plan.order) if resume else 0
    trainer.ready()

    workers = usable_workers(config.data.workers)
    pictures = cached(pictures, config.data, workers, device)
    batches = plan.batches(rank, start, plan.steps)
    stream: Any = iter(loader(pictures, batches, workers))
    log = Log(directory, config, start, enabled=main)
    unreadable = Unreadable(len(pictures))
    unreadable.add(log.skipped)
    quiet = plan.warmup if main else plan.steps + 1
    diagnosis = HeldOut(pictures_of(config, Subset(records, held_out)), config, prior, device, quiet, probe)
    prior_loss = prior.loss * (config.views.exemplars.count if config.pretext.reduction == "sum" else 1)
    tally, meter, points = Tally(), Meter(device), SavePoints(config, plan.steps, launched())
    bar = tqdm(total=plan.steps, initial=start, unit_scale=plan.global_batch, unit="img", disable=not main)
    with none_is_lost(processes), closing(log), closing(bar), closing(stream), closing(meter), points:
        if start == plan.steps:  # what ended the run may have come between its last checkpoint and its encoders
            ended = trainer.states() if main or trainer.sharded else None
            if main and ended:
                checkpoint.export(directory, ended.model, config, start, start * plan.global_batch)
        meter.start()
        for step in range(start, plan.steps):
            done, lr, momentum = step + 1, plan.lr(step), plan.momentum(step)
            torch.manual_seed(plan.seed(step, rank))
            for micro in range(config.optimiser.accumulation):
                batch = tally.next(stream)
                source = pictures.sources(batch, device)
                views = make_views(source, batch["uniforms"].to(source.device, non_blocking=True), config.views)
                output = trainer.backward(views, last=micro == config.optimiser.accumulation - 1)
                tally.losses.append(output.loss.detach())
            if step == start:
                meter.stop(0 if start else trainer.coming())
                if main:
                    logger.info("%s", in_words(meter, len(source)))
            tally.norms.append(trainer.clip())

            saves = points.reached(done)
            if saves or done % config.log_every == 0:
                read = partial(batch_of, pictures, batches)
                check_finite(tally.losses, tally.norms, done, rank, read, directory, config)
                for failure in unreadable.add(gather_object(tally.failed)):
                    if main:
                        logger.warning("skipped %s", failure)
                    log.write({"step": done, "skipped": failure, "unreadable": len(unreadable)})
                with trainer.measuring() as cim:
                    numbers = {"loss": torch.stack(tally.losses).mean(), **diagnose(cim, output, views)}
                means = trainer.mean(numbers)
                log.write({
                    **plan.position(done), **means, "prior_loss": prior_loss, "lr": lr, "momentum": momentum,
                    "grad_norm": float(tally.norms[-1]), **tally.speed(plan.pass_images),
                    "unreadable": len(unreadable), "peak_memory": meter.peak,
                })  # fmt: skip
                bar.set_postfix(loss=f"{means['loss']:.3f}", prior=f"{prior_loss:.3f}", gap=f"{means['gap']:.3f}")
                tally.clear()

            trainer.update(lr, momentum)
            bar.update()

            if diagnosis.due(done, plan.steps):
                if main or trainer.sharded:
                    with trainer.measuring() as cim:
                        log.write({"step": done, "images_seen": done * plan.global_batch, **diagnosis(cim, done)})
                points.wait()
            if saves:
                states = trainer.states() if main or trainer.sharded else None
                if main and states:
                    is_last = done == plan.steps or bool(points.received)
                    save(plan, done, states, views, output.logits, is_last)
                points.end_if_asked()

    atexit.register(accelerator.state.destroy_process_group)  # the processes stay together for another run
    return directory


def goes_on(config: PretrainConfig) -> bool:
    """Whether a run goes on from a checkpoint.

    Raises:
        ConfigError: If there is one in its directory and it is not to go on.
    """
    there = Path(config.out, "last.pt").exists()
    resume = there if config.resume == "auto" else config.resume
    if there and not resume:
        raise ConfigError(f"{config.out} holds a run; give --resume to go on with it, or another --out")
    return resume


def pictures_of(config: PretrainConfig, records: Records) -> Pictures:
    """The samples of a run's records."""
    data, exemplars = config.data, config.views.exemplars
    return Pictures(
        records, data.size, data.crop_area, data.crop_ratio, data.flip, exemplars=exemplars.count,
        draws=DRAWS, seed=config.seed,
    )  # fmt: skip


def save(plan: Plan, done: int, states: checkpoint.States, views: Views, logits: Tensor, is_last: bool) -> None:
    """Writes what a run leaves; where another save follows, a full disk, which may have room by then, does not end it.

    Raises:
        CheckpointError: If it cannot be written and is the last; what was there before is kept.
    """
    config, directory = plan.config, Path(plan.config.out)
    try:
        checkpoint.save(directory, states, done, plan.steps, config, plan.order)
        checkpoint.export(directory, states.model, config, done, done * plan.global_batch)
        save_samples(directory, views, logits)
    except CheckpointError as error:
        if is_last:
            raise
        logger.warning("%s; the run goes on, what was not written is as before", error)


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
