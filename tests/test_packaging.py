"""The manifest and the released weights are found however the package came: wheel, editable, sdist, plain copy.

Everything is built and installed for real, from a copy of the repository and without a network. The fresh environments
see the packages of the test environment, but neither the checkout nor whatever is installed from it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

PROBE = """
import hashlib, json, sys
import cim_models
from cim_models.hub.manifest import data_root, load_manifest
root = data_root()
entries = [entry for entry in load_manifest().entries.values() if "repository" in entry.sources]
named = {file.path: file.sha256 for entry in entries for file in entry.files}
files = [root / "weights_manifest.json", *(file for file in (root / "weights").rglob("*") if file.is_file())]
hashes = {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
assert named and named.items() <= hashes.items(), (named, hashes)
assert "torch" not in sys.modules
print(json.dumps({"package": cim_models.__file__, "root": str(root), "files": hashes}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command with nothing of the calling environment that names Python packages; returns what it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def probe(python: str | Path, empty: Path, **environment: str) -> dict:
    """What a process in an empty folder finds: each file that the manifest names as the repository's, by its sha256."""
    empty.mkdir()
    found = json.loads(run(python, "-c", PROBE, cwd=empty, **environment))
    assert not any(empty.iterdir())
    return found


@pytest.fixture(scope="session")
def copy(tmp_path_factory, repository) -> Path:
    """The repository as an archive of it would be: plain files, no git, no symlinks, nothing ignored."""
    root, files = repository
    target = tmp_path_factory.mktemp("copy") / "cim_models-main"
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target / file)
    return target


@pytest.fixture(scope="session")
def released(copy) -> dict[str, str]:
    """sha256 of the manifest and of every file in `weights/`, as the repository holds them."""
    files = [copy / "weights_manifest.json", *(file for file in (copy / "weights").rglob("*") if file.is_file())]
    assert any(file.suffix == ".safetensors" for file in files)
    return {file.relative_to(copy).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory, copy) -> tuple[Path, Path]:
    """The wheel and the sdist, both built from a copy of the repository."""
    source = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(copy, source)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, source, cwd=out)
    assert not (source / "cim_models" / "_data").exists()
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture
def install(tmp_path):
    """`install(*what)` puts something into a fresh environment and returns that environment's Python."""

    def into_fresh(*what: str | Path) -> Path:
        venv.create(tmp_path / "venv", symlinks=True)
        python = tmp_path / "venv" / "bin" / "python"
        (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        (packages / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [python, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        run(*pip, *what, cwd=tmp_path)
        return python

    return into_fresh


def test_wheel(tmp_path, copy, distributions, install, released):
    wheel, _ = distributions
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {file.relative_to(copy).as_posix() for file in (copy / "cim_models").rglob("*") if file.is_file()}
    assert names == package | {f"cim_models/_data/{name}" for name in released}
    python = install(wheel)
    found = probe(python, tmp_path / "empty")
    assert found["files"] == released
    assert Path(found["package"]).is_relative_to(tmp_path) and Path(found["root"]).name == "_data"
    listed = run(python.with_name("cim"), "list", cwd=tmp_path / "empty")
    assert "cim_vit_tiny" in listed
    run(python, "-c", "import cim_models as c; c.create_model('cim_vit_tiny', pretrained=True)", cwd=tmp_path / "empty")


def test_editable(tmp_path, copy, install, released):
    source = tmp_path / "repository"
    shutil.copytree(copy, source)
    found = probe(install("--editable", source), tmp_path / "empty")
    assert found["files"] == released
    assert Path(found["root"]) == source and not (source / "cim_models" / "_data").exists()


def test_sdist(tmp_path, distributions, install, released):
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (source / "tests" / "test_packaging.py").is_file()
    found = probe(sys.executable, tmp_path / "plain", PYTHONPATH=str(source))
    assert found["files"] == released and Path(found["root"]) == source
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    found = probe(install(wheel), tmp_path / "empty")
    assert found["files"] == released and Path(found["root"]).name == "_data"


def test_plain_copy(tmp_path, copy, released):
    """As torch.hub leaves a repository: unpacked somewhere and put on `sys.path`."""
    found = probe(sys.executable, tmp_path / "empty", PYTHONPATH=str(copy))
    assert found["files"] == released
    assert Path(found["root"]) == copy and Path(found["package"]).is_relative_to(copy)


def test_a_stale_build_folder_leaves_nothing_in_the_wheel(tmp_path, copy):
    source = tmp_path / "repository"
    shutil.copytree(copy, source)
    stale = source / "build" / "lib" / "cim_models" / "_data" / "weights" / "withdrawn"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").touch()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "withdrawn" in name]
