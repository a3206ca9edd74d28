"""Importing the package costs no torch; in whatever order, the backbones end up in timm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cim_models

ROOT = Path(__file__).resolve().parents[1]
REGISTERED = """
import sys, timm
assert len(timm.list_models("cim_*")) == len(timm.list_models(module="cim")) == 9
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "cim_models"]
assert timm.create_model("cim_vit_tiny", depth=1).num_features == 192
"""


def run(code: str) -> str:
    """Runs code in a new process, warnings being errors; returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_nothing():
    heavy = ("PIL", "accelerate", "huggingface_hub", "numpy", "safetensors", "timm", "torch", "torchvision", "yaml")
    rest = "json pathlib dataclasses importlib.abc importlib.resources inspect logging subprocess tempfile".split()
    code = "import sys; before = set(sys.modules); import cim_models; dir(cim_models); cim_models.__version__; "
    loaded = run(code + "print(*sorted(set(sys.modules) - before))").split()
    assert not {*heavy, *rest} & set(loaded)
    assert [name for name in loaded if name.startswith("cim_models")] == ["cim_models", "cim_models.errors"]


def test_names_of_the_manifest_need_no_torch():
    code = "import sys; from cim_models.hub import manifest, names, store; manifest.table(); "
    run(code + "assert not {'torch', 'timm', 'numpy', 'huggingface_hub'} & set(sys.modules)")


@pytest.mark.parametrize(
    "imports",
    [
        "import cim_models, timm",
        "import timm, cim_models",
        "import cim_models.backbones",
        "import cim_models.hub.cim",
        "import cim_models, importlib.util; assert importlib.util.find_spec('timm'); import timm.layers",
    ],
)
def test_timm_knows_the_backbones(imports):
    run(imports + REGISTERED)


def test_public_names():
    assert set(cim_models.__all__) <= set(dir(cim_models))
    for name in cim_models.__all__:
        assert getattr(cim_models, name) is not None
    assert issubclass(cim_models.WeightsError, cim_models.CimModelsError)
    assert cim_models.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="has no attribute 'create_modle'"):
        _ = cim_models.create_modle
