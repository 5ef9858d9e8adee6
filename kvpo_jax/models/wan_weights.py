"""Where each tensor of an official Wan checkpoint goes in our variable tree: tables, no code per tensor.

Official names are those of Wan2.1, LongLive and MemFlow once wrappers and prefixes are stripped. Ours are the paths of
the collection `params`, with the layers of `blocks` and `text_kv` stacked on a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from kvpo_jax.types import PyTree

# A Linear's weight is transposed; a norm's is not.
_LINEAR = {"weight": "kernel", "bias": "bias"}
_TOP = {
    "text_embedding.0": "text_embedding_0",
    "text_embedding.2": "text_embedding_2",
    "time_embedding.0": "time_embedding_0",
    "time_embedding.2": "time_embedding_2",
    "time_projection.1": "time_projection_1",
    "head.head": "head",
    "patch_embedding": "patch_embedding",
}
# Linears of a block, with the stack (see wan.py) that they live in.
BLOCK_LINEARS = {
    "self_attn.q": "blocks/self_q",
    "self_attn.k": "blocks/self_k",
    "self_attn.v": "blocks/self_v",
    "self_attn.o": "blocks/self_o",
    "cross_attn.q": "blocks/cross_q",
    "cross_attn.k": "text_kv/k",
    "cross_attn.v": "text_kv/v",
    "cross_attn.o": "blocks/cross_o",
    "ffn.0": "blocks/ffn_0",
    "ffn.2": "blocks/ffn_2",
}
_BLOCK_VECTORS = {
    "self_attn.norm_q.weight": "blocks/self_norm_q/scale",
    "self_attn.norm_k.weight": "blocks/self_norm_k/scale",
    "cross_attn.norm_q.weight": "blocks/cross_norm_q/scale",
    "cross_attn.norm_k.weight": "text_kv/norm_k/scale",
    "norm3.weight": "blocks/norm3/scale",
    "norm3.bias": "blocks/norm3/bias",
    "modulation": "blocks/modulation",
}


def wan_table(num_layers: int) -> dict[str, tuple[str, int | None]]:
    """official name -> (our path, layer or None if not stacked), for every tensor of the transformer."""
    table = {
        f"{official}.{theirs}": (f"{ours}/{name}", None)
        for official, ours in _TOP.items()
        for theirs, name in _LINEAR.items()
    }
    table["head.modulation"] = ("head_modulation", None)
    for layer in range(num_layers):
        for official, ours in BLOCK_LINEARS.items():
            for theirs, name in _LINEAR.items():
                table[f"blocks.{layer}.{official}.{theirs}"] = (f"{ours}/{name}", layer)
        for official, ours in _BLOCK_VECTORS.items():
            table[f"blocks.{layer}.{official}"] = (ours, layer)
    return table


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`."""
    if path.endswith("kernel"):
        return tensor.reshape(tensor.shape[0], -1).T  # the patch embedding is a Conv3d: (c, pt, ph, pw) flattened
    if path.endswith("modulation"):
        return tensor[0]
    return tensor


def from_official(state: Mapping[str, np.ndarray], num_layers: int) -> PyTree:
    """An official state dict as the collection `params`; ValueError names missing and left-over tensors."""
    table = wan_table(num_layers)
    missing, left = sorted(table.keys() - state.keys()), sorted(state.keys() - table.keys())
    if missing or left:
        raise ValueError(f"Wan state dict: missing {missing[:5]}, left over {left[:5]}")
    flat, stacked = {}, {}
    for official, (path, layer) in table.items():
        tensor = to_ours(path, np.asarray(state[official]))
        if layer is None:
            flat[path] = tensor
        else:
            stacked.setdefault(path, [None] * num_layers)[layer] = tensor
    flat |= {path: np.stack(layers) for path, layers in stacked.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")
