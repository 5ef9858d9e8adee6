"""A kind of weights: how its checkpoints are recognised, and what its tensors become."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from kvpo_jax.convert.table import Shapes, Table
from kvpo_jax.convert.tensors import Tensor
from kvpo_jax.types import PyTree

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says about a checkpoint; the command has a flag for every field.

    Attributes:
      kind: the kind of its weights, or "auto".
      dtype: "keep", or the number format of the model that the file is for: "float32" or
        "bfloat16".
      policy: which state dict of a training checkpoint to read.
      num_heads: attention heads of a transformer; None is a head dim of 128, of a DINO 64.
      text_len: tokens that a transformer's prompts are padded to; None is 512.
      alpha: the scale of a LoRA, over its rank; None is what its files state, or its rank.
      base: what a reward was made of: the folder of a Qwen2-VL, CLIP's file or folder; for CLIP the
        folder of its tokenizer.
      templates: file or folder with the instruction of a reward model.
    """

    kind: str = "auto"
    dtype: str = "keep"
    policy: str = "online"
    num_heads: int | None = None
    text_len: int | None = None
    alpha: float | None = None
    base: Path | None = None
    templates: Path | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything that says which config a checkpoint has.

    Attributes:
      shapes: official name -> shape, of the tensors that are converted.
      files: the files that hold them.
      options: what the user says.
    """

    shapes: Shapes
    files: Sequence[Path]
    options: Options


@dataclasses.dataclass(frozen=True)
class Kind(Generic[Config]):
    """A kind of weights.

    Attributes:
      mark: regular expression for the cleaned name of a tensor that only this kind has.
      official: shapes by cleaned name -> (cleaned name -> official name; UsageError for a tensor
        that is unknown).
      config: checkpoint -> its config, a frozen dataclass.
      table: config -> its weight map.
      to_ours: (our path, official tensor) -> our tensor.
      abstract: config -> the tree of our shapes and dtypes.
      sizes: fields of the config that a converted file notes; empty is all.
      aside: regular expression for the cleaned names of tensors that some releases have and that
        our model lacks.
      merge: (the other tensors by cleaned name, options) -> what replaces both: with LoRAs merged,
        fused tensors apart, or those of a base added.
      tokenizer: whether a tokenizer is copied beside the weights: the base's, or the source's.
      folder: where a folder with several kinds has this one: diffusers' subfolder ...
      pattern: ... and the file in a folder of Wan2.1.
    """

    mark: str
    official: Callable[[Shapes], Callable[[str], str]]
    config: Callable[[Checkpoint], Config]
    table: Callable[[Config], Table]
    to_ours: Callable[[str, np.ndarray], np.ndarray]
    abstract: Callable[[Config], PyTree]
    sizes: tuple[str, ...] = ()
    aside: str | None = None
    merge: Callable[[dict[str, Tensor], Options], tuple[dict[str, Tensor], Options]] | None = None
    tokenizer: bool = False
    folder: str = ""
    pattern: str = ""
