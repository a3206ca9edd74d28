"""CIM as a whole: which encoder sees what, losses, ablations, the moving average."""

import copy
import dataclasses
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cim_models.backbones import build
from cim_models.backbones.tokens import encode, resample_pos_embed
from cim_models.errors import ConfigError
from cim_models.pretext import model as module
from cim_models.pretext.correlation import CorrelationHead, CosineHead, info_nce
from cim_models.pretext.model import CIM, PretextConfig

B, K, S, T = 3, 2, 64, 48


def make(family: str = "vit", **settings) -> CIM:
    """A small CIM whose head predicts something and whose target is not its online encoder."""
    torch.manual_seed(0)
    resnet = family == "resnet"
    backbone = build("cim_resnet18", zero_init_last=False) if resnet else build("cim_vit_tiny", depth=2, img_size=64)
    cim = CIM(backbone, PretextConfig(**{"head_width": 64, "head_heads": 4, "global_hidden": 32, **settings}))
    with torch.no_grad():
        if isinstance(cim.head, CorrelationHead):
            nn.init.normal_(cim.head.predict.weight, std=0.5)
        if cim.target is not None:
            for name, parameter in cim.target.named_parameters():
                if name != "pos_embed":
                    parameter.add_(0.01 * torch.randn_like(parameter))
    return cim


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, 3, S, S), torch.randn(B, K, 3, T, T), torch.rand(B, K, S, S) < 0.3


def trained(cim: CIM) -> dict[str, nn.Parameter]:
    return {name: p for name, p in cim.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_shapes_and_the_loss_of_the_logits(family, batch):
    cim = make(family)
    output = cim(*batch)
    assert output.logits.shape == (B, K, S, S) and output.logits.dtype == torch.float32
    maps, p = batch[2].double(), output.logits.double().sigmoid()
    expected = -(maps * p.log() + (1 - maps) * (1 - p).log()).mean()
    assert torch.allclose(output.loss.double(), expected, atol=1e-5) and output.loss.shape == ()
    assert torch.equal(output.loss, output.correlation_loss) and output.global_loss == 0
    assert torch.equal(cim(*batch[:2], batch[2].float()).loss, output.loss)


def test_the_target_sees_contexts_and_the_online_encoder_exemplars(batch):
    cim, (context, exemplars, _) = make().eval(), batch
    output = cim(*batch)
    positions = cim.online.pos_embed
    seen = encode(cim.target, context, resample_pos_embed(positions, (4, 4), (4, 4)))
    assert torch.allclose(output.context.sequence, seen.sequence, atol=1e-5)
    for k in range(K):
        shown = encode(cim.online, exemplars[:, k], resample_pos_embed(positions, (4, 4), (3, 3)))
        assert torch.allclose(output.exemplars[:, k], shown.sequence, atol=1e-5)
    assert torch.allclose(output.logits, cim.head(seen, output.exemplars, S), atol=1e-4)
    assert not torch.allclose(encode(cim.online, context).patches, seen.patches, atol=1e-2)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_one_pass_of_each_encoder(family, batch):
    cim, seen = make(family), []
    for name in ("online", "target"):
        first = getattr(cim, name).patch_embed if family == "vit" else getattr(cim, name).conv1
        first.register_forward_hook(lambda _, args, out, name=name: seen.append((name, tuple(args[0].shape))))
    cim(*batch)
    assert sorted(seen) == [("online", (B * K, 3, T, T)), ("target", (B, 3, S, S))]


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("settings", [{}, {"global_weight": 1.0}, {"freeze_patch_embed": False}, {"head": "cosine"}])
def test_gradients_reach_all_that_is_trained_and_nothing_else(family, settings, batch):
    cim = make(family, **settings)
    cim(*batch).loss.backward()
    with_gradient = {name for name, p in cim.named_parameters() if p.grad is not None and p.grad.any()}
    expected = set(trained(cim))
    assert with_gradient == expected
    assert not any(name.startswith(("target", "global_target")) for name in expected)
    if family == "vit":
        assert ("online.patch_embed.proj.weight" in expected) is (settings.get("freeze_patch_embed") is False)
        assert "online.pos_embed" not in expected


def test_position_embeddings_are_computed_once_per_size(batch, monkeypatch):
    cim, calls = make(), []

    def counted(embed, old, new):
        calls.append(new)
        return resample_pos_embed(embed, old, new)

    monkeypatch.setattr(module, "resample_pos_embed", counted)
    for _ in range(3):
        cim(*batch)
    cim.locate(*batch[:2])
    assert sorted(calls) == [(3, 3), (4, 4)]


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_locate_is_the_sigmoid_of_the_logits(family, batch):
    cim = make(family).eval()
    probabilities = cim.locate(*batch[:2])
    assert torch.allclose(probabilities, cim(*batch).logits.sigmoid(), atol=1e-6)
    assert not probabilities.requires_grad and probabilities.shape == (B, K, S, S)


def test_locate_does_not_train(batch):
    cim, (context, exemplars, _) = make("resnet"), batch
    evaluated = copy.deepcopy(cim).eval()
    with torch.no_grad():
        expected = evaluated(*batch).logits.sigmoid()
    before = copy.deepcopy(cim.state_dict())
    assert torch.allclose(cim.locate(context, exemplars), expected, atol=1e-6)
    assert cim.training and all(part.training for part in cim.modules())
    assert all(torch.equal(value, before[name]) for name, value in cim.state_dict().items())


def test_another_dtype_after_use(batch):
    cim, (context, exemplars, _) = make(), batch
    expected = cim.locate(context, exemplars)
    for dtype, atol in ((torch.bfloat16, 0.1), (torch.float64, 1e-5)):
        found = copy.deepcopy(cim).to(dtype).locate(context.to(dtype), exemplars.to(dtype))
        assert torch.allclose(found.float(), expected, atol=atol)


def test_another_default_dtype_changes_no_logits(batch):
    cim = make().eval()
    expected = cim(*batch).logits
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(cim(*batch).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_locate_names_the_shapes_that_it_takes(batch):
    cim, (context, exemplars, _) = make(), batch
    for wrong in (
        (context, exemplars[:, 0]),
        (context[0], exemplars),
        (context[..., :32], exemplars),
        (context[:1], exemplars),
    ):
        with pytest.raises(ConfigError, match=r"\(B, K, 3, T, T\), not context"):
            cim.locate(*wrong)


def test_exemplars_do_not_know_of_each_other(batch):
    cim, (context, exemplars, _) = make().eval(), batch
    together = cim.locate(context, exemplars)
    assert torch.allclose(together.flip(1), cim.locate(context, exemplars.flip(1)), atol=1e-5)
    assert torch.allclose(together[1:2, 1:], cim.locate(context[1:2], exemplars[1:2, 1:]), atol=1e-5)


def test_the_sum_is_k_times_the_mean(batch):
    mean, total = make(global_weight=0.5), make(global_weight=0.5, reduction="sum")
    a, b = mean(*batch), total(*batch)
    for name in ("loss", "correlation_loss", "global_loss"):
        assert torch.allclose(K * getattr(a, name), getattr(b, name), atol=1e-5)


def test_without_a_moving_average_the_online_encoder_sees_the_contexts_without_gradient(batch):
    cim = make(moving_average=False)
    assert cim.target is None and cim.context_encoder is cim.online
    output = cim(*batch)
    assert torch.allclose(output.context.sequence, cim.encode_context(batch[0]).sequence)
    assert not output.context.sequence.requires_grad
    output.loss.backward()
    actual = {name: p.grad.clone() for name, p in trained(cim).items()}

    fixed = copy.deepcopy(cim)
    fixed.zero_grad()
    tokens = copy.deepcopy(cim).encode_context(batch[0])
    sequence, _ = fixed.encode_exemplars(batch[1])
    F.binary_cross_entropy_with_logits(fixed.head(tokens, sequence, S), batch[2].float()).backward()
    assert all(torch.allclose(p.grad, actual[name], atol=1e-6) for name, p in trained(fixed).items())

    before = copy.deepcopy(cim.state_dict())
    cim.update_target(0.5)
    assert all(torch.equal(value, before[key]) for key, value in cim.state_dict().items())


def test_without_a_moving_average_gradients_survive_autocast(batch):
    cim = make(moving_average=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = cim(*batch)
    assert output.loss.dtype == output.logits.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(cim).values())
    assert cim.online.blocks[0].attn.qkv.weight.grad.any()


def test_cosine_correlation(batch):
    cim = make(head="cosine")
    assert isinstance(cim.head, CosineHead)
    output = cim(*batch)
    exemplar = output.exemplars.mean(2)
    similarity = F.cosine_similarity(output.context.patches[:, None], exemplar[:, :, None], dim=-1).unflatten(
        -1, (4, 4)
    )
    expected = F.interpolate(similarity, (S, S), mode="bilinear", align_corners=True)
    assert torch.allclose(output.logits, expected, atol=1e-5)


@pytest.mark.parametrize("summary", ["class", "mean"])
def test_the_global_loss_is_info_nce_of_exemplars_and_their_contexts(batch, summary):
    cim = make(global_weight=0.7, correlation_weight=0.3, global_summary=summary)
    once = copy.deepcopy(cim)
    output = cim(*batch)
    context, exemplars = output.context.summary, output.exemplars[:, :, 0]
    if summary == "mean":
        context, exemplars = output.context.patches.mean(dim=1), output.exemplars[:, :, 1:].mean(dim=2)
    contexts = once.global_target(context)
    losses = []
    for k in range(K):
        predictions = once.global_head.predictor(once.global_head.projector(exemplars[:, k]))
        losses.append(info_nce(predictions[:, None], contexts, 0, 0.2)[0])
    assert torch.allclose(output.global_loss, torch.stack(losses).mean(), atol=1e-4)
    assert torch.allclose(output.loss, 0.3 * output.correlation_loss + 0.7 * output.global_loss, atol=1e-6)


def test_contexts_of_other_processes_are_gathered(batch):
    cim = make(global_weight=1.0).eval()
    others = F.normalize(torch.randn(5, 256), dim=-1)
    alone = cim(*batch).global_loss
    cim.gather = lambda x: (torch.cat([others, x]), 5)
    assert cim(*batch).global_loss > alone


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_moving_average_is_over_parameters_and_leaves_buffers(family, batch):
    cim = make(family, global_weight=1.0, freeze_patch_embed=False)
    cim(*batch)
    before = copy.deepcopy(cim)
    cim.update_target(0.9)
    for target, online, old in (
        (cim.target, cim.online, before.target),
        (cim.global_target, cim.global_head.projector, before.global_target),
    ):
        moved = dict(target.named_parameters())
        for name, source in online.named_parameters():
            assert torch.allclose(moved[name], 0.9 * old.get_parameter(name) + 0.1 * source, atol=1e-6), name
        assert all(torch.equal(value, old.get_buffer(name)) for name, value in target.named_buffers())
    unmoved = {**before.online.state_dict(), **before.head.state_dict()}
    now = {**cim.online.state_dict(), **cim.head.state_dict()}
    assert all(torch.equal(now[name], value) for name, value in unmoved.items())


def test_momentum_one_and_zero():
    cim = make()
    before = copy.deepcopy(cim.target.state_dict())
    cim.update_target(1.0)
    assert all(torch.equal(value, before[name]) for name, value in cim.target.state_dict().items())
    cim.update_target(0.0)
    for name, value in cim.target.state_dict().items():
        assert torch.allclose(value, cim.online.state_dict()[name], atol=1e-7)


@pytest.mark.parametrize("share", [True, False])
def test_a_shared_class_token(share):
    cim = make(share_class_token=share)
    cim.update_target(0.9)
    assert torch.equal(cim.target.cls_token, cim.online.cls_token) is share


def test_sharing_means_nothing_without_a_class_token():
    make("resnet", share_class_token=True).update_target(0.9)


def test_the_target_starts_as_the_online_encoder():
    cim = CIM(build("cim_vit_tiny", depth=1), PretextConfig(head_width=64, head_heads=4))
    for name, value in cim.target.state_dict().items():
        assert torch.equal(value, cim.online.state_dict()[name])
    assert not any(p.requires_grad for p in cim.target.parameters())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_an_untrained_model_has_the_loss_of_the_best_constant(family, batch):
    backbone = build("cim_resnet18") if family == "resnet" else build("cim_vit_tiny", depth=1)
    cim = CIM(backbone, PretextConfig(head_width=64, head_heads=4))
    share = batch[2].float().mean()
    cim.head.start_from(torch.logit(share).item())
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    assert torch.allclose(cim(*batch).loss, entropy, atol=1e-5)


def test_a_class_token_counts_among_an_exemplars_tokens_and_a_resnet_has_none(batch):
    assert make()(*batch).exemplars.shape == (B, K, 1 + 9, 192)
    assert make("resnet")(*batch).exemplars.shape == (B, K, 4, 512)


def test_gradient_checkpointing_changes_nothing(batch):
    plain, saving = make(), make()
    saving.online.set_grad_checkpointing(True)
    plain(*batch).loss.backward()
    saving(*batch).loss.backward()
    for (name, a), b in zip(trained(plain).items(), trained(saving).values(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_copies_and_state_dicts(family, batch):
    cim = make(family, global_weight=1.0).eval()
    expected = cim(*batch)
    assert torch.equal(copy.deepcopy(cim)(*batch).loss, expected.loss)
    file = io.BytesIO()
    torch.save(cim.state_dict(), file)
    file.seek(0)
    other = CIM(copy.deepcopy(cim.online), cim.config).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*batch).loss, expected.loss)


def test_a_position_embedding_is_the_same_for_both_encoders_and_is_kept():
    names = make().state_dict()
    assert "online.pos_embed" in names and "target.pos_embed" in names
    assert torch.equal(names["online.pos_embed"], names["target.pos_embed"])


def test_the_configuration_is_plain_data():
    config = PretextConfig(head="cosine", reduction="sum", global_weight=0.5)
    assert PretextConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "dot"}, "dot"),
        ({"reduction": "median"}, "median"),
        ({"head_width": 100, "head_heads": 16}, "100"),
        ({"head_width": 66, "head_heads": 11}, "66"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        CIM(build("cim_vit_tiny", depth=1), PretextConfig(**settings))
