"""The weight map of Wan's transformer: where each tensor of a checkpoint goes in our variable tree.

Official names are those of Wan2.1, LongLive and MemFlow without wrappers and prefixes (see
`table.clean_name`). Our names are the paths of the collection `params`, where the layers of
`blocks` and `text_kv` are stacked on a leading axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kvpo_jax.convert.kind import Checkpoint, Kind
from kvpo_jax.convert.sources import read_configs
from kvpo_jax.convert.table import Shapes, Table, check_ranks, unchanged
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import WanConfig, abstract_variables
from kvpo_jax.types import PyTree

N = TypeVar("N", int, float)

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
# The Linears of a block, and the stack (see models/wan.py) that has each. LoRA adapts all of these
# and nothing else.
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
# The tensors that show the sizes, and how many axes each has.
_SIZED = {
    "patch_embedding.weight": 5,
    "head.head.weight": 2,
    "text_embedding.0.weight": 2,
    "time_embedding.0.weight": 2,
    "blocks.0.ffn.0.weight": 2,
}
# What a converted file says about its transformer; the other fields of WanConfig belong to a run.
SIZES = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "freq_dim",
    "text_dim",
    "text_len",
    "channels",
    "patch",
    "eps",
)

# Official module -> module of diffusers' WanTransformer3DModel, outside of the blocks and inside of
# one. The norm before the text attention is norm3 in one and norm2 in the other.
DIFFUSERS_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
DIFFUSERS_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# A module of a block with underscores, as musubi-tuner and OneTrainer write it -> official module.
_UNDERSCORED = {
    theirs.replace(".", "_"): official
    for official, name in DIFFUSERS_BLOCK.items()
    for theirs in (official, name)
}
_OFFICIAL_TOP = {theirs: official for official, theirs in DIFFUSERS_TOP.items()}
_OFFICIAL_BLOCK = {theirs: official for official, theirs in DIFFUSERS_BLOCK.items()}


# ---------------------------------------------------------------- names


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """`name` with its module replaced, by `block` inside of a block; KeyError if it is unknown."""
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)((\.lora_[AB])?\.(weight|bias))?", name)
    if match is None:
        raise KeyError(name)
    prefix, module, suffix, *_ = match.groups("")
    return prefix + (block if prefix else top)[module] + suffix


def diffusers_name(name: str) -> str:
    """diffusers' name for an official tensor of the transformer or of its LoRA."""
    return _rename(name, DIFFUSERS_TOP, DIFFUSERS_BLOCK)


def official_name(name: str) -> str:
    """The official name of a tensor of diffusers' WanTransformer3DModel, or of its LoRA.

    Raises:
      UsageError: the model has no such tensor.
    """
    try:
        return _rename(name, _OFFICIAL_TOP, _OFFICIAL_BLOCK)
    except KeyError:
        raise UsageError(f"{name} is not a tensor of diffusers' WanTransformer3DModel") from None


def _official_of_underscored(name: str) -> str:
    """The official name of a LoRA's tensor that is called like blocks_0_self_attn_q.alpha."""
    match = re.fullmatch(r"blocks_(\d+)_(\w+)\.(.+)", name)
    if match is None or match[2] not in _UNDERSCORED:
        raise UsageError(f"{name} is not a tensor of a LoRA of Wan's blocks")
    return f"blocks.{match[1]}.{_UNDERSCORED[match[2]]}.{match[3]}"


def official_names(names: Collection[str]) -> Callable[[str], str]:
    """(cleaned name -> official name), for a transformer or LoRA whose tensors have these names."""
    if any(name.startswith("blocks_") for name in names):
        return _official_of_underscored
    diffusers = any(re.search(r"^condition_embedder\.|\.attn[12]\.", name) for name in names)
    return official_name if diffusers else unchanged


def layer_count(names: Collection[str]) -> int:
    """How many blocks there are, by the official names of their tensors."""
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


# ---------------------------------------------------------------- tensors


def wan_table(num_layers: int) -> Table:
    """The map of every tensor of the transformer."""
    table: Table = {
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
    """An official tensor of the transformer, or of its LoRA, in the layout of our `path`."""
    if path.endswith("kernel"):
        # The patch embedding is a Conv3d, whose (c, pt, ph, pw) are flattened.
        return tensor.reshape(tensor.shape[0], -1).T
    if path.endswith("modulation"):
        return tensor[0]
    if path.endswith(("/a", "/b")):  # a LoRA's
        return tensor.T
    return tensor


def to_official(path: str, tensor: np.ndarray, patch: Sequence[int] = (1, 2, 2)) -> np.ndarray:
    """The inverse of `to_ours`: one layer of our `path` in the official layout."""
    if path == "patch_embedding/kernel":
        return tensor.T.reshape(tensor.shape[1], -1, *patch)
    if path.endswith("modulation"):
        return tensor[None]
    return tensor.T if path.endswith(("kernel", "/a", "/b")) else tensor


# ---------------------------------------------------------------- config


def config_from_shapes(
    shapes: Shapes, num_heads: int | None = None, text_len: int = 512, eps: float = 1e-6
) -> WanConfig:
    """The config of the transformer whose tensors, by official name, have these shapes.

    Args:
      shapes: official name -> shape.
      num_heads: attention heads, which no shape shows; None is a head dim of 128, as in every
        published Wan.
      text_len: tokens that prompts are padded to, which no shape shows; 512 in every published Wan.
      eps: of the norms, which no shape shows; 1e-6 in every published Wan.

    Raises:
      UsageError: a tensor is missing, or the sizes are not those of a text-to-video Wan.
    """
    check_ranks("Wan transformer", shapes, _SIZED)
    dim, channels, *patch = shapes["patch_embedding.weight"]
    out, _ = shapes["head.head.weight"]
    _, text_dim = shapes["text_embedding.0.weight"]
    _, freq_dim = shapes["time_embedding.0.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.weight"]
    if out != channels * int(np.prod(patch)):
        raise UsageError(
            f"{channels} channels in, {out // np.prod(patch)} out: not a text-to-video Wan; bring"
            " one that takes no picture or video"
        )
    if channels == 48:
        raise UsageError(
            "48 channels: a Wan2.2 of 5B, whose VAE is of another design; bring a Wan2.1,"
            " of 1.3B or 14B, or a model that was made of it"
        )
    if dim % (num_heads or 128):
        heads = f"{num_heads} heads" if num_heads else "heads of 128 channels"
        raise UsageError(
            f"a width of {dim} is not made of {heads}; say how many it has with --num_heads"
        )
    frames, height, width = patch
    return WanConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads or dim // 128,
        num_layers=layer_count(shapes),
        freq_dim=freq_dim,
        text_dim=text_dim,
        text_len=text_len,
        channels=channels,
        patch=(frames, height, width),
        eps=eps,
    )


def config_from_checkpoint(checkpoint: Checkpoint) -> WanConfig:
    """The transformer's config. The user or a config.json says what no shape shows."""
    stated, options = read_configs(checkpoint.files), checkpoint.options
    heads = options.num_heads or _stated(stated, int, "num_heads", "num_attention_heads")
    text_len = options.text_len or _stated(stated, int, "text_len") or 512
    eps = _stated(stated, float, "eps") or 1e-6
    return config_from_shapes(checkpoint.shapes, heads, text_len, eps)


def _stated(stated: Mapping[str, Any], kind: type[N], *names: str) -> N | None:
    """The first of these numbers that a config.json states; UsageError if it is none."""
    for name in names:
        if (value := stated.get(name)) is not None:
            if type(value) is not kind or value <= 0:
                raise UsageError(
                    f"the config.json beside it says {name}={value!r}: expected a positive"
                    f" {kind.__name__}"
                )
            return value
    return None


def abstract_params(cfg: WanConfig) -> PyTree:
    """Shapes and dtypes of the collection `params`."""
    return abstract_variables(cfg)["params"]


def _table(cfg: WanConfig) -> Table:
    return wan_table(cfg.num_layers)


WAN = Kind(
    mark=r"^patch_embedding\.weight$",
    official=official_names,
    config=config_from_checkpoint,
    table=_table,
    to_ours=to_ours,
    abstract=abstract_params,
    sizes=SIZES,
    folder="transformer",
)
