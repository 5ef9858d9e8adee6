"""The tensors of PyTorch and safetensors files, as views of the mapped files.

Nothing is copied before it is written, so that a checkpoint of any size can be converted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvpo_jax.convert import torchscript
from kvpo_jax.errors import MissingPackageError, UsageError
from kvpo_jax.runtime import file_kind, weight_file
from kvpo_jax.runtime.weight_file import chunks, unknown_dtype

# The state dicts that a training checkpoint may have for a policy. The first one that is there is
# read: KVPO looks for a generator in this order.
PARTS = {
    "online": (
        "generator_lora",
        "generator",
        "generator_ema",
        "model",
        "state_dict",
        "model_state_dict",
        "module",
        "params",
    ),
    "ema": ("ema", "generator_ema", "ema_state_dict", "model_ema", "params_ema"),
    "initial": ("initial_generator_lora", "initial_generator"),
}
# torch's name of a number format -> the integer of its size, and the format.
_NOT_NUMPYS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("int8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("int8", ml_dtypes.float8_e5m2),
}
# Parts of other training checkpoints that are not the generator.
_NOT_WEIGHTS = re.compile(r"(optim|sched|critic|discriminator|scaler|rng)", re.IGNORECASE)


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

    What the file is, its first bytes say, not its name.

    Args:
      path: a safetensors file, a PyTorch checkpoint, or an index.
      policy: which state dict of a training checkpoint to read, a key of PARTS.
    """
    if not path.is_file():
        raise UsageError(f"there is no {path}")
    kind = file_kind.kind_of(path)
    readers: dict[str, Callable[[], list[Tensor]]] = {
        "json": lambda: _read_index(path),
        "safetensors": lambda: read_safetensors(path),
        "zip": lambda: _read_torch(path, policy),
        "pickle": lambda: _read_torch(path, policy),
    }
    file_kind.check(path, "a weight file", *readers)
    if kind is None:
        raise UsageError(
            f"{path} is not a weight file: it begins neither like a safetensors file nor like a"
            " PyTorch checkpoint; download or copy it again"
        )
    if not (tensors := readers[kind[0]]()):
        raise UsageError(f"{path} has no tensors; name the file with the weights")
    return tensors


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
    if torchscript.is_archive(path):
        return [Tensor(path, None, name, x) for name, x in torchscript.read(path).items()]
    state, trail = _load_torch(path), []
    while (part := _choose_part(path, state, policy)) is not None:
        state = state[part]
        trail.append(part)
    part = ".".join(trail) or None
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
        raise UsageError(f"{path} is cut short: its end is missing; download or copy it again")
    if zipped and not any(n.endswith("/data.pkl") for n in zipfile.ZipFile(path).namelist()):
        raise UsageError(f"{path} is a zip archive, and no PyTorch checkpoint; unpack it")
    try:
        # PyTorch before 1.6 wrote files that are not zip archives and cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever the file makes torch raise
        raise UsageError(f"{path} {_torch_reason(str(error))}") from error
    if not isinstance(checkpoint, Mapping):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict")
    return checkpoint


def _torch_reason(message: str) -> str:
    """What is wrong with a file, and what to do, in place of torch's message of many lines.

    That one advises to switch off `weights_only`, which would run whatever code is in the file.
    """
    alone = (
        "; in the program that wrote it, save the tensors alone:"
        " torch.save({'generator': model.state_dict()}, FILE)"
    )
    cause = message.partition("WeightsUnpickler error:")[2]
    if thing := re.search(r"(?:GLOBAL|class|function|of type|but got) ([\w.<]+)", cause):
        return f"has objects beside its tensors, such as {thing[1]}, which could run code{alone}"
    return "is not a PyTorch checkpoint, or is damaged; download or copy it again"


def _choose_part(path: Path, checkpoint: Mapping[str, Any], policy: str) -> str | None:
    """The key of the state dict for `policy`; None if the checkpoint is a state dict itself."""
    parts = {name: x for name, x in checkpoint.items() if isinstance(x, Mapping)}
    known = {name for names in PARTS.values() for name in names} & parts.keys()
    for name in PARTS[policy]:
        if name in known:
            return name
    if known:
        raise UsageError(
            f"{path} has nothing for the policy {policy!r} ({', '.join(PARTS[policy])}), only"
            f" {', '.join(sorted(known))}"
        )
    if any(hasattr(x, "dtype") for x in checkpoint.values()):
        return None
    others = [str(name) for name in parts if parts[name] and not _NOT_WEIGHTS.search(str(name))]
    if len(others) > 1:
        raise UsageError(
            f"{path} has the parts {', '.join(sorted(others)[:9])}; save the one to convert alone"
        )
    return others[0] if others else None


def _as_array(path: Path, name: str, value: Any) -> np.ndarray:
    """A torch tensor as an array of the same memory."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    value = value.detach()
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype in _NOT_NUMPYS:  # torch does not hand these to NumPy
        integer, ours = _NOT_NUMPYS[dtype]
        return value.view(getattr(torch, integer)).numpy().view(ours)
    try:
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise unknown_dtype(path, name, dtype) from error


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
