"""torch.export and torch.compile take the smallest of each family whole."""

import pytest
import torch

from cim_models.backbones import build


@pytest.fixture(params=[("cim_vit_tiny", {"depth": 2, "img_size": 64}), ("cim_resnet18", {})], ids=lambda p: p[0])
def model(request):
    name, kwargs = request.param
    torch.manual_seed(0)
    return build(name, **kwargs).eval()


def test_export(model):
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compile(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)
