"""Which numbers a machine is fast with, and computing with them."""

import torch


def fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 natively: its GPU, or a CPU with AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def used_precision(precision: str) -> str:
    """`bf16` or `fp32`: what is asked for, or, where that is `auto`, what this machine is fast with."""
    return ("bf16" if fast_bf16() else "fp32") if precision == "auto" else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bfloat16 for `bf16`, for `auto` where the machine is fast with it, and not for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=used_precision(precision) == "bf16")
