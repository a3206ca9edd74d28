"""The log of a run: `log.jsonl`, and TensorBoard events where they are asked for."""

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import replacing
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.pretraining.initial import located

logger = logging.getLogger(__name__)


class Log:
    """`log.jsonl`, one JSON object per line.

    A run that goes on keeps the lines up to its checkpoint. A line that cannot be written is said and left out: a full
    disk does not end a run.

    Args:
        directory: Of the run; made if it does not exist, with the run's `config.yaml`.
        config: The run.
        start: Steps done before.
        enabled: Whether this process writes.

    Raises:
        ConfigError: If the folder cannot be made, or TensorBoard is asked for and not there.
        CheckpointError: If nothing can be written there, or the log of a run that goes on is damaged.
    """

    def __init__(self, directory: Path, config: PretrainConfig, start: int, enabled: bool) -> None:
        self.path, self.enabled, self.events = directory / "log.jsonl", enabled, None
        lines = self.path.read_bytes().splitlines(keepends=True) if start and self.path.is_file() else []
        try:
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= start]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged: repair it, or remove it to go on without it") from error
        self.skipped = [record["skipped"] for record in map(json.loads, kept) if "skipped" in record]
        """Images that the kept lines name as unreadable."""
        if not enabled:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {directory}, where no folder can be made: {error.strerror}") from error
        recipe = {**to_dict(config), "init": located(config.init), "resume": False}  # repeats the run, from anywhere
        text = yaml.safe_dump(recipe, sort_keys=False)
        with replacing(directory / "config.yaml", CheckpointError) as file:
            file.write_text(text, encoding="utf-8")
        with replacing(self.path, CheckpointError) as file:
            file.write_bytes(b"".join(kept))
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("tensorboard is not installed: pip install 'cim-models[tensorboard]'") from error
            self.events = SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, whole or not at all."""
        if self.enabled:  # names of files need not be Unicode: what UTF-8 cannot write becomes a JSON escape
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            try:
                with open(self.path, "ab", buffering=0) as file:
                    before = file.tell()
                    if file.write(line) < len(line):
                        file.truncate(before)
                        raise OSError("is the disk full?")
            except OSError as error:
                logger.warning("%s: a line could not be written: %s", self.path, error.strerror or error)
        if self.events is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes the events."""
        if self.events is not None:
            self.events.close()
