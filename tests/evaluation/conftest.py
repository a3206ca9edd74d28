"""A run directory with small random encoders and their head: everything that evaluation asks of weights."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cim_models.backbones import build
from cim_models.images import find_images
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretext.views import ViewConfig


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run directory that hold weights: `cim_vit_tiny` with two blocks, for images of 64 pixels."""
    folder = tmp_path_factory.mktemp("run")
    model_args, config = {"depth": 2, "img_size": 64}, PretextConfig(head_width=64, head_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        cim = CIM(build("cim_vit_tiny", **model_args), config)
        torch.nn.init.normal_(cim.head.predict.weight)
        for parameter in cim.target.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    metadata = {
        "architecture": "cim_vit_tiny",
        "model_args": json.dumps(model_args),
        "pretext": json.dumps(dataclasses.asdict(config)),
        "views": json.dumps(dataclasses.asdict(ViewConfig(context_size=64, exemplars=ExemplarConfig(size=32)))),
        "step": "0",
        "images_seen": "0",
    }
    for name in ("online", "target", "head"):
        save_file(getattr(cim, name).state_dict(), folder / f"{name}.safetensors", metadata)
    return folder


@pytest.fixture
def splits(tmp_path: Path, photographs: Callable[[int, int], Path]) -> Path:
    """Two classes, the photographs with even and odd numbers: `train` has 8 + 8 files and `val` 3 + 3."""
    paths = find_images(photographs(22, 80))
    for split, start, stop in (("train", 0, 8), ("val", 8, 11)):
        for label, name in enumerate(("even", "odd")):
            folder = tmp_path / split / name / "deep"
            folder.mkdir(parents=True)
            for path in paths[label::2][start:stop]:
                shutil.copy(path, folder)
    return tmp_path
