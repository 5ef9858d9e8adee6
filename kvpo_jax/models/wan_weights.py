"""Where each tensor of a Wan checkpoint or of a LoRA of it goes in our variable tree: tables, no code per tensor.

Official names are those of Wan2.1, LongLive and MemFlow once wrappers and prefixes are stripped (`clean_name`); of a
LoRA, peft's names of the same modules. Ours are the paths of the collections `params` and `lora`, with the layers of
`blocks` and `text_kv` stacked on a leading axis. A table is official name -> (our path, layer or None if not stacked).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from kvpo_jax.models.wan import WanConfig, init_variables
from kvpo_jax.types import PyTree

Table = dict[str, tuple[str, int | None]]
Shapes = Mapping[str, tuple[int, ...]]

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
# Linears of a block, with the stack (see wan.py) that they live in. LoRA adapts these and no others.
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
_LORA = {"lora_A.weight": "a", "lora_B.weight": "b"}
# Tensors that tell the sizes, with their numbers of axes.
_SIZED = {
    "patch_embedding.weight": 5, "head.head.weight": 2, "text_embedding.0.weight": 2, "time_embedding.0.weight": 2,
    "blocks.0.ffn.0.weight": 2,
}  # fmt: skip
_LORA_SIZED = {"blocks.0.self_attn.q.lora_A.weight": 2, "blocks.0.ffn.0.lora_B.weight": 2}

# Official module -> module of diffusers' WanTransformer3DModel, outside of the blocks and inside of one. The norm
# before the text attention is norm3 in one and norm2 in the other.
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
_DIFFUSERS_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"
}  # fmt: skip
DIFFUSERS_BLOCK = {
    **{f"self_attn.{official}": f"attn1.{theirs}" for official, theirs in _DIFFUSERS_ATTENTION.items()},
    **{f"cross_attn.{official}": f"attn2.{theirs}" for official, theirs in _DIFFUSERS_ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}

# What training frameworks add to names: FSDP, activation checkpointing, torch.compile, peft in memory.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.", "default.")
# What a state dict's names may begin with: LongLive's wrapper, peft, ComfyUI, diffusers' pipelines.
_PREFIXES = ("model.", "base_model.model.", "diffusion_model.", "transformer.")
# The state dicts of a .pt checkpoint by policy, the first that is there. KVPO looks for a generator in this order.
PARTS = {
    "online": ("generator_lora", "generator", "generator_ema", "model"),
    "ema": ("ema", "generator_ema"),
    "initial": ("initial_generator_lora", "initial_generator"),
}


# ---------------------------------------------------------------- names


def clean_name(name: str) -> str:
    """A tensor's name without wrappers and prefixes, and with peft's lora_A and lora_B for ComfyUI's down and up."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """`name` with its module, of a block or not, as the dicts have it; KeyError for one that they do not have."""
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)((\.lora_[AB])?\.(weight|bias))?", name)
    prefix, module, suffix, *_ = match.groups("")
    return prefix + (block if prefix else top)[module] + suffix


def diffusers_name(name: str) -> str:
    """diffusers' name of an official tensor of the transformer or of a LoRA."""
    return _renamed(name, DIFFUSERS_TOP, DIFFUSERS_BLOCK)


def official_name(name: str) -> str:
    """The official name of a tensor of diffusers' WanTransformer3DModel or of a LoRA of it; ValueError for no such."""
    inverse = lambda names: {theirs: official for official, theirs in names.items()}
    try:
        return _renamed(name, inverse(DIFFUSERS_TOP), inverse(DIFFUSERS_BLOCK))
    except KeyError:
        raise ValueError(f"{name} is no tensor of diffusers' WanTransformer3DModel") from None


def official_names(names: Collection[str]) -> Callable[[str], str]:
    """What gives a cleaned name its official one, in a transformer or LoRA of these names, official or diffusers'."""
    theirs = any(re.search(r"^condition_embedder\.|\.attn[12]\.", name) for name in names)
    return official_name if theirs else lambda name: name


def part_of(checkpoint: Mapping[str, Any], policy: str) -> str | None:
    """The key of the state dict of `policy` in a .pt checkpoint, None if the checkpoint is a state dict itself.

    Raises:
      ValueError: there is none of this policy; says what there is.
    """
    known = {name for names in PARTS.values() for name in names} & checkpoint.keys()
    if not known:
        return None
    part = next((name for name in PARTS[policy] if name in known), None)
    if part is None:
        raise ValueError(f"no {' or '.join(PARTS[policy])} for the policy {policy!r}, only {', '.join(sorted(known))}")
    return part


# ---------------------------------------------------------------- transformer


def wan_table(num_layers: int) -> Table:
    """Every tensor of the transformer."""
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
    if path.endswith(("/a", "/b")):  # of LoRA
        return tensor.T
    return tensor


def to_official(path: str, tensor: np.ndarray, patch: Sequence[int] = (1, 2, 2)) -> np.ndarray:
    """The inverse of `to_ours`: one layer of our `path` in the official layout."""
    if path == "patch_embedding/kernel":
        return tensor.T.reshape(tensor.shape[1], -1, *patch)
    if path.endswith("modulation"):
        return tensor[None]
    return tensor.T if path.endswith(("kernel", "/a", "/b")) else tensor


def from_official(state: Mapping[str, np.ndarray], num_layers: int) -> PyTree:
    """An official state dict as the collection `params`; ValueError names missing and left-over tensors."""
    return stacked("Wan state dict", state, wan_table(num_layers))


def stacked(where: str, state: Mapping[str, np.ndarray], table: Table) -> PyTree:
    """The tensors of an official state dict as a tree; ValueError names missing and left-over ones, and `where`."""
    check_names(where, state, table)
    layers: dict[str, list[np.ndarray]] = {}
    flat = {}
    for official, (path, layer) in table.items():
        tensor = to_ours(path, np.asarray(state[official]))
        if layer is None:
            flat[path] = tensor
        else:
            layers.setdefault(path, []).append(tensor)
    flat |= {path: np.stack(tensors) for path, tensors in layers.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def check_names(where: str, state: Mapping[str, Any], table: Table) -> None:
    """ValueError unless `state` has the tensors of the table and no others."""
    missing, left = sorted(table.keys() - state.keys()), sorted(state.keys() - table.keys())
    if missing or left:
        raise ValueError(f"{where}: missing {missing[:5]}, left over {left[:5]}")


def layer_count(names: Mapping[str, Any]) -> int:
    """Layers of the blocks that the official names speak of."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def check_ranks(what: str, shapes: Shapes, ranks: Mapping[str, int]) -> None:
    """ValueError unless the tensors that tell the sizes are there and have so many axes."""
    for name, rank in ranks.items():
        if name not in shapes:
            raise ValueError(f"not the tensors of a {what}: {name} is missing")
        if len(shapes[name]) != rank:
            raise ValueError(f"{name} has the shape {list(shapes[name])}, expected {rank} axes")


def config_from_shapes(shapes: Shapes, num_heads: int | None = None, text_len: int = 512) -> WanConfig:
    """The config of the transformer whose tensors, by official name, have these shapes.

    Args:
      shapes: official name -> shape.
      num_heads: shows in no shape; None is a head dim of 128, that of every published Wan.
      text_len: shows in no shape; 512 is that of every published Wan.

    Raises:
      ValueError: a tensor is missing, or the sizes are not those of a text-to-video Wan.
    """
    check_ranks("Wan transformer", shapes, _SIZED)
    dim, channels, *patch = shapes["patch_embedding.weight"]
    out, _ = shapes["head.head.weight"]
    _, text_dim = shapes["text_embedding.0.weight"]
    _, freq_dim = shapes["time_embedding.0.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.weight"]
    if out != channels * int(np.prod(patch)):
        raise ValueError(f"{channels} channels in, {out // np.prod(patch)} out: not a text-to-video Wan")
    if dim % (num_heads or 128):
        heads = f"{num_heads} heads" if num_heads else "heads of 128 channels"
        raise ValueError(f"a width of {dim} is not made of {heads}; say how many it has with --num_heads")
    return WanConfig(
        dim=dim, ffn_dim=ffn_dim, num_heads=num_heads or dim // 128, num_layers=layer_count(shapes), freq_dim=freq_dim,
        text_dim=text_dim, text_len=text_len, channels=channels, patch=tuple(patch),
    )  # fmt: skip


# What a converted file says of its transformer; the other fields of WanConfig belong to a run.
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "channels", "patch")


# ---------------------------------------------------------------- LoRA


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Sizes of a LoRA of every Linear in the blocks.

    Attributes:
      dim, ffn_dim, num_layers: of the transformer.
      rank: r.
      alpha: the update of a Linear is alpha / rank * B A.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    rank: int
    alpha: float


def lora_table(num_layers: int) -> Table:
    """Every tensor of a LoRA, by peft's name below the model: "blocks.0.self_attn.q.lora_A.weight"."""
    return {
        f"blocks.{layer}.{official}.{theirs}": (f"{ours}/{name}", layer)
        for layer in range(num_layers)
        for official, ours in BLOCK_LINEARS.items()
        for theirs, name in _LORA.items()
    }


def lora_config_from_shapes(shapes: Shapes, alpha: float | None = None) -> LoRAConfig:
    """The config of the LoRA whose tensors, by official name, have these shapes; alpha is upstream's, rank, if None."""
    check_ranks("LoRA of every Linear of the blocks", shapes, _LORA_SIZED)
    rank, dim = shapes["blocks.0.self_attn.q.lora_A.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.lora_B.weight"]
    return LoRAConfig(dim, ffn_dim, layer_count(shapes), rank, float(rank if alpha is None else alpha))


# Who reads a LoRA file -> how the names of its tensors are made of the official ones.
LORA_NAMES = {
    "peft": "base_model.model.{}".format,
    "diffusers": lambda name: f"transformer.{diffusers_name(name)}",
    "comfyui": lambda name: "diffusion_model." + name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
}


def abstract_params(cfg: WanConfig) -> PyTree:
    """Shapes and dtypes of the collection `params`: what `checkpoint.load_weights` loads a file like."""
    return jax.eval_shape(lambda: init_variables(cfg, jax.random.key(0)))["params"]


def abstract_lora(cfg: LoRAConfig) -> PyTree:
    """Shapes and dtypes of the collection `lora`. The sizes of the transformer that a LoRA does not see are 2."""
    wan = WanConfig(
        dim=cfg.dim, ffn_dim=cfg.ffn_dim, num_heads=1, num_layers=cfg.num_layers, freq_dim=2, text_dim=2, text_len=2,
        channels=2, lora_rank=cfg.rank, lora_alpha=cfg.alpha,
    )  # fmt: skip
    return jax.eval_shape(lambda: init_variables(wan, jax.random.key(0)))["lora"]
