"""LoRA files of a command line: one, or a weighted sum of several, `A:1.0,B:0.5`.

The sum is that of the updates: W + sum_i weight_i alpha_i / rank_i B_i A_i, exactly. Its A has the
rows of all A_i below each other, its B the columns of all B_i beside each other, so its rank is the
sum of the ranks; the scales are folded into B, and its alpha is its rank. It is no average of A and
B, whose product would mix B_i with A_j.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from kvpo_jax import backbone
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import WanConfig
from kvpo_jax.runtime import checkpoint
from kvpo_jax.runtime.config import local_path
from kvpo_jax.types import PyTree

SYNTAX = "expected FILE, or FILE:WEIGHT,FILE:WEIGHT"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A file of a sum.

    Attributes:
      path: a LoRA that kvpo-convert wrote.
      weight: how much of it.
      made: its sizes: dim, ffn_dim, num_layers, rank, alpha.
    """

    path: Path
    weight: float
    made: dict[str, Any]

    @property
    def scale(self) -> float:
        """What its B A is multiplied by."""
        return self.weight * self.made["alpha"] / self.made["rank"]


def parse(text: str, flag: str = "--lora") -> list[Adapter]:
    """The files that a flag names; of their tensors nothing is read.

    Args:
      text: FILE, or FILE:WEIGHT with commas between several. A weight that is left out is 1. A file
        whose own name has commas or colons can only be named alone.
      flag: what it is of, for errors.

    Raises:
      UsageError: it is no such text, a file is not there or is no converted LoRA, or the files are
        of models of different sizes.
    """
    if Path(local_path(text)).is_file():
        pairs = [(text, 1.0)]
    else:
        pairs = [_pair(part.strip(), f"{flag}={text}") for part in text.split(",")]
    found = []
    for name, weight in pairs:
        path = Path(local_path(name))
        if not path.is_file():
            raise UsageError(f"{flag}={text}: there is no file {path}; {SYNTAX}")
        found.append(Adapter(path, weight, checkpoint.adapter_sizes(path)))
    first, *others = found
    for other in others:
        for name in first.made:
            if name not in ("rank", "alpha") and other.made.get(name) != first.made[name]:
                raise UsageError(
                    f"{flag}: {other.path} has {name} {other.made.get(name)} and {first.path}"
                    f" {first.made[name]}; they are for models of different sizes"
                )
    return found


def _pair(part: str, where: str) -> tuple[str, float]:
    """File and weight of FILE:WEIGHT; UsageError, beginning with `where`, if it is none."""
    name, colon, number = part.rpartition(":")
    if not colon or Path(local_path(part)).is_file():
        name, number = part, "1"
    try:
        weight = float(number)
    except ValueError as error:
        raise UsageError(
            f"{where}: {number!r} is no number and {part} no file; {SYNTAX}"
        ) from error
    if not name or not math.isfinite(weight):
        raise UsageError(f"{where}: {part!r} is no file with a finite weight; {SYNTAX}")
    return name, weight


def sizes(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The sizes of the sum, as a file has them."""
    first = adapters[0]
    if len(adapters) == 1 and first.weight == 1:
        return first.made
    rank = sum(adapter.made["rank"] for adapter in adapters)
    return {**first.made, "rank": rank, "alpha": float(rank)}


def configured(
    config: ml_collections.ConfigDict, adapters: Sequence[Adapter]
) -> ml_collections.ConfigDict:
    """The configuration with rank and alpha of the sum."""
    out, made = config.copy_and_resolve_references().unlock(), sizes(adapters)
    out.lora.update(rank=made["rank"], alpha=float(made["alpha"]))
    return out.lock()


def summed(adapters: Sequence[Adapter], read: Callable[[Adapter], PyTree]) -> PyTree:
    """The collection `lora` of the sum; a single file of weight 1 stays as it is, bit for bit.

    Args:
      adapters: from `parse`.
      read: the collection of one file, with leaves a float[L, fan in, rank] and b float[L, rank,
        fan out].
    """
    if len(adapters) == 1 and adapters[0].weight == 1:
        return read(adapters[0])

    def join(keys: Any, *leaves: jax.Array) -> jax.Array:
        if keys[-1].key == "a":
            return jnp.concatenate(leaves, axis=2)
        scaled = [x * adapter.scale for x, adapter in zip(leaves, adapters, strict=True)]
        return jnp.concatenate(scaled, axis=1)

    return jax.tree_util.tree_map_with_path(join, *map(read, adapters))


def load(adapters: Sequence[Adapter], cfg: WanConfig) -> PyTree:
    """The collection `lora` of the sum, for a model of these sizes.

    Raises:
      UsageError: a file is for a model of another size, or damaged.
    """

    def read(adapter: Adapter) -> PyTree:
        rank, alpha = adapter.made["rank"], adapter.made["alpha"]
        own = dataclasses.replace(cfg, lora_rank=rank, lora_alpha=alpha)
        return backbone.load_lora(adapter.path, own)

    return summed(adapters, read)
