"""VideoAlign's language model is a peft LoRA of Qwen2-VL's: the converter merges it, in float32."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import chex
import numpy as np

from kvpo_jax.convert.tensors import Tensor
from kvpo_jax.errors import UsageError

_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Merged(Tensor):
    """A Linear's weight with its LoRA, which are merged when they are written.

    Attributes:
      a: the LoRA's [rank, in].
      b: the LoRA's [out, rank].
      scale: what their product is multiplied by.
    """

    a: Tensor
    b: Tensor
    scale: float

    def read(self) -> np.ndarray:
        """The merged weight."""
        return merge_lora(self.array, self.a.array, self.b.array, self.scale)


def merge_lora(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """weight + scale * b a in float32, for a weight [out, in], a [rank, in] and b [out, rank]."""
    chex.assert_shape([weight, a, b], [(b.shape[0], a.shape[1]), (b.shape[1], None), (None, None)])
    weight, a, b = (x.astype(np.float32) for x in (weight, a, b))
    return weight + np.float32(scale) * (b @ a)


def is_lora(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the arrays are a weight [out, in] and its LoRA: a [rank, in] and b [out, rank]."""
    if not weight.ndim == a.ndim == b.ndim == 2:
        return False
    (out, fan_in), rank = weight.shape, len(a)
    return a.shape == (rank, fan_in) and b.shape == (out, rank)


def split_name(name: str) -> tuple[str, str | None]:
    """A cleaned name as that of a weight, and "A" or "B" if it names a matrix of its LoRA."""
    matrix = _MATRIX.fullmatch(name)
    return (f"{matrix[1]}.weight", matrix[2]) if matrix else (name, None)


def lora_scale(stated: Mapping[str, Any], rank: int) -> float:
    """The number that the product of a LoRA's matrices is multiplied by.

    Args:
      stated: peft_lora_config of VideoAlign's model_config.json, or peft's adapter_config.json.
      rank: the rank that the tensors have.

    Raises:
      UsageError: another rank is stated, or a kind of LoRA that is not merged here.
    """
    stated_rank, alpha = stated.get("r", stated.get("lora_r")), stated.get("lora_alpha")
    if stated_rank != rank or alpha is None:
        raise UsageError(
            f"a LoRA of rank {rank} is stated to have rank {stated_rank} and alpha {alpha}"
        )
    for name in ("use_dora", "rank_pattern", "alpha_pattern"):
        if stated.get(name):
            raise UsageError(f"{name} of a LoRA is not supported")
    return alpha / (math.sqrt(rank) if stated.get("use_rslora") else rank)
