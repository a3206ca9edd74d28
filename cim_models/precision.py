"""Which numbers a machine is fast with, and computing with them."""

import torch


def fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 natively: its GPU, or a CPU with AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bfloat16 for `bf16`, for `auto` where the machine is fast with it, and not for `fp32`."""
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16())
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
