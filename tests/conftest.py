"""What every test may ask for: the shared material beside the checkout, photographs made on the spot, limits."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # the Hub's client reads it once, when timm imports it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, where tests send it all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(min(torch.get_num_threads(), 4))  # OMP_NUM_THREADS may ask for fewer


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: reference tensors and data that do not travel with the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, a folder beside the checkout with reference tensors and data")
    return folder


@pytest.fixture(scope="session")
def repository() -> tuple[Path, list[Path]]:
    """The top of the repository and its files, relative to it: all that git tracks or would add."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return ROOT, sorted({Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()})


def photograph(index: int, size: int) -> Image.Image:
    """A picture (size, size) with what photographs have: smooth light, objects with edges and texture, some noise."""
    rng = np.random.default_rng([index, size])
    light = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    field = Image.fromarray(light).resize((size, size), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(3, 7)):
        mask = Image.new("L", (size, size))
        x, y = rng.uniform(0, size, 2)
        radii, turns = size * rng.uniform(0.08, 0.3, 7), np.sort(rng.uniform(0, 2 * np.pi, 7))
        corners = np.stack([x + radii * np.cos(turns), y + radii * np.sin(turns)], axis=1)
        if rng.random() < 0.5:
            ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
        else:
            ImageDraw.Draw(mask).ellipse((x - radii[0], y - radii[1], x + radii[0], y + radii[1]), fill=255)
        cells = int(rng.integers(2, 12))
        texture = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((size, size))
        paint = Image.blend(Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist())), texture, 0.4)
        field.paste(paint, mask=mask.filter(ImageFilter.GaussianBlur(size / 150)))
    noise = rng.normal(0, 4, (size, size, 1))
    return Image.fromarray(np.clip(np.asarray(field) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """`photographs(n, size)` gives a folder with n JPEG files of size × size pixels, the same ones at every call."""
    made: dict[tuple[int, int], Path] = {}

    def make(n: int = 8, size: int = 64) -> Path:
        if (n, size) not in made:
            folder = tmp_path_factory.mktemp(f"photographs_{n}_{size}_")
            for index in range(n):
                photograph(index, size).save(folder / f"{index:04d}.jpg", quality=92)
            made[n, size] = folder
        return made[n, size]

    return make


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`launch(program, *arguments)` runs a program in two processes of one torchrun, on the CPU, one thread each."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
        (tmp_path / "worker.py").write_text(program)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        changes = {
            "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return subprocess.run(
            [*command, tmp_path / "worker.py", *map(str, arguments)],
            env={**os.environ, **changes}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


@pytest.fixture
def small_files() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with small_files():` no file may grow beyond 4 kB, as on a full disk.

    Not even pytest's own output, so keep the block short.
    """
    resource = pytest.importorskip("resource", reason="needs limits on the size of files, which only Unix has")

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit


@pytest.fixture
def few_files() -> Iterator[None]:
    """No more than 40 files may be opened beside those that are; many systems allow 1,024 in all."""
    resource = pytest.importorskip("resource", reason="needs limits on open files, which only Unix has")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
