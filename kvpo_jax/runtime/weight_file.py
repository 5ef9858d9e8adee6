"""Safetensors files with a checksum for each tensor and one for the header.

They are mapped and written part by part, so that a file of any size needs little memory. The
checksums are CRC-32, which no flipped bit passes. Comparing them and looking for numbers that are
not finite take 0.5 s per GB together, on one core. Files of other programs have no checksums and
are read without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import file_kind, progress
from kvpo_jax.runtime.atomic import replacing

CHUNK = 1 << 26  # bytes that are compared, checked or written at once
_IN_CACHE = 1 << 20  # bytes that are looked at again while they are in a core's cache
MEGABYTE = 10**6
# safetensors' names of the number formats that are read and written.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Others that a file of another program may have, beside those.
_OTHERS = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
# Number format -> the integer of its size, and the bits of the exponent, all set in inf and nan.
_EXPONENTS = {
    DTYPES["F64"]: (np.uint64, 0x7FF << 52),
    DTYPES["F32"]: (np.uint32, 0xFF << 23),
    DTYPES["F16"]: (np.uint16, 0x1F << 10),
    DTYPES["BF16"]: (np.uint16, 0xFF << 7),
}
_SUMS, _HEADER_SUM = "crc32", "crc32_of_header"  # fields of the metadata
_AGAIN = "download, convert or copy it again"


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


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A safetensors file that is mapped.

    Attributes:
      path: the file.
      metadata: what it says beside its tensors, without the checksums.
      tensors: name -> a view of the file. Its numbers are not checked.
      sums: name -> checksum; empty in a file of another program.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, np.ndarray]
    sums: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor.

        Raises:
          UsageError: it is not what was written, has a number that is not finite, or is of a
            format that is not in DTYPES.
        """
        tensor = np.array(self.tensors[name], order="C")
        if tensor.dtype not in _EXPONENTS:
            raise unknown_dtype(self.path, name, tensor.dtype.name)
        check_finite(f"{self.path}: {name}", tensor)
        if self.sums and _crc32(tensor) != self.sums[name]:
            raise UsageError(f"{self.path}: {name} is damaged, its checksum is wrong; {_AGAIN}")
        return tensor


def open_file(path: Path | str) -> WeightFile:
    """Maps a safetensors file.

    Raises:
      OSError: there is no such file.
      UsageError: it is none, not whole, of an unknown number format, or its header is damaged; the
        message names the file.
    """
    path = Path(path)
    file_kind.check(path, "a safetensors file", "safetensors")
    try:
        # Opening it checks that the header is right and the file whole.
        with safetensors.safe_open(path, framework="numpy") as opened:
            opened.keys()
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}; {_AGAIN}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    stated = metadata.pop(_HEADER_SUM, None)
    if (stated or _SUMS in metadata) and stated != _header_sum(header, metadata):
        raise UsageError(f"{path} is damaged, the checksum of its header is wrong; {_AGAIN}")
    sums = json.loads(metadata.pop(_SUMS, "{}"))
    data = np.memmap(path, np.uint8, "r", offset=8 + size) if header else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        dtype = (DTYPES | _OTHERS).get(entry["dtype"])
        if dtype is None:
            raise unknown_dtype(path, name, entry["dtype"])
        numbers = data[slice(*entry["data_offsets"])].view(dtype)
        tensors[name] = numbers.reshape(entry["shape"])
    return WeightFile(path, metadata, tensors, sums)


def unknown_dtype(path: Path, name: str, dtype: str) -> UsageError:
    """The error for a number format that is not in DTYPES."""
    return UsageError(f"{path}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}")


def check_finite(what: str, tensor: np.ndarray) -> None:
    """UsageError, which begins with `what`, if a tensor of DTYPES has an inf or a nan."""
    integer, exponent = _EXPONENTS[tensor.dtype]
    for chunk in chunks(tensor, _IN_CACHE):
        bits = np.ascontiguousarray(chunk).view(integer) & integer(exponent)
        if bits.size and bits.max() == exponent:
            raise UsageError(
                f"{what} has numbers that are not finite (inf or nan): the file is damaged, or its"
                " training diverged; bring another"
            )


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    """Slices of an array's first axis, of about `size` bytes each."""
    if array.ndim == 0:
        yield array
        return
    step = max(1, size * len(array) // max(1, array.nbytes))
    yield from (array[i : i + step] for i in range(0, len(array), step))


# ---------------------------------------------------------------- checksums


def sums_of(path: Path | str) -> str:
    """One checksum of what a weight file says: tensors, kind and config; not where it came from.

    Only the header is read where it has the checksums of the tensors.

    Raises:
      OSError, UsageError: see `open_file`.
    """
    file = open_file(path)
    sums = file.sums or {name: _crc32(x) for name, x in file.tensors.items()}
    said = {name: file.metadata.get(name) for name in ("kind", "config")}
    shapes = {name: (x.dtype.name, x.shape) for name, x in file.tensors.items()}
    whole = json.dumps([sums, shapes, said], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _crc32(tensor: np.ndarray, start: int = 0) -> str:
    """The checksum of a tensor's bytes, as eight digits."""
    for chunk in chunks(tensor):
        start = zlib.crc32(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data, start)
    return f"{start:08x}"


def _header_sum(header: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The checksum of a header, whatever the order of its tensors."""
    said = {name: (entry["dtype"], list(entry["shape"])) for name, entry in header.items()}
    return f"{zlib.crc32(json.dumps([said, dict(metadata)], sort_keys=True).encode()):08x}"


def sha256(path: Path) -> str:
    """The checksum of any file, with a progress bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file, _byte_bar(f"reading {path.name}", path.stat().st_size) as advance:
        while block := file.read(1 << 23):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with a progress bar, whole or not at all."""
    # The widest numbers first, so that each tensor begins at a multiple of its item size.
    tensors = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    sums = {tensor.name: "0" * 8 for tensor in tensors}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_header(tensors, metadata, sums))
        size = sum(tensor.nbytes for tensor in tensors)
        with _byte_bar(f"writing {path.name}", size) as advance:
            for tensor in tensors:
                crc = 0
                for part in tensor.parts:
                    for chunk in chunks(part()):
                        numbers = np.ascontiguousarray(chunk, tensor.dtype)
                        data = numbers.reshape(-1).view(np.uint8).data
                        crc = zlib.crc32(data, crc)
                        file.write(data)
                        advance(len(data))
                sums[tensor.name] = f"{crc:08x}"
        file.seek(0)
        file.write(_header(tensors, metadata, sums))  # as long as the first one


def _header(
    tensors: Sequence[Stored], metadata: Mapping[str, str], sums: Mapping[str, str]
) -> bytes:
    """The bytes before the tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    noted = {**metadata, _SUMS: json.dumps(sums)}
    noted[_HEADER_SUM] = _header_sum(header, noted)
    encoded = json.dumps({"__metadata__": noted, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


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
