"""A safetensors file of features that is written row by row, whatever the number of images."""

import json
import math
import struct
from typing import BinaryIO

from torch import Tensor


class RowWriter:
    """Writes one tensor, `features`, whose number of rows is known only at the end.

    The header goes first, so its place is kept free for the longest one: JSON may end in spaces.
    """

    def __init__(self, file: BinaryIO, most_rows: int, metadata: dict[str, str]) -> None:
        """Begins a file that is open for writing.

        Args:
            file: Where to write.
            most_rows: Upper limit of their number.
            metadata: Of the safetensors file.
        """
        self.file, self.most_rows, self.metadata = file, most_rows, metadata
        self.shape: tuple[int, ...] = ()
        self.reserved = 0

    def write(self, features: Tensor) -> None:
        """Appends rows (B, …) float32."""
        if not self.shape:
            self.reserved = len(self._header((self.most_rows, *features.shape[1:])))
            self.reserved += -self.reserved % 8
            self.file.write(bytes(8 + self.reserved))
            self.shape = (0, *features.shape[1:])
        self.file.write(features.contiguous().numpy().astype("<f4", copy=False).data)
        self.shape = (self.shape[0] + len(features), *self.shape[1:])

    def finish(self) -> None:
        """Writes the header."""
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.reserved) + self._header(self.shape).ljust(self.reserved))

    def _header(self, shape: tuple[int, ...]) -> bytes:
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}
        return json.dumps({"__metadata__": self.metadata, "features": entry}).encode()
