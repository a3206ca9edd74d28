"""Two processes of the loop give the losses, gradients and weights of one process with the same global batch."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cim_models import backbones
from cim_models.backbones.vit import VITS
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretraining.config import to_dict
from cim_models.pretraining.data import GlobalBatches
from cim_models.pretraining.loop import pretrain

SHALLOW = """
from cim_models.backbones.vit import VITS

VITS["cim_vit_tiny"]["depth"] = 2
"""
WORKER = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cim_models import backbones
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretraining import load_recipe, pretrain
from cim_models.pretraining.trainer import Trainer

recipe, views, weights, gradients = sys.argv[1:]
torch.set_num_threads(1)

accelerator = Accelerator()
rank = accelerator.process_index
assert accelerator.num_processes == 2 and accelerator.device.type == "cpu"
backbone = backbones.build("cim_vit_tiny", embed_dim=24, depth=1, num_heads=2, img_size=32)
cim = CIM(backbone, PretextConfig(head_width=16, head_heads=2, global_weight=1.0, global_hidden=8)).eval()
cim.load_state_dict(load_file(weights))
cim.gather = lambda x: (accelerator.gather(x), rank * len(x))
model = accelerator.prepare(cim)
assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
views = load_file(views)
mine = [views[name].chunk(2)[rank] for name in ("context", "exemplars", "maps")]
output = model(*mine)
accelerator.backward(output.loss)
assert type(output).__name__ == "Output" and output.context.grid == (2, 2)
if rank == 0:
    save_file({name: p.grad for name, p in cim.named_parameters() if p.grad is not None}, gradients)

clip = Trainer.clip


def together(trainer):
    places = {p.grad.untyped_storage().data_ptr() for p in trainer.trained}
    assert len(places) < 5 < len(trainer.trained), "gradients have copies of their own beside what is sent"
    return clip(trainer)


Trainer.clip = together
config = load_recipe(recipe)
pretrain(config)
config.out += "-again"
pretrain(config)
"""
KILLED = """
import os, sys
import torch
from cim_models.pretraining import load_recipe, pretrain, schedules

torch.set_num_threads(1)
momentum = schedules.momentum


def kill(step, *others):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return momentum(step, *others)


schedules.momentum = kill
pretrain(load_recipe(sys.argv[1]))
"""
PATIENT = """
import sys, time
from datetime import timedelta
import torch
from cim_models.pretraining import load_recipe, pretrain


naps = [15, 0]


def probe(cim):
    time.sleep(naps.pop(0))
    return {"rank": float(torch.distributed.get_rank())}


torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=10))
pretrain(load_recipe(sys.argv[1]), probe)
"""
SHARDED = """
import sys
from functools import partial
import torch
from cim_models.pretext.model import CIM
from cim_models.pretraining import build, load_recipe, loop
from cim_models.pretraining.compiling import compile_parts

torch.set_num_threads(1)
update = CIM.update_target
here = []


def look(cim, momentum):
    here.append(sum(getattr(p, "to_local", lambda: p)().numel() for p in cim.parameters()))
    here[-1] /= sum(p.numel() for p in cim.parameters())
    update(cim, momentum)


def probe(cim):
    return {"feature": float(cim.target(torch.ones(2, 3, 64, 64)).abs().mean())}


CIM.update_target = look
build.compile_parts = partial(compile_parts, backend="aot_eager")  # which takes no time
for config in map(load_recipe, sys.argv[1:]):
    loop.pretrain(config, probe)
    assert all(0.45 < share < 0.55 if config.shard else share == 1 for share in here) and here, here
    here.clear()
"""
ELSEWHERE = """
import os, sys
from cim_models.pretraining import load_recipe, pretrain

os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
pretrain(load_recipe("run.yaml"))
"""
AUTO = """
import sys
import torch
from accelerate import Accelerator
from cim_models.pretraining import load_recipe, memory
from cim_models.pretraining.batch_size import find_batch_size
from cim_models.pretraining.loop import pictures_of
from cim_models.pretraining.readers import open_records

rank = Accelerator().process_index
room = 2 * (300 + 200 * rank) * 1_000_000  # which two processes share
memory.room = lambda device: room
config = load_recipe(sys.argv[1])
pictures = pictures_of(config, open_records(config.data.path))
pictures.__class__ = type("Many", (type(pictures),), {"__len__": lambda self: 100_000})
fitting = memory.largest_batch
found = []


def remember(*arguments):
    found.append(fitting(*arguments))
    return found[0]


find_batch_size.__globals__["largest_batch"] = remember
agreed = find_batch_size(config, pictures, torch.device("cpu"), 2)
print(f"found {found[0]} agreed {agreed}")
"""
TIMES = {"images_per_second", "data_wait", "peak_memory"}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """cim_vit_tiny has two blocks here, as in programs that begin with SHALLOW: they show the same in less time."""
    monkeypatch.setitem(VITS, "cim_vit_tiny", {**VITS["cim_vit_tiny"], "depth": 2})


def gradients_of_one_process(weights: Path, views: Path) -> dict[str, torch.Tensor]:
    """The same batch as in WORKER, whole. BatchNorm takes its running statistics, so that images do not mix."""
    torch.manual_seed(0)
    backbone = backbones.build("cim_vit_tiny", embed_dim=24, depth=1, num_heads=2, img_size=32)
    cim = CIM(backbone, PretextConfig(head_width=16, head_heads=2, global_weight=1.0, global_hidden=8)).eval()
    torch.nn.init.normal_(cim.head.predict.weight)
    save_file(cim.state_dict(), weights)
    batch = {
        "context": torch.randn(4, 3, 32, 32),
        "exemplars": torch.randn(4, 2, 3, 16, 16),
        "maps": (torch.rand(4, 2, 32, 32) < 0.3).float(),
    }
    save_file(batch, views)
    output = cim(**batch)
    output.loss.backward()
    assert output.global_loss > 0.1
    return {name: p.grad for name, p in cim.named_parameters() if p.grad is not None}


def lines_of(run: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor to `tolerance` of its largest value."""
    assert ours.keys() == theirs.keys() and ours
    worst = {}
    for name, tensor in ours.items():
        worst[name] = ((tensor - theirs[name]).abs().max() / tensor.abs().max().clamp_min(1e-6)).item()
    assert {name: error for name, error in worst.items() if not error <= tolerance} == {}


def test_two_processes_are_one(tmp_path, out, photographs, configure, launch):
    images = tmp_path / "images"
    images.mkdir()
    for path in photographs(200, 64).iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    order = list(GlobalBatches(200, 2, seed=0, rank=1, processes=2, total_steps=6))
    bad = sorted(path.name for path in images.iterdir())[order[3][0][1]]
    (images / bad).write_text("not an image")  # the second step of the second process
    changes = dict(
        optimiser__accumulation=2, optimiser__epochs=3 / 25, optimiser__warmup_epochs=0.0, optimiser__lr=0.01,
        optimiser__clip=None, optimiser__betas=(0.0, 0.95), pretext__freeze_patch_embed=True, precision="fp32",
    )  # fmt: skip

    one, two, fewer = (configure(images, out / name, **changes) for name in ("one", "two", "fewer"))
    one.optimiser.batch_size, two.optimiser.batch_size, fewer.optimiser.batch_size = 4, 2, 4
    two.save_every, two.keep = 1, 3
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(to_dict(two)))
    files = [tmp_path / name for name in ("views.safetensors", "weights.safetensors", "gradients.safetensors")]
    expected = gradients_of_one_process(weights=files[1], views=files[0])
    done = launch(SHALLOW + WORKER, tmp_path / "two.yaml", *files)
    assert done.returncode == 0, done.stderr
    assert_close(load_file(files[2]), expected, 1e-5)

    pretrain(one)
    texts = [(out / name / "log.jsonl").read_text() for name in ("one", "two")]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 2, 3]
    assert logs[0][1] == logs[1][1] == {"step": 2, "skipped": f"{images / bad}: not an image", "unreadable": 1}
    exact = {"step", "steps", "epoch", "images_seen", "prior_loss", "lr", "momentum", "unreadable"}
    for ours, theirs in zip(*(log[:1] + log[2:] for log in logs), strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in exact if ours[name] != theirs[name]] == []
        for name in ("loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
        for name in ("iou", "cosine"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4)

    states = [torch.load(out / name / "last.pt", weights_only=True) for name in ("one", "two")]
    # With beta1 = 0 the first moment of AdamW is the gradient of the last step.
    moments = [{str(i): s["exp_avg"] for i, s in state["optimiser"]["state"].items()} for state in states]
    assert_close(*moments, 1e-4)
    assert_close(*(state["model"] for state in states), 1e-3)

    # The second run in the same processes is the first one again.
    again = torch.load(out / "two-again" / "last.pt", weights_only=True)
    assert all(torch.equal(tensor, states[1]["model"][name]) for name, tensor in again["model"].items())

    # Half of the processes, with twice the batch, go on where two stopped: on the same images.
    (out / "fewer").mkdir()
    (out / "two" / "step-00000001.pt").rename(out / "fewer" / "last.pt")
    fewer.resume = True
    pretrain(fewer)
    lines = [json.loads(line) for line in (out / "fewer" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 3]
    for ours, theirs in zip(lines[1:], logs[1][2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert_close(torch.load(out / "fewer" / "last.pt", weights_only=True)["model"], states[1]["model"], 1e-3)


@pytest.mark.slow
def test_shards_are_one_process(tmp_path, out, photographs, configure, launch):
    """Each of two processes has half of all parameters; checkpoints are whole, and go on either way, compiled, too."""
    changes = dict(
        optimiser__accumulation=2, optimiser__epochs=0.16, optimiser__warmup_epochs=0.0, optimiser__lr=0.01,
        optimiser__clip=0.05, optimiser__betas=(0.0, 0.95), backbone__grad_checkpointing=True, precision="fp32",
        save_every=1, keep=4, diagnostics__held_out=10, diagnostics__every=2,
    )  # fmt: skip
    names = ("one", "two", "onwards", "compiled")
    one, two, onwards, compiled = configs = [configure(photographs(200, 64), out / name, **changes) for name in names]
    one.optimiser.batch_size, two.optimiser.batch_size, onwards.optimiser.batch_size = 4, 2, 2
    compiled.optimiser.batch_size = 2
    two.shard = onwards.shard = onwards.compile = compiled.compile = True
    onwards.resume = compiled.resume = True

    def probe(cim: CIM) -> dict[str, float]:
        return {"feature": float(cim.target(torch.ones(2, 3, 64, 64)).abs().mean())}

    pretrain(one, probe)
    for name in ("onwards", "compiled"):
        (out / name).mkdir()
        shutil.copy(out / "one" / "step-00000002.pt", out / name / "last.pt")  # of one process, for two
    recipes = []
    for config in configs[1:]:
        recipes.append(tmp_path / f"{len(recipes)}.yaml")
        recipes[-1].write_text(yaml.safe_dump(to_dict(config)))
    done = launch(SHALLOW + SHARDED, *recipes)
    assert done.returncode == 0, done.stderr

    logs = {name: lines_of(out / name) for name in names}
    assert [line["step"] for line in logs["one"]] == [line["step"] for line in logs["two"]] == [1, 2, 2, 3, 4, 4]
    for name, expected in zip(names[1:], (logs["one"], logs["one"][3:], logs["one"][3:]), strict=True):
        for ours, theirs in zip(logs[name], expected, strict=True):
            assert ours.keys() == theirs.keys()
            for field in {"loss", "grad_norm", "held_out_loss", "feature"} & ours.keys():
                assert ours[field] == pytest.approx(theirs[field], rel=1e-4), (name, ours["step"], field)
    states = {name: torch.load(out / name / "last.pt", weights_only=True) for name in names}
    for name in names[1:]:
        assert_close(states["one"]["model"], states[name]["model"], 1e-3)
        optimisers = [states[key]["optimiser"]["state"] for key in ("one", name)]
        moments = [{str(i): values["exp_avg"] for i, values in state.items()} for state in optimisers]
        assert_close(*moments, 1e-3)
    for part in ("online", "target", "head"):
        assert_close(*(load_file(out / name / f"{part}.safetensors") for name in ("one", "two")), 1e-3)

    two.resume, two.shard, two.optimiser.batch_size = True, False, 4
    (out / "two" / "step-00000003.pt").rename(out / "two" / "last.pt")  # of two processes, for one
    pretrain(two, probe)
    again = torch.load(out / "two" / "last.pt", weights_only=True)
    assert_close(states["two"]["model"], again["model"], 1e-3)


@pytest.mark.slow
def test_the_process_with_the_least_memory_decides_how_many_images(tmp_path, out, photographs, configure, launch):
    config = configure(photographs(8, 64), out, optimiser__batch_size="auto")
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(to_dict(config)))
    done = launch(SHALLOW + AUTO, tmp_path / "auto.yaml")
    assert done.returncode == 0, done.stderr
    found, agreed = zip(*re.findall(r"found (\d+) agreed (\d+)", done.stdout), strict=True)
    assert len(found) == 2 and set(agreed) == {min(found, key=int)} and 2 <= int(agreed[0]) < max(map(int, found))


@pytest.mark.slow
def test_a_probe_may_take_longer_than_processes_wait_for_each_other(tmp_path, out, photographs, configure, launch):
    config = configure(photographs(8, 64), out, optimiser__batch_size=2, optimiser__epochs=1.0, diagnostics__every=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    done = launch(SHALLOW + PATIENT, tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert [line["rank"] for line in lines_of(out) if "rank" in line] == [0.0, 0.0]


@pytest.mark.slow
def test_processes_that_find_other_images(tmp_path, photographs, configure, launch):
    """Each in its own folder, as on machines with disks of their own."""
    for rank in range(2):
        shutil.copytree(photographs(8, 64), tmp_path / str(rank) / "images")
        (tmp_path / str(rank) / "run.yaml").write_text(yaml.safe_dump(to_dict(configure("images", "run"))))
    next((tmp_path / "1" / "images").iterdir()).unlink()
    done = launch(SHALLOW + ELSEWHERE, tmp_path)
    assert done.returncode != 0
    assert "DataError: images: process 1 does not find there what the first one does; all must see" in done.stderr


def test_other_splits_of_a_step_see_the_same_images():
    """Whenever the images of a step and of an epoch are as many: in the same order, each once per epoch."""
    for splits in (((2, 2), (4, 1), (1, 4)), ((2, 4), (4, 2), (8, 1), (1, 8))):
        streams = []
        for batch_size, processes in splits:
            ranks = [
                list(GlobalBatches(53, batch_size, 0, rank, processes, total_steps=24 // (batch_size * processes) * 6))
                for rank in range(processes)
            ]
            steps = [[pair for rank in ranks for pair in rank[micro]] for micro in range(len(ranks[0]))]
            streams.append(sum(steps, []))
            per_epoch = 53 // (batch_size * processes) * batch_size * processes
            epoch = streams[-1][:per_epoch]
            assert len({index for _, index in epoch}) == per_epoch and {e for e, _ in epoch} == {0}
        assert all(stream == streams[0] for stream in streams)


def test_a_killed_process_ends_the_others(tmp_path, out, photographs, configure, launch):
    config = configure(photographs(8, 64), out, optimiser__batch_size=2, optimiser__epochs=20.0, save_every=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    done = launch(SHALLOW + KILLED, tmp_path / "run.yaml")
    assert done.returncode != 0
    assert "CimModelsError: another process of the run has ended, hence this one too" in done.stderr
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
