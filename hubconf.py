"""Entry points for torch.hub: one per backbone, and the pretext model.

torch.hub.load("OWNER/NAME:TAG", "cim_vit_tiny", pretrained=True, trust_repo=True, skip_validation=True)
torch.hub.load("FOLDER", "cim_vit_tiny", pretrained=True, source="local")
"""

from pathlib import Path as _Path

import cim_models as _cim_models

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub"]

if _Path(_cim_models.__file__).resolve().parents[1] != _Path(__file__).resolve().parent:
    raise ImportError(
        f"this hubconf.py belongs to {_Path(__file__).resolve().parent}, but Python has already imported cim_models "
        f"{_cim_models.__version__} from {_Path(_cim_models.__file__).resolve().parent}: use that copy, "
        "cim_models.create_model(…), or call torch.hub in a process that has not imported it"
    )

from cim_models.backbones import ARCHITECTURES as _ARCHITECTURES  # noqa: E402


def _entrypoint(name):
    def create(pretrained=False, **kwargs):
        return _cim_models.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name}, an encoder: a timm model.

    Args:
        pretrained: Load its newest released weights.
        kwargs: What cim_models.create_model takes: weights (a folder or file), num_classes, features_only, …
    """
    return create


for _name in _ARCHITECTURES:
    globals()[_name] = _entrypoint(_name)


def cim_pretext(name="cim_vit_tiny", pretrained=True, **kwargs):
    """Encoder pair and correlation head: cim_pretext().locate(context, exemplars) gives maps of probabilities.

    Args:
        name: A backbone, or the id of released weights.
        pretrained: Load released weights.
        kwargs: What cim_models.create_pretext takes.
    """
    return _cim_models.create_pretext(name, pretrained=pretrained, **kwargs)
