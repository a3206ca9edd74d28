"""What a pretrained model costs: creation and load of a ViT-Base-size checkpoint, beside stock timm's way.

    python benchmarks/load.py [--dtype float16]

Every time is that of one call in a fresh process, imports excluded, page cache warm, torch with one thread; checksums
of shards take as many cores as there are. The rows take turns. On a busy machine look at the processor's seconds. The
checkpoint is made for the occasion: a release in a temporary copy of the package; the model is float32, whatever the
files hold. Outputs are compared in the first round, which fills the page cache and is not counted.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cim_models.workers import CORES

ROOT = Path(__file__).resolve().parents[1]
ID = "cim_vit_base.benchmark"
STOCK = "timm.create_model + load_state_dict"
UNKNOWN, KNOWN = ", sha256 computed", ", file known to be good"
OURS, THROUGH_TIMM = "cim_models.create_model", "timm.create_model('cim_vit_base')"
BARS = {UNKNOWN: 7, KNOWN: 25}
"""How many times faster than stock timm it shall be."""

CALLS = {
    STOCK: f"""
model = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="avg", fc_norm=False)
tensors = {{}}
for path in Path("weights/{ID}").glob("*.safetensors"):
    tensors |= load_file(path)
model.load_state_dict(tensors)""",
    OURS: """
model = cim_models.create_model("cim_vit_base", pretrained=True)""",
    THROUGH_TIMM: """
model = timm.create_model("cim_vit_base", pretrained=True)""",
}
PROCESS = """
import hashlib, time
from pathlib import Path
import timm, torch
from safetensors.torch import load_file
import cim_models
from cim_models.hub.load import create_model
torch.set_num_threads(1)
start, cpu = time.perf_counter(), time.process_time()
{call}
print(time.perf_counter() - start, time.process_time() - cpu)
if {compare}:
    with torch.no_grad():
        output = model.eval()(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224))
    print(hashlib.sha256(output.numpy().tobytes()).hexdigest())
"""
RELEASE = f"""
import torch
from pathlib import Path
from cim_models.backbones import build
from cim_models.hub.entry import Entry
from cim_models.hub.folder import BLANK, preprocessing, write_folder
from cim_models.hub.manifest import Manifest, write_manifest
torch.manual_seed(0)
entry = Entry(id="{ID}", architecture="cim_vit_base", model_args={{}}, num_classes=0, kind="backbone", encoder="online",
    sources=("repository",), preprocessing=preprocessing(224, 0.9), pretext=None, dtype="DTYPE", licence="none",
    data=(), metrics=(), summary="Random numbers.", released="2026-01-01", **BLANK)
folder = Path("weights/{ID}")
folder.mkdir(parents=True)
entry = write_folder(folder, entry, {{"backbone": build("cim_vit_base").state_dict()}}, {{}})
write_manifest(Manifest(Path("."), {{entry.id: entry}}))
"""


def python(code: str, folder: Path) -> str:
    """Runs code in a process whose cim_models is the copy in `folder`, and whose memory of files is there, too."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CIM_")}
    environment |= {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32", help="of the files")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = options.rounds
    seconds: dict[str, list[tuple[float, ...]]] = {}
    outputs = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ignore = shutil.ignore_patterns("__pycache__", "_data")
        shutil.copytree(ROOT / "cim_models", folder / "cim_models", ignore=ignore)
        (folder / "weights_manifest.json").write_text('{"version": 1, "entries": {}}')
        python(RELEASE.replace("DTYPE", options.dtype), folder)
        megabytes = sum(path.stat().st_size for path in (folder / "weights" / ID).glob("*.safetensors")) / 1e6
        time.sleep(2.1)  # a file that has just changed is not remembered
        for number in range(rounds + 1):
            for call in CALLS:
                for memory in [""] if call == STOCK else [UNKNOWN, KNOWN]:
                    if memory == UNKNOWN:
                        shutil.rmtree(folder / "cache", ignore_errors=True)
                    took, *output = python(PROCESS.format(call=CALLS[call], compare=not number), folder).splitlines()
                    outputs.update(output)
                    if number:
                        seconds.setdefault(call + memory, []).append(tuple(map(float, took.split())))
    print(f"{megabytes:.0f} MB of {options.dtype}, medians of {rounds} fresh processes, {CORES} cores")
    print(f"{'':58}{'ms':>8}{'ratio':>7}{'ms of CPU':>12}{'ratio':>7}{'bar':>6}")
    medians = {
        row: [statistics.median(column) for column in zip(*times, strict=True)] for row, times in seconds.items()
    }
    for row, (wall, cpu) in medians.items():
        bar = next((str(bar) for end, bar in BARS.items() if row.endswith(end)), "")
        stock_wall, stock_cpu = medians[STOCK]
        ratios = f"{wall * 1e3:8.0f}{stock_wall / wall:7.1f}{cpu * 1e3:12.0f}{stock_cpu / cpu:7.1f}"
        print(f"{row:58}{ratios}{bar:>6}")
    print("outputs equal:", len(outputs) == 1)


if __name__ == "__main__":
    main()
