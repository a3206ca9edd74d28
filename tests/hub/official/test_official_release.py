"""`cim import-official`: the authors' files become release folders that load like any other."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cim_models import create_model, create_pretext
from cim_models.cli import main
from cim_models.errors import CheckpointError, ConfigError
from cim_models.hub.card import render_card
from cim_models.hub.entry import read_entry
from cim_models.hub.official import LICENSE, import_official, import_release


def entry_of(folder: Path):
    return read_entry(json.loads((folder / "config.json").read_text())["cim_models"], "test")


def test_both_folders_hold_the_model_of_the_file(authors, released, tmp_path):
    made = import_release(released, tmp_path / "new" / "out", **authors.heads)
    assert made == [tmp_path / "new" / "out" / name for name in ("pretext", "backbone")]
    expected, given = import_official(released, **authors.heads), authors.batch()

    pretext = create_pretext(made[0]).eval()
    assert pretext.config == expected.config
    held = pretext.state_dict()
    assert held.keys() == expected.state_dict().keys(), "the heads of the global loss, too"
    assert all(torch.equal(held[key], value) for key, value in expected.state_dict().items())
    torch.testing.assert_close(pretext(*given).loss, expected(*given).loss)

    images = torch.randn(2, 3, 48, 48)
    encoder = create_model(made[1]).eval()
    torch.testing.assert_close(encoder(images), expected.online(images))
    assert encoder.pretrained_cfg["input_size"] == (3, 48, 48) and encoder.num_classes == 0
    assert not any(key.startswith(("head", "online")) for key in load_file(made[1] / "model.safetensors"))


def test_the_target_can_be_the_backbone(authors, released, tmp_path):
    _, made = import_release(released, tmp_path / "out", **authors.heads, encoder="target", dtype="float16")
    target = import_official(released, **authors.heads).target
    held = create_model(made).state_dict()
    assert all(torch.equal(held[key], value.half().float()) for key, value in target.state_dict().items())
    assert (entry_of(made).encoder, entry_of(made).dtype) == ("target", "float16")


def test_the_licence_is_the_authors(authors, released, tmp_path):
    for made in import_release(released, tmp_path / "out", **authors.heads):
        text = (made / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert (front["license"], front["license_name"]) == ("other", "s-lab-license-1.0-non-commercial")
        assert entry_of(made).licence == LICENSE == "S-Lab License 1.0 (non-commercial)"
        assert f"Licence: {LICENSE}" in text and "after 300 epochs" in text
        assert text == render_card(entry_of(made), made)
    config = json.loads((tmp_path / "out" / "backbone" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == LICENSE
    entry = entry_of(tmp_path / "out" / "pretext")
    assert (entry.kind, entry.pretext.context_size, entry.pretext.exemplar_size) == ("pretext", 32, 16)


def test_snippets_run(authors, released, tmp_path, monkeypatch):
    """Those of both cards."""
    made, names = import_release(released, tmp_path / "out", **authors.heads), {}
    Image.new("RGB", (90, 70), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for folder in made:
        snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert len(snippet.splitlines()) == 6
        exec(snippet.replace("local-dir:FOLDER", f"local-dir:{folder}"), names)
    assert names["maps"].shape == (1, 2, 32, 32) and names["output"].shape == (1, 24)
    names["image"].close()


@pytest.mark.parametrize("mean", [True, False])
def test_a_finetuned_file_becomes_a_classifier(authors, tensors, tmp_path, mean):
    tensors = authors.finetuned_tensors(tensors, mean)
    path = authors.save(tmp_path / "a.pth", tensors)
    (made,) = import_release(path, tmp_path / "out", num_heads=authors.HEADS)
    assert made.name == "finetuned" and sorted(p.name for p in made.iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    images, plain = torch.randn(2, 3, 48, 48), authors.Plain(tensors)
    x = plain.encode(images, "", norm=not mean)
    x = plain.layer_norm("fc_norm", x[:, 1:].mean(1)) if mean else x[:, 0]
    torch.testing.assert_close(create_model(made).eval()(images), plain.linear("head", x), rtol=2e-5, atol=2e-5)
    assert create_model(made, num_classes=3)(images).shape == (2, 3)
    entry = entry_of(made)
    assert (entry.kind, entry.num_classes, entry.encoder, entry.pretext) == ("finetuned", 5, None, None)


def test_nothing_is_overwritten(authors, released, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    import_release(released, out, **authors.heads)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    with pytest.raises(ConfigError, match=f"{out} exists"):
        import_release(released, out, **authors.heads)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file exists"):
        import_release(released, tmp_path / "file", **authors.heads)


def test_a_failure_leaves_nothing(authors, released, tensors, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        import_release(released, tmp_path / "file" / "out", **authors.heads)
    bad = authors.save(tmp_path / "bad.pth", {**tensors, "norm.bias": tensors["norm.bias"] + 1e6})
    with pytest.raises(ConfigError, match="not finite as float16.*norm.bias"):
        import_release(bad, tmp_path / "out", **authors.heads, dtype="float16")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        import_release(tmp_path / "bad.pth", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "file"]


def test_the_command(authors, released, tmp_path, capsys):
    heads = ["--num-heads", str(authors.HEADS), "--head-num-heads", str(authors.HEAD_HEADS)]
    assert main(["import-official", str(released), "--out", str(tmp_path / "out"), *heads]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("pretext", "backbone")]
    assert main(["import-official", str(released), "--out", str(tmp_path / "out"), *heads]) == 1
    assert "exists" in capsys.readouterr().err


def test_the_reference_file_is_converted(shared, tmp_path):
    made = import_release(shared / "reference" / "official_small.pth", tmp_path / "out")
    given = load_file(shared / "reference" / "expected.safetensors")
    out = create_pretext(made[0])(*(given[f"input.{name}"] for name in ("context", "exemplars", "maps")))
    expected = given["expected.correlation_logits"]
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.loss, given["expected.loss_correlation"] + out.global_loss, rtol=0, atol=2e-5)
