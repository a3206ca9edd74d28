"""Is a released weight what its entry says? Everything that can be computed is computed again."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cim_models.backbones.modes import evaluation_mode
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.entry import Golden, Part, key_digest
from cim_models.hub.integrity import check_file
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.manifest import Manifest, known_manifest
from cim_models.hub.store import released_files
from cim_models.hub.weights import read_header
from cim_models.pretext.model import CIM

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def verify(id: str, manifest: Manifest | None = None) -> dict[str, Any]:
    """Computes sizes, hashes, counts, key digest, dtype and golden outputs of an entry again.

    Args:
        id: Of an entry, or an architecture for its default one.
        manifest: Another manifest than the package's.

    Returns:
        What was computed, by the names of `Entry`; `files` are those that were found whole.

    Raises:
        WeightsError: If there is no such entry, a file is missing or damaged, or with every field that differs.
    """
    manifest = manifest or known_manifest(id)
    entry = manifest.find(id)
    files = released_files(entry, manifest.root)
    for part, paths in files.items():
        for path, file in zip(paths, (file for file in entry.files if file.part == part), strict=True):
            check_file(path, file, again=True)
    main: Part = "backbone" if "backbone" in entry.parts else "pretext"
    headers = [read_header(path) for path in files[main]]
    shapes = {key: shape for header in headers for key, shape in header.shapes.items()}
    dtypes = {dtype for header in headers for dtype in header.dtypes.values() if not dtype.startswith("I")}
    models: dict[str, nn.Module] = {}
    if "backbone" in entry.parts:
        models["backbone"] = create_model(entry.id, pretrained=True, manifest=manifest)
    if "pretext" in entry.parts:
        models["pretext"] = create_pretext(entry.id, manifest=manifest)
    computed: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in models[main].parameters()),
        "tensors": len(shapes),
        "key_digest": key_digest(shapes),
        "dtype": "+".join(sorted(DTYPES.get(dtype, dtype) for dtype in dtypes)),
        "num_classes": getattr(models[main], "num_classes", 0),
    }
    faults = [
        f"{field}: {getattr(entry, field)!r} recorded, {value!r} found"
        for field, value in computed.items()
        if getattr(entry, field) != value
    ]
    computed["golden"] = []
    for golden in entry.golden:
        output = golden_output(models[golden.part], golden.recipe, len(golden.output))
        distance = max(map(abs, map(float.__sub__, output, golden.output)), default=math.inf)
        if not distance <= golden.atol:
            faults.append(f"golden output of the {golden.part}: {distance:g} away from the recorded one")
        computed["golden"].append(Golden(golden.part, golden.recipe, tuple(output), golden.atol))
    if faults:
        raise WeightsError(f"{entry.id} is not what its entry says: {'; '.join(faults)}")
    return computed | {"files": [path for paths in files.values() for path in paths]}


def verify_releases(names: tuple[str, ...] = (), /) -> list[str]:
    """Computes again what is recorded of released weights: sizes, checksums, shapes, golden outputs.

    Args:
        names: Ids or architectures; by default all that is released.

    Raises:
        WeightsError: As `verify`.
    """
    chosen = names or tuple(known_manifest().entries)
    return [f"{name}  {len(verify(name)['files'])} files, all as recorded" for name in chosen]


@torch.no_grad()
def golden_output(model: nn.Module, recipe: str = "waves", count: int = 16) -> list[float]:
    """What a model says of a computed input: numbers that any machine can compute again.

    Args:
        model: An encoder with `pretrained_cfg`, or a `CIM`; it is left as it was.
        recipe: `waves`, the one input there is.
        count: How many numbers, spread evenly over the output: pooled features or class scores of an encoder, the
            probabilities of `CIM.locate` for the input's middle quarter as exemplar.

    Raises:
        ConfigError: If there is no such recipe.
    """
    if recipe != "waves":
        raise ConfigError(f"no golden input is called {recipe!r}: there is 'waves'")
    cfg: Any = (model.online if isinstance(model, CIM) else model).pretrained_cfg
    image = _waves(*cfg["input_size"]).to(next(model.parameters()))
    with evaluation_mode(model):
        if isinstance(model, CIM):
            height, width = image.shape[-2:]
            exemplar = image[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
            output = model.locate(image, exemplar[:, None])
        else:
            output = model(image)
    flat = output.flatten().double().cpu()
    return flat[torch.linspace(0, len(flat) - 1, count).long()].tolist()


def _waves(channels: int, height: int, width: int) -> Tensor:
    """(1, C, H, W) in [-1, 1]: a product of sines, of another wavelength in each channel and direction."""
    c, y, x = (torch.arange(n, dtype=torch.float64) for n in (channels, height, width))
    c = c.view(-1, 1, 1) + 1
    return (torch.sin(0.11 * c * y.view(1, -1, 1)) * torch.cos(0.07 * c * x.view(1, 1, -1) + c))[None].float()
