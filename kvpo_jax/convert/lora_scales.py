"""The ranks and alphas of a LoRA's modules, and one LoRA of a single rank and alpha made of them.

The update of a Linear is scale * B A. Its scale is alpha / rank, and peft, diffusers, kohya and
ComfyUI state alpha in different places. A LoRA here has one rank and one alpha: where they differ,
zeros fill A and B up to the largest rank, and the scales are folded into B.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvpo_jax.convert.kind import Options
from kvpo_jax.convert.sources import read_json
from kvpo_jax.convert.tensors import Tensor
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime.weight_file import open_file

# Fields of an adapter's config that change what its tensors mean, in ways that we do not have.
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "use_qalora")
# Initialisations that change the weights of the base too, so that A and B do not fit the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Padded(Tensor):
    """A matrix of a LoRA with zeros up to a larger rank, multiplied by a number.

    Attributes:
      source: the matrix; `array` has the shape and number format of the result, and no numbers.
      factor: the number.
    """

    source: Tensor
    factor: float

    def read(self) -> np.ndarray:
        """The matrix in float32."""
        numbers = self.source.array.astype(np.float32) * np.float32(self.factor)
        missing = zip(numbers.shape, self.array.shape, strict=True)
        return np.pad(numbers, [(0, full - size) for size, full in missing])


def unify(tensors: dict[str, Tensor], options: Options) -> tuple[dict[str, Tensor], Options]:
    """The matrices of a LoRA of one rank, and the options with its alpha.

    Args:
      tensors: matrices and alphas by cleaned name, "blocks.0.self_attn.q.lora_A.weight".
      options: what the user says.

    Raises:
      UsageError: two places state different alphas or ranks, or what is stated is not a number or
        has no meaning here; the message names the places.
    """
    stated = {n.removesuffix(".alpha"): t for n, t in tensors.items() if n.endswith(".alpha")}
    matrices = {name: t for name, t in tensors.items() if not name.endswith(".alpha")}
    configs = {file: adapter_config(file) for file in {t.file for t in tensors.values()}}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, a in matrices.items():
        module, matrix, _ = name.partition(".lora_A.")
        if matrix and (b := matrices.get(f"{module}.lora_B.weight")) is not None:
            ranks[module] = _rank(a, b)
            places = _stated_alphas(module, stated.get(module), options, a.file, configs[a.file])
            alphas[module] = _alpha(module, ranks[module], places, configs[a.file])
    if lost := stated.keys() - ranks.keys():
        raise UsageError(f"{stated[min(lost)].name} belongs to no pair of matrices")
    if not ranks:
        return matrices, options
    rank = max(ranks.values())
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        return matrices, dataclasses.replace(options, alpha=alphas.popitem()[1])
    scales = {module: alphas[module] / ranks[module] for module in ranks}
    smallest, largest = min(scales.values()), max(scales.values())
    scale = largest if smallest == largest else 1.0
    print(
        f"ranks {min(ranks.values())} to {rank}, scales {smallest:g} to {largest:g}: filled up with"
        f" zeros to rank {rank}, all with scale {scale:g}",
        flush=True,
    )
    padded = {
        name: _pad(t, name, rank, scales[module] / scale)
        for name, t in matrices.items()
        if (module := re.sub(r"\.lora_[AB]\.weight$", "", name)) in ranks
    }
    return matrices | padded, dataclasses.replace(options, alpha=scale * rank)


def _rank(a: Tensor, b: Tensor) -> int:
    """The rank of a pair of matrices; UsageError if they are none."""
    if a.array.ndim == b.array.ndim == 2 and len(a.array) == b.array.shape[1]:
        return len(a.array)
    listed = f"{a.name} {list(a.array.shape)} and {b.name} {list(b.array.shape)}"
    raise UsageError(f"{listed} are not the two matrices of a LoRA")


def _pad(tensor: Tensor, name: str, rank: int, factor: float) -> Padded:
    """A matrix with the larger rank; B with the factor."""
    rows, columns = tensor.array.shape
    is_a = name.endswith(".lora_A.weight")
    shape = (rank, columns) if is_a else (rows, rank)
    array = np.broadcast_to(np.float32(0), shape)
    return Padded(tensor.file, tensor.part, tensor.name, array, tensor, 1.0 if is_a else factor)


# ---------------------------------------------------------------- what is stated


def _stated_alphas(
    module: str, tensor: Tensor | None, options: Options, file: Path, config: Mapping[str, Any]
) -> dict[str, float]:
    """place -> the alpha that it states for a module; UsageError for what is no number above 0."""
    stated: dict[str, Any] = {}
    if tensor is not None:
        if tensor.array.size != 1:
            shape = list(tensor.array.shape)
            raise UsageError(f"{tensor.name} has the shape {shape}, expected one number")
        stated[tensor.name] = tensor.array.item()
    stated["--alpha"] = options.alpha
    stated[file.name] = _of_module(config, "lora_alpha", "alpha_pattern", module)
    stated = {place: value for place, value in stated.items() if value is not None}
    for place, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"alpha is {value!r} ({place}), expected a number above 0")
    return stated


def _alpha(module: str, rank: int, stated: Mapping[str, float], config: Mapping[str, Any]) -> float:
    """The alpha of a module, whose update is alpha / rank * B A.

    Args:
      module: its name.
      rank: of its tensors.
      stated: see `_stated_alphas`; without any, alpha is upstream's default, the rank.
      config: of the adapter.
    """
    if len(set(stated.values())) > 1:
        listed = ", ".join(f"{value:g} ({place})" for place, value in stated.items())
        raise UsageError(f"alpha is not one: {listed}")
    stated_rank = _of_module(config, "r", "rank_pattern", module)
    if stated_rank not in (None, rank):
        raise UsageError(
            f"the adapter's config says that {module} has rank {stated_rank}, its tensors have rank"
            f" {rank}: the two are not of one adapter; bring the config that was saved with them"
        )
    if not stated and config:
        raise UsageError(
            "the adapter's config states no lora_alpha, for which peft takes 8; say which with"
            " --alpha"
        )
    alpha = float(next(iter(stated.values()), rank))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _of_module(config: Mapping[str, Any], field: str, pattern: str, module: str) -> Any:
    """What an adapter's config says for a module: the first pattern that ends its name, as in peft,
    or else the field.
    """
    patterns = config.get(pattern) or {}
    try:
        matches = (x for name, x in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
        return next(matches, config.get(field))
    except re.error as error:
        raise UsageError(f"{pattern} of the adapter's config: {error}") from error


def adapter_config(file: Path) -> Mapping[str, Any]:
    """What a LoRA's file and the adapter_config.json beside it say, the file before the other.

    Raises:
      UsageError: they state something that a LoRA here has not; the message names field and place.
    """
    beside = file.with_name("adapter_config.json")
    config, adapter = read_json(beside), {}
    if file.suffix == ".safetensors":
        noted = open_file(file).metadata.get("lora_adapter_metadata", "{}")
        try:
            adapter = {n.removeprefix("transformer."): x for n, x in json.loads(noted).items()}
        except (ValueError, AttributeError) as error:
            raise UsageError(f"{file}: its lora_adapter_metadata is not a JSON object") from error
    for place, fields in ((beside, config), (file, adapter)):
        for name in _UNSUPPORTED:
            if fields.get(name):
                raise UsageError(f"{name} of {place} is not supported")
        kind, bias = fields.get("peft_type") or "LORA", fields.get("bias") or "none"
        if kind != "LORA" or bias != "none":
            raise UsageError(f"{place} states peft_type {kind} and bias {bias}; only LORA, none")
        start = str(fields.get("init_lora_weights")).lower()
        if start.startswith(_CHANGES_BASE):
            raise UsageError(
                f"{place} states init_lora_weights {start}, which changes the base too; save the"
                " adapter as one of the original base (path_initial_model_for_weight_conversion)"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(fields.get(name) or {}, dict):
                raise UsageError(f"{name} of {place} is not an object of numbers by module")
    return config | adapter
