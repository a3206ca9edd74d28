"""A run becomes a release: the same numbers however it is loaded; all or nothing."""

import contextlib
import dataclasses
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg

from cim_models import create_model, create_pretext
from cim_models.cli import main
from cim_models.errors import CheckpointError, ConfigError, WeightsError
from cim_models.hub import folder
from cim_models.hub import release as module
from cim_models.hub.entry import Data
from cim_models.hub.manifest import load_manifest, write_manifest
from cim_models.hub.verify import verify
from cim_models.hub.weights import read_header

# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize(("encoder", "dtype"), [("target", "float16"), ("online", "float32"), ("target", "bfloat16")])
def test_the_released_encoder_is_the_runs(making, tmp_path, root, encoder, dtype):
    cim, images = making.make_run(tmp_path / "run"), making.images()
    made = module.release(tmp_path / "run", id="cim_vit_tiny.t1", encoder=encoder, dtype=dtype, root=root)
    manifest = load_manifest(root)
    expected = getattr(cim, encoder)
    precision = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 0}[dtype]
    for model in (
        create_model("cim_vit_tiny.t1", pretrained=True, manifest=manifest),
        create_model("cim_vit_tiny", weights=made),
        create_model(made),
    ):
        held = model.state_dict()
        assert all(torch.equal(held[k], v.to(getattr(torch, dtype)).float()) for k, v in expected.state_dict().items())
        torch.testing.assert_close(model.eval()(images), expected(images), rtol=0, atol=10 * precision)
    assert not any(key.startswith(("head", "fc")) for key in load_file(made / "model.safetensors"))
    assert {value.dtype for value in load_file(made / "pretext.safetensors").values()} == {getattr(torch, dtype)}


def test_one_encoder_and_the_head_locate(making, tmp_path, root):
    cim = making.make_run(tmp_path / "run")
    made = module.release(tmp_path / "run", id="cim_vit_tiny.t1", encoder="target", dtype="float32", root=root)
    cim.online.load_state_dict(cim.target.state_dict())
    given = making.images(), making.images(32)[:, None]
    pretext = create_pretext(made).eval()
    torch.testing.assert_close(pretext.locate(*given), cim.locate(*given), rtol=0, atol=1e-6)
    assert pretext.config == dataclasses.replace(making.CONFIG, global_weight=0.0) and pretext.global_head is None
    entry = load_manifest(root).entries["cim_vit_tiny.t1"]
    assert (entry.pretext.context_size, entry.pretext.exemplar_size) == (64, 32)


def test_a_folder_of_ones_own_gets_a_manifest(making, tmp_path):
    making.make_run(tmp_path / "run")
    made = module.release(tmp_path / "run", id="cim_vit_tiny.t1", root=tmp_path / "mine")
    assert made == tmp_path / "mine" / "weights" / "cim_vit_tiny.t1"
    assert list(load_manifest(tmp_path / "mine").entries) == ["cim_vit_tiny.t1"]


@pytest.mark.parametrize("architecture", ["cim_vit_tiny", "cim_resnet18"])
def test_the_entry_says_what_the_files_hold(making, tmp_path, root, architecture):
    making.make_run(tmp_path / "run", architecture)
    module.release(tmp_path / "run", id=f"{architecture}.t1", root=root)
    manifest = load_manifest(root)
    verify(f"{architecture}.t1", manifest)
    entry = manifest.entries[f"{architecture}.t1"]
    assert (entry.kind, entry.num_classes, entry.sources) == ("backbone", 0, ("repository",))
    assert [golden.part for golden in entry.golden] == ["backbone", "pretext"]
    wrong = dataclasses.replace(entry.golden[0], output=tuple(value + 1e-3 for value in entry.golden[0].output))
    write_manifest(manifest.with_entry(dataclasses.replace(entry, golden=(wrong,))))
    with pytest.raises(WeightsError, match="golden output of the backbone"):
        verify(f"{architecture}.t1", load_manifest(root))


def test_config_json_is_one_that_stock_tools_read(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    config = json.loads((made / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_features"] == 192
    assert (config["num_classes"], config["global_pool"]) == (0, "avg")
    assert "num_classes" not in config["model_args"] and "model_type" not in config
    assert PretrainedCfg(**config["pretrained_cfg"]).fixed_input_size is True
    assert config["cim_models"]["id"] == "cim_vit_tiny.t1"


@pytest.mark.parametrize("missing", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_large_weights_are_shards_with_an_index(making, run, root, monkeypatch, missing):
    """As the Hub's own conventions have it; every shard is verified, and any file of the folder stands for all."""
    whole = create_model(module.release(run, id="cim_vit_tiny.t1", root=root)).eval()
    limit = 900_000
    monkeypatch.setattr(folder, "SHARD", limit)
    made = module.release(run, id="cim_vit_tiny.t2", root=root)
    entry = load_manifest(root).entries["cim_vit_tiny.t2"]
    shards = sorted(path.name for path in made.glob("model*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((made / name).stat().st_size < limit + 20_000 for name in shards)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    contents = {name: load_file(made / name) for name in shards}
    assert index["weight_map"] == {key: name for name, tensors in contents.items() for key in tensors}
    sizes = [tensor.nbytes for tensors in contents.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert [file.part for file in entry.files] == ["backbone"] * 3 + ["index", "pretext"]
    verify(entry.id, load_manifest(root))
    for given in (made, made / shards[1], made / "model.safetensors.index.json"):
        assert torch.equal(create_model("cim_vit_tiny", weights=given).eval()(making.images()), whole(making.images()))
    assert len(create_pretext(made).state_dict()) > 0
    (made / missing).unlink()
    with pytest.raises(WeightsError, match=f"{missing} cannot be read"):
        create_model(made)
    with pytest.raises(WeightsError, match=f"cim_vit_tiny.t2: there is no .*{missing}"):
        create_model(entry.id, pretrained=True, manifest=load_manifest(root))


def test_no_shard_is_larger_than_50_mb(tmp_path, monkeypatch):
    """With its header, and whatever the sizes of the tensors: two of 24.9 MB do not share a file."""
    tensors = {f"blocks.{i}.attn.qkv.weight_{'x' * 50}": torch.zeros(6_225_000 // (1 + i % 2)) for i in range(5)}
    paths = folder._save(tensors, tmp_path, "model")
    assert len(paths) > 2 and all(path.stat().st_size <= 50_000_000 for path in paths)
    assert {key for path in paths[:-1] for key in load_file(path)} == tensors.keys()


# ---------------------------------------------------------------- all or nothing


def test_an_id_is_released_once(making, run, root, tmp_path):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    before = making.contents(root)
    with pytest.raises(ConfigError, match="cim_vit_tiny.t1 is released already"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert making.contents(root) == before
    module.release(run, id="cim_vit_tiny.t1", root=root, replace=True, encoder="target")
    assert load_manifest(root).entries["cim_vit_tiny.t1"].encoder == "target"
    verify("cim_vit_tiny.t1", load_manifest(root))
    assert [path.name for path in made.parent.iterdir()] == ["cim_vit_tiny.t1"]


def test_a_failure_restores_what_was_there(making, run, root, monkeypatch):
    def full(manifest):
        raise OSError(28, "No space left on device")

    module.release(run, id="cim_vit_tiny.t1", root=root)
    before = making.contents(root)
    monkeypatch.setattr(module, "write_manifest", full)
    for id in ("cim_vit_tiny.t1", "cim_vit_tiny.t2"):
        with pytest.raises(ConfigError, match=f"{id} cannot be written.*No space left"):
            module.release(run, id=id, root=root, replace=True, encoder="target")
        assert making.contents(root) == before
    assert [path.name for path in (root / "weights").iterdir()] == ["cim_vit_tiny.t1"]


def test_a_folder_that_cannot_be_made(making, run, root):
    (root / "weights").write_text("in the way")
    before = making.contents(root)
    with pytest.raises(ConfigError, match="weights/cim_vit_tiny.t1 cannot be written"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert making.contents(root) == before


def test_what_is_released_meanwhile_stays_released(run, root, monkeypatch):
    """Making a folder takes minutes where the encoder is large."""
    make = module.write_folder

    def meanwhile(*args):
        monkeypatch.setattr(module, "write_folder", make)
        module.release(run, id="cim_vit_tiny.other", root=root)
        return make(*args)

    monkeypatch.setattr(module, "write_folder", meanwhile)
    module.release(run, id="cim_vit_tiny.t1", root=root)
    assert list(load_manifest(root).entries) == ["cim_vit_tiny.other", "cim_vit_tiny.t1"]


def test_releases_at_the_same_time_are_all_in_the_manifest(run, root, monkeypatch):
    """Each would write what it read before the other one wrote, if they met in between; alone, neither is met."""
    met, write = threading.Barrier(2), module.write_manifest

    def late(manifest):
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(timeout=1)
        return write(manifest)

    monkeypatch.setattr(module, "write_manifest", late)
    ids = ["cim_vit_tiny.t1", "cim_vit_tiny.t2"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda id: module.release(run, id=id, root=root), ids))
    assert sorted(load_manifest(root).entries) == ids
    assert all(id in (root / "README.md").read_text() for id in ids)


IN_A_PROCESS = """
import os, resource, signal, sys
from pathlib import Path
from cim_models.errors import ConfigError
from cim_models.hub import folder, release
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
run, root, *sabotages = sys.argv[1:]
for number, sabotage in enumerate(sabotages):
    child = os.fork()
    if not child:
        exec(sabotage)
        try:
            made = release.release(Path(run), id="cim_vit_tiny.t1", root=Path(root, str(number)), replace=True)
        except ConfigError as error:
            os._exit("cannot be written" in str(error))
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
KILLS = tuple(
    f"{function} = die"
    for function in ("folder.save_torch_state_dict", "Path.rename", "release.write_manifest", "release.update_readme")
)
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
"""Files may not grow beyond 100 kB: the tensors do not fit."""


def test_interrupted_releases(making, run, tmp_path):
    """Killed before tensors, before the folder has its name, before the manifest and after it; and on a full disk."""
    roots = [making.make_root(tmp_path / "roots" / str(number)) for number in range(5)]
    module.release(run, id="cim_vit_tiny.t1", root=roots[4], encoder="online")
    before = making.contents(roots[4])
    said = making.run_python(IN_A_PROCESS, making.ROOT, run, tmp_path / "roots", *KILLS, FULL, cwd=tmp_path)
    assert said.split() == [str(-signal.SIGKILL)] * 4 + ["1"]
    assert making.contents(roots[4]) == before
    for number, root in enumerate(roots[:4]):
        assert list(load_manifest(root).entries) == ([] if number < 3 else ["cim_vit_tiny.t1"])
        assert (root / "weights" / "cim_vit_tiny.t1").exists() == (number > 1), "whole, or not under its name"
        module.release(run, id="cim_vit_tiny.t1", root=root, replace=number == 3)
        verify("cim_vit_tiny.t1", load_manifest(root))
        assert [path.name for path in (root / "weights").iterdir()] == ["cim_vit_tiny.t1"]
        assert "cim_vit_tiny.t1" in (root / "README.md").read_text()


# ---------------------------------------------------------------- runs and arguments that cannot be


@pytest.mark.parametrize("name", ["online.safetensors", "head.safetensors", "config.yaml", "log.jsonl"])
def test_runs_that_are_not_whole(run, root, name):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2] if name != "config.yaml" else b"[a")
    with pytest.raises(CheckpointError, match=str(run)):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=f"{run}.*lacks {name}$"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert not (root / "weights").exists() or not list((root / "weights").iterdir())


def test_a_run_without_a_moving_average(run, root):
    (run / "target.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks target.safetensors; without a moving average"):
        module.release(run, id="cim_vit_tiny.t1", root=root, encoder="target")
    module.release(run, id="cim_vit_tiny.t1", root=root)


def test_a_run_that_ended_between_its_files(run, root):
    head = run / "head.safetensors"
    save_file(load_file(head), head, {**read_header(head).metadata, "images_seen": "38400"})
    with pytest.raises(CheckpointError, match="head.safetensors is of 38400 images, not of 76800.*--resume"):
        module.release(run, id="cim_vit_tiny.t1", root=root)


def test_data_that_a_run_and_what_it_started_from_saw_are_named_once(run, root):
    before = load_manifest().default("cim_vit_tiny")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "init": before.id}))
    for number, (data, expected) in enumerate([(before.data[0], []), (Data("mine", "free"), [Data("mine", "free")])]):
        module.release(run, id=f"cim_vit_tiny.t{number}", data=data.name, terms=data.terms, root=root)
        assert load_manifest(root).entries[f"cim_vit_tiny.t{number}"].data == (*before.data, *expected)


@pytest.mark.parametrize(("licence", "said"), [("Apache-2.0", True), ("CC-BY-NC-SA-4.0", False), ("not stated", False)])
def test_a_licence_that_allows_more_than_that_of_what_the_run_started_from(run, root, caplog, licence, said):
    before = load_manifest().default("cim_vit_tiny")
    assert before.licence == "cc-by-nc-4.0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "init": before.id}))
    module.release(run, id="cim_vit_tiny.t1", root=root, licence=licence)
    warning = f"licence {licence}, but the run started from {before.id}, which is cc-by-nc-4.0, for non-commercial use"
    assert (warning in caplog.text) == said


def test_files_that_no_run_wrote(run, root):
    save_file({"a": torch.zeros(1)}, run / "online.safetensors")
    with pytest.raises(CheckpointError, match="does not say its architecture, images_seen, model_args, pretext"):
        module.release(run, id="cim_vit_tiny.t1", root=root)


def test_a_configuration_that_no_run_wrote(run, root):
    for text in ("3", "data: {}", "{data: {size: 64}, views: 3}"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=f"{run}.*config.yaml"):
            module.release(run, id="cim_vit_tiny.t1", root=root)


@pytest.mark.parametrize("id", ["cim_vit_small.t1", "t1", "cim_vit_tiny", "cim_vit_tiny.", "cim_vit_tiny./../x"])
def test_ids_that_cannot_be(run, root, id):
    with pytest.raises(ConfigError, match=r"cim_vit_tiny\.TAG"):
        module.release(run, id=id, root=root)


@pytest.mark.parametrize(
    "text", ["3", "{", "[3]", '[{"name": "a"}]', '[{"name": "a", "value": "high", "data": "", "command": ""}]']
)
def test_metrics_that_cannot_be(run, root, text):
    (run / "metrics.json").write_text(text)
    with pytest.raises(ConfigError, match="metrics"):
        module.release(run, id="cim_vit_tiny.t1", root=root, metrics=(run / "metrics.json",))
    assert not (root / "weights" / "cim_vit_tiny.t1").exists()


def test_numbers_that_float16_does_not_hold(making, tmp_path, root):
    making.make_run(tmp_path / "run")
    header = read_header(tmp_path / "run/online.safetensors").metadata
    tensors = load_file(tmp_path / "run/online.safetensors")
    save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1e5}, tmp_path / "run/online.safetensors", header)
    with pytest.raises(ConfigError, match="not finite as float16: norm.bias"):
        module.release(tmp_path / "run", id="cim_vit_tiny.t1", root=root)
    module.release(tmp_path / "run", id="cim_vit_tiny.t1", root=root, dtype="bfloat16")


def test_the_command(run, root, capsys):
    assert main(["release", str(run), "--id", "cim_vit_tiny.t1", "--root", str(root), "--encoder", "target"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "weights" / "cim_vit_tiny.t1")
    assert main(["release", str(run), "--id", "cim_vit_tiny.t1", "--root", str(root)]) == 1
    assert "released already" in capsys.readouterr().err
