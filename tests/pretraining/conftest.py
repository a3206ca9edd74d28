"""A run small enough for a test, in a run directory that is emptied afterwards."""

import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from cim_models.pretraining.config import PretrainConfig, from_dict

SMALL = {
    "model": "cim_vit_tiny",
    "log_every": 1,
    "data": {"size": 64, "workers": 0},
    "diagnostics": {"held_out": 0},
    "backbone": {"img_size": 64},
    "views": {"context_size": 64, "exemplars": {"count": 2, "size": 32}},
    "pretext": {"head_width": 96, "head_heads": 3, "freeze_patch_embed": False},
    "optimiser": {"batch_size": 4, "epochs": 2, "warmup_epochs": 0.5, "lr": 0.01},
}
"""Two steps on eight images."""


@pytest.fixture(scope="session")
def configure() -> Callable[..., PretrainConfig]:
    """`configure(data, out, optimiser__lr=1.0)` gives the small configuration with some fields changed."""

    def make(data: str | Path, out: str | Path, **changes: Any) -> PretrainConfig:
        config = from_dict(PretrainConfig, SMALL, "small")
        config.data.path, config.out = str(data), str(out)
        for name, value in changes.items():
            *path, last = name.split("__")
            setattr(reduce(getattr, path, config), last, value)
        return config

    return make


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A run directory that does not exist yet; what a test leaves there, 100 MB of weights, is removed."""
    yield tmp_path / "run"
    if (tmp_path / "run").is_dir():
        shutil.rmtree(tmp_path / "run")
