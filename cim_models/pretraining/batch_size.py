"""`optimiser.batch_size: auto`: how many images at once a run has memory for."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from cim_models import precision
from cim_models.errors import CheckpointError
from cim_models.pretext.views import DRAWS, make_views
from cim_models.pretraining.build import adamw, build
from cim_models.pretraining.config import PretrainConfig, load_recipe
from cim_models.pretraining.data import Pictures
from cim_models.pretraining.diagnostics import diagnose
from cim_models.pretraining.memory import largest_batch
from cim_models.processes import launched

logger = logging.getLogger(__name__)


def with_batch_size(
    config: PretrainConfig, pictures: Pictures, device: torch.device, processes: int, resume: bool
) -> PretrainConfig:
    """The run with a number of images in place of `auto`: of a run that goes on, the number that it began with.

    Raises:
        CheckpointError: If the run goes on and does not say it.
        ConfigError: If there is no such model, or two images do not fit.
    """
    if config.optimiser.batch_size != "auto":
        return config
    found = found_before(Path(config.out)) if resume else find_batch_size(config, pictures, device, processes)
    if launched().first:
        logger.info("optimiser.batch_size: auto is %d", found)
    return dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, batch_size=found))


def found_before(directory: Path) -> int:
    """The batch size of a run that goes on, which `auto` stands for.

    Raises:
        CheckpointError: If the run does not say it.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"there is no {path}, which says what auto stands for; give optimiser.batch_size")
    return int(load_recipe(path).optimiser.batch_size)


def find_batch_size(config: PretrainConfig, pictures: Pictures, device: torch.device, processes: int) -> int:
    """The most images per process and backward pass whose step fits all devices of a run.

    Args:
        config: The run.
        pictures: That it is trained on; an epoch has a step at least, and a cache on the device its place.
        device: Of this process.
        processes: Of the run.

    Raises:
        ConfigError: If there is no such model, or two images do not fit.
    """
    step = _trial(config, device, processes)
    most = max(2, len(pictures) // (processes * config.optimiser.accumulation))
    cached = len(pictures) * 3 * (config.data.cache_side or pictures.min_size) ** 2
    taken = cached if config.data.cache == "device" else 0
    found = largest_batch(step, most, device, 1 if device.type == "cuda" else processes, taken)
    return min(launched().gather_for_all(found))


def _trial(config: PretrainConfig, device: torch.device, processes: int) -> Callable[[int], None]:
    """A step with any number of images, for its memory alone: of a model and of images of its own."""
    autocast = precision.autocast(device, config.precision)
    cim = build(config, 0.0).to(device)
    optimiser = adamw(cim, config.optimiser, device)

    def step(images: int) -> None:
        size = config.data.size
        source = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
        uniforms = torch.rand(images, config.views.exemplars.count, DRAWS, device=device)
        try:
            views = make_views(source, uniforms, config.views)
            with autocast:
                output = cim(*views)
            output.loss.backward()
            with autocast:
                diagnose(cim, output, views)
            optimiser.step()
        finally:
            optimiser.zero_grad(set_to_none=processes == 1)  # several keep the gradient where they send it from

    return step
