"""cim_models.files: a file is the old one or the whole new one."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import check_writable, replacing


def fill(path, kind: str):
    """Writes 400 kB or 100 kB, with safetensors or without."""
    if kind == "safetensors":
        save_file({"a": torch.zeros(100_000)}, path)
    else:
        path.write_bytes(bytes(100_000))


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["safetensors", "bytes"])
@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_a_full_disk_leaves_the_old_file(tmp_path, kind, error, small_files):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error, match="file: cannot be written"), small_files(), replacing(path, error) as new:
        fill(new, kind)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second"):
        with replacing(path) as new:
            new.write_bytes(content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["file"]


def test_a_folder_that_cannot_be_made(tmp_path):
    path = tmp_path / "a" / "file"
    path.parent.write_bytes(b"")
    with pytest.raises(ConfigError, match="file: cannot be written: "), replacing(path):
        raise AssertionError("nothing to write to")


@pytest.mark.parametrize("name", ["..", "deep", "deep/..", "/"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    path = tmp_path / name
    with pytest.raises(CheckpointError, match=": cannot be written: Is a directory"), replacing(path, CheckpointError):
        raise AssertionError("nothing to write to")
    assert names(tmp_path) == ["deep"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: cannot be written: it is a device or a pipe"):
        check_writable(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device"), replacing(tmp_path / "pipe", CheckpointError):
        raise AssertionError("nothing to write to")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "file").symlink_to("large/file")
    for content in (b"first", b"second"):
        with replacing(tmp_path / "file") as new:
            new.write_bytes(content)
        assert (tmp_path / "file").is_symlink() and (tmp_path / "large" / "file").read_bytes() == content
    assert names(tmp_path) == ["file", "large"] and names(tmp_path / "large") == ["file"]


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="needs a user who may not write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="file: cannot be written: no permission to write in"):
        check_writable(tmp_path / "deep" / "file")


def test_what_can_be_written_is_not_made(tmp_path):
    check_writable(tmp_path / "deep" / "file")
    assert not names(tmp_path)


def test_errors_of_others_are_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(KeyError), replacing(tmp_path / "file"):
        raise KeyError("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_for_whom_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        for kind in ("safetensors", "bytes"):
            with replacing(tmp_path / kind) as new:
                fill(new, kind)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_what_a_kill_left_is_gone_with_the_next_writing(tmp_path):
    """safetensors writes to a file of its own, of any name, and then renames it."""
    path = tmp_path / "file"
    code = f"""
import os, pathlib
from cim_models.files import check_writable, replacing
with replacing(pathlib.Path({str(path)!r})) as new:
    (new.parent / ".tmpAbCdEf").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".file.tmp"]
    with replacing(path) as new:
        new.write_bytes(b"whole")
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"whole"
