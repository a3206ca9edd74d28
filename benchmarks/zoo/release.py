"""Makes a release of a run of the zoo: `cim release` with what the run's own files and its results say.

    python benchmarks/zoo/release.py runs/models/small --tag tin200_20min

Metrics are those of the JSON files below `--results` that measured an encoder of the run, and random weights in its
place. Hardware, minutes and energy come from the cost.jsonl of the run and of those that it started from. Where the
training set was not all of Tiny ImageNet, say so with `--data`.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from cim_models.errors import CimModelsError
from cim_models.evaluation.protocol import Report
from cim_models.hub.provenance import read_stages, seen_by
from cim_models.hub.release import release
from cim_models.hub.weights import read_header

DATA = "Tiny ImageNet-200, all 100,000 training images of 64 × 64 pixels, labels unused"
TERMS = "images of ImageNet: non-commercial research and educational use only"
LICENCE = "cc-by-nc-4.0"
PROTOCOLS = ("knn", "linear", "lowshot", "finetune", "segment", "correlation")
"""In the order in which a card shows them."""


def metrics(results: Path, run: Path) -> tuple[Path, ...]:
    """The results that measured an encoder of a run, or random weights with the same recipe."""
    found = []
    for path in results.rglob("*.json"):
        report = Report.load(path)
        model = Path(report.model["model"])
        if run in (model, model.parent) and not report.settings.get("from_scratch"):
            found.append(((PROTOCOLS.index(report.protocol.partition("-")[0]), str(path)), path))
    return tuple(path for _, path in sorted(found))


def hardware(run: Path) -> str:
    """On what, for how long, and with what energy a run was made, with those that it started from.

    Of weights that the first of them started from, the minutes are known at most.
    """
    stages = read_stages(run, "online")
    folders = [Path(stage.config["init"]) for stage in stages[1:]] + [run]
    files = [file for folder in folders if (file := folder / "cost.jsonl").is_file()]
    costs: list[dict[str, Any]] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    said = ", ".join(dict.fromkeys(cost["device"] for cost in costs)) or "not stated"
    if seen := seen_by(run / "online.safetensors"):
        said += f", {seen['minutes']:.1f} minutes of training"
    if len(files) == len(stages) and not stages[0].config.get("init") and all(cost["watts"] for cost in costs):
        said += f", about {sum(cost['watts'] * cost['seconds'] for cost in costs) / 3.6e6:.2g} kWh of the GPU"
    return said


def main() -> int:
    """Makes the release; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tag", required=True, help="what follows the architecture in the id")
    parser.add_argument("--encoder", choices=["online", "target"], default="online")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--data", default=DATA, help="what the run saw")
    parser.add_argument("--root", type=Path, help="folder with weights_manifest.json; by default the repository")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        architecture = read_header(options.run / "online.safetensors").metadata["architecture"]
        folder = release(
            options.run, id=f"{architecture}.{options.tag}", encoder=options.encoder, data=options.data, terms=TERMS,
            licence=LICENCE, metrics=metrics(options.results, options.run), hardware=hardware(options.run),
            root=options.root,
        )  # fmt: skip
    except CimModelsError as error:
        print(error, file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
