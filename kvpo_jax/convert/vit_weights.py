"""The weight maps of CLIP, DINO, DINOv2 and LAION's aesthetic head.

Official names are those of their authors' files (`ViT-B-32.pt`, `dino_vitbase16_pretrain.pth`,
`sa_0_4_vit_l_14_linear.pth`), with queries, keys and values apart and every projection a Linear,
as transformers has them. The name of CLIP's text tower, `transformer.`, is cut off as a wrapper's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvpo_jax.convert.kind import Checkpoint, Kind, Options
from kvpo_jax.convert.sources import find_files, read_configs, read_json
from kvpo_jax.convert.table import Shapes, Table, check_ranks, clean_name, count_layers
from kvpo_jax.convert.tensors import Tensor, read, unique
from kvpo_jax.errors import UsageError
from kvpo_jax.models.vit import (
    ACTIVATIONS,
    AestheticConfig,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    ViTConfig,
    abstract_params,
)
from kvpo_jax.rewards.clip import TOKENIZER_FILES

_HEAD_DIM = 64  # of every published CLIP and DINO
_CLIP_IMAGE = {
    "visual.class_embedding": "vision/class_token",
    "visual.positional_embedding": "vision/positions",
    "visual.conv1.weight": "vision/patch_embed/kernel",
    "visual.ln_pre.weight": "vision/pre_norm/scale",
    "visual.ln_pre.bias": "vision/pre_norm/bias",
    "visual.ln_post.weight": "vision/norm/scale",
    "visual.ln_post.bias": "vision/norm/bias",
    "visual.proj.weight": "vision/projection/kernel",
}
_CLIP_TEXT = {
    "token_embedding.weight": "text/tokens/embedding",
    "positional_embedding": "text/positions",
    "ln_final.weight": "text/norm/scale",
    "ln_final.bias": "text/norm/bias",
    "text_projection.weight": "text/projection/kernel",
}
_DINO = {
    "cls_token": "vision/class_token",
    "pos_embed": "vision/positions",
    "patch_embed.proj.weight": "vision/patch_embed/kernel",
    "patch_embed.proj.bias": "vision/patch_embed/bias",
    "norm.weight": "vision/norm/scale",
    "norm.bias": "vision/norm/bias",
}
# Module of a block -> ours, in CLIP and in DINO.
_CLIP_BLOCK = {
    "ln_1": "norm1",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.out_proj": "o",
    "ln_2": "norm2",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
_DINO_BLOCK = {
    "norm1": "norm1",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.proj": "o",
    "norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
# Names of transformers, and of OpenAI's projections, which are no Linears -> official ones. What
# stands between the first and the last of these is a layer's.
_HF_CLIP = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.", "visual.proj."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "resblocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_HF_DINO = (
    (r"^(vit|dinov2|backbone)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.attention\.(q)uery\.", r".attn.\1."),
    (r"\.attention\.attention\.(k)ey\.", r".attn.\1."),
    (r"\.attention\.attention\.(v)alue\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before)\.", ".norm1."),
    (r"\.(layernorm_after)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


# ---------------------------------------------------------------- names


def _renamed(patterns: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, official in patterns:
        name = re.sub(pattern, official, name)
    return name


def clip_names(shapes: Shapes) -> Callable[[str], str]:
    """(cleaned name -> official name), for a CLIP of OpenAI, open_clip or transformers."""
    return functools.partial(_renamed, _HF_CLIP)


def dino_names(shapes: Shapes) -> Callable[[str], str]:
    """(cleaned name -> official name), for a DINO of its authors, timm or transformers."""
    return functools.partial(_renamed, _HF_DINO)


def apart(tensors: dict[str, Tensor], options: Options) -> tuple[dict[str, Tensor], Options]:
    """The tensors with queries, keys and values apart and projections as Linears; options stay."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused = re.fullmatch(r"(.*\battn\.)(?:qkv\.|in_proj_)(weight|bias)", name)
        if fused and len(tensor.array) % 3 == 0:
            for part, rows in zip("qkv", np.split(tensor.array, 3), strict=True):
                of = f"{tensor.name}, its {part}"
                out[f"{fused[1]}{part}.{fused[2]}"] = dataclasses.replace(
                    tensor, name=of, array=rows
                )
        elif name in ("visual.proj", "text_projection"):
            out[f"{name}.weight"] = dataclasses.replace(tensor, array=tensor.array.T)
        else:
            out[name] = tensor
    return out, options


def _blocks(prefix: str, ours: str, block: Mapping[str, str], layers: int) -> Table:
    """The map of the blocks of a stack."""
    table: Table = {}
    for layer in range(layers):
        for module, name in block.items():
            weight = "scale" if name.startswith("norm") else "kernel"
            for theirs, leaf in (("weight", weight), ("bias", "bias")):
                table[f"{prefix}.{layer}.{module}.{theirs}"] = (f"{ours}/{name}/{leaf}", layer)
    return table


def _flat(table: Mapping[str, str]) -> Table:
    return {official: (ours, None) for official, ours in table.items()}


def _image_table(cfg: VisionConfig) -> Table:
    """The map of CLIP's image tower."""
    prefix = "visual.transformer.resblocks"
    return _flat(_CLIP_IMAGE) | _blocks(prefix, "vision/blocks", _CLIP_BLOCK, cfg.layers)


def clip_table(cfg: CLIPConfig) -> Table:
    """The map of every tensor of a CLIP but its logit_scale."""
    text = _flat(_CLIP_TEXT) | _blocks("resblocks", "text/blocks", _CLIP_BLOCK, cfg.text.layers)
    return _image_table(cfg.vision) | text


def dino_table(cfg: ViTConfig) -> Table:
    """The map of every tensor of a DINO or DINOv2 but its mask token."""
    layers = cfg.vision.layers
    table = _flat(_DINO) | _blocks("blocks", "vision/blocks", _DINO_BLOCK, layers)
    if cfg.vision.layer_scale:
        for layer in range(layers):
            for i in (1, 2):
                table[f"blocks.{layer}.ls{i}.gamma"] = (f"vision/blocks/scale{i}", layer)
    return table


def _head_modules(shapes: Shapes) -> list[str]:
    """The Linears of LAION's head in order; between them are dropouts, which have no tensors."""
    numbers = (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in shapes)
    found = sorted(int(match[1]) for match in numbers if match)
    return [f"layers.{number}." for number in found] or [""]


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`."""
    if path.endswith("kernel"):  # the patches' is a Conv2d, whose (c, y, x) are flattened
        return tensor.reshape(len(tensor), -1).T
    if path == "vision/positions":  # DINO's have an axis of one batch
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(-1) if path == "vision/class_token" else tensor


# ---------------------------------------------------------------- configs


def _heads(what: str, dim: int, stated: Mapping[str, Any], given: int | None = None) -> int:
    """Attention heads: what a config.json or the user says, or else heads of 64 channels."""
    heads = int(given or stated.get("num_attention_heads") or dim // _HEAD_DIM)
    if not heads or dim % heads:
        raise UsageError(
            f"a {what} of width {dim} is not made of {heads} heads; bring its config.json with"
            " num_attention_heads"
        )
    return heads


def _activation(stated: Mapping[str, Any], default: str) -> str:
    """The activation that a config.json states."""
    name = stated.get("hidden_act") or default
    if name not in ACTIVATIONS:
        raise UsageError(f"hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return str(name)


def _eps(stated: Mapping[str, Any], default: float) -> float:
    return float(stated.get("layer_norm_eps") or default)


def _side(positions: int) -> int:
    """Patches along the side of a square with so many positions, one of them the class token's."""
    side = math.isqrt(max(positions - 1, 0))
    if not side or side**2 + 1 != positions:
        raise UsageError(f"{positions} positions are not those of a square of patches and a class")
    return side


def _clip_stated(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What the JSON files beside a CLIP say about its two towers, by "vision" and "text".

    That of transformers states all; open_clip's, whether the activation is OpenAI's.
    """
    files = list(files)
    config = read_configs(files)
    stated = {name: dict(config.get(f"{name}_config") or {}) for name in ("vision", "text")}
    for file in files:
        model = read_json(file.with_name("open_clip_config.json")).get("model_cfg")
        if model is not None:
            quick = "quick_gelu" if model.get("quick_gelu") else "gelu"
            stated = {name: {"hidden_act": quick} | of for name, of in stated.items()}
    return stated


_IMAGE_SIZED = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "visual.proj.weight": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
}
_TEXT_SIZED = {
    "token_embedding.weight": 2,
    "positional_embedding": 2,
    "text_projection.weight": 2,
    "resblocks.0.mlp.c_fc.weight": 2,
}
_DINO_SIZED = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}


def _clip_image(shapes: Shapes, stated: Mapping[str, Any]) -> VisionConfig:
    """The sizes of CLIP's image tower."""
    check_ranks("CLIP", shapes, _IMAGE_SIZED)
    dim, _, patch, _ = shapes["visual.conv1.weight"]
    return VisionConfig(
        dim,
        shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        _heads("CLIP image tower", dim, stated),
        count_layers(shapes, r"visual\.transformer\.resblocks\.\d+\.mlp\.c_fc\.weight"),
        _activation(stated, "quick_gelu"),
        _eps(stated, 1e-5),
        patch=patch,
        side=_side(shapes["visual.positional_embedding"][0]),
        projection=shapes["visual.proj.weight"][0],
        pre_norm=True,
    )


def clip_config(checkpoint: Checkpoint) -> CLIPConfig:
    """The config of a CLIP, whose tokenizer must be at hand.

    Raises:
      UsageError: a tensor is missing, sizes do not fit, or there is no tokenizer.
    """
    shapes, stated = checkpoint.shapes, _clip_stated(checkpoint.files)
    vision = _clip_image(shapes, stated["vision"])
    check_ranks("CLIP with a text tower", shapes, _TEXT_SIZED)
    vocab, dim = shapes["token_embedding.weight"]
    text = TextConfig(
        dim,
        shapes["resblocks.0.mlp.c_fc.weight"][0],
        _heads("CLIP text tower", dim, stated["text"]),
        count_layers(shapes, r"resblocks\.\d+\.mlp\.c_fc\.weight"),
        _activation(stated["text"], "quick_gelu"),
        _eps(stated["text"], 1e-5),
        vocab=vocab,
        context=shapes["positional_embedding"][0],
        projection=shapes["text_projection.weight"][0],
    )
    folder = checkpoint.options.base or checkpoint.files[0].parent
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"CLIP's tokenizer ({' or '.join(TOKENIZER_FILES)}) is not in {folder}: name its"
            " folder with --base, such as that of openai/clip-vit-base-patch32"
        )
    return CLIPConfig(vision, text=text)


def dino_config(checkpoint: Checkpoint) -> ViTConfig:
    """The config of a DINO or DINOv2."""
    shapes, stated = checkpoint.shapes, read_configs(checkpoint.files)
    check_ranks("DINO", shapes, _DINO_SIZED)
    dim, _, patch, _ = shapes["patch_embed.proj.weight"]
    vision = VisionConfig(
        dim,
        shapes["blocks.0.mlp.fc1.weight"][0],
        _heads("DINO", dim, stated, checkpoint.options.num_heads),
        count_layers(shapes, r"blocks\.\d+\.mlp\.fc1\.weight"),
        _activation(stated, "gelu"),
        _eps(stated, 1e-6),
        layer_scale="blocks.0.ls1.gamma" in shapes,
        patch=patch,
        side=_side(shapes["pos_embed"][1]),
    )
    return ViTConfig(vision)


# ---------------------------------------------------------------- the aesthetic head


def with_clip(tensors: dict[str, Tensor], options: Options) -> tuple[dict[str, Tensor], Options]:
    """LAION's head with the image tower of the CLIP that the user names; the options stay."""
    if options.base is None:
        raise UsageError(
            "LAION's head reads the embeddings of CLIP ViT-L/14: name its file or folder with"
            " --base"
        )
    read_names = ((clean_name(t.name), t) for t in _base_tensors(options.base))
    named, _ = apart(dict(unique(read_names)), options)
    official = ((_renamed(_HF_CLIP, name), t) for name, t in named.items())
    image = {name: t for name, t in unique(official).items() if name.startswith("visual.")}
    return tensors | image, options


def _base_tensors(base: Path) -> Iterable[Tensor]:
    return (tensor for file in find_files(base) for tensor in read(file))


def aesthetic_config(checkpoint: Checkpoint) -> AestheticConfig:
    """The config of CLIP's image tower with LAION's head."""
    shapes, base = checkpoint.shapes, checkpoint.options.base
    assert base is not None, "checked by `with_clip`"
    modules = _head_modules(shapes)
    check_ranks("LAION head", shapes, {f"{module}weight": 2 for module in modules})
    widths = tuple(shapes[f"{module}weight"][0] for module in modules)
    vision = _clip_image(shapes, _clip_stated(find_files(base))["vision"])
    takes = shapes[f"{modules[0]}weight"][1]
    if takes != vision.projection or widths[-1] != 1:
        raise UsageError(
            f"the head takes {takes} numbers and makes {widths[-1]}; the embeddings of {base} have"
            f" {vision.projection}, and a score is one: they do not belong together"
        )
    return AestheticConfig(vision, head=widths)


def aesthetic_table(cfg: AestheticConfig) -> Table:
    """The map of the head and of CLIP's image tower."""
    # The published heads: one Linear, or five with a dropout behind each but the last two.
    last = len(cfg.head) - 1
    numbers = [*range(0, 2 * last, 2), 2 * last - 1]
    modules = [f"layers.{number}." for number in numbers] if last else [""]
    table = _image_table(cfg.vision)
    for i, module in enumerate(modules):
        for theirs, leaf in (("weight", "kernel"), ("bias", "bias")):
            table[f"{module}{theirs}"] = (f"head/fc{i + 1}/{leaf}", None)
    return table


CLIP = Kind(
    mark=r"^visual\.(class_embedding|conv1\.weight)$|^vision_model\.embeddings\.class_embedding$",
    official=clip_names,
    config=clip_config,
    table=clip_table,
    to_ours=to_ours,
    abstract=abstract_params,
    # The scale of the logits, and what OpenAI's and older files have beside the weights.
    aside=r"^(logit_scale|input_resolution|context_length|vocab_size)$|\b(attn_mask|position_ids)$",
    merge=apart,
    tokenizer=True,
)
DINO = Kind(
    mark=r"^((vit|dinov2)\.)?(embeddings\.)?cls_token$",
    official=dino_names,
    config=dino_config,
    table=dino_table,
    to_ours=to_ours,
    abstract=abstract_params,
    aside=r"(^|\.)mask_token$|^(pooler|head|classifier)\.",
    merge=apart,
)
AESTHETIC = Kind(
    mark=r"^weight$|^layers\.7\.weight$",
    official=clip_names,
    config=aesthetic_config,
    table=aesthetic_table,
    to_ours=to_ours,
    abstract=abstract_params,
    merge=with_clip,
)
