"""Trains MAE or DINO at the cost of a run of ours: the same backbone, images, batches, resolution, reader and device.

    python benchmarks/zoo/rivals.py mae runs/models/small --out runs/rivals/mae-images
    python benchmarks/zoo/rivals.py mae runs/models/small --out runs/rivals/mae-minutes --match minutes
    python benchmarks/zoo/rivals.py mae weights/cim_vit_small.tin200_6min --data TRAIN --out runs/rivals/mae-images

As many images as the run saw in all its parts, or as it sees in as many minutes as they trained. What makes the methods
is lightly's (`pip install --no-deps lightly==1.6.0`): heads, decoder, masking, losses; the settings are the papers'
(`--lr` searches), but MAE's decoder has four blocks of width 256, half of the paper's. Crops and colours are made on
the device, as ours are. What is left is like a run directory: `online.safetensors` (of DINO also `target.safetensors`,
the teacher), log.jsonl, last.pt; it goes on after SIGTERM.
"""

import argparse
import copy
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models import utils
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from cim_models import backbones
from cim_models.errors import CheckpointError, CimModelsError, ConfigError
from cim_models.files import replacing
from cim_models.hub.card import RECIPE
from cim_models.hub.provenance import CONFIG, seen_by
from cim_models.precision import autocast
from cim_models.pretext import exemplars
from cim_models.pretext.colour import ColourConfig, recolour
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.views import normalise
from cim_models.pretraining import load_recipe, schedules
from cim_models.pretraining.cache import OnDevice
from cim_models.pretraining.compiling import VARIANTS
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.data import GlobalBatches, Pictures, loader
from cim_models.pretraining.loop import pictures_of
from cim_models.pretraining.readers import open_records
from cim_models.pretraining.savepoints import SavePoints
from cim_models.state import load_state, save_state
from cim_models.workers import usable_workers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACE = 60
"""Steps that tell how fast a rival is: the last third of them counts."""


def crops(source: Tensor, uniforms: Tensor, where: ExemplarConfig, how: ColourConfig) -> Tensor:
    """Random crops of (B, 3, H, W) uint8 pictures, recoloured and normalised: (B · K, 3, T, T)."""
    source = source.float() / 255
    height, width = source.shape[2:]
    rectangles = exemplars.draw_rectangles(uniforms[..., : exemplars.DRAWS], height, width, where)
    found = recolour(exemplars.crop(source, rectangles, where.size), uniforms[..., exemplars.DRAWS :], how)
    return normalise(found).flatten(0, 1)


def plain(count: int, size: int, area: tuple[float, float]) -> ExemplarConfig:
    """Upright crops, as random resized crops are."""
    return ExemplarConfig(count, size, area, ratio=(3 / 4, 4 / 3), angle=(0.0, 0.0))


class Method(nn.Module):
    """What MAE and DINO have in common: settings per 256 images, and what is done beside a step."""

    lr: float
    betas: tuple[float, float]
    weight_decay: tuple[float, float]
    """At the start and at the end, a half cosine apart."""
    clip: float = float("inf")
    count: int
    """Crops of a picture."""

    def views(self, source: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """What `forward` takes, of (B, 3, H, W) uint8 pictures and (B, count, DRAWS) uniforms."""
        raise NotImplementedError

    def before_step(self, step: int, steps: int) -> None:
        """Called before each step."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after each step."""


class MAE(Method):
    """Masked autoencoding (He et al., CVPR 2022): three quarters of the patches, normalised, from the others."""

    lr, betas, weight_decay, count = 1.5e-4, (0.9, 0.95), (0.05, 0.05), 1

    def __init__(self, encoder: Any, size: int) -> None:
        super().__init__()
        self.online, self.where = encoder, plain(1, size, (0.2, 1.0))
        self.masked = MaskedVisionTransformerTIMM(encoder, None, "skip", pos_embed_initialization="skip")
        self.patch, patches = encoder.patch_embed.patch_size[0], encoder.patch_embed.num_patches
        self.embed = nn.Linear(encoder.embed_dim, 256)
        self.decoder = MaskedVisionTransformerDecoderTIMM(patches, embed_dim=256, depth=4, num_heads=8)
        self.predict = nn.Linear(256, 3 * self.patch**2)

    def views(self, source: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """One crop, uncoloured."""
        return (crops(source, uniforms, self.where, ColourConfig.off()),)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of (B, 3, S, S)."""
        shape = (len(images), self.masked.sequence_length)
        kept, hidden = utils.random_token_mask(shape, mask_ratio=0.75, device=images.device)
        shown = self.embed(self.masked.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).type_as(shown)
        decoded = self.decoder(utils.set_at_index(tokens, kept, shown))
        predicted = self.predict(utils.get_at_index(decoded, hidden))
        patches = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)  # token 0 is no patch
        return nn.functional.mse_loss(predicted.float(), utils.normalize_mean_var(patches))


class DINO(Method):
    """Self-distillation (Caron et al., ICCV 2021): class tokens of two large and six small crops."""

    lr, betas, weight_decay, clip, count = 5e-4, (0.9, 0.999), (0.04, 0.4), 3.0, 8
    colours = (
        ColourConfig(blur=1.0, solarise=0.0),
        ColourConfig(blur=0.1, solarise=0.2),
        ColourConfig(blur=0.5, solarise=0.0),
    )
    """Of the first and the second large crop, and of the small ones."""

    def __init__(self, encoder: Any, size: int, prototypes: int = 8192) -> None:
        super().__init__()
        self.online, self.target = encoder, copy.deepcopy(encoder)
        self.where = plain(1, size, (0.25, 1.0)), plain(1, size, (0.25, 1.0)), plain(6, size // 2, (0.05, 0.25))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lightly normalises weights by a function that torch deprecates
            self.head, self.target_head = (DINOProjectionHead(encoder.embed_dim, output_dim=prototypes) for _ in "ab")
        self.target_head.load_state_dict(self.head.state_dict())
        for teacher in (self.target, self.target_head):
            teacher.requires_grad_(False)
        self.loss = DINOLoss(prototypes)

    def views(self, source: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """Two large crops of each picture, all first ones first, and six small ones, picture by picture."""
        draws = uniforms.split([where.count for where in self.where], dim=1)
        first, second, small = (crops(source, *each) for each in zip(draws, self.where, self.colours, strict=True))
        return torch.cat([first, second]), small

    def forward(self, large: Tensor, small: Tensor) -> Tensor:
        """The loss of (2 B, 3, S, S) and (6 B, 3, S / 2, S / 2)."""
        with torch.no_grad():
            taught = self.target_head(self.target.forward_features(large)[:, 0])
        learned = self.head(torch.cat([self.online.forward_features(x)[:, 0] for x in (large, small)]))
        views = [*learned[: len(large)].chunk(2), *learned[len(large) :].unflatten(0, (len(large) // 2, 6)).unbind(1)]
        with torch.autocast(large.device.type, enabled=False):
            return self.loss([x.float() for x in taught.chunk(2)], [x.float() for x in views])

    def before_step(self, step: int, steps: int) -> None:
        """The prototypes stay as they are for a hundredth of the run."""
        self.head.last_layer.weight_v.requires_grad_(step >= steps // 100)

    def after_step(self, step: int, steps: int) -> None:
        """Moves the teacher towards the student."""
        for student, teacher in ((self.online, self.target), (self.head, self.target_head)):
            utils.update_momentum(student, teacher, schedules.momentum(step, steps, 0.996))


METHODS: dict[str, type[Method]] = {"mae": MAE, "dino": DINO}


def rival(
    method: str, run: Path, out: Path, match: str = "images", lr: float | None = None, data: Path | None = None
) -> None:
    """Trains a rival of a run, or goes on with it.

    Args:
        method: One of `METHODS`.
        run: Run directory, or the release folder that was made of it.
        out: Of the rival.
        match: `images` or `minutes` of the run and of those that it started from.
        lr: Peak learning rate per 256 images, in place of the paper's.
        data: The images that the run saw, where it does not name them, as a release does not.

    Raises:
        ConfigError: If the run is not one of a vision transformer, its images or its cost are not known, or the loss
            stops being finite.
    """
    kind, like = METHODS[method], load_recipe(run / (CONFIG if (run / CONFIG).is_file() else RECIPE))
    cost = seen_by(run / "online.safetensors")
    like.data.path = str(data or like.data.path)
    if not like.model.startswith("cim_vit"):
        raise ConfigError(f"{method} is one of vision transformers here, and {run} is of {like.model}")
    if not like.data.path:
        raise ConfigError(f"{run} does not name its images; give them with --data")
    if not cost:
        raise ConfigError(f"{run}: how many images it saw is not known, nor in how many minutes")
    pictures = read_pictures(like, kind.count)
    lr = (lr or kind.lr) * like.optimiser.batch_size / 256
    steps = round(cost["images_seen"] / like.optimiser.batch_size)
    if match == "minutes" and not (out / "last.pt").exists():
        with tempfile.TemporaryDirectory() as folder:
            rate = train(kind, like, pictures, Path(folder), PACE, lr)
        steps = round(60 * cost["minutes"] * rate / like.optimiser.batch_size)
    train(kind, like, pictures, out, steps, lr)


def read_pictures(like: PretrainConfig, count: int) -> Pictures:
    """Whole pictures as a run reads them, with uniforms for so many crops of each."""
    whole = replace(like.data, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    views = replace(like.views, exemplars=replace(like.views.exemplars, count=count))
    pictures = pictures_of(replace(like, data=whole, views=views), open_records(like.data.path))
    if like.data.cache != "device":
        return pictures
    return OnDevice(pictures, like.data.cache_side or like.data.size, usable_workers(like.data.workers), DEVICE)


def train(kind: type[Method], like: PretrainConfig, pictures: Pictures, out: Path, steps: int, lr: float) -> float:
    """Trains a method, or goes on; the images per second of its last steps."""
    optim, size = like.optimiser, like.backbone.img_size
    torch.manual_seed(like.seed)
    model: Any = kind(backbones.build(like.model, img_size=size), size).to(DEVICE)
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in (module for module in model.modules() if like.compile and isinstance(module, Block)):
        block.compile(dynamic=False)  # as those of the run
    groups = param_groups_weight_decay(model, kind.weight_decay[0])
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=kind.betas, fused=True)
    out.mkdir(parents=True, exist_ok=True)
    log, lines, start = out / "log.jsonl", [], 0
    if (out / "last.pt").exists():
        state = load_state(out / "last.pt", "a rival's run")
        start, steps, lines = state["step"], state["steps"], log.read_text().splitlines(keepends=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
    batches = GlobalBatches(len(pictures), optim.batch_size, like.seed, start_step=start, total_steps=steps)
    stream = loader(pictures, batches, usable_workers(like.data.workers))
    warmup, every = round(optim.warmup_epochs / optim.epochs * steps), min(like.log_every, PACE // 3)
    losses: list[Tensor] = []
    rate, clock = 0.0, time.perf_counter()
    with SavePoints(like, steps) as points:
        for step, batch in enumerate(tqdm(stream, initial=start, total=steps), start):
            done = step + 1
            torch.manual_seed(like.seed + step * 1_000_003)
            decay = schedules.learning_rate(step, steps, 0, *kind.weight_decay)
            for group in optimiser.param_groups:
                group["lr"] = schedules.learning_rate(step, steps, warmup, lr)
                group["weight_decay"] = decay if group["weight_decay"] else 0.0
            model.before_step(step, steps)
            views = model.views(pictures.sources(batch, DEVICE), batch["uniforms"].to(DEVICE, non_blocking=True))
            with autocast(DEVICE, like.precision):
                loss = model(*views)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), kind.clip)
            optimiser.step()
            optimiser.zero_grad()
            model.after_step(step, steps)
            losses.append(loss.detach())
            saves = points.reached(done)
            if saves or done % every == 0:
                mean = torch.stack(losses).mean().item()
                rate = len(losses) * optim.batch_size / (time.perf_counter() - clock)
                seen = {"epoch": round(done / batches.steps_per_epoch, 4), "images_seen": done * optim.batch_size}
                record = {"step": done, "steps": steps, **seen, "loss": mean, "images_per_second": rate}
                if not math.isfinite(mean):
                    raise ConfigError(f"{out}: the loss is {mean} at step {done}; give a smaller --lr")
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
                losses, clock = [], time.perf_counter()
            if saves:
                save(model, optimiser, like, out, done, steps)
                points.end_if_asked()
    return rate


def save(model: Any, optimiser: Any, like: PretrainConfig, out: Path, done: int, steps: int) -> None:
    """Writes last.pt, and the encoders as a run does."""
    state = {"step": done, "steps": steps, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
    save_state(state, out / "last.pt")
    metadata = {
        "architecture": like.model,
        "model_args": json.dumps({"img_size": like.backbone.img_size}),
        "images_seen": str(done * like.optimiser.batch_size),
    }
    for name in (name for name in ("online", "target") if hasattr(model, name)):
        tensors = {key: value.detach().cpu() for key, value in getattr(model, name).state_dict().items()}
        with replacing(out / f"{name}.safetensors", CheckpointError) as file:
            save_file(tensors, file, {"format": "pt", **metadata})


def main() -> int:
    """Trains what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("run", type=Path, help="run directory, or release folder, whose cost is matched")
    parser.add_argument("--out", type=Path, required=True, help="the rival's directory")
    parser.add_argument("--match", choices=["images", "minutes"], default="images")
    parser.add_argument("--lr", type=float, help="peak learning rate per 256 images, in place of the paper's")
    parser.add_argument("--data", type=Path, help="the run's images, which a release does not name")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        rival(options.method, options.run, options.out, options.match, options.lr, options.data)
    except CimModelsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
