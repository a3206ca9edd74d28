"""Processes that are killed, that crowd one cache, that may not write to it, or find the disk full."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback import FOREVER

from cim_models.errors import WeightsError
from cim_models.hub.store import resolve

ROOT = Path(__file__).resolve().parents[2]
FETCH = """
import hashlib, json, logging, sys
from pathlib import Path
from cim_models.errors import WeightsError
from cim_models.hub.manifest import load_manifest
from cim_models.hub.store import resolve
logging.basicConfig(format="%(message)s")
try:
    found = resolve("cim_vit_tiny", manifest=load_manifest(Path(sys.argv[1])))
except WeightsError as error:
    sys.exit(f"WeightsError: {error}")
assert "torch" not in sys.modules
files = [path for paths in found.files.values() for path in paths]
print(json.dumps({str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}))
"""
MODEL = """
import hashlib, sys, torch
from pathlib import Path
from cim_models import create_model
from cim_models.hub.manifest import load_manifest
model = create_model("cim_vit_tiny", pretrained=True, manifest=load_manifest(Path(sys.argv[1])))
tensors = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
print(hashlib.sha256(tensors).hexdigest())
"""


@pytest.fixture
def start(hub, published, tmp_path) -> Callable[..., subprocess.Popen]:
    """`start(code, …)` runs code in a process that uses this test's Hub, cache and manifest."""

    def start(code: str, folder: Path = tmp_path, **kwargs) -> subprocess.Popen:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CIM_", "PYTHON"))}
        clean |= hub.environment(folder) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        clean |= kwargs.pop("environment", {})
        command = [*kwargs.pop("prefix", ()), sys.executable, "-c", code, str(published[0].root)]
        return subprocess.Popen(
            command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **kwargs
        )

    return start


def right(entry, output: str) -> bool:
    """Whether a process printed the digests of the entry's files."""
    return sorted(json.loads(output).values()) == sorted(file.sha256 for file in entry.files)


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_eight_processes_and_one_empty_cache(hub, published, start, pause):
    """One download; the others wait for it, however slow it is."""
    _, entry, _ = published
    hub.fault("GET /objects/", times=FOREVER, pause=pause)
    processes = [start(FETCH) for _ in range(8)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert all(right(entry, output) for output, _ in outputs), outputs
    assert len({output for output, _ in outputs}) == 1
    assert len(hub.requests("GET /objects/")) == len(entry.files)


@pytest.mark.slow
def test_eight_equal_models(hub, published, start):
    outputs = [process.communicate(timeout=300) for process in [start(MODEL) for _ in range(8)]]
    assert len({output for output, _ in outputs}) == 1 and all(output for output, _ in outputs), outputs
    assert len(hub.requests("GET /objects/")) == len(published[1].files)


def test_eight_processes_and_a_damaged_cache(hub, published, start):
    _, entry, _ = published
    for path in resolve("cim_vit_tiny", manifest=published[0]).files["backbone"]:
        path.write_bytes(b"x")
    hub.log.clear()
    outputs = [process.communicate(timeout=60) for process in [start(FETCH) for _ in range(8)]]
    assert all(right(entry, output) for output, _ in outputs), outputs
    assert len(hub.requests("GET /objects/")) == 1


def test_a_killed_download(hub, published, start, tmp_path):
    """What had arrived is gone on from, and nothing of it is left over."""
    _, entry, contents = published
    reached = threading.Event()
    hub.fault("GET /objects/", stall=300_000, first=reached.set)
    process = start(FETCH)
    assert reached.wait(60)
    while not [path for path in tmp_path.rglob("*.partial") if path.stat().st_size == 300_000]:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    output, error = start(FETCH).communicate(timeout=60)
    assert right(entry, output), error
    assert hub.requests("GET /objects/")[1].headers["range"] == "bytes=300000-"
    assert not list((tmp_path / "cache").rglob("*.partial")) and not list(tmp_path.rglob("*.incomplete"))


def test_a_killed_download_does_not_keep_others_waiting(hub, published, start, tmp_path):
    _, entry, _ = published
    reached = threading.Event()
    hub.fault("GET /objects/", stall=300_000, first=reached.set)
    first = start(FETCH)
    assert reached.wait(60)
    second = start(FETCH)
    while len(hub.requests("HEAD .*resolve")) < 2:  # the second has asked, and waits for the first
        assert second.poll() is None
    first.kill()
    output, error = second.communicate(timeout=60)
    first.communicate()
    assert right(entry, output), error


def test_who_waits_for_another_process_does_not_wait_for_ever(hub, published, tmp_path):
    """The other one has the lock and receives nothing."""
    from filelock import FileLock

    manifest, entry, _ = published
    folder = tmp_path / "cache" / "cim_models" / "sha256"
    folder.mkdir(parents=True)
    file = entry.files[0]
    with FileLock(folder / f".{file.sha256}.safetensors.lock"):
        with pytest.raises(WeightsError, match="another process downloads it and receives nothing for 2 s"):
            resolve(entry.id, manifest=manifest)
    assert resolve(entry.id, manifest=manifest)


def as_others() -> list[str]:
    """What a command must begin with so that permissions hold for it, although we may be root."""
    if not hasattr(os, "getuid") or os.getuid():
        return []
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root may write anywhere")
    return prefix


def set_modes(folder: Path, mode: int) -> None:
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix's permissions")
def test_a_cache_that_cannot_be_written_to(hub, published, start, tmp_path):
    """What is in it is used; what is not is kept in another folder, and a warning says so."""
    _, entry, _ = published
    cache, own = tmp_path / "cache", tmp_path / "own"
    cache.mkdir(mode=0o555)
    output, error = start(FETCH, prefix=as_others()).communicate(timeout=60)
    assert right(entry, output), error
    assert all(Path(path).is_relative_to(own) for path in json.loads(output))
    assert f"{cache / 'cim_models'} cannot be written to: downloads are kept in {own / 'cim_models'}" in error
    hub.log.clear()
    output, error = start(FETCH, prefix=as_others()).communicate(timeout=60)
    assert right(entry, output) and not hub.log and not error
    cache.chmod(0o755)
    (own / "cim_models").rename(cache / "cim_models")
    set_modes(cache, 0o555)
    output, error = start(FETCH, prefix=as_others()).communicate(timeout=60)
    set_modes(cache, 0o755)
    assert right(entry, output) and not hub.log and not error
    assert all(Path(path).is_relative_to(cache) for path in json.loads(output))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix's permissions")
def test_a_cache_that_cannot_be_read(hub, published, start, tmp_path):
    """Another user's, for instance: as one that cannot be written to."""
    _, entry, _ = published
    cache, own = tmp_path / "cache", tmp_path / "own"
    cache.mkdir(mode=0)
    output, error = start(FETCH, prefix=as_others()).communicate(timeout=60)
    cache.chmod(0o755)
    assert right(entry, output), error
    assert all(Path(path).is_relative_to(own) for path in json.loads(output))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix's users")
def test_a_user_without_a_home(hub, published, start, tmp_path, monkeypatch):
    """Such as one of a container, of whom the system knows a number only."""
    _, entry, _ = published
    unset = "for name in ('HOME', 'XDG_CACHE_HOME', 'HF_HOME', 'HF_HUB_CACHE'): os.environ.pop(name, '')\n"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output, error = start(f"import os, pwd\npwd.getpwuid = {{}}.__getitem__\n{unset}{FETCH}").communicate(timeout=60)
    assert right(entry, output), error
    assert all(Path(path).is_relative_to(tmp_path / f"cim_models-{os.getuid()}") for path in json.loads(output))


def test_a_full_disk(hub, published, small_files, tmp_path):
    manifest, entry, contents = published
    with small_files(), pytest.raises(WeightsError) as caught:
        resolve(entry.id, manifest=manifest)
    for text in (
        entry.id,
        str(tmp_path / "cache"),
        "cannot be written: File too large",
        "make room there",
        "cache_dir",
    ):
        assert text in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".incomplete")]
    found = resolve(entry.id, manifest=manifest)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for paths in found.files.values() for path in paths}
    assert digests == {file.sha256 for file in entry.files}


def test_the_example(hub, published, start, photographs, tmp_path):
    """Features of a folder, with weights that come from the Hub on the way."""
    code = "import runpy, sys; sys.argv[1:] = %r; runpy.run_path(%r, run_name='__main__')"
    example = ROOT / "examples" / "extract_features.py"
    arguments = [str(photographs(4, 64)), "hf-hub:org/name"]
    process = start(f"import os; os.chdir({str(tmp_path)!r}); {code % (arguments, str(example))}")
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert len(output.splitlines()) == 4 and all(line.count(".jpg") == 2 for line in output.splitlines())


@pytest.mark.parametrize(("variable", "below"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
def test_the_environment_may_change_after_timm_was_imported(hub, published, start, tmp_path, variable, below):
    """The Hub's client reads it once."""
    change = "import os, sys, huggingface_hub.constants as c\n"
    change += f"os.environ['HF_ENDPOINT'] = {hub.endpoint!r}\n"
    change += f"del os.environ['HF_HUB_CACHE']\nos.environ[{variable!r}] = {str(tmp_path / 'cache')!r}\n"
    change += "assert c.ENDPOINT != os.environ['HF_ENDPOINT'] and c.HF_HUB_CACHE == '/nowhere'\n"
    output, error = start(
        change + FETCH, environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "/nowhere"}
    ).communicate(timeout=60)
    assert right(published[1], output), error
    assert all(path.startswith(str(tmp_path / "cache" / below / "cim_models")) for path in json.loads(output))


def test_offline_from_the_start(hub, published, start):
    _, error = start(FETCH, environment={"HF_HUB_OFFLINE": "1"}).communicate(timeout=60)
    assert "requests are forbidden: load it once online" in error and not hub.log
    output, _ = start(FETCH).communicate(timeout=60)
    hub.log.clear()
    again, error = start(FETCH, environment={"HF_HUB_OFFLINE": "1"}).communicate(timeout=60)
    assert again == output and not hub.log, error
