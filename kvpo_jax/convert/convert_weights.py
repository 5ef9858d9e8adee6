r"""Converts PyTorch checkpoints to the weight files of kvpo_jax.

    kvpo-convert Wan2.1-T2V-1.3B --output=weights/wan.safetensors
    kvpo-convert longlive_base.pt --output=weights/longlive.safetensors
    kvpo-convert lora.pt --output=weights/longlive_lora.safetensors
    kvpo-convert Wan2.1_VAE.pth --output=weights/vae.safetensors
    kvpo-convert models_t5_umt5-xxl-enc-bf16.pth --output=weights/umt5.safetensors
    kvpo-convert HPSv3.safetensors --base=Qwen2-VL-7B-Instruct --dtype=bfloat16 \
        --templates=hpsv3-1.0.0-py3-none-any.whl --output=weights/hpsv3.safetensors
    kvpo-convert VideoReward --base=Qwen2-VL-2B-Instruct --dtype=bfloat16 \
        --templates=VideoAlign/prompt_template.py --output=weights/videoalign.safetensors
    kvpo-convert clip-vit-base-patch32 --output=weights/clip.safetensors
    kvpo-convert dino_vitbase16_pretrain.pth --output=weights/dino.safetensors
    kvpo-convert sa_0_4_vit_l_14_linear.pth --base=clip-vit-large-patch14 \
        --output=weights/aesthetic.safetensors

In a checkout, `python tools/convert_weights.py` is the same as `kvpo-convert`.

A source is a file, the index of a sharded one, or a folder, of the Wan2.1, LongLive, MemFlow,
Self-Forcing, KVPO, HPSv3 and VideoReward releases, of CLIP, DINO and LAION's aesthetic head, of
diffusers, transformers, peft or ComfyUI; tensor names show which. Every tensor must be known and
none may be missing. A manifest beside the output says where every tensor comes from. Files are
mapped and their tensors written one by one, so that any checkpoint fits into a small memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from kvpo_jax.convert.kind import Options
from kvpo_jax.convert.mapping import KINDS, Mapped, describe, map_tensors, signature_of
from kvpo_jax.convert.sources import find_files
from kvpo_jax.convert.tensors import PARTS, read
from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.rewards import learned
from kvpo_jax.runtime import command
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.weight_file import check_finite, sha256, write_safetensors

# Files that the folder of a tokenizer may have.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def convert(sources: Sequence[Path], output: Path | None, options: Options | None = None) -> None:
    """Converts a checkpoint and says what was found in it.

    Args:
      sources: its files, or folders that have them.
      output: safetensors file to write; None prints what each tensor becomes, and writes nothing.
      options: what the user says about the checkpoint.

    Raises:
      UsageError: the checkpoint is not what it should be. Nothing is written then.
    """
    options = options or Options()
    if output is not None and output.suffix != ".safetensors":
        raise UsageError(f"--output={output} does not end in .safetensors")
    spec = KINDS.get(options.kind)
    place = (spec.folder, spec.pattern) if spec else ()
    files = [file for source in sources for file in find_files(source, *place)]
    tensors = [tensor for file in files for tensor in read(file, options.policy)]
    mapped = map_tensors(tensors, options)
    used = [t for layers in mapped.sources.values() for t in layers.values()]
    if output is None:
        for tensor in used:
            check_finite(str(tensor), tensor.read())
        print(describe(mapped))
    parts = {t.file: t.part for t in [*tensors, *used]}
    _print_summary(mapped, parts)
    if output is not None:
        _write(mapped, parts, output)
        if KINDS[mapped.kind].tokenizer:
            copy_tokenizer(options.base or files[0].parent, learned.tokenizer_folder(output))
        print(f"wrote {output}", flush=True)


def _print_summary(mapped: Mapped, parts: Mapping[Path, str | None]) -> None:
    """Prints which files are read, and what they are."""
    for file, part in parts.items():
        print(f"{file}{f', its {part}' if part else ''}")
    numbers = sum(math.prod(t.shape) for t in mapped.tensors)
    size = sum(t.nbytes for t in mapped.tensors)
    sizes = ", ".join(f"{name} {x}" for name, x in mapped.config.items() if name != "template")
    print(f"{mapped.kind}: {numbers:,} parameters, {size / 1e9:.2f} GB; {sizes}", flush=True)
    if mapped.aside:
        first = mapped.aside[0].name
        print(f"not used: {len(mapped.aside)} tensors, {first} and so on", flush=True)


def _write(mapped: Mapped, parts: Mapping[Path, str | None], output: Path) -> None:
    """Writes the weights, and the manifest both into their file and beside it."""
    manifest = make_manifest(mapped, parts)
    metadata = {
        "kind": mapped.kind,
        "config": json.dumps(mapped.config),
        "manifest": json.dumps(manifest),
    }
    write_safetensors(output, mapped.tensors, metadata)
    write_json(manifest, output.with_name(f"{output.name}.manifest.json"))


def make_manifest(mapped: Mapped, parts: Mapping[Path, str | None]) -> dict[str, Any]:
    """What a converted file says about its origin.

    Args:
      mapped: the conversion.
      parts: source file -> the state dict in it that was read, or None.
    """
    sources = [
        {"file": str(file), "part": part, "bytes": file.stat().st_size, "sha256": sha256(file)}
        for file, part in parts.items()
    ]
    tensors = {
        t.name: {
            "shape": list(t.shape),
            "dtype": t.dtype.name,
            "sources": [
                f"{source.name}: {signature_of(source)}"
                for source in mapped.sources[t.name].values()
            ],
        }
        for t in mapped.tensors
    }
    return {"kind": mapped.kind, "config": mapped.config, "sources": sources, "tensors": tensors}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # JAX only works out shapes here
    sources = arguments[1:]
    for source in sources:
        if source.startswith("--"):
            name = source[2:].partition("=")[0]
            raise UsageError(f"there is no flag --{name}{nearest(name, given)}")
    if not sources or given["dry-run"].value == bool(given.output):
        raise UsageError(
            "expected one or more sources, and either --output=FILE or --dry-run; see --help"
        )
    options = Options(
        kind=given.kind,
        dtype=given.dtype,
        policy="ema" if given.ema else given.policy,
        num_heads=given.num_heads,
        text_len=given.text_len,
        alpha=given.alpha,
        base=Path(given.base) if given.base else None,
        templates=Path(given.templates) if given.templates else None,
    )
    output = Path(given.output) if given.output else None
    convert([Path(source) for source in sources], output, options)


def define_flags() -> None:
    """The flags of the command."""
    command.define_path(
        "output", None, "safetensors file to write; its manifest is written beside it"
    )
    flags.DEFINE_bool("dry-run", False, "print which tensor becomes which, and write nothing")
    flags.DEFINE_enum(
        "kind", "auto", ["auto", *KINDS], "kind of the weights; needed where a folder has several"
    )
    flags.DEFINE_enum(
        "dtype",
        "keep",
        ["keep", "bfloat16", "float32"],
        "number format of the model that the file is for; bfloat16 leaves norms and modulation in "
        "float32, as the model has them",
    )
    flags.DEFINE_enum(
        "policy", "online", list(PARTS), "which state dict of a training checkpoint to read"
    )
    flags.DEFINE_bool("ema", False, "the same as --policy=ema")
    flags.DEFINE_integer(
        "num_heads", None, "attention heads where the head dim is not 128 (of a DINO 64)"
    )
    flags.DEFINE_integer(
        "text_len", None, "tokens that a prompt is padded to, 512 in every published Wan"
    )
    command.define_path(
        "base",
        None,
        "what a reward was made of: the folder of a Qwen2-VL, the CLIP of LAION's head; of CLIP "
        "itself the folder of its tokenizer, unless it is beside the weights",
    )
    command.define_path(
        "templates",
        None,
        "file or folder with the instruction of a reward model: the hpsv3 wheel, VideoAlign's "
        "prompt_template.py",
    )
    flags.DEFINE_float(
        "alpha", None, "scale of a LoRA without an adapter_config.json; by default its rank"
    )


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.convert.convert_weights", define_flags, main)


if __name__ == "__main__":
    cli()
