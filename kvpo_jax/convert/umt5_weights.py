"""The weight map of a UMT5 encoder: where each tensor of a checkpoint goes in our variable tree.

Official names are those of Wan2.1's `models_t5_umt5-xxl-enc-bf16.pth`. `official_name` makes them
from those of transformers' `UMT5EncoderModel`, which diffusers' folders of Wan have.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from kvpo_jax.convert.kind import Checkpoint, Kind
from kvpo_jax.convert.table import Shapes, Table, check_ranks, count_layers, unchanged
from kvpo_jax.errors import UsageError
from kvpo_jax.models import umt5
from kvpo_jax.models.umt5 import UMT5Config

_TOP = {"token_embedding.weight": "token_embedding/embedding", "norm.weight": "norm/scale"}
_BLOCK = {
    "norm1.weight": "norm1/scale",
    "attn.q.weight": "q/kernel",
    "attn.k.weight": "k/kernel",
    "attn.v.weight": "v/kernel",
    "attn.o.weight": "o/kernel",
    "pos_embedding.embedding.weight": "pos_embedding/embedding",
    "norm2.weight": "norm2/scale",
    "ffn.gate.0.weight": "gate/kernel",
    "ffn.fc1.weight": "fc1/kernel",
    "ffn.fc2.weight": "fc2/kernel",
}
# The tensors that show the sizes, and how many axes each has.
_SIZED = {
    "token_embedding.weight": 2,
    "blocks.0.pos_embedding.embedding.weight": 2,
    "blocks.0.attn.q.weight": 2,
    "blocks.0.ffn.fc1.weight": 2,
}
# transformers' names -> official ones. The token embedding has two names there, which are tied.
HF_TOP = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}
HF_BLOCK = {
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
}


def umt5_table(num_layers: int) -> Table:
    """The map of every tensor of the encoder."""
    table: Table = {official: (ours, None) for official, ours in _TOP.items()}
    for layer in range(num_layers):
        table |= {
            f"blocks.{layer}.{official}": (f"blocks/{ours}", layer)
            for official, ours in _BLOCK.items()
        }
    return table


def official_name(hf_name: str) -> str:
    """The official name of a tensor of `UMT5EncoderModel`; UsageError if it has no such tensor."""
    block = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", hf_name)
    if hf_name in HF_TOP:
        return HF_TOP[hf_name]
    if block and block[2] in HF_BLOCK:
        return f"blocks.{block[1]}.{HF_BLOCK[block[2]]}"
    raise UsageError(f"{hf_name} is not a tensor of transformers' UMT5EncoderModel")


def official_names(shapes: Shapes) -> Callable[[str], str]:
    """(cleaned name -> official name), for an encoder whose tensors have these names."""
    return unchanged if "token_embedding.weight" in shapes else official_name


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`."""
    return tensor.T if path.endswith("kernel") else tensor


def config_from_shapes(shapes: Shapes) -> UMT5Config:
    """The config of the encoder whose tensors, by official name, have these shapes.

    No shape shows max_distance, eps and dtype, which are those of UMT5-XXL.

    Raises:
      UsageError: it names the tensor that is missing or has another number of axes.
    """
    check_ranks("UMT5 encoder", shapes, _SIZED)
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    width, _ = shapes["blocks.0.attn.q.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
    layers = count_layers(shapes, r"blocks\.\d+\.norm1\.weight")
    return UMT5Config(vocab, dim, heads, width // heads, ffn_dim, layers, buckets)


def config_from_checkpoint(checkpoint: Checkpoint) -> UMT5Config:
    """The encoder's config."""
    return config_from_shapes(checkpoint.shapes)


def _table(cfg: UMT5Config) -> Table:
    return umt5_table(cfg.layers)


UMT5 = Kind(
    mark=r"^(token_embedding|shared|encoder\.embed_tokens)\.weight$",
    official=official_names,
    config=config_from_checkpoint,
    table=_table,
    to_ours=to_ours,
    abstract=umt5.abstract_params,
    # The decoder of the whole model, and what ComfyUI keeps beside an encoder.
    aside=r"^(decoder|lm_head)\.|^(spiece_model|logit_scale|text_projection)",
    folder="text_encoder",
    pattern="models_t5*.pth",
)
