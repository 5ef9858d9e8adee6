"""The tensors of PyTorch and safetensors files, as views of the mapped files.

Nothing is copied before it is written, so that a checkpoint of any size can be converted.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvpo_jax.errors import MissingPackageError, UsageError
from kvpo_jax.runtime import weight_file
from kvpo_jax.runtime.weight_file import DTYPES, chunks, unknown_dtype

# The state dicts that a training checkpoint may have for a policy. The first one that is there is
# read: KVPO looks for a generator in this order.
PARTS = {
    "online": ("generator_lora", "generator", "generator_ema", "model"),
    "ema": ("ema", "generator_ema"),
    "initial": ("initial_generator_lora", "initial_generator"),
}
SUFFIXES = (".json", ".safetensors", ".pt", ".pth", ".bin")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a source file.

    Attributes:
      file: the file.
      part: key of its state dict in the file; None if the file is one state dict.
      name: its name in the state dict.
      array: a view of the mapped file.
    """

    file: Path
    part: str | None
    name: str
    array: np.ndarray

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def read(self) -> np.ndarray:
        """The numbers to convert."""
        return self.array


def read(path: Path, policy: str = "online") -> list[Tensor]:
    """The tensors of a weight file, or of the shards that an index names.

    Args:
      path: one of SUFFIXES ends its name.
      policy: which state dict of a training checkpoint to read, a key of PARTS.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is not a weight file; these end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"there is no {path}")
    if path.suffix == ".json":
        return _read_index(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, policy)


def _read_index(path: Path) -> list[Tensor]:
    """The tensors of a sharded checkpoint, each of which must be where the index says."""
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the index of a sharded checkpoint: {error!r}") from error
    tensors = [t for shard in sorted(set(places.values())) for t in read(path.parent / shard)]
    found = {t.name: t.file.name for t in tensors}
    for name in places.keys() | found.keys():
        if places.get(name) != found.get(name):
            raise UsageError(
                f"{path}: {name} is in {found.get(name)}, the index says {places.get(name)}"
            )
    return tensors


# ---------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file."""
    opened = weight_file.open_file(path).tensors
    return [Tensor(path, None, name, array) for name, array in opened.items()]


# ---------------------------------------------------------------- PyTorch


def _read_torch(path: Path, policy: str) -> list[Tensor]:
    """The tensors of a PyTorch checkpoint, or of its state dict for `policy` if it has several."""
    checkpoint = _load_torch(path)
    part = _choose_part(path, checkpoint, policy)
    state = checkpoint[part] if part else checkpoint
    return [Tensor(path, part, name, _as_array(path, name, x)) for name, x in state.items()]


def _load_torch(path: Path) -> Mapping[str, Any]:
    """What a PyTorch file has, without running any code that may be in it."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs PyTorch: pip install 'kvpo_jax[convert]'"
        ) from error
    zipped = zipfile.is_zipfile(path)
    if not zipped and path.open("rb").read(2) == b"PK":
        raise UsageError(f"{path} is cut short: its end is missing")
    try:
        # PyTorch before 1.6 wrote files that are not zip archives and cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UsageError(
            f"{path} is not a PyTorch checkpoint of tensors alone: {reason}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict")
    return checkpoint


def _choose_part(path: Path, checkpoint: Mapping[str, Any], policy: str) -> str | None:
    """The key of the state dict for `policy`; None if the checkpoint is a state dict itself."""
    known = {name for names in PARTS.values() for name in names} & checkpoint.keys()
    if not known:
        return None
    for name in PARTS[policy]:
        if name in known:
            return name
    raise UsageError(
        f"{path} has no {' or '.join(PARTS[policy])} for the policy {policy!r}, only"
        f" {', '.join(sorted(known))}"
    )


def _as_array(path: Path, name: str, value: Any) -> np.ndarray:
    """A torch tensor as an array of the same memory."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in {known.name for known in DTYPES.values()}:
        raise unknown_dtype(path, name, dtype)
    value = value.detach()
    if value.dtype == torch.bfloat16:  # torch does not hand bfloat16 to NumPy
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


# ---------------------------------------------------------------- comparing


def unique(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """name -> tensor. A tied tensor may be there twice; UsageError for two that differ."""
    out: dict[str, Tensor] = {}
    for name, tensor in named:
        other = out.setdefault(name, tensor)
        if other is not tensor and not _equal(other.array, tensor.array):
            raise UsageError(f"{other} and {tensor} are different tensors for {name}")
    return out


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal, without a copy of either."""
    return a.shape == b.shape and all(
        np.array_equal(x, y) for x, y in zip(chunks(a), chunks(b), strict=True)
    )
