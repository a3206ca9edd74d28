"""Reading the authors' released files, good ones and others."""

import argparse
import os
import pickle
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cim_models.backbones.vit import VITS
from cim_models.errors import CheckpointError, ConfigError
from cim_models.hub.official import import_official, read_official


def test_what_the_file_tells_is_read(authors, released):
    official = read_official(released, **authors.heads)
    assert (official.architecture, official.kind, official.num_classes) == ("cim_vit_tiny", "pretext", 0)
    assert official.model_args == dict(patch_size=8, embed_dim=24, depth=2, img_size=48)
    assert (official.epoch, official.flags["template_size"], official.extra) == (299, 16, ())
    config = asdict(official.pretext)
    assert (config["reduction"], config["share_class_token"], config["freeze_patch_embed"]) == ("sum", True, True)
    assert (config["correlation_weight"], config["global_weight"]) == (2.0, 0.5)
    assert (config["head_width"], config["head_heads"], config["global_hidden"]) == (16, 2, 20)


def test_the_global_heads_survive_a_weight_of_zero(authors, tmp_path, tensors):
    """The released recipe gives the global loss no weight, and writes its heads all the same."""
    cim = import_official(authors.save(tmp_path / "a.pth", tensors, sigma_cont=0, sigma_corr=1), **authors.heads)
    out = cim(*authors.batch())
    assert torch.equal(out.loss, out.correlation_loss) and cim.config.global_weight == 0
    assert torch.equal(cim.global_head.predictor[0].weight, tensors["decoder_predictor.0.weight"])
    assert torch.equal(cim.global_target[1].running_var, tensors["decoder_g_embed_c.1.running_var"])
    assert cim.global_target[1].num_batches_tracked == 7


def test_the_model_is_trainable_as_released(authors, released):
    cim = import_official(released, **authors.heads)
    frozen = {name for name, p in cim.named_parameters() if not p.requires_grad}
    online = {name for name in frozen if name.startswith("online.")}
    assert online == {"online.pos_embed", "online.patch_embed.proj.weight", "online.patch_embed.proj.bias"}
    assert all(not p.requires_grad for p in (*cim.target.parameters(), *cim.global_target.parameters()))
    assert not cim.training and {p.dtype for p in cim.parameters()} == {torch.float32}


def test_a_finetuned_file_is_no_pretext_model(authors, tmp_path, tensors):
    path = authors.save(tmp_path / "a.pth", authors.finetuned_tensors(tensors, mean=True))
    with pytest.raises(CheckpointError, match="fine-tuned classifier.*import-official"):
        import_official(path, num_heads=authors.HEADS)


@pytest.mark.parametrize(
    ("width", "patch", "name", "heads"),
    [
        (192, 16, "cim_vit_tiny", 3),
        (384, 16, "cim_vit_small", 6),
        (768, 16, "cim_vit_base", 12),
        (1024, 16, "cim_vit_large", 16),
        (1280, 14, "cim_vit_huge", 16),
    ],
)
def test_heads_of_the_released_sizes(authors, tmp_path, width, patch, name, heads):
    shape = dict(width=width, patch=patch, depth=VITS[name]["depth"], head_width=512, hidden=4096)
    path = authors.shapes_only(tmp_path / "a.pth", **shape)
    official = read_official(path)
    assert (official.architecture, official.model_args, VITS[name]["num_heads"]) == (name, {}, heads)
    assert (official.pretext.head_heads, official.pretext.head_width, official.pretext.global_hidden) == (16, 512, 4096)


@pytest.mark.parametrize("width", [128, 200, 1088, 1408])
def test_other_widths_ask_for_heads(authors, tmp_path, width):
    path = authors.shapes_only(tmp_path / "a.pth", width=width, patch=16, depth=1, head_width=64)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{width}.*num_heads"):
        read_official(path)
    assert read_official(path, num_heads=8).model_args["num_heads"] == 8


@pytest.mark.parametrize("heads", [dict(num_heads=5), dict(num_heads=0), dict(num_heads=3, head_num_heads=5)])
def test_heads_that_do_not_divide(released, heads):
    with pytest.raises(ConfigError, match="divide|head_num_heads"):
        read_official(released, **heads)


def test_the_default_of_the_head_does_not_fit_every_width(authors, tmp_path):
    path = authors.shapes_only(tmp_path / "a.pth", width=192, patch=16, depth=1, head_width=24)
    with pytest.raises(ConfigError, match="24 wide, not for 16 heads: give head_num_heads"):
        read_official(path)


def test_extra_tensors_are_reported_and_do_no_harm(authors, tmp_path, tensors, caplog):
    extra = {name: torch.zeros(2, 24) for name in ("mask_token", "decoder_embed.scale", "head.weight")}
    path = authors.save(tmp_path / "a.pth", tensors | extra)
    assert read_official(path, **authors.heads).extra == tuple(extra)
    message = caplog.records[0].getMessage()
    assert str(path) in message and all(name in message for name in extra)
    given = authors.batch()
    expected = authors.Plain(tensors).losses(*given)[1]
    torch.testing.assert_close(import_official(path, **authors.heads)(*given).correlation_loss, expected)


@pytest.mark.parametrize(
    "gone",
    [
        ["cls_token"],
        ["pos_embed"],
        ["decoder_embed.weight"],
        ["blocks.1.attn.qkv.bias"],
        ["blocks_c.0.norm2.weight", "norm_c.bias", "patch_embed_c.proj.weight"],
        ["decoder_corr_block.block.attn.kv.weight", "decoder_norm.bias", "decoder_pred_mask.0.bias"],
        ["decoder_g_embed.4.running_mean", "decoder_g_embed_c.0.weight", "decoder_predictor.1.num_batches_tracked"],
    ],
)
def test_missing_tensors_are_named(authors, tmp_path, tensors, gone):
    path = authors.save(tmp_path / "a.pth", {name: value for name, value in tensors.items() if name not in gone})
    with pytest.raises(CheckpointError) as caught:
        import_official(path, **authors.heads)
    message = str(caught.value)
    assert str(path) in message and all(name in message for name in gone)


def test_shapes_that_disagree_are_named(authors, tmp_path, tensors):
    wrong = {"blocks.1.mlp.fc2.bias": torch.zeros(3), "decoder_norm.bias": torch.zeros(4)}
    path = authors.save(tmp_path / "a.pth", tensors | wrong)
    with pytest.raises(CheckpointError, match=r"fc2.bias \(3,\), not \(24,\).*norm.bias \(4,\), not \(16,\)"):
        import_official(path, **authors.heads)


def test_no_shape_is_trusted(authors, tmp_path, tensors):
    """Each tensor becomes a number, an empty one, one of more dimensions; and the number of a block is absurd."""
    names = [name for name in tensors if "blocks_c" not in name and "blocks.1" not in name]
    for i, name in enumerate(names[::2]):
        wrong = (torch.tensor([[[1.0]]]), torch.zeros(0), tensors[name][None].expand(2, *tensors[name].shape))[i % 3]
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
            read_official(authors.save(tmp_path / "a.pth", tensors | {name: wrong}), **authors.heads)
    with pytest.raises(CheckpointError, match=r"lacks blocks.2.norm1.weight"):
        absurd = tensors | {"blocks.99999999.norm1.bias": torch.zeros(1)}
        read_official(authors.save(tmp_path / "a.pth", absurd), **authors.heads)


def test_another_position_embedding_of_the_head_is_refused(authors, tmp_path, tensors):
    path = authors.save(tmp_path / "a.pth", tensors | {"decoder_pos_embed": tensors["decoder_pos_embed"].flip(1)})
    with pytest.raises(CheckpointError, match="decoder_pos_embed"):
        import_official(path, **authors.heads)


def test_three_channels_are_refused(authors, tmp_path, tensors):
    path = authors.save(tmp_path / "a.pth", tensors | {"decoder_pred_mask.0.weight": torch.zeros(3, 16, 1, 1)})
    with pytest.raises(CheckpointError, match=r"\(3, 16, 1, 1\), not of two channels"):
        import_official(path, **authors.heads)


class Command:
    """Runs when unpickled by a reader that allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_runs_nothing(authors, tmp_path, tensors, legacy):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    file = {"model": tensors, "args": argparse.Namespace(output_dir=Command(trace))}
    torch.save(file, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"asks to run \w+.mkdir"):
        import_official(path, **authors.heads)
    assert not trace.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_plain_pickle_runs_nothing(tmp_path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Command(trace)))
    with pytest.raises(CheckpointError, match=str(path)):
        import_official(path)
    assert not trace.exists()


def test_the_format_before_zip_is_read(authors, tmp_path, tensors):
    path = tmp_path / "a.pth"
    torch.save({"model": tensors, "args": argparse.Namespace(sigma_cont=1)}, path, _use_new_zipfile_serialization=False)
    cim = import_official(path, **authors.heads)
    expected = authors.Plain(tensors).losses(*authors.batch())[1]
    torch.testing.assert_close(cim(*authors.batch()).correlation_loss, expected)


def test_damaged_files(authors, tmp_path, released):
    good, path = released.read_bytes(), tmp_path / "a.pth"
    with zipfile.ZipFile(released) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    flipped = bytearray(good)
    flipped[largest.header_offset + 1000] ^= 1
    cut = (good[: len(good) // 2], good[:-30], good[:100], b"")
    for content in (*cut, bytes(flipped), b"not a checkpoint", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(path)):
            import_official(path, **authors.heads)


@pytest.mark.parametrize("file", [{}, [], torch.zeros(3), {"model": None}, {"model": {"epoch": 3}}, {"state_dict": {}}])
def test_foreign_files(tmp_path, file):
    path = tmp_path / "a.pth"
    torch.save(file, path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} is not a released CIM checkpoint"):
        import_official(path)


def test_another_model_is_named_incomplete(tmp_path, tensors):
    path = tmp_path / "a.pth"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(CheckpointError, match="lacks cls_token, pos_embed"):
        import_official(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(CheckpointError, match=f"no file {re.escape(str(path))}"):
            import_official(path)
