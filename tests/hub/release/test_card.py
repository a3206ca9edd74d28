"""Cards and README's table follow from manifest entries, and say what a user must know."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from cim_models import create_model, create_transform
from cim_models.errors import ConfigError
from cim_models.hub import card
from cim_models.hub import release as module
from cim_models.hub.entry import to_dict
from cim_models.hub.manifest import load_manifest
from cim_models.pretraining.config import load_recipe

ROOT = Path(__file__).resolve().parents[3]
TEXTS = dict(summary="Small, for tests.", data="Tiny", terms="research only", licence="Apache-2.0", hardware="2 cores")
# ---------------------------------------------------------------- texts


def test_the_card_says_what_a_user_must_know(run, root):
    made = module.release(
        run, id="cim_vit_tiny.t1", root=root, encoder="target", metrics=(run / "metrics.json",), **TEXTS
    )
    text = (made / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("apache-2.0", "timm") and "timm" in front["tags"]
    for said in (
        "Small, for tests.",
        "- Tiny: research only",
        "- Hardware: 2 cores",
        "- Time: 5.3 hours",
        "- Images: 76,800 seen",
        "| knn_top1.target | 9.1% | Tiny val | `cim evaluate knn target` |",
        "| shuffled-exemplar gap | 0.2461 | Tiny val | `python / gap` |",
        "The backbone is the **target** encoder.",
        "9.1%, against 8.3% for the online encoder and 2.4% for random weights",
        "- Licence: Apache-2.0",
        "## Limits",
    ):
        assert said in text, said
    assert len(card.snippet(load_manifest(root).entries["cim_vit_tiny.t1"]).splitlines()) == 6


def test_a_licence_that_the_hub_does_not_know(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root, licence="S-Lab License 1.0 (non-commercial)")
    front = yaml.safe_load((made / "README.md").read_text().split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "s-lab-license-1.0-non-commercial")
    assert "datasets" not in front, "nobody said which"


def test_data_whose_name_has_no_letter_that_the_hub_takes(run, root):
    """It refuses a card whose list of data has an empty one."""
    made = module.release(run, id="cim_vit_tiny.t1", root=root, data="写真", terms="mine")
    assert "datasets" not in yaml.safe_load((made / "README.md").read_text().split("---")[1])
    assert "- 写真: mine" in (made / "README.md").read_text(encoding="utf-8")


def test_nothing_of_the_machine_is_published(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    for path in made.glob("*.*"):
        assert str(run.parent).encode() not in path.read_bytes() and b"me.jpg" not in path.read_bytes(), path
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["README.md", "config.json", "log.jsonl", "model.safetensors", "pretext.safetensors", "recipe.yaml"]
    )
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in made.iterdir()) and made.stat().st_mode & 0o055 == 0o055


def test_the_recipe_is_one(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    recipe = load_recipe(made / "recipe.yaml")
    assert (recipe.model, recipe.views.exemplars.size, recipe.out) == ("cim_vit_tiny", 32, "")


@pytest.fixture(scope="module")
def copy(making, tmp_path_factory) -> Path:
    """A plain copy of the package with a release of its own in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "cim_models", folder / "cim_models", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    making.make_run(folder / "run")
    metrics = folder / "run" / "metrics.json"
    module.release(folder / "run", id="cim_vit_tiny.t1", root=making.make_root(folder), metrics=(metrics,))
    return folder


def test_the_snippet_of_the_card_runs(making, copy, tmp_path):
    text = (copy / "weights" / "cim_vit_tiny.t1" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    code += "print(tuple(output.shape), float(output.detach().double().sum()))\n"
    said = making.run_python(code, copy, cwd=tmp_path)
    model = create_model(copy / "weights" / "cim_vit_tiny.t1").eval()
    with Image.open(tmp_path / "photo.jpg") as image, torch.no_grad():
        expected = model(create_transform(model)(image.convert("RGB"))[None])
    assert said.startswith("(1, 192) ")
    assert float(said.split()[-1]) == pytest.approx(float(expected.double().sum()), abs=1e-3)


def test_readme_has_the_table_of_the_manifest(run, root):
    module.release(run, id="cim_vit_tiny.t1", root=root, metrics=(run / "metrics.json",), **TEXTS)
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- models -->\n| name |") and text.endswith("|\n<!-- /models -->\n\nEnd\n")
    row = "| 64 × 64 | Tiny | knn_top1 8.3% (random weights 2.4%), Tiny val | Apache-2.0 |"
    assert "[`cim_vit_tiny.t1`](weights/cim_vit_tiny.t1/README.md)" in text and row in text
    assert card.readme_with_table(text, load_manifest(root)) == text
    manifest = load_manifest(root)
    entry = replace(manifest.entries["cim_vit_tiny.t1"], sources=(f"hf-hub:org/name@{'0' * 40}",))
    page = f"https://huggingface.co/org/name/tree/{'0' * 40}"
    assert f"[`cim_vit_tiny.t1`]({page})" in card.models_table(manifest.with_entry(entry))
    (root / "README.md").write_text("# no table")
    assert card.update_readme(load_manifest(root)) is None
    with pytest.raises(ConfigError, match="<!-- models -->"):
        card.readme_with_table("# no table", load_manifest(root))


@pytest.mark.parametrize("order", [1, -1])
def test_numbers_are_compared_on_the_same_data(run, root, order):
    """Whichever came first, and however many seeds each is a mean of."""
    values = {("online", "A; mean of 3"): 0.2, ("random", "A"): 0.03, ("online", "B"): 0.6, ("random", "B"): 0.5}
    listed = [
        {"name": f"knn_top1.{whose}", "value": value, "data": data, "command": "cim evaluate knn"}
        for (whose, data), value in values.items()
    ]
    (run / "metrics.json").write_text(json.dumps(listed[::order]))
    made = module.release(run, id="cim_vit_tiny.t1", root=root, metrics=(run / "metrics.json",), **TEXTS)
    text = (made / "README.md").read_text()
    assert "on A; mean of 3: 20.0%, against 3.0% for random" in text and "on B: 60.0%, against 50.0% for random" in text
    table = {1: "20.0% (random weights 3.0%), A; mean of 3 |", -1: "60.0% (random weights 50.0%), B |"}[order]
    assert table in (root / "README.md").read_text()


@pytest.mark.parametrize("whose", ["target", "random"])
def test_a_number_of_another_encoder_is_not_in_the_table(run, root, whose):
    metric = {"name": f"knn_top1.{whose}", "value": 0.5, "data": "Tiny val", "command": "cim evaluate knn"}
    (run / "metrics.json").write_text(json.dumps([metric]))
    module.release(run, id="cim_vit_tiny.t1", root=root, metrics=(run / "metrics.json",), **TEXTS)
    assert "| Tiny | nothing | Apache-2.0 |" in (root / "README.md").read_text()


def released_entries():
    return load_manifest(ROOT).entries.values() if (ROOT / "weights_manifest.json").is_file() else ()


@pytest.mark.parametrize("entry", released_entries(), ids=lambda entry: entry.id)
def test_cards_follow_from_their_entries(entry):
    made = ROOT / "weights" / entry.id
    assert (made / "README.md").read_text() == card.render_card(entry, made), "render the card again"
    described = json.loads((made / "config.json").read_text())["cim_models"]
    assert described | {"sources": list(entry.sources)} == to_dict(entry), "its own commit is not in a published file"


def test_this_readme_has_the_table_of_this_manifest():
    if not (ROOT / "README.md").is_file():
        pytest.skip("needs the README.md of the repository")
    text = (ROOT / "README.md").read_text()
    assert card.readme_with_table(text, load_manifest(ROOT)) == text, "run cim_models.hub.card.update_readme"


def test_a_card_is_rendered_the_same_again(copy):
    entry = load_manifest(copy).entries["cim_vit_tiny.t1"]
    made = copy / "weights" / entry.id
    assert (made / "README.md").read_text() == card.render_card(entry, made)
