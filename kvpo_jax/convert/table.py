"""What every weight map is made of: tables of names, and checks that let no tensor pass unseen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from kvpo_jax.errors import UsageError

Table = dict[str, tuple[str, int | None]]  # official name -> (our path, layer; None: not stacked)
Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor -> its shape

# What training frameworks add to names: FSDP, activation checkpointing, torch.compile, peft in
# memory.
_WRAPPERS = re.compile(
    r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|base_layer)\."
)
# What a state dict's names may begin with, once or several times: the attribute of a wrapper, DDP,
# peft, the parts of diffusers, DiffSynth and ComfyUI; with underscores musubi-tuner and OneTrainer.
_PREFIXES = re.compile(
    r"((module|model|generator|base_model|diffusion_model|transformer|unet|net|dit|pipe|student"
    r"|ema_model|text_encoders?|umt5xxl|cond_stage_model|vae|first_stage_model)\."
    r"|(lora_unet|lora_transformer|lycoris)__?)+"
)
# A matrix of a LoRA, as peft with any adapter, kohya, ComfyUI and older diffusers name it.
_MATRIX = re.compile(
    r"[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|(?:lora_B|lora_up|lora\.up"
    r"|lora_linear_layer\.up))(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?$"
)


def clean_name(name: str) -> str:
    """A tensor's name without wrappers and prefixes, and with peft's names of a LoRA's matrices,
    without that of the adapter.
    """
    name = _WRAPPERS.sub("", name)
    prefix = _PREFIXES.match(name)
    name = name[prefix.end() :] if prefix else name
    matrix = _MATRIX.search(name)
    if matrix is None:
        return name
    letter = "A" if matrix[1].endswith(("A", "down")) else "B"
    return f"{name[: matrix.start()]}.lora_{letter}.{matrix[3] or 'weight'}"


def adapter_of(name: str) -> str | None:
    """The name of the adapter in a tensor's name, if peft wrote one there."""
    matrix = _MATRIX.search(name)
    return matrix[2] if matrix else None


def unchanged(name: str) -> str:
    """The official name of a tensor that has it already."""
    return name


def check_names(where: str, names: Collection[str], expected: Collection[str]) -> None:
    """UsageError, beginning with `where`, unless the names are those that are expected."""
    missing, left = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or left:
        raise UsageError(f"{where}: missing {missing[:5]}, left over {left[:5]}")


def check_ranks(what: str, shapes: Shapes, ranks: Mapping[str, int]) -> None:
    """UsageError unless the tensors that show the sizes are there, with so many axes each."""
    for name, rank in ranks.items():
        if name not in shapes:
            raise UsageError(f"not the tensors of a {what}: {name} is missing")
        if len(shapes[name]) != rank:
            raise UsageError(f"{name} has the shape {list(shapes[name])}, expected {rank} axes")


def count_layers(shapes: Shapes, pattern: str) -> int:
    """How many names match a regular expression, which has one match in every layer."""
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)
