"""A file is read once, and again whenever the system says that anything about it changed."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from cim_models.errors import WeightsError
from cim_models.hub import digest as module
from cim_models.hub.digest import sha256
from cim_models.hub.load import create_model
from cim_models.hub.verify import verify


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    """An empty folder of remembered digests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "own" / "cim_models" / "digests"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A file that has not changed for as long as is asked: what waits is the clock, not the test."""
    path = tmp_path / "x"
    path.write_bytes(b"content")
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3 * 10**9)
    return path


def reads(monkeypatch) -> list[Path]:
    """The files that are read from now on."""
    opened: list[Path] = []

    def opening(path, *args, **kwargs):
        opened.append(path)
        return open(path, *args, **kwargs)

    monkeypatch.setattr(module, "open", opening, raising=False)
    return opened


def real(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_unchanged_file_is_read_once(old, monkeypatch):
    opened = reads(monkeypatch)
    assert sha256(old) == sha256(old) == real(old) and opened == [old]
    assert sha256(old, again=True) == real(old) and opened == [old, old]
    monkeypatch.chdir(old.parent)
    assert sha256(Path("x")) == real(old) and len(opened) == 2


def rewrite(path: Path) -> None:
    path.write_bytes(b"CONTENT")


def rewrite_and_set_back(path: Path) -> None:
    """As `rsync --times` and `touch --reference` do: only ctime tells."""
    stat = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def replace(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def link_elsewhere(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    path.unlink()
    path.symlink_to(other)


def one_byte_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"C")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [rewrite, rewrite_and_set_back, replace, link_elsewhere, one_byte_in_place, grow])
def test_a_changed_file_is_read_again(old, change):
    before = sha256(old)
    change(old)
    assert sha256(old) == real(old) != before


def test_a_file_that_is_still_being_made_is_not_remembered(tmp_path, memory):
    path = tmp_path / "x"
    path.write_bytes(b"content")
    assert sha256(path) == real(path) and not memory.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(old, memory, monkeypatch):
    class Changing:
        def __init__(self, *args):
            self.stream = open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def read(self, size):
            content = self.stream.read(size)
            old.write_bytes(b"CONTENT")
            return content

    monkeypatch.setattr(module, "open", Changing, raising=False)
    sha256(old)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '"x"', "null", '{"path": 1, "state": 2}'])
def test_a_damaged_memory_is_no_memory(old, memory, damage):
    sha256(old)
    (stamp,) = memory.iterdir()
    stamp.write_text(damage)
    assert sha256(old) == real(old)
    assert json.loads(stamp.read_text())["sha256"] == real(old)


def test_a_memory_of_another_file_is_none(old, memory, tmp_path):
    """Hard links share everything that the system says; a copied memory does not say the other path."""
    sha256(old)
    (stamp,) = memory.iterdir()
    other = tmp_path / "y"
    other.write_bytes(b"CONTENT")
    shutil.copy(stamp, module._place(other))
    assert sha256(other) == real(other)


def test_nowhere_to_remember(old, tmp_path, monkeypatch):
    (tmp_path / "own").write_text("in the way")
    opened = reads(monkeypatch)
    assert sha256(old) == sha256(old) == real(old) and len(opened) == 2


def test_a_model_is_read_whole_once_and_verify_reads_always(release, old, monkeypatch):
    manifest, entry = release()
    path = manifest.root / entry.files[0].path
    opened = reads(monkeypatch)
    for _ in range(3):
        create_model(entry.id, pretrained=True, manifest=manifest)
    assert opened == [path]
    verify(entry.id, manifest)
    assert opened == [path, path]
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(WeightsError, match="is damaged"):
        create_model(entry.id, pretrained=True, manifest=manifest)
