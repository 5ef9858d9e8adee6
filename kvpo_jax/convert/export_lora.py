"""Takes a LoRA that was trained here, or a converted one, back to PyTorch.

    kvpo-export --workdir=runs/longlive-... --format=peft --output=lora.pt      # for LongLive
    kvpo-export --workdir=runs/longlive-... --format=peft --output=lora_folder  # for peft
    kvpo-export --workdir=runs/longlive-... --iteration=best --format=peft --output=lora.pt
    kvpo-export --workdir=runs/longlive-... --policy=ema --format=merged --output=generator.pt
    kvpo-export --lora=weights/lora.safetensors --format=diffusers --output=lora.safetensors
    kvpo-export --lora=a.safetensors:1.0,b.safetensors:0.5 --format=peft --output=lora.pt

In a checkout, `python tools/export_lora.py` is the same as `kvpo-export`.

Numbers are written as they are, in float32; kvpo-convert reads every format back to the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
from absl import flags

from kvpo_jax import adapters, backbone
from kvpo_jax.convert.table import check_names
from kvpo_jax.convert.wan_lora_weights import LORA_NAMES, LoRAConfig, abstract_lora, lora_table
from kvpo_jax.convert.wan_weights import BLOCK_LINEARS, DIFFUSERS_BLOCK, to_official, wan_table
from kvpo_jax.errors import MissingPackageError, UsageError
from kvpo_jax.runtime import checkpoint, command, sharding, weight_file
from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.weight_file import Stored, write_safetensors
from kvpo_jax.runtime.workdir import has_checkpoint, trained_config
from kvpo_jax.state import POLICIES, policy_of, saved_state
from kvpo_jax.types import PyTree

FORMATS = (*LORA_NAMES, "merged")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """An adapter to export.

    Attributes:
      config: its sizes.
      tensors: path in the collection `lora` -> tensor.
      base: the converted weights that it was trained on; None if that is not known.
    """

    config: LoRAConfig
    tensors: Mapping[str, np.ndarray]
    base: Path | None


# ---------------------------------------------------------------- reading


def from_run(workdir: Path, policy: str, which: checkpoint.Which = checkpoint.NEWEST) -> LoRA:
    """The LoRA of a policy in one of a run's checkpoints."""
    if not has_checkpoint(workdir):
        raise UsageError(
            f"{workdir} is not the directory of a run with checkpoints: there is none in"
            f" {workdir / 'checkpoints'}"
        )
    config = trained_config(workdir, which)
    state = saved_state(workdir, config, sharding.make_mesh(1, 1, 1, 1), which)
    print(f"{policy} policy of {workdir} after iteration {int(state.iteration)}", flush=True)
    lora, model = jax.device_get(policy_of(state, policy)), config.model
    cfg = LoRAConfig(
        model.dim, model.ffn_dim, model.num_layers, config.lora.rank, config.lora.alpha
    )
    base = Path(config.weights) if config.weights else backbone.shipped_weights(config)
    return LoRA(cfg, flax.traverse_util.flatten_dict(lora, sep="/"), base)


def from_files(text: str) -> LoRA:
    """The LoRA of a converted file, or the sum of several (`adapters.parse`)."""

    def read(adapter: adapters.Adapter) -> PyTree:
        return checkpoint.load_weights(adapter.path, abstract_lora(LoRAConfig(**adapter.made)))

    found = adapters.parse(text)
    lora = jax.device_get(adapters.summed(found, read))
    cfg = LoRAConfig(**adapters.sizes(found))
    return LoRA(cfg, flax.traverse_util.flatten_dict(lora, sep="/"), None)


# ---------------------------------------------------------------- writing


def state_dict(lora: LoRA, format: str) -> dict[str, np.ndarray]:
    """The tensors of a LoRA file by name, in a format of LORA_NAMES."""
    cfg, rename = lora.config, LORA_NAMES[format]
    state = {
        rename(name): to_official(path, lora.tensors[path][layer])
        for name, (path, layer) in lora_table(cfg.num_layers).items()
    }
    if format == "comfyui":
        modules = {name.rsplit(".", 2)[0] for name in state}
        state |= {f"{module}.alpha": np.asarray(cfg.alpha, np.float32) for module in modules}
    return state


def peft_config(cfg: LoRAConfig, modules: list[str]) -> dict[str, Any]:
    """The fields of peft's LoraConfig that matter, for an adapter of these modules."""
    return {
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "target_modules": modules,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def write_peft(lora: LoRA, output: Path) -> None:
    """Writes a folder that peft loads, or the .pt that LongLive and KVPO load."""
    state = state_dict(lora, "peft")
    if output.suffix == ".pt":
        _write_torch({"generator_lora": state}, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    fields = peft_config(lora.config, list(BLOCK_LINEARS))
    config = {"peft_type": "LORA", "inference_mode": True, **fields}
    write_json(config, output / "adapter_config.json")
    checkpoint.save_weights(output / "adapter_model.safetensors", state, {"format": "pt"})


def _write_torch(parts: Mapping[str, Mapping[str, np.ndarray]], output: Path) -> None:
    """Writes state dicts by name as a PyTorch checkpoint."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            "writing a .pt needs PyTorch: pip install 'kvpo_jax[convert]'"
        ) from error

    def tensor(x: np.ndarray) -> Any:
        x = np.array(x, order="C")
        if x.dtype == ml_dtypes.bfloat16:  # torch does not take bfloat16 from NumPy
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    tensors = {
        part: {name: tensor(x) for name, x in state.items()} for part, state in parts.items()
    }
    # A file that Python opens names the reason where it cannot be written; torch's own does not.
    with replacing(output) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def write_diffusers(lora: LoRA, output: Path) -> None:
    """Writes a file for `load_lora_weights` and `load_lora_adapter`.

    They read rank and alpha in its metadata.
    """
    config = peft_config(lora.config, [DIFFUSERS_BLOCK[module] for module in BLOCK_LINEARS])
    adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    metadata = {"format": "pt", "lora_adapter_metadata": adapter}
    checkpoint.save_weights(output, state_dict(lora, "diffusers"), metadata)


def write_comfyui(lora: LoRA, output: Path) -> None:
    """Writes a file for ComfyUI's LoRA loaders, with alpha beside every pair of matrices."""
    checkpoint.save_weights(output, state_dict(lora, "comfyui"), {"format": "pt"})


WRITERS = {"peft": write_peft, "diffusers": write_diffusers, "comfyui": write_comfyui}


# ---------------------------------------------------------------- merging


def write_merged(lora: LoRA, base: Path, output: Path) -> None:
    """Writes converted weights with W + alpha / rank A B in place of W.

    The output has official names, and the number formats of the base. In a .pt, which is made in
    memory, they begin with "model." and are the part "generator", as the inference code of LongLive
    and KVPO loads them.

    Args:
      lora: the adapter.
      base: the converted weights.
      output: a .safetensors or a .pt.
    """
    file = weight_file.open_file(base)
    params = file.tensors
    table = wan_table(lora.config.num_layers)
    check_names(str(base), params, {path for path, _ in table.values()})
    _check_fit(lora, params, base)
    for name in params:
        file.read(name)  # an error if it is damaged
    patch = json.loads(file.metadata.get("config", "{}")).get("patch", (1, 2, 2))

    def make(path: str, layer: int | None) -> np.ndarray:
        return to_official(path, _merged(lora, params, path, layer), patch)

    if output.suffix == ".pt":
        state = {
            f"model.{name}": make(path, layer).astype(params[path].dtype)
            for name, (path, layer) in table.items()
        }
        _write_torch({"generator": state}, output)
        return
    stored = []
    for name, (path, layer) in table.items():
        array = params[path] if layer is None else params[path][layer]
        shape = to_official(path, array, patch).shape
        stored.append(Stored(name, shape, array.dtype, (functools.partial(make, path, layer),)))
    write_safetensors(output, stored, {"format": "pt"})


def _merged(
    lora: LoRA, params: Mapping[str, np.ndarray], path: str, layer: int | None
) -> np.ndarray:
    """A tensor of the base with its update, if the LoRA has one for it."""
    if layer is None:
        return params[path]
    cfg, module, array = lora.config, path.removesuffix("/kernel"), params[path][layer]
    if not path.endswith("/kernel") or f"{module}/a" not in lora.tensors:
        return array
    update = lora.tensors[f"{module}/a"][layer] @ lora.tensors[f"{module}/b"][layer]
    return array.astype(np.float32) + cfg.alpha / cfg.rank * update


def _check_fit(lora: LoRA, params: Mapping[str, np.ndarray], base: Path) -> None:
    """UsageError unless the kernels of the base have the shapes that the LoRA is for."""
    for path in BLOCK_LINEARS.values():
        layers, fan_in, _ = lora.tensors[f"{path}/a"].shape
        expected = (layers, fan_in, lora.tensors[f"{path}/b"].shape[2])
        shape = params[f"{path}/kernel"].shape
        if shape != expected:
            raise UsageError(f"{base}: {path}/kernel is {shape}, the LoRA is for {expected}")


# ---------------------------------------------------------------- the command


def export(
    output: Path,
    format: str,
    workdir: Path | None = None,
    lora: Path | str | None = None,
    policy: str = "online",
    base: Path | None = None,
    iteration: checkpoint.Which = checkpoint.NEWEST,
) -> None:
    """Exports the LoRA of a run or of converted files; the arguments are the flags.

    Raises:
      UsageError: the flags or the files do not go together. Nothing is written then.
    """
    if (workdir is None) == (lora is None):
        raise UsageError("expected either --workdir or --lora")
    if lora is not None and iteration != checkpoint.NEWEST:
        raise UsageError(f"--iteration={iteration} is of --workdir; --lora is a file")
    if format == "peft" and output.suffix not in ("", ".pt"):
        raise UsageError(f"--output={output}: peft has a folder, or LongLive a .pt")
    if format == "merged" and output.suffix not in (".pt", ".safetensors"):
        raise UsageError(
            f"--output={output}: merged weights end in .pt, as LongLive loads them, or .safetensors"
        )
    if format in ("diffusers", "comfyui") and output.suffix != ".safetensors":
        raise UsageError(f"--output={output} does not end in .safetensors")
    if workdir is not None:
        adapter = from_run(workdir, policy, iteration)
    else:
        assert lora is not None  # one of the two is given
        adapter = from_files(str(lora))
    base = base or adapter.base
    if format != "merged":
        WRITERS[format](adapter, output)
    elif base is not None:
        write_merged(adapter, base, output)
    else:
        raise UsageError(
            "--format=merged needs --base, the converted weights that the LoRA belongs to"
        )
    cfg = adapter.config
    print(
        f"wrote {output}: {format}, rank {cfg.rank}, alpha {cfg.alpha:g}, {cfg.num_layers} layers",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    workdir, base = (Path(x) if x is not None else None for x in (given.workdir, given.base))
    output = Path(given.output)
    export(output, given.format, workdir, given.lora, given.policy, base, given.iteration)


def define_flags() -> None:
    """The flags of the command."""
    command.define_path(
        "output",
        None,
        "a .safetensors; for peft a folder or LongLive's lora.pt; merged: a .pt too",
        required=True,
    )
    flags.DEFINE_enum(
        "format",
        None,
        FORMATS,
        "what is written; merged is the base with the LoRA in it",
        required=True,
    )
    command.define_path("workdir", None, "run directory")
    command.define_iteration()
    flags.DEFINE_string(
        "lora", None, "or a LoRA that kvpo-convert wrote, or a sum of several: A:1.0,B:0.5"
    )
    flags.DEFINE_enum("policy", "online", list(POLICIES), "the policy of the run")
    command.define_path(
        "base", None, "converted weights to merge with; those of the run by default"
    )


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.convert.export_lora", define_flags, main)


if __name__ == "__main__":
    cli()
