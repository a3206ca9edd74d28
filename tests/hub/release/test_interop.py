"""Those who have never heard of us load our releases: timm and transformers, from a folder and from the Hub."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from loopback import TOKEN
from PIL import Image
from safetensors.torch import load_file, save_file

from cim_models.backbones import build
from cim_models.hub import folder as folders
from cim_models.hub.fetch import fetch
from cim_models.hub.load import create_model, create_transform
from cim_models.hub.manifest import load_manifest
from cim_models.hub.publish import publish
from cim_models.hub.release import release

TIMM = """
import json, sys
sys.modules["cim_models"] = None
import timm
from safetensors.torch import load_file, save_file
images, outputs = load_file("images.safetensors")["images"], {}
for when in ("before", "after"):
    for name, (id, classes) in json.load(open("names.json")).items():
        model = timm.create_model(name, pretrained=True).eval()
        outputs |= {f"{name} {when}": model(images), f"{name} {when} maps": model.forward_features(images)}
        other = timm.create_model(name, pretrained=True, num_classes=10).eval()
        assert other(images).shape == (2, 10)
        assert all((value == other.state_dict()[key]).all() for key, value in model.state_dict().items()
                   if key.partition(".")[0] not in ("head", "fc"))
        cfg = timm.data.resolve_data_config(model=model)
        assert tuple(cfg["input_size"]) == (3, 64, 64) and cfg["crop_pct"] == 0.8, cfg
        assert tuple(cfg["mean"]) == (0.485, 0.456, 0.406) and cfg["interpolation"] == "bicubic", cfg
        assert (model.pretrained_cfg["license"], model.pretrained_cfg["tag"]) == ("Apache-2.0", id.partition(".")[2])
        assert model.num_classes == classes
    if when == "before":
        del sys.modules["cim_models"]
        import cim_models
save_file(outputs, "output.safetensors")
"""
TRANSFORMERS = """
import json, sys
sys.modules["cim_models"] = None
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
images, picture, outputs = load_file("images.safetensors")["images"], Image.open("picture.png"), {}
for number, (name, (id, classes)) in enumerate(json.load(open("names.json")).items()):
    place, _, revision = name.partition(":")[2].partition("@")
    kwargs = dict(revision=revision) if revision else {}
    model = AutoModel.from_pretrained(place, **kwargs).float().eval()
    said = model(images)
    outputs |= {name: said.pooler_output, f"{name} maps": said.last_hidden_state}
    loaded, info = AutoModelForImageClassification.from_pretrained(
        place, output_loading_info=True, **kwargs, **({} if classes else dict(num_labels=3))
    )
    head = "fc" if "resnet" in id else "head"
    missing = set() if classes else {f"timm_model.{head}.weight", f"timm_model.{head}.bias"}
    assert set(info["missing_keys"]) == missing and not info["unexpected_keys"], info
    logits = loaded.float().eval()(images).logits
    assert logits.shape == (2, classes or 3)
    outputs[f"{name} logits"] = logits
    loaded.save_pretrained(f"saved/{number}")
    if classes:
        assert loaded.config.id2label[1] == "dog"
    processor = AutoImageProcessor.from_pretrained(place, **kwargs)
    outputs[f"{name} pixels"] = processor(picture, return_tensors="pt")["pixel_values"]
save_file({key: value.contiguous() for key, value in outputs.items()}, "output.safetensors")
"""


@pytest.fixture
def releases(making, tmp_path, root) -> dict[str, Path]:
    """Release folders by id: an encoder of each family, and a classifier with labels."""
    made = {}
    for name in ("cim_vit_tiny", "cim_resnet18"):
        making.make_run(tmp_path / name, name)
        id = f"{name}.t1"
        made[id] = release(tmp_path / name, id=id, root=root, licence="Apache-2.0", crop_pct=0.8)
    encoder = load_manifest(root).entries["cim_vit_tiny.t1"]
    entry = dataclasses.replace(
        encoder, id="cim_vit_tiny.pets", kind="finetuned", num_classes=3, pretext=None, **folders.BLANK
    )
    made[entry.id] = root / "weights" / entry.id
    made[entry.id].mkdir()
    torch.manual_seed(1)
    model = build(entry.architecture, num_classes=3, **entry.model_args)
    torch.nn.init.normal_(model.head.weight)
    folders.write_folder(made[entry.id], entry, {"backbone": model.state_dict()}, {}, ["cat", "dog", "owl"])
    return made


@pytest.fixture
def names(releases, hub) -> dict[str, Path]:
    """Names by which others may ask, and the folder that each means; on the Hub, a commit or `main`."""
    found = {}
    for id, folder in releases.items():
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        commit = hub.add(f"org/{id}", files)
        places = (f"local-dir:{folder}", f"hf-hub:org/{id}@{commit}")
        found |= dict.fromkeys(places, folder)
    found["hf-hub:org/cim_vit_tiny.t1"] = releases["cim_vit_tiny.t1"]
    return found


def outputs(making, code: str, names: dict[str, Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """What a process of its own computes of `making.images()` with the models of these names."""
    save_file({"images": making.images()}, tmp_path / "images.safetensors")
    Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 80).convert("RGB").save(tmp_path / "picture.png")
    classes = {name: (folder.name, 3 if "pets" in folder.name else 0) for name, folder in names.items()}
    (tmp_path / "names.json").write_text(json.dumps(classes))
    making.run_python(code, making.ROOT, cwd=tmp_path)
    return load_file(tmp_path / "output.safetensors")


def test_stock_timm(making, names, tmp_path, hub):
    """Where our package cannot be imported, and once it is."""
    output = outputs(making, TIMM, names, tmp_path)
    for name, folder in names.items():
        model = create_model(folder).eval()
        for when in ("before", "after"):
            torch.testing.assert_close(output[f"{name} {when}"], model(making.images()), rtol=0, atol=1e-6)
            maps = model.forward_features(making.images())
            torch.testing.assert_close(output[f"{name} {when} maps"], maps, rtol=0, atol=1e-5)
    assert not hub.requests(r"\.bin"), "there is one file of weights, and timm looks for no other"


def test_transformers(making, names, tmp_path, hub):
    pytest.importorskip("transformers", reason="needs transformers")
    output = outputs(making, TRANSFORMERS, names, tmp_path)
    picture = Image.open(tmp_path / "picture.png")
    for number, (name, folder) in enumerate(names.items()):
        model, saved = create_model(folder).eval(), create_model(tmp_path / "saved" / str(number)).eval()
        said = model.forward_head(model.forward_features(making.images()), pre_logits=True)
        torch.testing.assert_close(output[name], said, rtol=0, atol=1e-6)
        maps = model.forward_features(making.images())
        torch.testing.assert_close(output[f"{name} maps"], maps, rtol=0, atol=1e-5)
        torch.testing.assert_close(output[f"{name} pixels"][0], create_transform(model)(picture), rtol=0, atol=1e-6)
        torch.testing.assert_close(output[f"{name} logits"], saved(making.images()), rtol=0, atol=1e-6)
        if model.num_classes:
            torch.testing.assert_close(output[f"{name} logits"], model(making.images()), rtol=0, atol=1e-6)
    commit = hub.add("org/saved", {path.name: path.read_bytes() for path in (tmp_path / "saved" / "0").iterdir()})
    pushed = create_model(f"hf-hub:org/saved@{commit}").eval()
    torch.testing.assert_close(output[f"{next(iter(names))} logits"], pushed(making.images()), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the Hub's client's own upload
def test_shards(making, run, root, tmp_path, monkeypatch, hub):
    """transformers reads their index; timm does not, so what is published, or fetched so, is one file, too."""
    monkeypatch.setattr(folders, "SHARD", 900_000)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = release(run, id="cim_vit_tiny.t1", root=root, licence="Apache-2.0", crop_pct=0.8)
    assert len(list(made.glob("model-*.safetensors"))) == 3
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{made}", pretrained=True)
    publish(made.name, repo="org/shards", root=root)
    fetched = fetch(made.name, to=tmp_path / made.name, whole=True, root=root)
    repository = hub.repositories["org/shards"]
    assert {path.name for path in fetched.iterdir()} == {path.name for path in made.iterdir()} | {"model.safetensors"}
    assert set(repository.commits[repository.branches["main"]]) - {".gitattributes"} == set(os.listdir(fetched))
    expected = create_model("hf-hub:org/shards", token=TOKEN).eval()(making.images())
    names = {"hf-hub:org/shards": made, f"local-dir:{fetched}": made}
    output = outputs(making, TIMM, names, tmp_path)
    for name in names:
        torch.testing.assert_close(output[f"{name} before"], expected, rtol=0, atol=1e-6)
    pytest.importorskip("transformers", reason="needs transformers")
    names = {"hf-hub:org/shards": made, f"local-dir:{made}": made}
    output = outputs(making, TRANSFORMERS, names, tmp_path)
    for name in names:
        torch.testing.assert_close(output[name], expected, rtol=0, atol=1e-6)
