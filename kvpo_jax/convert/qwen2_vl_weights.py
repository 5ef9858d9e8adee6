"""The weight map of Qwen2-VL: where each tensor of a checkpoint goes in our variable tree.

Official names are those of the Qwen2-VL folders on the hub and of the reward models' checkpoints
(transformers before 5): `visual.*` and `model.*`. Our model has no language head.
"""

from __future__ import annotations

import math
import re

import numpy as np

from kvpo_jax.convert.table import Shapes, Table, check_ranks, count_layers
from kvpo_jax.errors import UsageError
from kvpo_jax.models.qwen2_vl import Qwen2VLConfig, TextConfig, VisionConfig

_TOP = {
    "visual.patch_embed.proj.weight": "visual/patch_embed/kernel",
    "visual.merger.ln_q.weight": "visual/merger_norm/scale",
    "visual.merger.ln_q.bias": "visual/merger_norm/bias",
    "visual.merger.mlp.0.weight": "visual/merger_fc1/kernel",
    "visual.merger.mlp.0.bias": "visual/merger_fc1/bias",
    "visual.merger.mlp.2.weight": "visual/merger_fc2/kernel",
    "visual.merger.mlp.2.bias": "visual/merger_fc2/bias",
    "model.embed_tokens.weight": "embed_tokens/embedding",
    "model.norm.weight": "norm/scale",
}
# The tensors of a layer: what is before its number in the name -> what is behind -> our path.
_LAYER = {
    "visual.blocks": {
        "norm1.weight": "visual/blocks/norm1/scale",
        "norm1.bias": "visual/blocks/norm1/bias",
        "attn.qkv.weight": "visual/blocks/qkv/kernel",
        "attn.qkv.bias": "visual/blocks/qkv/bias",
        "attn.proj.weight": "visual/blocks/proj/kernel",
        "attn.proj.bias": "visual/blocks/proj/bias",
        "norm2.weight": "visual/blocks/norm2/scale",
        "norm2.bias": "visual/blocks/norm2/bias",
        "mlp.fc1.weight": "visual/blocks/fc1/kernel",
        "mlp.fc1.bias": "visual/blocks/fc1/bias",
        "mlp.fc2.weight": "visual/blocks/fc2/kernel",
        "mlp.fc2.bias": "visual/blocks/fc2/bias",
    },
    "model.layers": {
        "input_layernorm.weight": "layers/norm1/scale",
        "self_attn.q_proj.weight": "layers/q/kernel",
        "self_attn.q_proj.bias": "layers/q/bias",
        "self_attn.k_proj.weight": "layers/k/kernel",
        "self_attn.k_proj.bias": "layers/k/bias",
        "self_attn.v_proj.weight": "layers/v/kernel",
        "self_attn.v_proj.bias": "layers/v/bias",
        "self_attn.o_proj.weight": "layers/o/kernel",
        "post_attention_layernorm.weight": "layers/norm2/scale",
        "mlp.gate_proj.weight": "layers/gate/kernel",
        "mlp.up_proj.weight": "layers/up/kernel",
        "mlp.down_proj.weight": "layers/down/kernel",
    },
}
# The tensors that show the sizes, and how many axes each has.
_SIZED = {
    "visual.patch_embed.proj.weight": 5,
    "visual.blocks.0.mlp.fc1.weight": 2,
    "visual.merger.mlp.0.weight": 2,
    "model.embed_tokens.weight": 2,
    "model.layers.0.self_attn.k_proj.weight": 2,
    "model.layers.0.mlp.gate_proj.weight": 2,
}


def qwen2_vl_table(cfg: Qwen2VLConfig) -> Table:
    """The map of every tensor but the language head."""
    table: Table = {official: (ours, None) for official, ours in _TOP.items()}
    for stack, layers in (("visual.blocks", cfg.vision.layers), ("model.layers", cfg.text.layers)):
        for layer in range(layers):
            table |= {
                f"{stack}.{layer}.{official}": (ours, layer)
                for official, ours in _LAYER[stack].items()
            }
    return table


def official_name(name: str) -> str:
    """The official name of a tensor.

    Args:
      name: an official name, or transformers 5's (`model.visual.*`, `model.language_model.*`), with
        or without the `model.` that it begins with.

    Raises:
      UsageError: our model has no such tensor.
    """
    bare = name.removeprefix("model.")
    official = (
        bare if bare.startswith("visual.") else f"model.{bare.removeprefix('language_model.')}"
    )
    layer = re.fullmatch(r"(visual\.blocks|model\.layers)\.\d+\.(.+)", official)
    if official in _TOP or (layer and layer[2] in _LAYER[layer[1]]):
        return official
    raise UsageError(f"{name} is not a tensor of Qwen2-VL's vision tower or language model")


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`."""
    # The patch embedding is a Conv3d, whose (c, t, y, x) are flattened.
    return tensor.reshape(tensor.shape[0], -1).T if path.endswith("kernel") else tensor


def config_from_shapes(
    shapes: Shapes, heads: int | None = None, vision_heads: int | None = None
) -> Qwen2VLConfig:
    """The config of the model whose tensors, by official name, have these shapes.

    No shape shows the bases of the rotary embeddings, eps, the ids of the pad tokens and dtype,
    which are the published ones.

    Args:
      shapes: official name -> shape.
      heads: query heads of the language model, which no shape shows; None is a head dim of 128, as
        published.
      vision_heads: heads of the vision tower; None is a head dim of 80, as published.

    Raises:
      UsageError: a tensor is missing, or the sizes are not those of a Qwen2-VL.
    """
    check_ranks("Qwen2-VL", shapes, _SIZED)
    vision_dim, channels, temporal_patch, patch, _ = shapes["visual.patch_embed.proj.weight"]
    vision_ffn, _ = shapes["visual.blocks.0.mlp.fc1.weight"]
    merged, _ = shapes["visual.merger.mlp.0.weight"]
    vocab, dim = shapes["model.embed_tokens.weight"]
    kv_dim, _ = shapes["model.layers.0.self_attn.k_proj.weight"]
    ffn_dim, _ = shapes["model.layers.0.mlp.gate_proj.weight"]
    heads, vision_heads = heads or max(dim // 128, 1), vision_heads or max(vision_dim // 80, 1)
    if dim % heads or kv_dim % (dim // heads) or vision_dim % (4 * vision_heads):
        raise UsageError(
            f"widths of {dim} (queries), {kv_dim} (keys) and {vision_dim} (vision) are not made of"
            f" {heads} heads and {vision_heads} vision heads: give their numbers,"
            " num_attention_heads and vision_config.num_heads of the model's config.json"
        )

    text = TextConfig(
        vocab,
        dim,
        heads,
        kv_dim * heads // dim,
        ffn_dim,
        layers=count_layers(shapes, r"model\.layers\.\d+\.mlp\.up_proj\.weight"),
    )
    vision = VisionConfig(
        vision_dim,
        vision_ffn,
        vision_heads,
        count_layers(shapes, r"visual\.blocks\.\d+\.mlp\.fc1\.weight"),
        channels,
        temporal_patch,
        patch,
        merge=math.isqrt(merged // vision_dim),
    )
    return Qwen2VLConfig(text, vision)
