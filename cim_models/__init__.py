"""Correlational Image Modeling: pretraining from a folder of images, and encoders that load everywhere.

The public names are loaded on first use, so that importing the package costs no torch. The backbones are registered in
timm as soon as both packages are imported, in any order.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cim_models.errors import CheckpointError, CimModelsError, ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from cim_models import evaluation
    from cim_models.hub.load import create_model, create_pretext, create_transform, list_models
    from cim_models.hub.official import import_official
    from cim_models.pretraining.config import PretrainConfig
    from cim_models.pretraining.loop import pretrain

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "CimModelsError",
    "ConfigError",
    "DataError",
    "PretrainConfig",
    "WeightsError",
    "__version__",
    "create_model",
    "create_pretext",
    "create_transform",
    "evaluation",
    "import_official",
    "list_models",
    "pretrain",
]

_HOMES = {
    "PretrainConfig": ".pretraining.config",
    "create_model": ".hub.load",
    "create_pretext": ".hub.load",
    "create_transform": ".hub.load",
    "import_official": ".hub.official",
    "list_models": ".hub.load",
    "pretrain": ".pretraining.loop",
}


def __getattr__(name: str) -> Any:
    if name == "evaluation":
        return importlib.import_module(".evaluation", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _TimmHook:
    """Registers the backbones in timm at the end of its import.

    timm may be imported for the first time by our own backbones, which are needed to register them: then at their end.
    """

    modules = ("timm", f"{__name__}.backbones")

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                loader.exec_module = execute  # type: ignore[method-assign]
                try:
                    execute(module)
                except RuntimeError as error:
                    if "torchvision" not in str(error):
                        raise
                    todo = "install the two together, pip install --upgrade --force-reinstall torch torchvision"
                    raise ConfigError(f"torchvision is not of the same build as torch: {todo} ({error})") from error
                self.register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        backbones = sys.modules.get(self.modules[1])
        if backbones is None or hasattr(backbones, "ARCHITECTURES"):
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(".hub.cim", __name__)


if "timm" in sys.modules:
    _TimmHook().register()
else:
    sys.meta_path.insert(0, _TimmHook())
