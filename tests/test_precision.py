"""What a machine is fast with, against what its processor says of itself."""

from pathlib import Path

import pytest
import torch

from cim_models.precision import fast_bf16


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_bf16_is_fast_where_the_processor_has_it():
    assert fast_bf16() == ("avx512_bf16" in Path("/proc/cpuinfo").read_text())
