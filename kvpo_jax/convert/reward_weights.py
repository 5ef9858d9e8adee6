"""The weight maps of HPSv3 and VideoAlign, and what their configs say.

Official names are those of Qwen2-VL (see qwen2_vl_weights.py) and `rm_head.*`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpo_jax.convert import qwen2_vl_weights, templates
from kvpo_jax.convert.kind import Checkpoint, Kind, Options
from kvpo_jax.convert.reward_lora import Merged, is_lora, lora_scale, split_name
from kvpo_jax.convert.sources import find_files, read_json, read_videoreward_config
from kvpo_jax.convert.table import Shapes, Table, check_ranks, clean_name
from kvpo_jax.convert.tensors import Tensor, read, unique
from kvpo_jax.errors import UsageError
from kvpo_jax.models.qwen2_vl import Qwen2VLConfig
from kvpo_jax.models.reward_model import (
    HPSV3_PIXELS,
    HPSV3_TOKENS,
    PAD_TOKENS,
    VIDEO_MIN_PIXELS,
    VIDEOALIGN_TOKENS,
    RewardConfig,
    VideoAlignConfig,
    abstract_params,
)
from kvpo_jax.rewards import learned

# Number of Linears in a head -> their modules; between HPSv3's are ReLU and dropout.
_HEADS = {1: ("rm_head",), 3: ("rm_head.0", "rm_head.3", "rm_head.5")}
_LANGUAGE_HEAD = r"^lm_head\."


def reward_table(cfg: RewardConfig) -> Table:
    """The map of every tensor but the language head."""
    table: Table = {
        official: (f"backbone/{ours}", layer)
        for official, (ours, layer) in qwen2_vl_weights.qwen2_vl_table(cfg).items()
    }
    leaves = {"weight": "kernel"} | ({"bias": "bias"} if cfg.head_bias else {})
    for i, module in enumerate(_HEADS[len(cfg.head)]):
        for theirs, name in leaves.items():
            table[f"{module}.{theirs}"] = (f"head/fc{i + 1}/{name}", None)
    return table


def official_name(name: str) -> str:
    """The official name of a tensor; UsageError if neither the backbone nor the head has it."""
    bare = name.removeprefix("model.")
    return bare if bare.startswith("rm_head.") else qwen2_vl_weights.official_name(name)


def official_names(shapes: Shapes) -> Callable[[str], str]:
    """(cleaned name -> official name), for a reward model of any release."""
    return official_name


# ---------------------------------------------------------------- configs


@dataclasses.dataclass(frozen=True)
class Base:
    """What a reward model takes from the Qwen2-VL that it was made of, beside weights.

    Attributes:
      config: its config.json, for the numbers of heads; may be empty.
      ids: token -> id in its tokenizer, for the reward tokens and the pad tokens.
      instruction: where the reward model's instruction is.
    """

    config: Mapping[str, Any]
    ids: Mapping[str, int]
    instruction: Path


def _read_base(options: Options, tokens: tuple[str, ...]) -> Base:
    """The base that the user names, with these reward tokens."""
    if options.base is None:
        raise UsageError(
            "a reward model needs the folder of the Qwen2-VL that it was made of: name it with"
            " --base; see --help"
        )
    if options.templates is None:
        raise UsageError(
            "a reward model needs the file with its instruction: name it with --templates; see"
            " --help"
        )
    _, ids = learned.tokenizer(options.base, tokens)
    return Base(read_json(options.base / "config.json"), ids, options.templates)


def _backbone(shapes: Shapes, base: Base) -> dict[str, Any]:
    """The fields of the Qwen2-VL in a reward model."""
    text = base.config.get("text_config", base.config)
    cfg = qwen2_vl_weights.config_from_shapes(
        {name: shape for name, shape in shapes.items() if not name.startswith("rm_head.")},
        text.get("num_attention_heads"),
        base.config.get("vision_config", {}).get("num_heads"),
    )
    if max(base.ids.values()) >= cfg.text.vocab:
        raise UsageError(
            f"the tokenizer has the ids {dict(base.ids)} and the checkpoint embeddings of"
            f" {cfg.text.vocab} tokens: the tokenizer is another model's"
        )
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Qwen2VLConfig)}
    return fields | {field: base.ids[token] for field, token in PAD_TOKENS.items()}


def hpsv3_config(checkpoint: Checkpoint) -> RewardConfig:
    """The config of an HPSv3."""
    base, shapes = _read_base(checkpoint.options, HPSV3_TOKENS), checkpoint.shapes
    template = templates.hpsv3(base.instruction)
    check_ranks("HPSv3", shapes, {f"{module}.weight": 2 for module in _HEADS[3]})
    return RewardConfig(
        **_backbone(shapes, base),
        head=tuple(shapes[f"{module}.weight"][0] for module in _HEADS[3]),
        head_bias=True,
        tokens=HPSV3_TOKENS,
        token_ids=tuple(base.ids[token] for token in HPSV3_TOKENS),
        template=template,
        min_pixels=HPSV3_PIXELS,
        max_pixels=HPSV3_PIXELS,
    )


def videoalign_config(checkpoint: Checkpoint) -> VideoAlignConfig:
    """The config of a VideoAlign, for which its model_config.json says how clips are scored."""
    base, shapes = _read_base(checkpoint.options, VIDEOALIGN_TOKENS), checkpoint.shapes
    template = templates.videoalign(base.instruction)
    stated = read_videoreward_config(checkpoint.files)
    check_ranks("VideoAlign", shapes, {"rm_head.weight": 2})
    scoring, trained_with = _read_scoring(stated)
    outputs = shapes["rm_head.weight"][0]
    known = ("detailed_special", "special", True)
    if trained_with != known or outputs != len(VIDEOALIGN_TOKENS):
        raise UsageError(
            "prompt_template_type, reward_token and use_special_tokens are"
            f" {trained_with} and the head's outputs {outputs}; only VideoReward's"
            " 'detailed_special', 'special', True and 3 are known"
        )
    return VideoAlignConfig(
        **_backbone(shapes, base),
        head=(len(VIDEOALIGN_TOKENS),),
        head_bias=False,
        tokens=VIDEOALIGN_TOKENS,
        token_ids=tuple(base.ids[token] for token in VIDEOALIGN_TOKENS),
        template=template,
        min_pixels=VIDEO_MIN_PIXELS,
        **scoring,
    )


def _read_scoring(stated: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, str, bool]]:
    """(the fields of VideoAlignConfig, the instruction that it was trained with) that a
    model_config.json states.
    """
    names = [token.removeprefix("<|").split("_")[0] for token in VIDEOALIGN_TOKENS]
    try:
        data, model, inference = (
            stated[name] for name in ("data_config", "model_config", "inference_config")
        )
        trained_with = (
            data["prompt_template_type"],
            model["reward_token"],
            bool(model["use_special_tokens"]),
        )
        scoring = {
            "mean": tuple(float(inference[f"{name}_mean"]) for name in names),
            "std": tuple(float(inference[f"{name}_std"]) for name in names),
            "sample_type": data["sample_type"],
            "fps": data["fps"],
            "num_frames": data["num_frames"],
            "max_pixels": data["max_frame_pixels"],
        }
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"model_config.json does not say {error}, which VideoAlign's scores depend on"
        ) from error
    except ValueError as error:
        raise UsageError(f"inference_config of model_config.json: {error}") from error
    return scoring, trained_with


# ---------------------------------------------------------------- merging


def merge_videoalign(
    tensors: dict[str, Tensor], options: Options
) -> tuple[dict[str, Tensor], Options]:
    """VideoAlign's tensors by official name, with its LoRA merged; the options stay.

    A checkpoint of what was trained lacks the other weights, which come from the base model.
    """
    weights: dict[str, Tensor] = {}
    loras: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight_name, matrix = split_name(name)
        official = official_name(weight_name)
        if matrix:
            loras.setdefault(official, {})[matrix] = tensor
        else:
            weights[official] = tensor
    if loras.keys() - weights.keys() and options.base is not None:
        weights = _base_weights(options.base) | weights
    stated: dict[Path, list[Mapping[str, Any]]] = {}
    for official, lora in loras.items():
        if lora.keys() != {"A", "B"} or official not in weights:
            absent = ", ".join(sorted({"A", "B"} - lora.keys()))
            raise UsageError(
                f"the LoRA of {official} lacks {absent or 'the weight itself, which --base has'}"
            )
        file = lora["A"].file
        if file not in stated:
            stated[file] = _stated_loras(file)
        weights[official] = _merge(weights[official], lora["A"], lora["B"], stated[file])
    return weights, options


def _base_weights(base: Path) -> dict[str, Tensor]:
    """The tensors of the base model by official name, without the language head."""
    tensors = (t for file in find_files(base) for t in read(file))
    named = unique((clean_name(t.name), t) for t in tensors)
    return {
        official_name(name): t for name, t in named.items() if not re.search(_LANGUAGE_HEAD, name)
    }


def _stated_loras(file: Path) -> list[Mapping[str, Any]]:
    """What VideoReward's JSON file and, if it is there, peft's state about the LoRA in a file."""
    adapter = read_json(file.with_name("adapter_config.json"))
    videoreward = read_videoreward_config([file]).get("peft_lora_config", {})
    return [videoreward, *([adapter] if adapter else [])]


def _merge(weight: Tensor, a: Tensor, b: Tensor, stated: list[Mapping[str, Any]]) -> Merged:
    """A weight with its LoRA, scaled as every JSON file states it."""
    if not is_lora(weight.array, a.array, b.array):
        raise UsageError(
            f"{a} {list(a.array.shape)} and {b} {list(b.array.shape)} are not a LoRA of {weight}"
        )
    scales = {lora_scale(fields, len(a.array)) for fields in stated}
    if len(scales) > 1:
        raise UsageError(
            f"model_config.json and adapter_config.json of {a.file} scale a LoRA by {scales}"
        )
    name = f"{weight.name} + {b.name} {a.name}"
    return Merged(weight.file, weight.part, name, weight.array, a, b, scales.pop())


HPSV3 = Kind(
    mark=r"^rm_head\.0\.weight$",
    official=official_names,
    config=hpsv3_config,
    table=reward_table,
    to_ours=qwen2_vl_weights.to_ours,
    abstract=abstract_params,
    aside=_LANGUAGE_HEAD,
    tokenizer=True,
)
VIDEOALIGN = Kind(
    mark=r"^rm_head\.weight$",
    official=official_names,
    config=videoalign_config,
    table=reward_table,
    to_ours=qwen2_vl_weights.to_ours,
    abstract=abstract_params,
    aside=_LANGUAGE_HEAD,
    merge=merge_videoalign,
    tokenizer=True,
)
