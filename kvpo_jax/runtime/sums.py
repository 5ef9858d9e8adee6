"""Checksums, which tell damage and change: of arrays, of JSON records, of files and folders.

A sum is the first half of a SHA-256. It is of bytes alone, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kvpo_jax.runtime import sharding, weight_file
from kvpo_jax.types import Array

WHOLE = 2**26  # bytes; of a larger file only the ends are read
END = 2**20
SEAL = "seal"


def of_bytes(*parts: Any) -> str:
    """The sum of buffers, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def of_arrays(arrays: Mapping[str, Array]) -> dict[str, str]:
    """name -> sum of the whole array's bytes, on every process, however the array is sharded.

    Every process has to ask. A core sums 1.8e9 bytes a second here, and several work at once.
    """

    def of_array(x: np.ndarray) -> str:
        return of_bytes(np.ascontiguousarray(x).reshape(-1).view(np.uint8))

    # Wholes are gathered here, because threads would ask the other processes in any order.
    wholes = [sharding.whole(x) for x in arrays.values()]
    with ThreadPoolExecutor() as threads:
        return dict(zip(arrays, threads.map(of_array, wholes), strict=True))


def of_json(value: Any) -> str:
    """The sum of a JSON value, also after it was written and read."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with its own sum in it."""
    return {**record, SEAL: of_json(record)}


def opened(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was `sealed`.

    Raises:
      ValueError: it has changed since, or has no seal.
    """
    inner = {key: value for key, value in record.items() if key != SEAL}
    if record.get(SEAL) != of_json(inner):
        raise ValueError("its record is not what was saved")
    return inner


def of_path(path: Path | str) -> str:
    """The sum of a file, or of the names and files in a folder.

    Of weights it is that of their tensors (`weight_file.sums_of`). Of another file above 64 MiB it
    is that of its size, its first and its last MiB.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return of_json([[str(file.relative_to(path)), of_path(file)] for file in files])
    if path.suffix == ".safetensors":
        return weight_file.sums_of(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return of_bytes(file.read())
        first = file.read(END)
        file.seek(-END, os.SEEK_END)
        return of_bytes(str(size).encode(), first, file.read(END))
