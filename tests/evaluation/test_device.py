"""Evaluation on a GPU, without one: nothing mixes devices, and the host waits only where numbers are wanted."""

from pathlib import Path

import pytest
import torch
from fake_gpu import Enough, FakeGPU, OnGPU
from PIL import Image
from torch.utils.data import Dataset

from cim_models.backbones import build
from cim_models.evaluation.correlation import _measure
from cim_models.evaluation.decoders import LinearSegmenter, PyramidSegmenter
from cim_models.evaluation.features import extract
from cim_models.evaluation.finetune import FinetuneConfig, _task, build_classifier
from cim_models.evaluation.heads import CHUNK, fit_lbfgs, fit_sgd
from cim_models.evaluation.knn import knn_accuracy
from cim_models.evaluation.recipe import make_plan
from cim_models.evaluation.segment import SegmentConfig, parameter_groups, pixel_loss
from cim_models.evaluation.splits import Split
from cim_models.evaluation.training import Task, fit
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretext.views import DRAWS, ViewConfig, make_views

CUDA = torch.device("cuda")
SIZE = {"depth": 1, "img_size": 32}


def task_of(kind, config):
    """Something that is trained, with a model that has numbers; and what is to come out for one picture."""
    encoder, maps = build("cim_vit_tiny", **SIZE), torch.ones(32, 32, dtype=torch.long)
    if kind == "finetune":
        model = build_classifier(encoder, SIZE, 3, config)
        split = Split(Path("pictures"), ["a", "b", "c"], [Path("picture")] * 16, torch.zeros(16).long())
        return _task(model, split, list(range(16)), [], config, None), 1
    if kind == "linear":
        model = LinearSegmenter(encoder, 3)
    else:
        model = PyramidSegmenter(build("cim_vit_tiny", **SIZE, features_only=True, out_indices=(0,)), 3, 8)
    return Task(model, parameter_groups(model, config), None, 16, pixel_loss, None), maps


class Examples(Dataset):
    """Black pictures."""

    def __init__(self, target):
        self.target = target

    def __getitem__(self, key):
        return torch.zeros(3, 32, 32), self.target, []


@pytest.mark.parametrize("kind", ["finetune", "linear", "pyramid"])
def test_a_training_step_mixes_no_devices_and_waits_for_nothing(kind, tmp_path):
    config = (FinetuneConfig if kind == "finetune" else SegmentConfig)(
        batch_size=4, workers=0, precision="bf16", clip=1
    )
    task, target = task_of(kind, config)
    gpu, steps, augment = FakeGPU(), [], task.augment

    def noted(inputs, targets):
        steps.append(gpu.take())
        if len(steps) == 3:
            raise Enough
        return augment(inputs, targets)

    with pytest.raises(Enough), gpu:
        parameters = {parameter: name for name, parameter in task.model.named_parameters()}
        names = [[parameters[parameter] for parameter in group["params"]] for group in task.groups]
        task.model.to(CUDA)
        parameters = dict(task.model.named_parameters())
        for group, members in zip(task.groups, names, strict=True):
            group["params"] = [parameters[name] for name in members]
        task.examples, task.augment = Examples(target), noted
        fit(task, config, make_plan(config, 16), OnGPU(mixed_precision="no"), tmp_path, {}, resume=False)
    assert steps[1].waits == [] and len(steps[1].copies) == 2  # pictures and targets


def test_features_go_there_and_come_back_once_a_batch():
    model = build("cim_vit_tiny", **SIZE)
    with FakeGPU() as gpu:
        model.to(CUDA)
        gpu.take()
        pictures = [Image.new("RGB", (40, 32))] * 3
        found = list(
            extract(model, pictures, transform=lambda picture: torch.zeros(3, 32, 32), batch_size=2, workers=0)
        )
    assert [batch.features.device.type for batch in found] == ["cpu", "cpu"]
    assert gpu.copies == [(2, 3, 32, 32), (2, 192), (1, 3, 32, 32), (1, 192)] and len(gpu.waits) == 4


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_the_gallery_of_neighbours_may_lie_anywhere(on):
    labels, queries = torch.zeros(40, dtype=torch.long), torch.randn(5, 8)
    with FakeGPU():
        knn_accuracy(torch.randn(40, 8, device=on), labels, queries.to(CUDA), labels[:5], ks=(1, 3), chunk=16)


def test_linear_classifiers_wait_once_a_chunk():
    features, labels = torch.randn(20, 8), torch.arange(20) % 2
    gpu, passes = FakeGPU(), []
    with gpu:
        heads = fit_sgd(
            features, labels, 2, (0.1, 1.0), epochs=2, batch_size=4, device=CUDA,
            progress=lambda: passes.append(gpu.take()),
        )  # fmt: skip
        assert len(heads.accuracies(features, labels)) == 2
    assert [len(done.waits) for done in passes][1:] == [2]  # features and labels, for five steps
    assert CHUNK > 20


def test_logistic_regression_moves_a_few_features_once():
    with FakeGPU() as gpu:
        fit_lbfgs(torch.randn(20, 8), torch.arange(20) % 2, 2, 1.0, iterations=2, device=CUDA)
    assert gpu.copies == [(20, 8), (20,)]


def test_exemplars_are_found_there():
    with torch.random.fork_rng():
        pretext = CIM(build("cim_vit_tiny", **SIZE), PretextConfig(head_width=32, head_heads=2))
    config = ViewConfig(context_size=32)
    config.exemplars.size = 16
    with FakeGPU():
        pretext = pretext.to(CUDA).eval()
        source, uniforms = torch.zeros(2, 3, 64, 64, device=CUDA), torch.zeros(2, 2, DRAWS, device=CUDA)
        assert _measure(pretext, make_views(source, uniforms, config)).shape == (4,)
