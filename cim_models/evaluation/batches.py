"""What a training step sees: a function of seed, epoch and step, whatever number of processes reads images."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from cim_models.evaluation.recipe import Plan

_ORDER, _IMAGE, _STEP = range(3)

Example: TypeAlias = tuple[Tensor | None, Any, list[str]]
"""What goes in, what should come out, and `path: reason` of images that could not be read."""


class Steps(Sampler[list[tuple[int, int]]]):
    """The images (epoch, index) of one process in each step of a plan, from a step on.

    The order of an epoch is a function of (seed, epoch); an incomplete step at its end is left out.
    """

    def __init__(self, images: int, plan: Plan, seed: int, start: int = 0, rank: int = 0, processes: int = 1) -> None:
        self.images, self.plan, self.seed, self.start = images, plan, seed, start
        self.slice = slice(rank * plan.batch // processes, (rank + 1) * plan.batch // processes)

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.plan.steps):
            epoch, position = divmod(step, self.plan.steps_per_epoch)
            if position == 0 or not order:
                order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.images).tolist()
            images = order[position * self.plan.batch : (position + 1) * self.plan.batch]
            yield [(epoch, index) for index in images[self.slice]]


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch as a function of the key; on the CPU the old ones come back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def step_seed(seed: int, step: int, rank: int) -> contextlib.AbstractContextManager[None]:
    """`seeded` for what is random in a step of one process, beside its images."""
    return seeded(seed, _STEP, step, rank)


def image_seed(seed: int, epoch: int, index: int) -> contextlib.AbstractContextManager[None]:
    """`seeded` for the augmentation of one image."""
    return seeded(seed, _IMAGE, epoch, index)


def collate(samples: list[Example]) -> tuple[Tensor | None, Tensor, list[str]]:
    """Inputs and targets of the examples that have an image, and what is said of unreadable ones."""
    good = [(inputs, target) for inputs, target, _ in samples if inputs is not None]
    failed = [reason for *_, reasons in samples for reason in reasons]
    if not good:
        return None, torch.empty(0), failed
    inputs, targets = zip(*good, strict=True)
    return torch.stack(inputs), torch.stack([torch.as_tensor(target) for target in targets]), failed
