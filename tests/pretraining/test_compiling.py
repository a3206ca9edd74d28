"""cim_models.pretraining.compiling: one graph for each part, the same numbers, the same names."""

import json
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from cim_models import backbones
from cim_models.errors import ConfigError
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretraining import build, compiling, loop
from cim_models.pretraining.build import remember_positions
from cim_models.pretraining.compiling import compile_parts, eager
from cim_models.pretraining.config import PretrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""Which torch gives of its own tracing."""
BATCH = 2


def small(family: str, drop_path: float = 0.0, head: str = "cross_attention") -> tuple[CIM, PretrainConfig]:
    torch.manual_seed(0)
    args = dict(embed_dim=24, depth=10, num_heads=2, img_size=64) if "vit" in family else {}
    backbone = backbones.build(family, drop_path_rate=drop_path, **args)
    cim = CIM(backbone, PretextConfig(head=head, head_width=16, head_heads=2, freeze_patch_embed=False))
    config = PretrainConfig(model=family)
    config.views.context_size, config.views.exemplars.size = 64, 32
    if head == "cross_attention":
        torch.nn.init.normal_(cim.head.predict.weight, std=0.1)
    return cim, config


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, 3, 64, 64), (BATCH, 2, 3, 32, 32), (BATCH, 2, 64, 64))
    context, exemplars, maps = (torch.randn(shape, generator=generator) for shape in shapes)
    return context, exemplars, maps > 0.5


def gradients(cim: CIM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step, and its gradients."""
    torch.manual_seed(2)
    cim.zero_grad()
    loss = cim(*batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in cim.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cim_vit_tiny", {}),
        ("cim_vit_tiny", {"drop_path": 0.3}),
        ("cim_vit_tiny", {"checkpointing": True}),
        ("cim_vit_tiny", {"head": "cosine"}),
        ("cim_resnet18", {}),
    ],
)
def test_no_graph_breaks_and_nothing_else_changes(family, changes):
    """`fullgraph` makes a break an error; a second step, and a diagnosis, compile nothing more."""
    changes = dict(changes)
    checkpointing = changes.pop("checkpointing", False)
    plain, config = small(family, **changes)
    plain.online.set_grad_checkpointing(checkpointing)
    compiled, _ = small(family, **changes)
    compiled.online.set_grad_checkpointing(checkpointing)
    counter = CompileCounterWithBackend("aot_eager")
    compile_parts(compiled, counter)
    before = counter.frame_count
    with eager(True):
        remember_positions(compiled, config)
    assert counter.frame_count == before
    loss, expected = gradients(plain)
    ours, found = gradients(compiled)
    assert torch.allclose(ours, loss, rtol=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name
    graphs = counter.frame_count - before
    assert graphs > 2
    if family == "cim_vit_tiny" and not changes.get("drop_path"):
        assert graphs == 3  # blocks that are alike share theirs: online, target, head
    gradients(compiled)
    with eager(True), torch.no_grad():
        compiled.locate(torch.randn(3, 3, 64, 64), torch.randn(3, 1, 3, 32, 32))
    assert counter.frame_count - before == graphs
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_parts_stay_in_one_graph_where_processes_share_gradients(tmp_path):
    """torch would cut a part at each 25 MB of gradients, and after the first one: here the head alone has 1.7 MB."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        backbone = backbones.build("cim_vit_tiny", embed_dim=24, depth=2, num_heads=2, img_size=64)
        compiled = CIM(backbone, PretextConfig(head_width=192, head_heads=2))
        counter = CompileCounterWithBackend("aot_eager")
        compile_parts(compiled, counter)
        before = counter.frame_count
        torch.nn.parallel.DistributedDataParallel(compiled)(*batch()).loss.backward()
        assert counter.frame_count - before == 3
    finally:
        torch.distributed.destroy_process_group()


def test_where_nothing_can_be_compiled():
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nthere")

    cim, _ = small("cim_vit_tiny")
    with pytest.raises(ConfigError, match="compile is true, but torch.compile fails here: .*it needs a C.. compiler"):
        compile_parts(cim, broken)


@pytest.mark.slow
def test_a_compiled_run_is_the_run(configure, photographs, out, monkeypatch):
    """With a backend that compiles nothing, so that it is fast; what is tested is the way there and back."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(build, "compile_parts", lambda cim: compile_parts(cim, counter))
    images, changes = photographs(200, 64), dict(optimiser__epochs=4 / 47, optimiser__warmup_epochs=0.0)
    changes |= dict(diagnostics__held_out=10, diagnostics__every=2, backbone__drop_path=0.2, save_every=2, keep=2)
    plain = configure(images, out / "plain", **changes, precision="fp32")
    ours = configure(images, out / "compiled", **changes, precision="fp32", compile=True)
    loop.pretrain(plain)
    loop.pretrain(ours)
    graphs = counter.frame_count
    assert 3 < graphs < 20
    logs = [[json.loads(x) for x in (out / n / "log.jsonl").read_text().splitlines()] for n in ("plain", "compiled")]
    for theirs, line in zip(*logs, strict=True):
        for field in {"loss", "grad_norm", "held_out_loss"} & theirs.keys():
            assert line[field] == pytest.approx(theirs[field], rel=1e-3)
    states = [torch.load(out / name / "last.pt", weights_only=True) for name in ("plain", "compiled")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, tensor in states[0]["model"].items():
        assert torch.allclose(states[1]["model"][name], tensor, atol=2e-3), name

    shutil.copy(out / "compiled" / "step-00000002.pt", out / "compiled" / "last.pt")
    ours.resume, ours.compile = True, False  # goes on without
    loop.pretrain(ours)
    again = torch.load(out / "compiled" / "last.pt", weights_only=True)["model"]
    assert all(torch.allclose(again[name], tensor, atol=2e-3) for name, tensor in states[1]["model"].items())


@pytest.mark.slow
def test_inductor_gives_the_same_step():
    try:
        compiling._check(torch.device("cpu"), "inductor")
    except ConfigError as error:
        pytest.skip(str(error))
    plain, config = small("cim_vit_tiny", drop_path=0.0)
    compiled, _ = small("cim_vit_tiny", drop_path=0.0)
    compile_parts(compiled)
    with eager(True):
        remember_positions(compiled, config)
    loss, expected = gradients(plain)
    ours, found = gradients(compiled)
    assert torch.allclose(ours, loss, rtol=1e-4)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max())), name
