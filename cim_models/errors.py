"""The errors that a user can cause. Each message says what is wrong, where, and what to do."""

from collections.abc import Sequence


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class CimModelsError(Exception):
    """Base of every error that cim_models raises on purpose."""


class ConfigError(CimModelsError):
    """A setting, a name or a combination of both that cannot work."""


class DataError(CimModelsError):
    """Images, lists or labels that are missing or cannot be read."""


class CheckpointError(CimModelsError):
    """A training checkpoint or run directory that is missing, damaged or of another run."""


class WeightsError(CimModelsError):
    """Released weights that are unknown, unreachable, damaged or do not fit the model."""
