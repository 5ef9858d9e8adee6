"""Which files a checkpoint consists of, and what the JSON files beside them say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpo_jax.errors import UsageError

# How the hub's folders name weights, in the order in which they are looked for.
_SHARDS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin")
_SINGLE = ("*.pt", "*.pth", "*.ckpt")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)\.")


def find_files(source: Path, folder: str = "", pattern: str = "") -> list[Path]:
    """The weight files, or the index of them, of a checkpoint.

    Args:
      source: a file, which is the checkpoint, or a folder.
      folder: a subfolder to look in, where there is one.
      pattern: files to look for before all others.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"there is no {source}")
    if (source / "model_config.json").is_file():
        return _find_videoreward(source)
    if folder and (source / folder).is_dir():
        source = source / folder
    patterns = [p for p in (pattern, *_SHARDS, *_SINGLE) if p]
    found = next((found for p in patterns if (found := sorted(source.glob(p)))), [])
    # The same weights once more, in another number format.
    found = [path for path in found if not _VARIANT.search(path.name)] or found
    if not found and any(source.glob("*.distcp")):
        raise UsageError(
            f"{source} is a distributed checkpoint; make one file of it with python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {source} FILE.pt"
        )
    if not found:
        names = ", ".join(sorted(path.name for path in source.iterdir()))
        raise UsageError(
            f"{source} has no weights, only {names}; name a file or folder, or choose with --kind"
        )
    if len(found) > 1 and found[0].suffix not in (".safetensors", ".bin"):
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{source} has more than one checkpoint: name one of {names}")
    return found


def _find_videoreward(source: Path) -> list[Path]:
    """The last checkpoint in a folder of VideoReward.

    It is the whole model, or what was trained: an adapter and the other tensors.
    """
    steps = {
        int(match[1]): path
        for path in source.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not steps:
        raise UsageError(f"{source} has a model_config.json, but no checkpoint-STEP beside it")
    last = steps[max(steps)]
    whole = last / "model.pth"
    parts = [last / "adapter_model.safetensors", last / "non_lora_state_dict.pth"]
    if whole.is_file():
        return [whole]
    if not all(path.is_file() for path in parts):
        names = " and ".join(path.name for path in parts)
        raise UsageError(f"{last} has neither {whole.name} nor {names}")
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_configs(files: Iterable[Path]) -> dict[str, Any]:
    """What the config.json beside each file says, together."""
    fields: dict[str, Any] = {}
    for file in files:
        fields |= read_json(file.with_name("config.json"))
    return fields


def read_videoreward_config(files: Iterable[Path]) -> dict[str, Any]:
    """VideoReward's model_config.json, which is beside the folders of its checkpoints."""
    places = sorted({folder / "model_config.json" for file in files for folder in file.parents[:2]})
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        raise UsageError(
            f"expected one model_config.json, found {len(found)} among"
            f" {', '.join(map(str, places))}"
        )
    return read_json(found[0])
