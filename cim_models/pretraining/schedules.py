"""Schedules: pure functions of the step, so that a resumed run needs no state for them."""

import math


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then a half cosine to `floor` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum(step: int, steps: int, base: float) -> float:
    """Momentum of the target: `base` at step 0, 1 at `steps`, along a half cosine."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / steps))
