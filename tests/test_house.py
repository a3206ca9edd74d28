"""The rules of the house (docs/architecture.md), read from the sources: imports, sizes, docstrings, paths."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cim_models"
SOURCES = sorted(PACKAGE.rglob("*.py"))
GROUND = {"errors", "files", "images", "plots", "precision", "processes", "state", "workers"}
ROOMS = GROUND | {"backbones", "pretext", "pretraining", "hub", "evaluation"}
MAY_KNOW = {
    "errors": set(),
    "files": {"errors"},
    "images": {"errors"},
    "plots": {"errors"},
    "precision": set(),
    "processes": {"errors"},
    "workers": set(),
    "state": {"errors", "files"},
    "backbones": GROUND,
    "pretext": GROUND | {"backbones"},
    "pretraining": GROUND | {"backbones", "pretext", "hub"},
    "hub": GROUND | {"backbones", "pretext"},
    "evaluation": GROUND | {"backbones", "pretext", "hub"},
    "cli": ROOMS | {"__init__"},
    "__init__": ROOMS,
}
"""Which rooms a room may import, besides itself; a module at the ground level counts as a room."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields (line, dotted name in parts) of every import in a source, wherever it stands, relative ones resolved."""
    package = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, (*base, alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                dots = len(target.value) - len(target.value.lstrip("."))
                base = package[: len(package) - dots + 1] if dots else ()
                yield node.lineno, (*base, *target.value[dots:].split("."))


def arrows_back(source: str, path: str) -> list[str]:
    """Imports of one file, `path` within the package, that the house does not allow."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ("cim_models", *(parts[:-1] if is_package else parts))
    room = parts[0]
    wrong = []
    for line, name in imported(source, module, is_package):
        if name[0] != "cim_models" or name[1:] == ("__version__",):
            continue
        target = name[1] if len(name) > 1 else "__init__"
        if target != room and target not in MAY_KNOW[room]:
            wrong.append(f"cim_models/{path}:{line} imports {'.'.join(name)}: {room} may not know {target}")
    return wrong


def test_every_room_is_known():
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES}
    assert rooms <= set(MAY_KNOW), "a new room needs its line in MAY_KNOW"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_arrow_points_back(path):
    assert not arrows_back(path.read_text(), path.relative_to(PACKAGE).as_posix())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("backbones/vit.py", "from ..pretext import model"),
        ("pretext/model.py", "def late():\n    from ..hub.load import create_model"),
        ("pretext/__init__.py", "from .. import evaluation"),
        ("pretext/model.py", "import cim_models.cli"),
        ("pretraining/loop.py", "import cim_models"),
        ("pretraining/loop.py", "from cim_models import create_model"),
        ("hub/release.py", "from ..pretraining.config import PretrainConfig"),
        ("hub/release.py", "import importlib\nimportlib.import_module('cim_models.pretraining.loop')"),
        ("images.py", "from .backbones import tokens"),
        ("errors.py", "if TYPE_CHECKING:\n    from . import images"),
    ],
)
def test_an_arrow_back_is_seen(path, source):
    assert len(arrows_back(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pretext/model.py", "from .. import errors\nfrom ..backbones.tokens import encode\nfrom . import views"),
        ("hub/release.py", "from .. import __version__\nfrom ..errors import WeightsError\nimport torch"),
        ("cli.py", "def run():\n    import cim_models\n    from .pretraining.loop import pretrain"),
        ("__init__.py", "from .hub.load import create_model"),
    ],
)
def test_an_arrow_forward_is_allowed(path, source):
    assert not arrows_back(source, path)


@pytest.mark.parametrize("path", sorted((PACKAGE / "pretext").glob("*.py")), ids=relative)
def test_the_method_is_pure_tensors(path):
    """No files, no pictures, no processes in `pretext/`."""
    top = {name[0] for _, name in imported(path.read_text(), ("cim_models", "pretext", path.stem), False)}
    assert not top & {"PIL", "glob", "io", "multiprocessing", "os", "pathlib", "shutil", "subprocess", "threading"}


def test_the_map_names_every_module_and_no_other():
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```")[3].split("\nweights_manifest.json")[0]
    named = re.findall(r"\b(\w+\.py)\b", drawing)
    inits = [path for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]
    assert sorted(named) == sorted(path.name for path in SOURCES if path not in inits)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_command_line_prints(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert path == PACKAGE / "cli.py" or not lines


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert not [f"{relative(path)}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    assert not tree.body or ast.get_docstring(tree), "the module has no docstring"


def test_files_are_short(repository):
    root, files = repository
    lengths = {path: len((root / path).read_text().splitlines()) for path in files if path.suffix == ".py"}
    limit = {"cim_models": 400, "tests": 600}
    assert not {str(path): lines for path, lines in lengths.items() if lines >= limit.get(path.parts[0], 400)}


MACHINE_PATH = re.compile(rf"(?<![\w.])/(?:{'|'.join(('work', 'root', 'home', 'Users'))})[./]")


def test_no_path_of_a_machine(repository):
    """No absolute path of somebody's machine in any text file."""
    root, files = repository
    found = []
    for path in files:
        try:
            text = (root / path).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert not found


def test_a_path_of_a_machine_is_seen():
    slash = "/"
    assert MACHINE_PATH.search(f"open('{slash}home/me/images')") and MACHINE_PATH.search(f"{slash}Users/me")
    assert not MACHINE_PATH.search("https://example.org/home/") and not MACHINE_PATH.search("../home/")
