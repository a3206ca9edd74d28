"""A recipe for training an encoder further, and its scaling to a number of images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.features import DEFAULT_WORKERS

BATCH, STEPS_PER_EPOCH = 1024, 16
"""Images of a step, as released; on small data fewer, so that an epoch has so many steps."""


@dataclass(frozen=True)
class TrainConfig:
    """How an encoder is trained further; the defaults are those of the released fine-tuning recipe."""

    epochs: float = 100.0
    """Length of the run in passes over the training images; fractions are fine."""
    warmup_epochs: float = 5.0
    """Linear warm-up of the learning rate; at most a fifth of the run."""
    batch_size: int | None = None
    """Images of an optimiser step, over all processes; by default 1024, on small data fewer: an epoch has 16 steps."""
    device_batch: int = 128
    """Images of a backward pass of one process, at most; a step has as many as it needs."""
    lr: float = 1.2e-3
    """Peak learning rate of a step of 256 images: larger steps have a proportionally larger one, smaller ones one that
    falls with the root of their size."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    layer_decay: float = 0.8
    """Factor between the learning rates of a layer and of the one above it; 1 treats all alike."""
    weight_decay: float = 0.05
    """On matrices and kernels only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    clip: float | None = None
    """Greatest 2-norm of the gradient."""
    ema: float = 0.0
    """Moving average of the weights, such as 0.9999: the greatest momentum, after a warm-up; 0 has none."""
    held_out: float = 0.1
    """Share of the training images that only chooses the best weights; 0 takes the last ones."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of training; auto is bf16 where the hardware multiplies it natively. Evaluation is in fp32."""
    seed: int = 0
    """Of everything random."""
    workers: int = DEFAULT_WORKERS
    """Processes that read images."""

    def check(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for meaning, fits, names in LIMITS:
            for name in names.split():
                value = getattr(self, name, None)
                if value is not None and not all(map(fits, value if isinstance(value, tuple) else (value,))):
                    raise ConfigError(f"{name} is {value}; it must be {meaning}")
        for name in ("crop_area", "scale"):
            least, greatest = getattr(self, name, (0, 0))
            if least > greatest:
                raise ConfigError(f"{name} is {least} to {greatest}; it must not fall")


LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "greater than 0",
        lambda x: 0 < x < math.inf,
        "epochs batch_size device_batch lr clip crop_area head_lr scale width crop short_side",
    ),
    ("0 or more", lambda x: 0 <= x < math.inf, "warmup_epochs min_lr weight_decay workers mixup cutmix colour"),
    ("from 0 to less than 1", lambda x: 0 <= x < 1, "betas ema drop_path smoothing held_out"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "layer_decay erasing crop_area"),
    ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "seed"),
)
"""What each number of a configuration may be, where it has one of the name."""


class Plan(NamedTuple):
    """The length of a run."""

    batch: int
    """Images of a step, over all processes."""
    steps_per_epoch: int
    steps: int
    warmup: int
    """Steps of the warm-up."""
    lr: float
    """Peak learning rate."""


def make_plan(config: TrainConfig, images: int, processes: int = 1, even: bool = False, most: int = BATCH) -> Plan:
    """Scales a recipe to a number of training images.

    Args:
        config: The recipe.
        images: To train on.
        processes: That share a step.
        most: Images of a step where the recipe does not say.
        even: Each process gets an even number of images at a time, as mixing pairs of them asks.

    Raises:
        DataError: If the images do not fill a step.
    """
    unit = processes * (2 if even else 1)
    small = 2 ** math.floor(math.log2(max(1, images / STEPS_PER_EPOCH)))
    batch = max(unit, (config.batch_size or min(most, small)) // unit * unit)
    if images < batch:
        raise DataError(f"{images} training images do not fill a step of {batch}: give more images")
    per_epoch = images // batch
    steps = max(1, round(config.epochs * per_epoch))
    warmup = min(round(config.warmup_epochs * per_epoch), steps // 5)
    return Plan(batch, per_epoch, steps, warmup, config.lr * (batch / 256) ** (1 if batch > 256 else 0.5))
