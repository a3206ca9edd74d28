"""Which numbers a machine is fast with."""

import torch


def fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 natively: its GPU, or a CPU with AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()
