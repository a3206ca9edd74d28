"""Files of features: stock safetensors reads them, rows and paths belong together, memory stays bounded."""

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cim_models.backbones import build
from cim_models.errors import ConfigError, DataError, WeightsError
from cim_models.evaluation import embed, load_features
from cim_models.evaluation.encoders import describe, open_encoder
from cim_models.evaluation.features import extract_all
from cim_models.images import find_images, read_image


def test_stock_safetensors_reads_what_is_written(tmp_path, photographs, run):
    folder, out = photographs(11, 80), tmp_path / "new" / "f.safetensors"
    result = embed(str(folder), str(run), str(out), batch_size=4, workers=0)  # paths may be strings
    tensors = load_file(out)
    assert list(tensors) == ["features"] and tensors["features"].shape == result.shape == (11, 192)
    encoder = open_encoder(str(run))
    expected = extract_all(encoder, find_images(folder), workers=0).features
    torch.testing.assert_close(tensors["features"], expected)
    features, paths = load_features(out)
    assert torch.equal(features, tensors["features"]) and paths == [str(path) for path in find_images(folder)]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    about = describe(encoder, str(run))
    assert metadata["model"] == str(run) and metadata["pooling"] == "patches"
    assert metadata["weights_sha256"] == about["weights_sha256"]
    assert json.loads(metadata["transform"])["input_size"] == [3, 64, 64]
    assert sorted(path.name for path in out.parent.iterdir()) == ["f.paths.jsonl", "f.safetensors"]
    assert str(out) in str(result) and "11 × 192" in str(result)


def test_dense_and_class_features(tmp_path, photographs, run):
    shapes = {"dense": (11, 192, 4, 4), "class": (11, 192), "both": (11, 384)}
    for pooling, shape in shapes.items():
        embed(photographs(11, 80), str(run), tmp_path / "f.safetensors", pooling=pooling, workers=0)
        assert load_features(tmp_path / "f.safetensors")[0].shape == shape


def test_unreadable_images_have_no_row(tmp_path, photographs, run):
    names = ["bad.jpg", "x\ny.png", "z #.png", "été 1.png"]
    for name in names[1:]:
        Image.open(find_images(photographs(11, 80))[0]).save(tmp_path / name)
    (tmp_path / names[0]).write_text("no picture")
    out = tmp_path / "out" / "features.safetensors"
    result = embed(tmp_path, str(run), out, batch_size=2, workers=2)
    features, paths = load_features(out)
    assert [path.removeprefix(f"{tmp_path}/") for path in paths] == names[1:] and len(features) == 3
    assert len(result.unreadable) == 1 and result.unreadable[0].startswith(str(tmp_path / "bad.jpg"))
    assert "1 images could not be read" in str(result)
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"")
    before = out.read_bytes()
    with pytest.raises(DataError, match="none of 4"):
        embed(tmp_path, str(run), out, workers=0)
    assert out.read_bytes() == before and len(list(out.parent.iterdir())) == 2


def test_difficult_files(tmp_path, shared, run):
    with zipfile.ZipFile(shared / "data" / "odd.zip") as archive:
        archive.extractall(tmp_path)
    result = embed(tmp_path / "odd", str(run), tmp_path / "f.safetensors", batch_size=4, workers=2)
    features, paths = load_features(tmp_path / "f.safetensors")
    assert features.isfinite().all() and len(features) >= 10 and result.unreadable
    assert len(features) + len(result.unreadable) == len(find_images(tmp_path / "odd"))
    assert any(read_image(path).size == (20000, 4) for path in paths)


def test_a_list_keeps_its_order(tmp_path, photographs, run):
    paths = find_images(photographs(11, 80))[::-2]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    embed(tmp_path / "list.txt", str(run), tmp_path / "f.safetensors", workers=0)
    assert load_features(tmp_path / "f.safetensors")[1] == [str(path) for path in paths]


def test_what_cannot_be_is_said(tmp_path, photographs, run, monkeypatch):
    folder = photographs(11, 80)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "file" / "f.safetensors", tmp_path / "folder", Path(".")):
        with pytest.raises(ConfigError, match="cannot be written"):
            embed(folder, str(run), out, workers=0)
    with pytest.raises(ConfigError, match="device 'teapot'"):
        embed(folder, str(run), tmp_path / "f.safetensors", device="teapot")
    with pytest.raises(WeightsError, match="timm cannot load"):
        embed(folder, "resnet18.no_such_tag", tmp_path / "f.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_files_that_do_not_belong_together_are_refused(tmp_path, photographs, run):
    out, names = tmp_path / "f.safetensors", tmp_path / "f.paths.jsonl"
    embed(photographs(11, 80), str(run), out, workers=0)
    lines = names.read_text().splitlines(keepends=True)
    names.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="has 11 rows.* has 10 paths"):
        load_features(out)
    names.write_text("no JSON\n")
    with pytest.raises(DataError, match="f.paths.jsonl"):
        load_features(out)
    names.unlink()
    with pytest.raises(DataError, match="f.paths.jsonl"):
        load_features(out)
    out.write_bytes(out.read_bytes()[:1000])
    with pytest.raises(DataError, match="f.safetensors"):
        load_features(out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, photographs):
    """The peak of a process that writes 27 MB of dense features is not much above what 2 MB took before."""
    metadata = {"architecture": "cim_vit_tiny", "model_args": '{"depth": 1}'}
    save_file(build("cim_vit_tiny", depth=1).state_dict(), tmp_path / "model.safetensors", metadata)
    path = find_images(photographs(11, 80))[0]
    program = """
        import resource, sys
        from pathlib import Path
        from cim_models.evaluation import embed
        folder = Path(sys.argv[1])
        for count in (16, 176):
            model, out = str(folder / "model.safetensors"), folder / f"{count}.safetensors"
            embed(folder / f"{count}.txt", model, out, pooling="dense", batch_size=16, workers=0)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    for count in (16, 176):
        (tmp_path / f"{count}.txt").write_text(f"{path}\n" * count)
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (int(line) * (1 if sys.platform == "darwin" else 1024) for line in process.stdout.split())
    assert (tmp_path / "176.safetensors").stat().st_size > 176 * 192 * 14 * 14 * 4
    assert many - few < 12e6
