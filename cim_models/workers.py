"""Processes that read images: no more than there are cores."""

import logging
import os

logger = logging.getLogger(__name__)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""That this process may use."""


def usable_workers(wanted: int) -> int:
    """No more readers than there are cores."""
    if wanted > CORES:
        logger.info("%d readers are asked for, but there are %d cores: reading with as many", wanted, CORES)
    return min(wanted, CORES)
