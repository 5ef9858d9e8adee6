"""What every weight map is made of: tables of names, and checks that let no tensor pass unseen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from kvpo_jax.errors import UsageError

Table = dict[str, tuple[str, int | None]]  # official name -> (our path, layer; None: not stacked)
Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor -> its shape

# What training frameworks add to names: FSDP, activation checkpointing, torch.compile, peft in
# memory.
_WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_layer.",
    "default.",
)
# What a state dict's names may begin with: LongLive's wrapper, peft, ComfyUI, diffusers' pipelines.
_PREFIXES = ("model.", "base_model.model.", "diffusion_model.", "transformer.")


def clean_name(name: str) -> str:
    """A tensor's name without wrappers and prefixes, and with peft's lora_A and lora_B in place of
    ComfyUI's lora_down and lora_up.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


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
