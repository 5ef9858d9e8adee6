"""Safetensors files of any size, written part by part, and checksums of their sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvpo_jax.convert.tensors import DTYPES, chunks
from kvpo_jax.runtime import progress
from kvpo_jax.runtime.atomic import replacing

MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file that is to be written.

    Attributes:
      name: its name there, such as "blocks/self_q/kernel".
      shape: the shape of the whole tensor.
      dtype: its number format.
      parts: each makes the next layers of the tensor, or all of it. They are called in this order,
        one after the other is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with a progress bar, whole or not at all."""
    # The widest numbers first, so that each tensor begins at a multiple of its item size.
    tensors = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    header, size = _header(tensors, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        with _byte_bar(f"writing {path.name}", size) as advance:
            for tensor in tensors:
                for part in tensor.parts:
                    for chunk in chunks(part()):
                        file.write(np.ascontiguousarray(chunk, tensor.dtype).view(np.uint8).data)
                        advance(chunk.size * tensor.dtype.itemsize)


def _header(tensors: Sequence[Stored], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The bytes before the tensors, and how many bytes these have."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, end


def sha256(path: Path) -> str:
    """The checksum of a file, with a progress bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file, _byte_bar(f"reading {path.name}", path.stat().st_size) as advance:
        while block := file.read(1 << 23):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextmanager
def _byte_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows in megabytes how much of a file is done.

    Args:
      description: what is done.
      total: bytes of the file.

    Yields:
      A function to call with the bytes that have been done since the last call.
    """
    done = 0
    with progress.bar(f"{description}, MB", -(-total // MEGABYTE)) as advance:

        def advance_bytes(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            advance(-(-done // MEGABYTE) - -(-before // MEGABYTE))

        yield advance_bytes
