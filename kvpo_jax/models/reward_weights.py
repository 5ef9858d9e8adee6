"""Where each tensor of HPSv3 and of VideoAlign goes in our variable tree, and what their configs say; see
wan_weights.py.

Official names are those of the Qwen2-VL folders (see qwen2_vl_weights.py) and `rm_head.*`. VideoAlign's language model
is a peft LoRA of Qwen2-VL's, which is merged here, in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvpo_jax.models import qwen2_vl_weights
from kvpo_jax.models.qwen2_vl import Qwen2VLConfig
from kvpo_jax.models.reward_model import (
    HPSV3_PIXELS,
    HPSV3_TOKENS,
    VIDEO_MIN_PIXELS,
    VIDEOALIGN_TOKENS,
    RewardConfig,
    VideoAlignConfig,
)
from kvpo_jax.models.wan_weights import Shapes, Table, check_ranks

# The Linears of a head by their number; between HPSv3's are ReLU and dropout.
_HEADS = {1: ("rm_head",), 3: ("rm_head.0", "rm_head.3", "rm_head.5")}
PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}  # field of the config -> token
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")


def reward_table(cfg: RewardConfig) -> Table:
    """official name -> (our path, layer or None if not stacked), for every tensor but the language head."""
    backbone = qwen2_vl_weights.qwen2_vl_table(cfg)
    table: Table = {official: (f"backbone/{ours}", layer) for official, (ours, layer) in backbone.items()}
    for i, module in enumerate(_HEADS[len(cfg.head)]):
        for theirs, name in {"weight": "kernel", **({"bias": "bias"} if cfg.head_bias else {})}.items():
            table[f"{module}.{theirs}"] = (f"head/fc{i + 1}/{name}", None)
    return table


def official_name(name: str) -> str:
    """The official name of a tensor of the backbone or the head; ValueError for one that is of neither."""
    bare = name.removeprefix("model.")
    return bare if bare.startswith("rm_head.") else qwen2_vl_weights.official_name(name)


# ---------------------------------------------------------------- LoRA


def split_lora(name: str) -> tuple[str, str | None]:
    """The official name of the weight that a cleaned name speaks of, and "A" or "B" if it is that part of its LoRA."""
    lora = _LORA.fullmatch(name)
    return (official_name(f"{lora[1]}.weight"), lora[2]) if lora else (official_name(name), None)


def merge_lora(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """weight + scale * b a, in float32, of a Linear's weight [out, in], a [rank, in] and b [out, rank]."""
    weight, a, b = (x.astype(np.float32) for x in (weight, a, b))
    return weight + np.float32(scale) * (b @ a)


def lora_scale(said: Mapping[str, Any], rank: int) -> float:
    """What the product of a LoRA of this rank is multiplied by.

    Args:
      said: peft_lora_config of VideoAlign's model_config.json, or peft's adapter_config.json.
      rank: as the tensors have it.

    Raises:
      ValueError: it says another rank, or a kind of LoRA that is not merged here.
    """
    stated, alpha = said.get("r", said.get("lora_r")), said.get("lora_alpha")
    if stated != rank or alpha is None:
        raise ValueError(f"a LoRA of rank {rank} is stated to have rank {stated} and alpha {alpha}")
    for name in ("use_dora", "rank_pattern", "alpha_pattern"):
        if said.get(name):
            raise ValueError(f"{name} of a LoRA is not supported")
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


# ---------------------------------------------------------------- configs


def _backbone(shapes: Shapes, base: Mapping[str, Any], ids: Mapping[str, int]) -> Qwen2VLConfig:
    text = base.get("text_config", base)
    cfg = qwen2_vl_weights.config_from_shapes(
        {name: shape for name, shape in shapes.items() if not name.startswith("rm_head.")},
        text.get("num_attention_heads"), base.get("vision_config", {}).get("num_heads"),
    )  # fmt: skip
    if max(ids.values()) >= cfg.text.vocab:
        raise ValueError(
            f"the tokenizer has the ids {dict(ids)} and the checkpoint embeddings of {cfg.text.vocab} tokens: the "
            "tokenizer is of another model"
        )
    return dataclasses.replace(cfg, **{field: ids[token] for field, token in PADS.items()})


def _fields(cfg: Qwen2VLConfig) -> dict[str, Any]:
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}


def hpsv3_config(shapes: Shapes, base: Mapping[str, Any], ids: Mapping[str, int], template: str) -> RewardConfig:
    """The config of the HPSv3 whose tensors, by official name, have these shapes.

    Args:
      shapes: official name -> shape.
      base: config.json of the Qwen2-VL that it was made of, for its numbers of heads; may be empty.
      ids: of the reward token and the pad tokens, in its tokenizer.
      template: see RewardConfig.
    """
    check_ranks("HPSv3", shapes, {f"{module}.weight": 2 for module in _HEADS[3]})
    return RewardConfig(
        **_fields(_backbone(shapes, base, ids)),
        head=tuple(shapes[f"{module}.weight"][0] for module in _HEADS[3]), head_bias=True, tokens=HPSV3_TOKENS,
        token_ids=tuple(ids[token] for token in HPSV3_TOKENS), template=template, min_pixels=HPSV3_PIXELS,
        max_pixels=HPSV3_PIXELS,
    )  # fmt: skip


def videoalign_config(
    shapes: Shapes, base: Mapping[str, Any], ids: Mapping[str, int], template: str, said: Mapping[str, Any]
) -> VideoAlignConfig:
    """The config of the VideoAlign whose tensors, by official name, have these shapes.

    Args:
      shapes, base, ids, template: see `hpsv3_config`.
      said: model_config.json of the checkpoint.

    Raises:
      ValueError: it does not say what a score needs, or was trained with another kind of instruction.
    """
    check_ranks("VideoAlign", shapes, {"rm_head.weight": 2})
    try:
        data, model, inference = (said[name] for name in ("data_config", "model_config", "inference_config"))
        asked = data["prompt_template_type"], model["reward_token"], bool(model["use_special_tokens"])
        names = [token.removeprefix("<|").split("_")[0] for token in VIDEOALIGN_TOKENS]
        mean, std = (tuple(float(inference[f"{name}_{what}"]) for name in names) for what in ("mean", "std"))
        sampling = {"sample_type": data["sample_type"], "fps": data["fps"], "num_frames": data["num_frames"]}
        max_pixels = data["max_frame_pixels"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"model_config.json does not say {error}, which VideoAlign's scores depend on") from error
    if asked != ("detailed_special", "special", True) or shapes["rm_head.weight"][0] != len(VIDEOALIGN_TOKENS):
        raise ValueError(
            f"prompt_template_type, reward_token and use_special_tokens are {asked} and the head's outputs "
            f"{shapes['rm_head.weight'][0]}; only VideoReward's 'detailed_special', 'special', True and 3 are known"
        )
    return VideoAlignConfig(
        **_fields(_backbone(shapes, base, ids)),
        head=(len(VIDEOALIGN_TOKENS),), head_bias=False, tokens=VIDEOALIGN_TOKENS,
        token_ids=tuple(ids[token] for token in VIDEOALIGN_TOKENS), template=template, min_pixels=VIDEO_MIN_PIXELS,
        max_pixels=max_pixels, mean=mean, std=std, **sampling,
    )  # fmt: skip
