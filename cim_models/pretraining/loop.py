"""The whole run: images in, a pretrained encoder out."""

import json
import logging
import os
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from cim_models import backbones
from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import replacing
from cim_models.images import find_images
from cim_models.plots import correlation_sheet
from cim_models.precision import fast_bf16
from cim_models.pretext import views as views_module
from cim_models.pretext.measures import location_prior
from cim_models.pretext.model import CIM
from cim_models.pretext.views import Views, denormalise, make_views
from cim_models.pretraining import checkpoint, schedules
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.pretraining.data import GlobalBatches, Pictures, Unreadable, loader
from cim_models.pretraining.diagnostics import diagnose
from cim_models.state import save_state

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> Path:
    """Pretrains an encoder with CIM.

    Runs unchanged on one CPU, one GPU, or under `accelerate launch` / `torchrun`.

    Args:
        config: The run; see `cim_models.pretraining.config.load_recipe`.

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
    if not config.resume and (directory / "last.pt").exists():
        raise ConfigError(f"{directory} holds a run; give --resume to go on with it, or another --out")

    # One process of the run, its images, and how many steps they make
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bf16())
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16)
    rank, processes, optim = accelerator.process_index, accelerator.num_processes, config.optimiser
    paths = find_images(config.data.path)
    pictures = Pictures(
        paths, config.data.size, config.data.crop_area, config.data.crop_ratio, config.data.flip,
        exemplars=config.views.exemplars.count, draws=views_module.DRAWS, seed=config.seed,
    )  # fmt: skip
    batches = GlobalBatches(len(paths), optim.batch_size, config.seed, rank, processes, total_steps=0)
    global_batch = optim.batch_size * optim.accumulation * processes
    steps_per_epoch = batches.steps_per_epoch / optim.accumulation
    steps, warmup = round(optim.epochs * steps_per_epoch), round(optim.warmup_epochs * steps_per_epoch)
    if steps_per_epoch < 1 or steps < 1:
        raise ConfigError(
            f"a step takes {global_batch} images (batch_size × accumulation × processes), too many for "
            f"{optim.epochs} epochs of {len(paths)}; lower optimiser.accumulation or raise optimiser.epochs"
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
    if config.init and not config.resume:
        checkpoint.start_from(Path(config.init), cim)
    if processes > 1 and accelerator.device.type == "cuda":
        cim = nn.SyncBatchNorm.convert_sync_batchnorm(cim)
    optimiser = torch.optim.AdamW(param_groups_weight_decay(cim, optim.weight_decay), betas=optim.betas)
    model, optimiser = accelerator.prepare(cim, optimiser)
    cim.gather = lambda x: (accelerator.gather(x), rank * len(x))
    trained = [p for p in cim.parameters() if p.requires_grad]
    start = checkpoint.load(directory, cim, optimiser, steps, config) if config.resume else 0

    # What goes in and what is written down
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.data.workers > cores:
        logger.info("data.workers is %d, but there are %d cores: reading with as many", config.data.workers, cores)
    batches.start_step, batches.total_steps = start * optim.accumulation, steps * optim.accumulation
    stream = iter(loader(pictures, batches, min(config.data.workers, cores)))
    scale = global_batch / 256
    prior_loss = prior.loss * (config.views.exemplars.count if config.pretext.reduction == "sum" else 1)
    main = accelerator.is_main_process
    log = Log(directory, config, start, enabled=main)
    unreadable = Unreadable(len(paths))
    unreadable.add(log.skipped)
    losses: list[Tensor] = []
    failed: list[str] = []
    waited, clock = 0.0, time.perf_counter()

    with closing(log), tqdm(total=steps, initial=start, unit_scale=global_batch, unit="img", disable=not main) as bar:
        for step in range(start, steps):
            done = step + 1
            saves = done % config.save_every == 0 or done == steps
            lr = schedules.learning_rate(step, steps, warmup, optim.lr * scale, optim.min_lr * scale)
            momentum = schedules.momentum(step, steps, optim.momentum)
            torch.manual_seed(config.seed + (step * processes + rank) * 1_000_003)
            for group in optimiser.param_groups:
                group["lr"] = lr

            read: list[dict[str, Any]] = []
            for micro in range(optim.accumulation):
                before = time.perf_counter()
                read.append(batch := next(stream))
                waited += time.perf_counter() - before
                failed += batch["failed"]
                source, uniforms = (
                    batch[name].to(accelerator.device, non_blocking=True) for name in ("source", "uniforms")
                )
                views = make_views(source, uniforms, config.views)
                last = micro == optim.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model), autocast:
                    output = model(*views)
                accelerator.backward(output.loss / optim.accumulation)
                losses.append(output.loss.detach())

            grad_norm = accelerator.clip_grad_norm_(trained, optim.clip or float("inf"))
            newest = torch.stack([*losses[-optim.accumulation :], grad_norm])
            if not newest.isfinite().all():
                raise ConfigError(_stop_at(directory, done, rank, read, config, newest))

            if saves or done % config.log_every == 0:
                for failure in unreadable.add(gather_object(failed)):
                    if main:
                        logger.warning("skipped %s", failure)
                    log.write({"step": done, "skipped": failure, "unreadable": len(unreadable)})
                with autocast:
                    numbers = {"loss": torch.stack(losses).mean(), **diagnose(cim, output, views)}
                mean = accelerator.reduce(torch.stack([x.float() for x in numbers.values()]), "mean").tolist()
                elapsed = time.perf_counter() - clock
                log.write({
                    "step": done, "steps": steps, "epoch": round(done / steps_per_epoch, 4),
                    "images_seen": done * global_batch, **dict(zip(numbers, mean, strict=True)),
                    "prior_loss": prior_loss, "lr": lr, "momentum": momentum, "grad_norm": float(grad_norm),
                    "images_per_second": len(losses) * optim.batch_size * processes / elapsed,
                    "data_wait": waited / elapsed, "unreadable": len(unreadable),
                })  # fmt: skip
                bar.set_postfix(loss=f"{mean[0]:.3f}", prior=f"{prior_loss:.3f}", gap=f"{mean[1]:.3f}")
                losses.clear()
                failed.clear()
                waited, clock = 0.0, time.perf_counter()

            optimiser.step()
            optimiser.zero_grad()
            cim.update_target(momentum)
            bar.update()

            if saves and main:
                checkpoint.save(directory, cim, optimiser, done, steps, config)
                checkpoint.export(directory, cim, config, done, done * global_batch)
                sheet = draw_samples(views, output.logits)
                with replacing(directory / "samples.png", CheckpointError) as file:
                    sheet.save(file, format="png")
            if saves:
                accelerator.wait_for_everyone()

    accelerator.end_training()
    return directory


def build(config: PretrainConfig, log_odds: float) -> CIM:
    """The untrained model of a run, its head answering with the prior's log-odds.

    Raises:
        ConfigError: If there is no such backbone, or its patches do not tile the images.
    """
    args: dict[str, Any] = {"drop_path_rate": config.backbone.drop_path}
    if not config.model.startswith("cim_resnet"):
        args["img_size"] = config.backbone.img_size
    online: Any = backbones.build(config.model, **args)
    cim = CIM(online, config.pretext)
    if isinstance(online, backbones.VisionTransformer):
        patch = online.patch_embed.patch_size[0]
        sizes = {
            "backbone.img_size": config.backbone.img_size,
            "views.context_size": config.views.context_size,
            "views.exemplars.size": config.views.exemplars.size,
        }
        for name, size in sizes.items():
            if size % patch:
                raise ConfigError(f"{name} is {size}; it must be a multiple of {config.model}'s patches of {patch}")
    for module in cim.target.modules() if cim.target is not None else ():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    online.set_grad_checkpointing(config.backbone.grad_checkpointing)
    head: Any = cim.head
    head.start_from(log_odds)
    return cim


def draw_samples(views: Views, logits: Tensor, images: int = 6, exemplars: int = 3) -> Any:
    """A sheet of contexts, exemplars, true and predicted maps of the first images of a batch."""
    context, cut, maps = (x[:images].detach().float().cpu() for x in views)
    return correlation_sheet(
        denormalise(context).clamp(0, 1),
        denormalise(cut[:, :exemplars]).clamp(0, 1),
        maps[:, :exemplars] > 0.5,
        logits[:images, :exemplars].detach().float().sigmoid().cpu(),
    )


class Log:
    """`log.jsonl`, one JSON object per line, and TensorBoard events where they are asked for.

    A run that goes on keeps the lines up to its checkpoint; `skipped` holds the unreadable images that they name.
    """

    def __init__(self, directory: Path, config: PretrainConfig, start: int, enabled: bool) -> None:
        self.path, self.enabled, self.events = directory / "log.jsonl", enabled, None
        lines = self.path.read_bytes().splitlines(keepends=True) if start and self.path.is_file() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= start]
        self.skipped = [record["skipped"] for record in map(json.loads, kept) if "skipped" in record]
        if not enabled:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {directory}, where no folder can be made: {error.strerror}") from error
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        with replacing(directory / "config.yaml", CheckpointError) as file:
            file.write_text(text, encoding="utf-8")
        with replacing(self.path, CheckpointError) as file:
            file.write_bytes(b"".join(kept))
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("tensorboard is not installed: pip install 'cim-models[tensorboard]'") from error
            self.events = SummaryWriter(str(directory), purge_step=start)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        if self.enabled:  # names of files need not be Unicode: what UTF-8 cannot write becomes a JSON escape
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.events is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes the events."""
        if self.events is not None:
            self.events.close()


def _stop_at(
    directory: Path, step: int, rank: int, read: list[dict[str, Any]], config: PretrainConfig, values: Tensor
) -> str:
    """Saves the first batch of a step whose loss is not finite, and says what to do.

    Args:
        directory: Of the run.
        step: Counted from 1, as in the log.
        rank: This process.
        read: The batches of the step.
        config: The run's.
        values: Their losses, and the norm of the gradient.
    """
    bad = int((~values.isfinite()).int().argmax())
    name = "loss" if bad < len(read) else "norm of the gradient"
    path = directory / f"nonfinite-step{step}-rank{rank}.pt"
    kept = {"step": step, "losses": values[:-1].tolist(), "grad_norm": float(values[-1]), "config": to_dict(config)}
    save_state({**kept, **read[min(bad, len(read) - 1)]}, path)
    return (
        f"the {name} is {float(values[bad])} at step {step}: the batch is saved as {path}, and last.pt beside it, if "
        "there is one, is the last good checkpoint; try a lower optimiser.lr, a longer warm-up or optimiser.clip"
    )
