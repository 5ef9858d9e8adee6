"""The weight map of a LoRA of Wan's transformer, and its names in the formats that others read.

Official names are peft's for the modules of wan_weights.py: "blocks.0.self_attn.q.lora_A.weight".
"""

from __future__ import annotations

import dataclasses

from kvpo_jax.convert.kind import Checkpoint, Kind
from kvpo_jax.convert.lora_scales import unify
from kvpo_jax.convert.table import Shapes, Table, check_ranks
from kvpo_jax.convert.wan_weights import (
    BLOCK_LINEARS,
    diffusers_name,
    layer_count,
    official_names,
    to_ours,
)
from kvpo_jax.models.wan import WanConfig, abstract_variables
from kvpo_jax.types import PyTree

_MATRICES = {"lora_A.weight": "a", "lora_B.weight": "b"}
# The tensors that show the sizes, and how many axes each has.
_SIZED = {"blocks.0.self_attn.q.lora_A.weight": 2, "blocks.0.ffn.0.lora_B.weight": 2}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Sizes of a LoRA of every Linear in the blocks.

    Attributes:
      dim: width of the transformer.
      ffn_dim: width of its MLPs.
      num_layers: how many blocks it has.
      rank: r.
      alpha: the update of a Linear is alpha / rank * B A.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    rank: int
    alpha: float


def lora_table(num_layers: int) -> Table:
    """The map of every tensor of a LoRA."""
    return {
        f"blocks.{layer}.{official}.{theirs}": (f"{ours}/{name}", layer)
        for layer in range(num_layers)
        for official, ours in BLOCK_LINEARS.items()
        for theirs, name in _MATRICES.items()
    }


# ---------------------------------------------------------------- config


def config_from_shapes(shapes: Shapes, alpha: float | None = None) -> LoRAConfig:
    """The config of the LoRA whose tensors, by official name, have these shapes.

    Args:
      shapes: official name -> shape.
      alpha: its scale; None is upstream's default, the rank.
    """
    check_ranks("LoRA of every Linear of the blocks", shapes, _SIZED)
    rank, dim = shapes["blocks.0.self_attn.q.lora_A.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.lora_B.weight"]
    alpha = float(rank if alpha is None else alpha)
    return LoRAConfig(dim, ffn_dim, layer_count(shapes), rank, alpha)


def config_from_checkpoint(checkpoint: Checkpoint) -> LoRAConfig:
    """The config of a LoRA, whose alpha `unify` has found."""
    return config_from_shapes(checkpoint.shapes, checkpoint.options.alpha)


def abstract_lora(cfg: LoRAConfig) -> PyTree:
    """Shapes and dtypes of the collection `lora`."""
    wan = WanConfig(
        dim=cfg.dim,
        ffn_dim=cfg.ffn_dim,
        num_heads=1,
        num_layers=cfg.num_layers,
        freq_dim=2,  # no LoRA depends on this size and the next three
        text_dim=2,
        text_len=2,
        channels=2,
        lora_rank=cfg.rank,
        lora_alpha=cfg.alpha,
    )
    return abstract_variables(wan)["lora"]


def _table(cfg: LoRAConfig) -> Table:
    return lora_table(cfg.num_layers)


WAN_LORA = Kind(
    mark=r"^blocks[._].+\.lora_A\.weight$",
    official=official_names,
    config=config_from_checkpoint,
    table=_table,
    to_ours=to_ours,
    abstract=abstract_lora,
    merge=unify,
)


# ---------------------------------------------------------------- others' names


def _peft_name(name: str) -> str:
    return f"base_model.model.{name}"


def _diffusers_name(name: str) -> str:
    return f"transformer.{diffusers_name(name)}"


def _comfyui_name(name: str) -> str:
    return "diffusion_model." + name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


# Program that reads a LoRA file -> (official name -> the name that it looks for).
LORA_NAMES = {"peft": _peft_name, "diffusers": _diffusers_name, "comfyui": _comfyui_name}
