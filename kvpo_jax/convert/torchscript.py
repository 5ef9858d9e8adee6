"""The tensors of a TorchScript archive, such as OpenAI's CLIP, of which nothing is run.

It is a zip file: a program in code/, the pickle of its module in data.pkl, and the numbers of every
storage in a file of data/. Whatever class the pickle names, an object without a behaviour stands
for it, so that a file can do no more than name its attributes.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from kvpo_jax.errors import UsageError

# torch's name of a storage -> its number format.
_STORAGES: dict[str, Any] = {
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
}
_HEADER = 30  # bytes of a file's header in a zip archive, before its name and a field of its own


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive; a checkpoint of torch.save has no constants."""
    return zipfile.is_zipfile(path) and any(
        name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
    )


def read(path: Path) -> dict[str, np.ndarray]:
    """Name of a parameter, buffer or other tensor of the module -> a view of the mapped file.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            numbers = _Numbers(path, archive, pickled.removesuffix(".pkl"))
            with archive.open(pickled) as file:
                return dict(_tensors(_Unpickler(file, numbers).load()))
    except Exception as error:  # whatever a wrong pickle makes Python raise
        raise UsageError(
            f"{path} is a TorchScript program whose tensors cannot be read"
            f" ({type(error).__name__}: {error}); download or copy it again"
        ) from error


class _Object:
    """Stands for an object of any class, with its attributes."""

    def __init__(self, *made_of: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, Mapping) else {})


def _tensors(module: _Object, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a module and of those in it, by their dotted names."""
    for name, value in vars(module).items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Object):
            yield from _tensors(value, f"{prefix}{name}.")


class _Numbers:
    """(torch's name of a storage, key of its file) -> the numbers in it."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str):
        self._mapped = np.memmap(path, np.uint8, "r")
        self._archive, self._folder = archive, folder

    def __call__(self, storage: str, key: str) -> np.ndarray:
        entry = self._archive.getinfo(f"{self._folder}/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed")
        header = self._mapped[entry.header_offset :][:_HEADER]
        lengths = np.ascontiguousarray(header[26:30]).view("<u2")
        start = entry.header_offset + _HEADER + int(lengths.sum(dtype=int))
        return np.asarray(self._mapped[start : start + entry.file_size]).view(_STORAGES[storage])


def _tensor(
    numbers: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> np.ndarray:
    """A view of a storage, as torch's function of this name makes a tensor."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, 0) < 0 or (all(shape) and last >= len(numbers)):
        raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(
        numbers[offset:], shape, [s * numbers.itemsize for s in strides], writeable=False
    )


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of a module: tensors, plain values, and an `_Object` for everything else."""

    def __init__(self, file: IO[bytes], numbers: Callable[[str, str], np.ndarray]):
        super().__init__(file)
        self._numbers = numbers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        return name if module == "torch" and name in _STORAGES else _Object

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage, key, *_ = pid
        return self._numbers(storage, key)
