"""torch.hub, from a folder and from its own cache as GitHub's archives fill it."""

import io
import shutil
import subprocess
import zipfile

import pytest

NAMES = sorted(
    [f"cim_resnet{depth}" for depth in (18, 34, 50, 101)]
    + [f"cim_vit_{size}" for size in ("tiny", "small", "base", "large", "huge")]
    + ["cim_pretext"]
)
USE = """
import torch
kwargs = dict(trust_repo=True, skip_validation=True) if source == "github" else dict(source="local")
assert sorted(torch.hub.list(repo, **kwargs) if source == "github" else names(repo)) == {names}
model = torch.hub.load(repo, "cim_vit_tiny", pretrained=True, **kwargs)
assert model.pretrained_cfg["tag"] == "two" and model(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
assert torch.hub.load(repo, "cim_resnet18", num_classes=3, **kwargs)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
assert "two" not in torch.hub.load(repo, "cim_vit_tiny", weights="cim_vit_tiny.one", **kwargs).pretrained_cfg["tag"]
pretext = torch.hub.load(repo, "cim_pretext", **kwargs)
assert pretext.locate(torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 3, 32, 32)).shape == (1, 2, 64, 64)
assert source == "local" or "pretrained" in torch.hub.help(repo, "cim_vit_huge", **kwargs)
import sys, cim_models, timm
assert cim_models.__file__.startswith(folder) and timm.is_model("cim_vit_tiny")
assert folder not in sys.path
print("done")
"""
LOCAL_NAMES = """
def names(repo):
    import torch.hub
    sys.path.insert(0, repo)
    module = torch.hub._import_module("hubconf.py", repo + "/hubconf.py")
    sys.path.remove(repo)
    return [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
"""


@pytest.fixture
def cache(plain_copy, tmp_path):
    """$TORCH_HOME as torch.hub leaves it after a download of the tag v0.1.0 of owner/name."""
    shutil.copytree(plain_copy, tmp_path / "torch" / "hub" / "owner_name_v0.1.0")
    return tmp_path / "torch"


def test_from_the_cache_beside_modules_of_the_same_names(cache, python, tmp_path):
    """Without a network, in a project that has its own models.py, utils.py and tests."""
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    for name in ("models.py", "utils.py", "hub.py", "tests/__init__.py"):
        (project / name).write_text("mine = True\n")
    code = "import models, utils, hub, tests\nsource, repo = 'github', 'owner/name:v0.1.0'\n"
    code += f"folder = {str(cache / 'hub' / 'owner_name_v0.1.0')!r}\n"
    code += "import torch.hub\ndef offline(*args, **kwargs): raise OSError('no network')\ntorch.hub.urlopen = offline\n"
    code += USE.replace("{names}", repr(NAMES)) + "assert models.mine and utils.mine and hub.mine and tests.mine\n"
    printed = python(code, project, TORCH_HOME=str(cache))
    assert printed.endswith("done\n")


@pytest.fixture
def archive(repository, tmp_path):
    """$TORCH_HOME with what GitHub serves of this repository as it stands now, unpacked as torch.hub does."""
    root, _ = repository
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x"]
    changed = subprocess.run([*git, "stash", "create"], capture_output=True, check=True, text=True).stdout.strip()
    command = [*git, "archive", "--format=zip", "--prefix=name-0123456/", changed or "HEAD"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        file.extractall(tmp_path / "unpacked")
    hub = tmp_path / "torch" / "hub"
    hub.mkdir(parents=True)
    for ref in ("v0.1.0", "main"):
        shutil.copytree(tmp_path / "unpacked" / "name-0123456", hub / f"owner_name_{ref}")
    return tmp_path / "torch"


RELEASED = """
import pickle, sys, torch
def offline(*args, **kwargs): raise OSError("no network")
import torch.hub
torch.hub.urlopen = offline
kwargs = dict(trust_repo=True, skip_validation=True)
assert sorted(torch.hub.list("owner/name:v0.1.0", **kwargs)) == {names}
model = torch.hub.load("owner/name:v0.1.0", "cim_vit_tiny", pretrained=True, **kwargs).eval()
local = torch.hub.load({folder!r}, "cim_vit_tiny", pretrained=True, source="local").eval()
picture = torch.randn(1, *model.pretrained_cfg["input_size"])
assert torch.equal(model(picture), local(picture)) and model.pretrained_cfg["tag"]
again = pickle.loads(pickle.dumps(model))
assert torch.equal(again(picture), model(picture))
try:
    torch.hub.load("owner/name:main", "cim_vit_tiny", **kwargs)
except ImportError as error:
    print(error)
import models, utils, tests
assert models.mine and utils.mine and tests.mine
"""


def test_from_githubs_archive(archive, python, tmp_path):
    """What is released in this repository, beside a project's own modules; a second ref does not run the first's code.

    Nothing is asked of GitHub, so that its rate limit, or a machine without a network, is no obstacle.
    """
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    for name in ("models.py", "utils.py", "tests/__init__.py"):
        (project / name).write_text("mine = True\n")
    folder = archive / "hub" / "owner_name_v0.1.0"
    code = RELEASED.replace("{names}", repr(NAMES)).replace("{folder!r}", repr(str(folder)))
    message = python(code, project, TORCH_HOME=str(archive))
    assert "belongs to" in message and "owner_name_main" in message and str(folder) in message


def test_a_damaged_file_in_torch_hubs_folder_is_named(cache, python):
    """torch.hub's own downloads fail for ever, or are not checked at all."""
    path = cache / "hub" / "owner_name_v0.1.0" / "weights" / "cim_vit_tiny.two" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    code = """
import torch
try:
    torch.hub.load("owner/name:v0.1.0", "cim_vit_tiny", pretrained=True, trust_repo=True, skip_validation=True)
except Exception as error:
    print(type(error).__name__, error)
"""
    message = python(code, TORCH_HOME=str(cache))
    assert message.startswith("WeightsError") and f"{path} is damaged: sha256" in message


def test_from_a_local_folder(plain_copy, python):
    code = f"import sys\nsource, repo = 'local', {str(plain_copy)!r}\nfolder = repo\n"
    assert python(code + LOCAL_NAMES + USE.replace("{names}", repr(NAMES))).endswith("done\n")


def test_another_copy_in_the_way_is_an_error(plain_copy, python, cache):
    """Said before anything else is imported."""
    hubconf = cache / "hub" / "owner_name_v0.1.0" / "hubconf.py"
    code = f"""
import cim_models, runpy, sys
try:
    runpy.run_path({str(hubconf)!r})
except ImportError as error:
    print(error)
assert "torch" not in sys.modules
"""
    message = python(code, plain_copy)
    assert str(hubconf.parent) in message and str(plain_copy) in message and "cim_models.create_model" in message
