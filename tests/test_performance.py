"""Benchmarks: costs by formula against torch's own counts, and documents that say what was measured."""

import json

import costs
import decode
import performance
import pytest
import scaling
import start
import table
import throughput
import torch

from cim_models.backbones import build
from cim_models.pretext.model import CIM
from cim_models.pretraining.readers import open_records, read_record


@pytest.mark.parametrize("model", ["cim_vit_tiny", "cim_resnet18"])
@pytest.mark.parametrize("shapes", [None, costs.Shapes(96, 64, 2)])
def test_the_formula_of_operations_is_what_torch_counts(model, shapes):
    assert costs.formula_flops(model, shapes) == pytest.approx(costs.counted_flops(model, shapes), rel=1e-6)


@pytest.mark.parametrize("model", ["cim_vit_tiny", "cim_resnet18"])
def test_the_least_memory_is_no_more_than_what_autograd_keeps(model):
    shapes, images = costs.Shapes(96, 64, 2), 2
    cim = CIM(build(model))
    parameters = {p.untyped_storage().data_ptr() for p in cim.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = cim(
            torch.randn(images, 3, 96, 96), torch.randn(images, 2, 3, 64, 64), torch.zeros(images, 2, 96, 96)
        ).loss
    measured = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in parameters) / images
    assert loss.requires_grad
    assert 0.7 * measured < costs.saved_bytes(model, shapes) < 1.05 * measured


def test_activation_checkpointing_keeps_less():
    least = [costs.saved_bytes("cim_vit_small", checkpointing=checkpointing) for checkpointing in (False, True)]
    assert least[1] < 0.6 * least[0]


def test_the_operations_of_a_throughput_are_those_of_its_run(tmp_path, monkeypatch):
    small = ["views.context_size=64", "views.exemplars.size=32", "views.exemplars.count=2"]
    words = ["--device", "cpu", "--batch", "2", "--workers", "0", "--out", str(tmp_path / "table.json")]
    monkeypatch.setattr("sys.argv", ["throughput.py", *words, "--set", *small])
    monkeypatch.setitem(throughput.SIDES, "cpu", (64,))
    throughput.main()
    made = table.Table.read(tmp_path / "table.json")
    counted = made.rows["cim_vit_tiny"][list(made.columns).index("GFLOP/image")]
    assert counted == pytest.approx(costs.formula_flops("cim_vit_tiny", costs.Shapes(64, 32, 2)) / 1e9)


def test_documents_are_what_the_commands_write():
    document = performance.DOCUMENT.read_text(encoding="utf-8")
    assert document == performance.markdown(performance.BENCHMARKS / "performance"), "run benchmarks/performance.py"
    document = scaling.DOCUMENT.read_text(encoding="utf-8")
    written = scaling.replaced(document, scaling.markdown(decoded=scaling.decoding_rate()))
    assert document == written, "run benchmarks/scaling.py --out docs/scaling.md"


def test_a_table_is_the_same_after_it_was_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/step.py", "--batch", "4", "--out", str(tmp_path / "a.json")])
    made = table.Table(
        "Title", {"s": ".1f", "bar": ".0%"}, ["so and so"], rows={"one": [1.26, None], "two": [2.0, 0.5]}
    )
    made.finish(tmp_path / "a.json")
    assert table.Table.read(tmp_path / "a.json") == made
    assert made.command == "python benchmarks/step.py --batch 4"
    assert json.loads((tmp_path / "a.json").read_text())["rows"]["one"] == [1.26, None]
    assert made.cells() == [("one", ["1.3", ""]), ("two", ["2.0", "50%"])]
    assert "1.3" in capsys.readouterr().out


def test_rows_take_turns():
    calls: list[str] = []
    times = iter(range(100))
    took = table.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 2, lambda: next(times))
    assert calls == ["a", "b"] * 3
    assert took == {"a": [1, 1], "b": [1, 1]}
    assert table.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 9.0]) == 2.0


def test_what_was_not_measured_is_said_to_be_open(tmp_path):
    document = performance.markdown(tmp_path)
    for command in performance.COMMANDS.values():
        assert f"- `python benchmarks/{command}`" in document
        assert (performance.BENCHMARKS / command.split()[0]).is_file()


def test_pictures_are_read_alike_by_both_ways(tmp_path):
    paths = decode.generate(tmp_path, 3, (96, 72))
    rows = decode.rows_of(paths, 48)
    ours, scaled, _ = (function() for function in rows.values())
    for sample, other in zip(ours, scaled, strict=True):
        assert torch.equal(sample["source"], other) or torch.equal(sample["source"], other.flip(-1))


def test_many_pictures_of_a_few_files(tmp_path):
    (tmp_path / "files").mkdir()
    files = decode.generate(tmp_path / "files", 2, (32, 24))
    for kind in (
        start.folder(files, tmp_path / "folder", 25),
        start.archive(files, tmp_path / "pictures.zip", 25),
        start.shards(files, tmp_path / "shards", 25),
    ):
        records = open_records(kind)
        assert len(records) == 25
        assert read_record(records, 24).size == (32, 24)
