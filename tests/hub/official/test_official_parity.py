"""Parity: the authors' own outputs, and those of their method in plain steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cim_models.backbones.tokens import resample_pos_embed
from cim_models.backbones.vit import sincos_pos_embed
from cim_models.hub.official import import_official, read_official
from cim_models.pretext.correlation import info_nce

LOOSE = {"expected.train.global_targets": 5e-3, "expected.train.global_predictions": 5e-3}
"""Badly conditioned: batch statistics of three rows."""


def reproduced(authors, path: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every `expected.*`, computed by the imported model from every `input.*`."""
    context, exemplars, maps = (given[f"input.{name}"] for name in ("context", "exemplars", "maps"))
    cim = import_official(path)
    out = cim(context, exemplars, maps)
    tokens = cim.encode_context(context)
    sequence, summaries = cim.encode_exemplars(exemplars)
    pos_embed = cim.online.pos_embed
    values = {
        **{f"pos_embed_{s}": resample_pos_embed(pos_embed, (14, 14), (s // 16, s // 16)) for s in (224, 160, 64)},
        "decoder_pos_embed": F.pad(sincos_pos_embed(256, (10, 10)), (0, 0, 1, 0))[None],
        "context_tokens": out.context.sequence,
        "exemplar_tokens": out.exemplars,
        "correlation_grid": cim.head.predict_grid(tokens, sequence),
        "correlation_logits": out.logits,
        "loss_correlation": out.correlation_loss,
        "loss_global": out.global_loss,
        "loss_total": out.loss,
        "global_targets": cim.global_target(tokens.summary),
        "global_predictions": cim.global_head(summaries),
    }
    cim.config = replace(cim.config, reduction="mean")
    values["loss_correlation_mean"] = cim(context, exemplars, maps).correlation_loss

    cim = import_official(path).train()
    out = cim(context, exemplars, maps)
    values |= {"train.loss_global": out.global_loss, "train.loss_total": out.loss}
    gradients = authors.correlation_gradients(cim, out.correlation_loss)
    cim = import_official(path).train()
    values["train.global_targets"] = cim.global_target(cim.encode_context(context).summary)
    values["train.global_predictions"] = cim.global_head(cim.encode_exemplars(exemplars)[1])

    cim = import_official(path).train()
    targets = cim.global_target(given["input.head_context_class"])
    predictions = cim.global_head(given["input.head_exemplar_class"])
    loss = info_nce(predictions, targets, 0, cim.config.global_temperature).sum()
    values |= {"train_head.global_targets": targets, "train_head.global_predictions": predictions}
    values["train_head.loss_global"] = loss
    values["train_head.grad_norm"] = authors.norm(torch.autograd.grad(loss, list(cim.global_head.parameters())))
    heads = {"decoder_g_embed": cim.global_head.projector, "decoder_g_embed_c": cim.global_target}
    for name, head in (heads | {"decoder_predictor": cim.global_head.predictor}).items():
        values |= {f"train_head.bn.{name}.1.{key}": getattr(head[1], key) for key in ("running_mean", "running_var")}

    cim.update_target(0.99)
    values["ema.blocks_c.0.attn.qkv.weight"] = cim.target.blocks[0].attn.qkv.weight
    return {f"expected.{name}": value.detach() for name, value in values.items()} | gradients


def test_every_released_output_is_reproduced(authors, shared):
    from cim_models.pretraining.schedules import momentum

    given = load_file(shared / "reference" / "expected.safetensors")
    grid = given["expected.correlation_grid"]
    given["expected.correlation_grid"] = grid[:, :, 1] - grid[:, :, 0]
    values = reproduced(authors, shared / "reference" / "official_small.pth", given)
    schedule = torch.tensor([momentum(step, 100, 0.99) for step in (0, 1, 10, 50, 99)])
    values["expected.momentum_schedule"] = schedule

    assert set(values) == {name for name in given if name.startswith("expected.")}
    for name, value in values.items():
        expected = given[name].float()
        assert value.shape == expected.shape, name
        relative, absolute = (1e-4, 0) if "grad_norm" in name else (0, LOOSE.get(name, 2e-5))
        difference = (value - expected).abs().max()
        assert difference <= absolute + relative * expected.abs().max(), f"{name} differs by {difference:.2e}"


def test_a_released_file_reads_completely(shared, caplog):
    official = read_official(shared / "reference" / "official_small.pth")
    assert (official.kind, official.architecture, official.model_args) == ("pretext", "cim_vit_tiny", {"depth": 2})
    assert (official.extra, official.epoch, official.flags["template_size"]) == ((), 0, 64)
    assert not caplog.records


def test_the_imported_model_is_the_plain_method(authors, released, tensors):
    cim, given = import_official(released, **authors.heads), authors.batch()
    out = cim(*given)
    pairs, correlation, contrast = authors.Plain(tensors).losses(*given)
    logits = torch.stack([pair[:, 1] - pair[:, 0] for pair in pairs], 1)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.correlation_loss, correlation, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.global_loss, contrast, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.loss, 2.0 * correlation + 0.5 * contrast, rtol=0, atol=5e-5)
    probability = torch.stack([pair.softmax(1)[:, 1] for pair in pairs], 1)
    torch.testing.assert_close(cim.locate(*given[:2]), probability, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_plain_method(authors, released, tensors):
    cim, given = import_official(released, **authors.heads), authors.batch()
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items() if value.is_floating_point()}
    pairs, correlation, _ = authors.Plain(tensors | leaves).losses(*given)
    ours = authors.correlation_gradients(cim, cim(*given).correlation_loss)
    for name, value in ours.items():
        part = name.removeprefix("expected.grad_norm.")
        mine = [x for key, x in leaves.items() if key.split(".")[0] == part]
        if mine:
            gradients = torch.autograd.grad(correlation, mine, retain_graph=True)
            torch.testing.assert_close(value, authors.norm(gradients), rtol=1e-4, atol=0)


def test_heads_in_training_mode_are_those_of_the_plain_method(authors, released, tensors):
    """Batch statistics for each exemplar by itself, and the running ones that they leave behind."""
    cim, plain = import_official(released, **authors.heads).train(), authors.Plain(dict(tensors))
    summaries = torch.randn(16, 2, authors.WIDTH)
    projections = [plain.project("decoder_g_embed", x, 3, train=True) for x in summaries.unbind(1)]
    expected = torch.stack([plain.project("decoder_predictor", x, 2, train=True) for x in projections], 1)
    torch.testing.assert_close(cim.global_head(summaries), expected, rtol=0, atol=1e-4)
    expected = plain.project("decoder_g_embed_c", summaries[:, 0], 3, train=True)
    torch.testing.assert_close(cim.global_target(summaries[:, 0]), expected, rtol=0, atol=1e-4)
    heads = {"decoder_g_embed": cim.global_head.projector, "decoder_g_embed_c": cim.global_target}
    for name, head in (heads | {"decoder_predictor": cim.global_head.predictor}).items():
        for layer in range(1, len(head), 3):
            for key in ("running_mean", "running_var"):
                torch.testing.assert_close(getattr(head[layer], key), plain.t[f"{name}.{layer}.{key}"])


def test_class_token_and_positions_stay_shared(authors, released):
    cim = import_official(released, **authors.heads)
    with torch.no_grad():
        cim.online.cls_token.add_(1)
    before = cim.target.norm.weight.clone()
    cim.update_target(0.9)
    assert torch.equal(cim.target.cls_token, cim.online.cls_token)
    torch.testing.assert_close(cim.target.norm.weight, 0.9 * before + 0.1 * cim.online.norm.weight)


@pytest.mark.parametrize("mean", [True, False])
def test_a_finetuned_file_is_a_classifier(authors, tmp_path, tensors, mean):
    tensors = authors.finetuned_tensors(tensors, mean)
    official = read_official(authors.save(tmp_path / "a.pth", tensors), num_heads=authors.HEADS)
    assert (official.kind, official.num_classes, official.extra) == ("finetuned", 5, ())
    images = torch.randn(2, 3, authors.PATCH * authors.GRID, authors.PATCH * authors.GRID)
    plain = authors.Plain(tensors)
    x = plain.encode(images, "", norm=not mean)
    x = plain.layer_norm("fc_norm", x[:, 1:].mean(1)) if mean else x[:, 0]
    torch.testing.assert_close(official.build()(images), plain.linear("head", x), rtol=0, atol=2e-5)
