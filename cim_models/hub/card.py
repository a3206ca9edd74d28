"""Texts made from manifest entries: the card of a release, and README's table of models. Needs no torch."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cim_models.errors import ConfigError
from cim_models.files import replacing
from cim_models.hub.entry import Entry, Metric
from cim_models.hub.manifest import Manifest

RECIPE, LOG = "recipe.yaml", "log.jsonl"
"""Files of a release folder that its card quotes."""
BEGIN, END = "<!-- models -->", "<!-- /models -->"
"""README's table of models stands between these lines."""
OPEN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")
"""Licences that the Hugging Face Hub knows by these names."""
NOT_STATED = "not stated"
"""Of a text that nobody gave."""
RANDOM = "random"
"""What follows the dot in the name of a metric of the untrained backbone, as `online` and `target` do of encoders."""
MEAN = "; mean of "
"""What follows the data of a metric, with a number, if several measurements were made."""


def render_card(entry: Entry, folder: Path) -> str:
    """The README.md of a release folder: a function of its entry, `recipe.yaml` and `log.jsonl`, if it has them."""
    what = {
        "backbone": "A vision encoder, pretrained without labels by",
        "pretext": "An encoder pair with its correlation head, pretrained without labels by",
        "finetuned": "A classifier with an encoder of",
    }[entry.kind]
    facts = {
        "Architecture": f"`{entry.architecture}`{_arguments(entry)}, {entry.parameters:,} parameters, {entry.dtype}",
        "Input": "{1} × {2} pixels ({0} channels)".format(*entry.preprocessing.input_size)
        + f", {entry.preprocessing.interpolation}, {entry.preprocessing.crop_pct:g} {entry.preprocessing.crop_mode}",
        "Licence": entry.licence,
        "Released": entry.released,
    }
    sections = [
        _front_matter(entry),
        f"# {entry.id}",
        entry.summary,
        f"{what} Correlational Image Modeling (Li, Xie, Loy, CVPR 2023).",
        _list(facts),
        "## Use",
        f"```python\n{snippet(entry)}```",
        "## Data and terms",
        _list({data.name: data.terms for data in entry.data}) or "Not recorded.",
        "## Training",
        _list(_header(folder / RECIPE)) or "Not recorded.",
        _progress(folder / LOG),
        "## Metrics",
        _metrics(entry),
        _which_encoder(entry),
        "## Limits",
        _limits(entry),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def snippet(entry: Entry) -> str:
    """Six lines of Python that use a release."""
    name = entry.id if entry.sources else "local-dir:FOLDER"
    if entry.kind == "pretext" and entry.pretext is not None:
        side, small = entry.pretext.context_size, entry.pretext.exemplar_size
        return (
            "import cim_models\n"
            "import torch\n"
            f'pretext = cim_models.create_pretext("{name}").eval()\n'
            f"context = torch.randn(1, 3, {side}, {side})  # pictures, normalised like ImageNet\n"
            f"exemplars = torch.randn(1, 2, 3, {small}, {small})\n"
            f"maps = pretext.locate(context, exemplars)  # (1, 2, {side}, {side}) probabilities\n"
        )
    says = "class scores" if entry.num_classes else "features"
    return (
        "import cim_models\n"
        "from PIL import Image\n"
        f'encoder = cim_models.create_model("{name}", pretrained=True).eval()\n'
        "transform = cim_models.create_transform(encoder)\n"
        'image = Image.open("photo.jpg").convert("RGB")\n'
        f"output = encoder(transform(image)[None])  # (1, …) {says}\n"
    )


def models_table(manifest: Manifest) -> str:
    """README's table of models, in Markdown; empty without any."""
    rows = [("name", "parameters", "download", "input", "trained on", "measured", "licence")]
    for entry in manifest.entries.values():
        rows.append(
            (
                f"[`{entry.id}`]({_page(entry)})",
                f"{entry.parameters / 1e6:.1f} M",
                f"{entry.bytes / 1e6:.1f} MB",
                "{1} × {2}".format(*entry.preprocessing.input_size),
                ", ".join(data.name for data in entry.data) or "not recorded",
                _headline(entry),
                entry.licence,
            )
        )
    return _table(rows) + "\n" if len(rows) > 1 else ""


def readme_with_table(text: str, manifest: Manifest) -> str:
    """README's text with the table of this manifest; ConfigError if the two lines that enclose it are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"README.md: the lines {BEGIN} and {END}, which enclose the table of models, are missing")
    return f"{before}{begin}\n{models_table(manifest)}{end}{after}"


def update_readme(manifest: Manifest) -> Path | None:
    """Writes the table into `manifest.root / README.md` whole or not at all; None where there is no place for it."""
    path = manifest.root / "README.md"
    if not path.is_file() or BEGIN not in path.read_text(encoding="utf-8"):
        return None
    with replacing(path) as file:
        file.write_text(readme_with_table(path.read_text(encoding="utf-8"), manifest), encoding="utf-8")
    return path


def shown(metric: Metric) -> str:
    """A value for people: accuracies, whose names hold `top`, as percentages."""
    return f"{metric.value:.1%}" if "top" in metric.name else f"{metric.value:.4g}"


def _front_matter(entry: Entry) -> str:
    """What the Hugging Face Hub reads."""
    known = entry.licence.lower() in OPEN_LICENCES
    values: dict[str, Any] = {"license": entry.licence.lower() if known else "other"}
    if not known:
        values["license_name"] = re.sub(r"[^a-z0-9.]+", "-", entry.licence.lower()).strip("-")
    values["library_name"] = "timm" if "backbone" in entry.parts else "cim_models"
    values["pipeline_tag"] = "image-classification" if entry.num_classes else "image-feature-extraction"
    values["tags"] = ["timm", "cim", "self-supervised-learning", entry.architecture]
    names = [data.name.lower() for data in entry.data if data.name != NOT_STATED]
    slugs = [re.sub(r"[^a-z0-9]+", "-", name).strip("-") for name in names]
    values["datasets"] = [slug for slug in slugs if slug]
    return f"---\n{yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False)}---"


def _arguments(entry: Entry) -> str:
    return f" ({', '.join(f'{key}={value!r}' for key, value in entry.model_args.items())})" if entry.model_args else ""


def _header(path: Path) -> dict[str, str]:
    """The `# Key: value` lines at the top of a recipe."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if not line.startswith("#"):
            break
        key, colon, value = line.lstrip("# ").partition(":")
        if colon:
            found[key] = value.strip()
    return found


def _progress(path: Path) -> str:
    """Where the run ended, from the last line of its log."""
    if not path.is_file():
        return ""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last: dict[str, Any] = next((record for record in reversed(records) if "loss" in record), {})
    names = {
        "loss": "loss",
        "prior_loss": "loss of the location prior, which a model that learned nothing of images reaches",
        "gap": "rise of the loss with the exemplars of another image",
        "iou": "correlation IoU",
        "iou_shuffled": "correlation IoU with the exemplars of another image",
    }
    rows = [(text, f"{last[key]:.3f}") for key, text in names.items() if key in last]
    return _table([("last training batch", "value"), *rows]) if rows else ""


def _metrics(entry: Entry) -> str:
    if not entry.metrics:
        return "Nothing was measured."
    rows = [(metric.name, shown(metric), metric.data, f"`{metric.command}`") for metric in entry.metrics]
    return _table([("metric", "value", "data", "command"), *rows])


def _which_encoder(entry: Entry) -> str:
    """Which encoder the backbone is, and how the other one and random weights compare."""
    if entry.encoder is None:
        return ""
    other = "online" if entry.encoder == "target" else "target"
    said = f"The backbone is the **{entry.encoder}** encoder."
    for mine in (metric for metric in entry.metrics if metric.name.endswith(f".{entry.encoder}")):
        others = {f"the {other} encoder": _beside(entry, mine, other), "random weights": _beside(entry, mine, RANDOM)}
        values = {what: shown(metric) for what, metric in others.items() if metric}
        if any(value != shown(mine) for value in values.values()):
            compared = " and ".join(f"{value} for {what}" for what, value in values.items())
            name = mine.name.removesuffix(f".{entry.encoder}")
            said += f" {name} on {mine.data}: {shown(mine)}, against {compared}."
    if entry.kind == "backbone" and "pretext" in entry.parts:
        said += " It serves both sides of `locate`."
    return said


def _limits(entry: Entry) -> str:
    channels, height, width = entry.preprocessing.input_size
    limits = [
        f"Made for pictures of {height} × {width} pixels; other sizes work, but were not evaluated.",
        "What stands under Metrics is all that was measured; other data can give quite other results.",
        "It has whatever biases its data have, and must not decide about people.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _page(entry: Entry) -> str:
    """Where the card is: beside the files in the repository, or on the Hub."""
    hub = next((source for source in entry.sources if source.startswith("hf-hub:")), None)
    if hub is None or "repository" in entry.sources:
        return f"{Path(entry.files[0].path).parent.as_posix()}/README.md"
    return f"https://huggingface.co/{hub.removeprefix('hf-hub:').replace('@', '/tree/')}"


def _headline(entry: Entry) -> str:
    """The first metric of the released encoder, or of no single one, with that of random weights beside it."""
    mine = next((metric for metric in entry.metrics if metric.name.endswith(f".{entry.encoder}")), None)
    others = (".online", ".target", f".{RANDOM}")
    mine = mine or next((metric for metric in entry.metrics if not metric.name.endswith(others)), None)
    if mine is None:
        return "nothing"
    random = _beside(entry, mine, RANDOM)
    name = mine.name.removesuffix(f".{entry.encoder}")
    return f"{name} {shown(mine)}{f' (random weights {shown(random)})' if random else ''}, {mine.data}"


def _beside(entry: Entry, metric: Metric, whose: str) -> Metric | None:
    """The same number of another encoder or of random weights, on the same data, whatever it is a mean of."""
    name, data = f"{metric.name.rpartition('.')[0]}.{whose}", metric.data.partition(MEAN)[0]
    return next((other for other in entry.metrics if (other.name, other.data.partition(MEAN)[0]) == (name, data)), None)


def _list(values: dict[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in values.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
