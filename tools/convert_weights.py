r"""Converts PyTorch checkpoints to the weight files of kvpo_jax, with a manifest of where every tensor comes from.

    python tools/convert_weights.py Wan2.1-T2V-1.3B --output=weights/wan.safetensors
    python tools/convert_weights.py longlive_base.pt --output=weights/longlive.safetensors
    python tools/convert_weights.py lora.pt --output=weights/longlive_lora.safetensors
    python tools/convert_weights.py Wan2.1_VAE.pth --output=weights/vae.safetensors
    python tools/convert_weights.py models_t5_umt5-xxl-enc-bf16.pth --output=weights/umt5.safetensors
    python tools/convert_weights.py HPSv3.safetensors --base=Qwen2-VL-7B-Instruct --dtype=bfloat16 \
        --templates=hpsv3-1.0.0-py3-none-any.whl --output=weights/hpsv3.safetensors
    python tools/convert_weights.py VideoReward --base=Qwen2-VL-2B-Instruct --dtype=bfloat16 \
        --templates=VideoAlign/prompt_template.py --output=weights/videoalign.safetensors

A source is a file, the index of a sharded one, or a folder, of the Wan2.1, LongLive, MemFlow, Self-Forcing, KVPO, HPSv3
and VideoReward releases, of diffusers, transformers, peft or ComfyUI; tensor names tell which. Every tensor must be
known and none may be missing. Files are mapped and their tensors written one by one, so that any checkpoint fits into a
small memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors
from absl import app, flags

from kvpo_jax.config import write_json
from kvpo_jax.models import (
    qwen2_vl_weights,
    reward_model,
    reward_weights,
    umt5,
    umt5_weights,
    wan_vae,
    wan_vae_weights,
    wan_weights,
)
from kvpo_jax.rewards import learned
from kvpo_jax.rewards import templates as templates_lib

CHUNK = 1 << 26  # bytes that are copied at once

# safetensors' names of the number formats that we read and write.
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a source file.

    Attributes:
      file: it is in.
      part: key of its state dict there, None if the file is a state dict.
      name: its name there.
      array: a view of the mapped file.
    """

    file: Path
    part: str | None
    name: str
    array: np.ndarray

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def read(self) -> np.ndarray:
        """What is converted."""
        return self.array


@dataclasses.dataclass(frozen=True)
class Merged(Tensor):
    """A Linear's weight with its LoRA, which are merged when they are written.

    Attributes:
      a, b: of the LoRA.
      scale: of their product.
    """

    a: Tensor
    b: Tensor
    scale: float

    def read(self) -> np.ndarray:
        return reward_weights.merge_lora(self.array, self.a.array, self.b.array, self.scale)


def files_of(source: Path, kind: str) -> list[Path]:
    """The weight files, or the index of them, that a file or folder stands for; `kind` chooses where there are more."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"there is no {source}")
    if (source / "model_config.json").is_file():
        return videoreward_files(source)
    folder, own = PLACES.get(kind, ("", ""))
    if folder and (source / folder).is_dir():
        source = source / folder
    shards = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin")
    found = next((found for p in (own, *shards, "*.pt", "*.pth") if p and (found := sorted(source.glob(p)))), [])
    if not found:
        names = ", ".join(sorted(path.name for path in source.iterdir()))
        raise ValueError(f"{source} has no weights, only {names}; name a file or folder, or choose with --kind")
    if len(found) > 1 and found[0].suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{source} has more than one checkpoint: name one of {', '.join(path.name for path in found)}")
    return found


def videoreward_files(source: Path) -> list[Path]:
    """The last checkpoint in a folder of VideoReward: the whole model, or else what was trained of it."""
    steps = {int(path.name.split("-")[1]): path for path in source.glob("checkpoint-[0-9]*")}
    if not steps:
        raise ValueError(f"{source} has a model_config.json, but no checkpoint-STEP beside it")
    last = steps[max(steps)]
    whole, parts = last / "model.pth", [last / "adapter_model.safetensors", last / "non_lora_state_dict.pth"]
    if not whole.is_file() and not all(path.is_file() for path in parts):
        raise ValueError(f"{last} has neither {whole.name} nor {' and '.join(path.name for path in parts)}")
    return [whole] if whole.is_file() else parts


def read(path: Path, policy: str) -> list[Tensor]:
    """The tensors of a file, or of the shards of an index."""
    readers = {".json": read_index, ".safetensors": read_safetensors}
    readers |= dict.fromkeys((".pt", ".pth", ".bin"), functools.partial(read_torch, policy=policy))
    if path.suffix not in readers:
        raise ValueError(f"{path} is no weight file; these end in {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    return readers[path.suffix](path)


def read_index(path: Path) -> list[Tensor]:
    """The tensors of a sharded checkpoint, all where the index says."""
    try:
        places = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the index of a sharded checkpoint: {error!r}") from error
    tensors = [t for shard in sorted(set(places.values())) for t in read(path.parent / shard, "online")]
    found = {t.name: t.file.name for t in tensors}
    for name in places.keys() | found.keys():
        if places.get(name) != found.get(name):
            raise ValueError(f"{path}: {name} is in {found.get(name)}, the index says {places.get(name)}")
    return tensors


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file."""
    try:
        # To open it checks that the header is right and the file whole.
        with safetensors.safe_open(path, framework="numpy") as opened:
            opened.keys()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size) if header else None

    def tensor(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}")
        return Tensor(path, None, name, data[slice(*data_offsets)].view(DTYPES[dtype]).reshape(shape))

    return [tensor(name, **entry) for name, entry in header.items()]


def read_torch(path: Path, policy: str) -> list[Tensor]:
    """The tensors of a PyTorch checkpoint, of the state dict of `policy` if there are several."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"reading {path} needs PyTorch: pip install 'kvpo_jax[convert]'") from error
    zipped = zipfile.is_zipfile(path)
    if not zipped and path.open("rb").read(2) == b"PK":
        raise ValueError(f"{path} is cut short: its end is missing")
    try:
        # What PyTorch before 1.6 wrote is no zip archive and cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is not a PyTorch checkpoint of tensors alone: {reason}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict")
    try:
        part = wan_weights.part_of(checkpoint, policy)
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from error

    def tensor(name: str, value: Any) -> Tensor:
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in {known.name for known in DTYPES.values()}:
            raise ValueError(f"{path}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}")
        value = value.detach()
        if value.dtype == torch.bfloat16:  # NumPy's is another module's
            return Tensor(path, part, name, value.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return Tensor(path, part, name, value.numpy())

    return [tensor(name, value) for name, value in (checkpoint[part] if part else checkpoint).items()]


def unique(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """name -> tensor; ValueError if two different tensors have one name. A tied one may be there twice."""
    out: dict[str, Tensor] = {}
    for name, tensor in named:
        other = out.setdefault(name, tensor)
        if other is not tensor and not same(other.array, tensor.array):
            raise ValueError(f"{other} and {tensor} are different tensors for {name}")
    return out


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal, without a copy of either."""
    return a.shape == b.shape and all(np.array_equal(x, y) for x, y in zip(chunks(a), chunks(b), strict=True))


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in slices of its first axis of about CHUNK bytes."""
    if array.ndim == 0:
        yield array
        return
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes))
    yield from (array[i : i + rows] for i in range(0, len(array), rows))


# ---------------------------------------------------------------- kinds


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of weights.

    Attributes:
      mark: regular expression of a tensor, by cleaned name, that only a checkpoint of this kind has.
      official: shapes by cleaned name -> (cleaned name -> official name, ValueError for a tensor that is unknown).
      config: (shapes by official name, source files, tensors set aside, what the user says) -> its frozen config.
      table: config -> official name -> (our path, layer).
      to_ours: (our path, official tensor) -> our tensor.
      abstract: config -> the tree of our shapes and dtypes.
      sizes: fields of the config that a converted file notes; empty is all.
      aside: regular expression of tensors, by cleaned name, that some releases have and that are none of ours.
      merge: (the other tensors by cleaned name, what the user says) -> those that take their place.
      tokenizer: whether the base model's goes with the weights.
    """

    mark: str
    official: Callable[[wan_weights.Shapes], Callable[[str], str]]
    config: Callable[[wan_weights.Shapes, Collection[Path], Collection[Tensor], Mapping[str, Any]], Any]
    table: Callable[[Any], wan_weights.Table]
    to_ours: Callable[[str, np.ndarray], np.ndarray]
    abstract: Callable[[Any], Any]
    sizes: tuple[str, ...] = ()
    aside: str | None = None
    merge: Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] = lambda tensors, given: tensors
    tokenizer: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def wan_config(shapes, files, aside, given) -> wan_weights.WanConfig:
    """The config of a transformer; what no shape shows is said by the user or in a config.json beside it."""
    beside = {name: value for file in files for name, value in read_json(file.with_name("config.json")).items()}
    heads = given["num_heads"] or beside.get("num_heads") or beside.get("num_attention_heads")
    return wan_weights.config_from_shapes(shapes, heads, given["text_len"] or beside.get("text_len") or 512)


def lora_config(shapes, files, aside, given) -> wan_weights.LoRAConfig:
    """The config of a LoRA; alpha is in tensors of ComfyUI's files, and beside those of peft and diffusers."""
    stated = {str(t): t.array.item() for t in aside} | {"--alpha": given["alpha"]}
    for file in files:
        beside, adapter = file.with_name("adapter_config.json"), {}
        config = read_json(beside)
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="numpy") as opened:
                adapter = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            adapter = {name.removeprefix("transformer."): value for name, value in adapter.items()}
        for where, said in ((beside, config), (file, adapter)):
            for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
                if said.get(name):
                    raise ValueError(f"{name} of {where} is not supported")
        stated[str(file)] = (config | adapter).get("lora_alpha")
    stated = {where: alpha for where, alpha in stated.items() if alpha is not None}
    if len(set(stated.values())) > 1:
        raise ValueError(f"alpha is not one: {', '.join(f'{alpha:g} ({where})' for where, alpha in stated.items())}")
    return wan_weights.lora_config_from_shapes(shapes, next(iter(stated.values()), None))


def vae_names(shapes: wan_weights.Shapes) -> Callable[[str], str]:
    """See `Kind.official`. Where diffusers' decoder blocks go depends on the sizes, which its encoder tells."""
    if "conv1.weight" in shapes:
        return lambda name: name
    encoder = {name: shape for name, shape in shapes.items() if name.startswith(("encoder.", "post_quant_conv."))}
    any_size = functools.partial(wan_vae_weights.official_name, cfg=wan_vae.VAEConfig())
    cfg = wan_vae_weights.config_from_shapes({any_size(name): shape for name, shape in encoder.items()})
    return functools.partial(wan_vae_weights.official_name, cfg=cfg)


def vae_config(shapes, files, aside, given) -> wan_vae.VAEConfig:
    """The config of a VAE, with the statistics of latents that a diffusers folder states."""
    cfg = wan_vae_weights.config_from_shapes(shapes)
    beside = {name: value for file in files for name, value in read_json(file.with_name("config.json")).items()}
    stated = {ours: beside[theirs] for ours, theirs in LATENT_STATISTICS.items() if theirs in beside}
    return dataclasses.replace(cfg, **{name: tuple(value) for name, value in stated.items()})


def umt5_names(shapes: wan_weights.Shapes) -> Callable[[str], str]:
    """See `Kind.official`."""
    return (lambda name: name) if "token_embedding.weight" in shapes else umt5_weights.official_name


def reward_inputs(given: Mapping[str, Any], tokens: Sequence[str]) -> tuple[dict[str, Any], dict[str, int], str]:
    """(config.json of a reward model's base, ids of its tokens, where its instruction is), of what the user says."""
    needed = {"base": "the folder of the Qwen2-VL that it was made of", "templates": "the file with its instruction"}
    for name, what in needed.items():
        if not given[name]:
            raise ValueError(f"a reward model needs {what}: name it with --{name}; see --help")
    _, ids = learned.tokenizer(given["base"], tokens)
    return read_json(Path(given["base"]) / "config.json"), ids, given["templates"]


def hpsv3_config(shapes, files, aside, given) -> reward_model.RewardConfig:
    """The config of an HPSv3."""
    base, ids, instruction = reward_inputs(given, reward_model.HPSV3_TOKENS)
    return reward_weights.hpsv3_config(shapes, base, ids, templates_lib.hpsv3(instruction))


def videoalign_config(shapes, files, aside, given) -> reward_model.VideoAlignConfig:
    """The config of a VideoAlign."""
    base, ids, instruction = reward_inputs(given, reward_model.VIDEOALIGN_TOKENS)
    return reward_weights.videoalign_config(
        shapes, base, ids, templates_lib.videoalign(instruction), videoreward_json(files)
    )


def videoreward_json(files: Collection[Path]) -> dict[str, Any]:
    """VideoReward's model_config.json, which lies beside the folders of its checkpoints."""
    places = sorted({folder / "model_config.json" for file in files for folder in file.parents[:2]})
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"expected one model_config.json, found {len(found)} among {', '.join(map(str, places))}")
    return read_json(found[0])


def videoalign_tensors(tensors: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """VideoAlign's tensors by official name, its LoRA merged; what it left as it was comes from the base model."""
    weights: dict[str, Tensor] = {}
    loras: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        official, part = reward_weights.split_lora(name)
        if part:
            loras.setdefault(official, {})[part] = tensor
        else:
            weights[official] = tensor
    if loras.keys() - weights.keys() and given["base"]:
        base = unique(
            (wan_weights.clean_name(t.name), t)
            for file in files_of(Path(given["base"]), "auto")
            for t in read(file, "online")
        )
        untrained = {name: t for name, t in base.items() if not re.search(KINDS["videoalign"].aside, name)}
        weights = {reward_weights.official_name(name): t for name, t in untrained.items()} | weights
    said = {}
    for official, lora in loras.items():
        if lora.keys() != {"A", "B"} or official not in weights:
            missing = ", ".join(sorted({"A", "B"} - lora.keys())) or "the weight itself, which --base has"
            raise ValueError(f"the LoRA of {official} lacks {missing}")
        weight, a, b = weights[official], lora["A"], lora["B"]
        if a.file not in said:
            adapter = read_json(a.file.with_name("adapter_config.json"))
            said[a.file] = [videoreward_json([a.file]).get("peft_lora_config", {}), *([adapter] if adapter else [])]
        scales = {reward_weights.lora_scale(stated, len(a.array)) for stated in said[a.file]}
        if len(scales) > 1:
            raise ValueError(f"model_config.json and adapter_config.json of {a.file} scale a LoRA by {scales}")
        if (b.array.shape[0], a.array.shape[1]) != weight.array.shape or b.array.shape[1] != len(a.array):
            raise ValueError(f"{a} {list(a.array.shape)} and {b} {list(b.array.shape)} are no LoRA of {weight}")
        name = f"{weight.name} + {b.name} {a.name}"
        weights[official] = Merged(weight.file, weight.part, name, weight.array, a, b, scales.pop())
    return weights


LATENT_STATISTICS = {"latent_mean": "latents_mean", "latent_std": "latents_std"}  # ours, in diffusers' config.json
KINDS = {
    "wan_lora": Kind(
        mark=r"^blocks\..+\.lora_A\.weight$",
        official=wan_weights.official_names,
        config=lora_config,
        table=lambda cfg: wan_weights.lora_table(cfg.num_layers),
        to_ours=wan_weights.to_ours,
        abstract=wan_weights.abstract_lora,
        aside=r"\.alpha$",
    ),
    "wan": Kind(
        mark=r"^patch_embedding\.weight$",
        official=wan_weights.official_names,
        config=wan_config,
        table=lambda cfg: wan_weights.wan_table(cfg.num_layers),
        to_ours=wan_weights.to_ours,
        abstract=wan_weights.abstract_params,
        sizes=wan_weights.SIZES,
    ),
    "wan_vae": Kind(
        mark=r"^decoder\.(conv1|conv_in)\.weight$",
        official=vae_names,
        config=vae_config,
        table=lambda cfg: {name: (path, None) for name, path in wan_vae_weights.vae_table(cfg).items()},
        to_ours=wan_vae_weights.to_ours,
        abstract=wan_vae.abstract_params,
    ),
    "umt5": Kind(
        mark=r"^(token_embedding|shared|encoder\.embed_tokens)\.weight$",
        official=umt5_names,
        config=lambda shapes, files, aside, given: umt5_weights.config_from_shapes(shapes),
        table=lambda cfg: umt5_weights.umt5_table(cfg.layers),
        to_ours=umt5_weights.to_ours,
        abstract=umt5.abstract_params,
        aside=r"^(decoder|lm_head)\.",
    ),
    "hpsv3": Kind(
        mark=r"^rm_head\.0\.weight$",
        official=lambda shapes: reward_weights.official_name,
        config=hpsv3_config,
        table=reward_weights.reward_table,
        to_ours=qwen2_vl_weights.to_ours,
        abstract=reward_model.abstract_params,
        aside=r"^lm_head\.",
        tokenizer=True,
    ),
    "videoalign": Kind(
        mark=r"^rm_head\.weight$",
        official=lambda shapes: reward_weights.official_name,
        config=videoalign_config,
        table=reward_weights.reward_table,
        to_ours=qwen2_vl_weights.to_ours,
        abstract=reward_model.abstract_params,
        aside=r"^lm_head\.",
        merge=videoalign_tensors,
        tokenizer=True,
    ),
}
# Where a kind is in a folder that has several: diffusers' subfolder, and the file in a folder of Wan2.1.
PLACES = {
    "wan": ("transformer", ""),
    "wan_vae": ("vae", "*VAE*.pth"),
    "umt5": ("text_encoder", "models_t5*.pth"),
}


def kind_of(names: Collection[str], asked: str) -> str:
    """The kind that cleaned names tell; ValueError if it is none, or not the one that was asked for."""
    found = next((kind for kind, spec in KINDS.items() if any(re.search(spec.mark, name) for name in names)), None)
    if found is None:
        raise ValueError(f"no checkpoint of {', '.join(KINDS)}: its tensors are {', '.join(sorted(names)[:5])}, ...")
    if asked not in ("auto", found):
        raise ValueError(f"the kind is {found}, not {asked}")
    return found


# ---------------------------------------------------------------- mapping


@dataclasses.dataclass(frozen=True)
class Mapped:
    """What a conversion does.

    Attributes:
      kind: of the weights, a key of KINDS.
      config: of the model, as JSON has it.
      tensors: what is written.
      sources: our name -> layer, None if it is not stacked -> source tensor.
      aside: source tensors that are none of ours.
    """

    kind: str
    config: dict[str, Any]
    tensors: list[Stored]
    sources: dict[str, dict[int | None, Tensor]]
    aside: list[Tensor]


def map_tensors(tensors: Sequence[Tensor], asked: str, dtype: str, given: Mapping[str, Any]) -> Mapped:
    """Which source tensors make which of ours.

    Args:
      tensors: of all sources.
      asked: the kind, or "auto".
      dtype: "keep", or that of the model as whose parameters ours are stored: "float32" or "bfloat16".
      given: num_heads, text_len, alpha, base and templates where the user says them, or else None.

    Raises:
      ValueError: a tensor is missing, left over, or of another shape than the model's; names file and tensor.
    """
    files = sorted({t.file for t in tensors})
    where = ", ".join(map(str, files))
    cleaned = unique((wan_weights.clean_name(t.name), t) for t in tensors)
    try:
        kind = kind_of(cleaned, asked)
        spec = KINDS[kind]
        aside = {name: t for name, t in cleaned.items() if spec.aside and re.search(spec.aside, name)}
        kept = spec.merge({name: t for name, t in cleaned.items() if name not in aside}, given)
        official = spec.official({name: t.array.shape for name, t in kept.items()})
        named = unique((official(name), t) for name, t in kept.items())
        cfg = spec.config({name: t.array.shape for name, t in named.items()}, files, aside.values(), given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    table = spec.table(cfg)
    wan_weights.check_names(where, named, table)
    if hasattr(cfg, "dtype"):
        largest = max((t.array for t in named.values()), key=lambda array: array.nbytes)
        cfg = dataclasses.replace(cfg, dtype=largest.dtype.name if dtype == "keep" else dtype)
    sources: dict[str, dict[int | None, Tensor]] = {}
    for name, (path, layer) in table.items():
        sources.setdefault(path, {})[layer] = named[name]
    converted = lambda path, tensor: spec.to_ours(path, tensor.read())
    stored = []
    for path, like in flax.traverse_util.flatten_dict(spec.abstract(cfg), sep="/").items():
        group = sources[path]
        expected = like.shape if None in group else like.shape[1:]
        for tensor in group.values():
            if (shape := spec.to_ours(path, tensor.array).shape) != expected:
                raise ValueError(f"{tensor} makes {path} {list(shape)}; the others make it {list(expected)}: {cfg}")
        types = {t.array.dtype for t in group.values()} if dtype == "keep" else {np.dtype(like.dtype)}
        if len(types) > 1:
            raise ValueError(f"{where}: the layers of {path} are of the types {types}; choose one with --dtype")
        parts = tuple(functools.partial(converted, path, t) for t in group.values())
        stored.append(Stored(path, like.shape, types.pop(), parts))
    config = {name: value for name, value in dataclasses.asdict(cfg).items() if name in (spec.sizes or vars(cfg))}
    return Mapped(kind, config, stored, sources, list(aside.values()))


def mapping_table(mapped: Mapped) -> str:
    """A line per source tensor: what it is, and what it becomes."""
    signature = lambda dtype, shape: f"{dtype.name}{list(shape)}"
    rows = []
    for stored in mapped.tensors:
        for layer, tensor in mapped.sources[stored.name].items():
            ours = stored.name if layer is None else f"{stored.name}[{layer}]"
            shape = stored.shape if layer is None else stored.shape[1:]
            source = signature(tensor.array.dtype, tensor.array.shape)
            rows.append((tensor.name, source, "->", ours, signature(stored.dtype, shape)))
    rows += [(t.name, signature(t.array.dtype, t.array.shape), "->", "(not used)", "") for t in mapped.aside]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file that is to be written.

    Attributes:
      name: "blocks/self_q/kernel".
      shape: of the whole.
      dtype: of the whole.
      parts: each makes the next layers of the array, or all of it; called in this order, when they are written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file part by part, with a progress bar, at once or not at all."""
    tensors = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))  # each begins at a multiple of its itemsize
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for t in tensors:
        start, end = end, end + t.nbytes
        header[t.name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    advance = progress_bar(f"writing {path.name}", end)
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for t in tensors:
                for rows in (rows for part in t.parts for rows in chunks(part())):
                    file.write(np.ascontiguousarray(rows, t.dtype).view(np.uint8).data)
                    advance(rows.size * t.dtype.itemsize)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The checksum of a file, with a progress bar."""
    digest, advance = hashlib.sha256(), progress_bar(f"reading {path.name}", path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def progress_bar(label: str, total: int) -> Callable[[int], None]:
    """A function to tell of every so many bytes done; shows on stderr how far it is, how fast, and how long still."""
    begin = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    done = 0

    def advance(size: int) -> None:
        nonlocal done, shown
        done += size
        now = time.monotonic()
        if now - shown < (0.2 if terminal else 10) and done < total:
            return
        shown = now
        rate = done / max(now - begin, 1e-9)
        bar = "#" * (20 * done // total)
        line = f"{label} [{bar:<20}] {done / total:4.0%}  {rate / 1e6:.0f} MB/s, {(total - done) / rate:.0f} s left"
        print(line, end="\r" if terminal and done < total else "\n", file=sys.stderr, flush=True)

    return advance


# ---------------------------------------------------------------- the command


def convert(
    sources: Sequence[Path | str],
    output: Path | str | None,
    kind: str = "auto",
    dtype: str = "keep",
    policy: str = "online",
    num_heads: int | None = None,
    text_len: int | None = None,
    alpha: float | None = None,
    base: Path | str | None = None,
    templates: Path | str | None = None,
) -> None:
    """What the command does; without an `output` it prints the mapping. ValueError names what is wrong.

    Args:
      sources: see `files_of`.
      output: safetensors file.
      kind, dtype, policy, num_heads, text_len, alpha, base, templates: see the flags.
    """
    if output is not None and Path(output).suffix != ".safetensors":
        raise ValueError(f"--output={output} does not end in .safetensors")
    tensors = [t for source in sources for file in files_of(Path(source), kind) for t in read(file, policy)]
    given = {"num_heads": num_heads, "text_len": text_len, "alpha": alpha, "base": base, "templates": templates}
    mapped = map_tensors(tensors, kind, dtype, given)
    if output is None:
        print(mapping_table(mapped))
    used = [t for group in mapped.sources.values() for t in group.values()]
    parts = {t.file: t.part for t in [*tensors, *used]}
    for file, part in parts.items():
        print(f"{file}{f', its {part}' if part else ''}")
    numbers = sum(math.prod(t.shape) for t in mapped.tensors)
    size = sum(t.nbytes for t in mapped.tensors)
    sizes = ", ".join(f"{name} {value}" for name, value in mapped.config.items() if name != "template")
    print(f"{mapped.kind}: {numbers:,} parameters, {size / 1e9:.2f} GB; {sizes}", flush=True)
    if mapped.aside:
        print(f"not used: {len(mapped.aside)} tensors, {mapped.aside[0].name} and so on", flush=True)
    if output is None:
        return
    output = Path(output)
    manifest = {
        "kind": mapped.kind,
        "config": mapped.config,
        "sources": [
            {"file": str(file), "part": part, "bytes": file.stat().st_size, "sha256": sha256(file)}
            for file, part in parts.items()
        ],
        "tensors": {
            t.name: {
                "shape": list(t.shape),
                "dtype": t.dtype.name,
                "sources": [
                    f"{s.name}: {s.array.dtype.name}{list(s.array.shape)}" for s in mapped.sources[t.name].values()
                ],
            }
            for t in mapped.tensors
        },
    }
    metadata = {"kind": mapped.kind, "config": json.dumps(mapped.config), "manifest": json.dumps(manifest)}
    write_safetensors(output, mapped.tensors, metadata)
    write_json(manifest, output.with_name(f"{output.name}.manifest.json"))
    if KINDS[mapped.kind].tokenizer:
        learned.copy_tokenizer(base, learned.tokenizer_folder(output))
    print(f"wrote {output}", flush=True)


def main(arguments: list[str]) -> None:
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # only shapes are asked of it
    if len(arguments) < 2 or given["dry-run"].value == bool(given.output):
        sys.exit("error: expected one or more sources, and either --output=FILE or --dry-run; see --help")
    try:
        convert(
            arguments[1:], given.output, given.kind, given.dtype, "ema" if given.ema else given.policy, given.num_heads,
            given.text_len, given.alpha, given.base, given.templates,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "safetensors file to write; its manifest is written beside it")
    flags.DEFINE_bool("dry-run", False, "print which tensor becomes which, and write nothing")
    flags.DEFINE_enum("kind", "auto", ["auto", *KINDS], "of the weights; needed where a folder has several")
    flags.DEFINE_enum(
        "dtype", "keep", ["keep", "bfloat16", "float32"],
        "of the model that the file is for; bfloat16 leaves norms and modulation in float32, as the model has them",
    )  # fmt: skip
    flags.DEFINE_enum("policy", "online", list(wan_weights.PARTS), "which state dict of a training checkpoint")
    flags.DEFINE_bool("ema", False, "the same as --policy=ema")
    flags.DEFINE_integer("num_heads", None, "attention heads where the head dim is not 128")
    flags.DEFINE_integer("text_len", None, "tokens that a prompt is padded to, 512 in every published Wan")
    flags.DEFINE_string("base", None, "folder of the Qwen2-VL that a reward model was made of")
    flags.DEFINE_string(
        "templates", None,
        "file or folder with the instruction of a reward model: the hpsv3 wheel, VideoAlign's prompt_template.py",
    )  # fmt: skip
    flags.DEFINE_float("alpha", None, "of a LoRA without an adapter_config.json; by default its rank")
    app.run(main)
