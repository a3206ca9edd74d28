"""Features of a folder in a file: written row by row, whatever the number of images, read by stock safetensors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from cim_models.errors import DataError
from cim_models.evaluation.encoders import DEFAULT_MODEL, describe, open_encoder
from cim_models.evaluation.features import DEFAULT_WORKERS, Features, Pooling, Precision, extract
from cim_models.evaluation.rows import RowWriter
from cim_models.files import check_writable, replacing
from cim_models.images import find_images
from cim_models.processes import launched


@dataclass
class Embedded:
    """Where the features of `embed` are."""

    path: Path
    """safetensors file with the tensor `features`, one row per readable image."""
    paths: Path
    """JSON lines: the image of each row."""
    shape: tuple[int, ...]
    """(N, D), or (N, D, h, w) when dense."""
    unreadable: list[str] = field(default_factory=list)
    """`path: reason` of each image without a row."""

    def __str__(self) -> str:
        lines = [f"{self.path}  features {' × '.join(map(str, self.shape))}", f"{self.paths}  the image of each row"]
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} images could not be read and have no row")
        return "\n".join(lines)


def embed(
    images: Path,
    /,
    model: str = DEFAULT_MODEL,
    out: Path = Path("features.safetensors"),
    *,
    pooling: Pooling = "patches",
    batch_size: int = 64,
    workers: int = DEFAULT_WORKERS,
    device: str | None = None,
    precision: Precision = "fp32",
) -> Embedded:
    """Writes the features of any number of images, in bounded memory.

    `features.safetensors` holds the tensor `features` with a row for each image, and says in its metadata which model,
    weights, transform and pooling made it; `features.paths.jsonl` beside it holds the path of each row. Both appear
    when they are complete. Under torchrun or `accelerate launch` all processes extract and the first one writes the
    same two files; all of them have to call it.

    Args:
        images: A folder, searched recursively, a text file with one path per line, or one image.
        model: Name of a model or of released weights, a release folder, a weights file, or any model of timm.
        out: The file to write.
        pooling: Mean of the patch tokens, class token, both, or the dense map.
        batch_size: Images at a time.
        workers: Processes that read images.
        device: Such as cuda or cpu; by default the GPU where there is one.
        precision: Of the encoder; the features are fp32.

    Raises:
        DataError: If there are no images or none can be read.
        ConfigError: If the file cannot be written or the model has no such pooling.
        WeightsError: If the model cannot be loaded.
    """
    processes, out = launched(), Path(out)
    if processes.first:
        check_writable(out)
    files = find_images(images)
    encoder = open_encoder(model, device=device or processes.device)
    about = {**describe(encoder, model), "pooling": pooling, "precision": precision}
    processes.check_same([about, files], f"{images} or {model}")
    batches = extract(
        encoder, files, pooling, batch_size=batch_size, workers=workers, precision=precision, progress="embed",
        processes=processes,
    )  # fmt: skip
    if not processes.first:
        list(batches)  # none: they go to the first process, which writes
    return processes.by_first(lambda: _write(batches, files, out, about))


def _write(batches: Iterable[Features], files: list[Path], out: Path, about: dict[str, Any]) -> Embedded:
    """Writes features, and the path of each row, as they come."""
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    names = _paths_file(out)
    unreadable: list[str] = []
    with replacing(out) as features, replacing(names) as texts, features.open("wb") as file, texts.open("wb") as lines:
        rows = RowWriter(file, len(files), metadata)
        for batch in batches:
            if len(batch.indices):
                rows.write(batch.features)
                lines.writelines(json.dumps(str(files[index])).encode() + b"\n" for index in batch.indices)
            unreadable += batch.unreadable.values()
        rows.finish()
    return Embedded(out, names, rows.shape, unreadable)


def load_features(path: str | Path) -> tuple[Tensor, list[str]]:
    """Reads what `embed` wrote.

    Returns:
        Features (N, D) float32 (dense: (N, D, h, w)), mapped from the file, and the path of each row's image.

    Raises:
        DataError: If a file is missing or damaged, or the two do not belong together.
    """
    path = Path(path)
    names = _paths_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
        paths = [json.loads(line) for line in names.read_bytes().splitlines()]
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot read features and {names.name} beside them: {error}") from error
    if len(paths) != len(features):
        raise DataError(f"{path} has {len(features)} rows, {names} has {len(paths)} paths: embed the images again")
    return features, paths


def _paths_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.paths.jsonl")
