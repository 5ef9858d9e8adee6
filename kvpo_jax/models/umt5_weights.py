"""Where each tensor of a UMT5 encoder's checkpoint goes in our variable tree; see wan_weights.py.

Official names are those of Wan2.1's `models_t5_umt5-xxl-enc-bf16.pth`; `official_name` has those of transformers'
`UMT5EncoderModel`, which diffusers' folders of Wan hold too.
"""

from __future__ import annotations

import re

import numpy as np

from kvpo_jax.models.umt5 import UMT5Config
from kvpo_jax.models.wan_weights import Shapes, check_ranks

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
# The tensors that tell the sizes, and how many axes they have.
_SIZED = {
    "token_embedding.weight": 2, "blocks.0.pos_embedding.embedding.weight": 2, "blocks.0.attn.q.weight": 2,
    "blocks.0.ffn.fc1.weight": 2,
}  # fmt: skip
# transformers' names -> official ones. The token embedding has two there, tied.
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


def umt5_table(num_layers: int) -> dict[str, tuple[str, int | None]]:
    """official name -> (our path, layer or None if not stacked), for every tensor of the encoder."""
    table = {official: (ours, None) for official, ours in _TOP.items()}
    for layer in range(num_layers):
        table |= {f"blocks.{layer}.{official}": (f"blocks/{ours}", layer) for official, ours in _BLOCK.items()}
    return table


def official_name(hf_name: str) -> str:
    """The official name of a tensor of `UMT5EncoderModel`; ValueError for one that is none."""
    block = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", hf_name)
    if hf_name in HF_TOP:
        return HF_TOP[hf_name]
    if block and block[2] in HF_BLOCK:
        return f"blocks.{block[1]}.{HF_BLOCK[block[2]]}"
    raise ValueError(f"{hf_name} is no tensor of transformers' UMT5EncoderModel")


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`."""
    return tensor.T if path.endswith("kernel") else tensor


def config_from_shapes(shapes: Shapes) -> UMT5Config:
    """The config of the encoder whose tensors, by official name, have these shapes.

    max_distance, eps and dtype show in no shape and are those of UMT5-XXL.

    Raises:
      ValueError: names the tensor that is missing or has another number of axes.
    """
    check_ranks("UMT5 encoder", shapes, _SIZED)
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    width, _ = shapes["blocks.0.attn.q.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
    layers = sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in shapes)
    return UMT5Config(vocab, dim, heads, width // heads, ffn_dim, layers, buckets)
