"""Takes a LoRA that was trained here, or a converted one, back to PyTorch.

    python tools/export_lora.py --workdir=runs/longlive-... --format=peft --output=lora.pt         # for LongLive
    python tools/export_lora.py --workdir=runs/longlive-... --format=peft --output=lora_folder     # for peft
    python tools/export_lora.py --lora=weights/lora.safetensors --format=diffusers --output=lora.safetensors
    python tools/export_lora.py --workdir=runs/longlive-... --policy=ema --format=merged --output=generator.safetensors

Numbers are written as they are, in float32; tools/convert_weights.py reads every format back to the same bits.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import safetensors
from absl import app, flags
from convert_weights import Stored, read_safetensors, write_safetensors

from kvpo_jax import backbone, checkpoint, sharding, train
from kvpo_jax import config as config_lib
from kvpo_jax.models import wan_weights
from kvpo_jax.models.wan_weights import LoRAConfig

# Policy -> field of the TrainState.
POLICIES = {"online": "lora", "ema": "ema", "reference": "reference"}
FORMATS = (*wan_weights.LORA_NAMES, "merged")

Flat = Mapping[str, np.ndarray]  # path of the collection `lora` -> tensor


# ---------------------------------------------------------------- reading


def from_run(workdir: Path, policy: str) -> tuple[LoRAConfig, Flat, Path]:
    """The LoRA of a run's newest checkpoint, and the base weights that it was trained on."""
    for needed in (workdir / "config.json", workdir / "checkpoints"):
        if not needed.exists():
            raise ValueError(f"{workdir} is not the directory of a run with checkpoints: there is no {needed}")
    config = config_lib.load_saved(workdir / "config.json")
    mesh = sharding.make_mesh(1, 1, config.train.prompts_per_iteration, config.rollout.branches)
    state = jax.eval_shape(lambda: train.init_state(config, train.make_optimiser(config.train), mesh))
    iteration, state = train.newest_state(workdir, state)
    print(f"{policy} policy of {workdir} after iteration {iteration}", flush=True)
    model, lora = config.model, jax.device_get(getattr(state, POLICIES[policy]))
    cfg = LoRAConfig(model.dim, model.ffn_dim, model.num_layers, config.lora.rank, config.lora.alpha)
    return cfg, flax.traverse_util.flatten_dict(lora, sep="/"), Path(config.weights or backbone.TOY_WEIGHTS)


def from_file(path: Path) -> tuple[LoRAConfig, Flat]:
    """The LoRA in a converted file."""
    cfg = LoRAConfig(**checkpoint.metadata_config(path, "wan_lora"))
    lora = jax.device_get(checkpoint.load_weights(path, wan_weights.abstract_lora(cfg)))
    return cfg, flax.traverse_util.flatten_dict(lora, sep="/")


# ---------------------------------------------------------------- writing


def state_dict(cfg: LoRAConfig, lora: Flat, format: str) -> dict[str, np.ndarray]:
    """The tensors of a LoRA file of this format, by name."""
    rename = wan_weights.LORA_NAMES[format]
    state = {
        rename(name): wan_weights.to_official(path, lora[path][layer])
        for name, (path, layer) in wan_weights.lora_table(cfg.num_layers).items()
    }
    if format == "comfyui":
        modules = {name.rsplit(".", 2)[0] for name in state}
        state |= {f"{module}.alpha": np.float32(cfg.alpha) for module in modules}
    return state


def peft_config(cfg: LoRAConfig, modules: list[str]) -> dict[str, object]:
    """The fields of peft's LoraConfig that matter."""
    return {"r": cfg.rank, "lora_alpha": cfg.alpha, "target_modules": modules, "bias": "none", "lora_dropout": 0.0}


def write_peft(cfg: LoRAConfig, lora: Flat, output: Path) -> None:
    """A folder that peft loads, or the .pt that LongLive and KVPO load."""
    state = state_dict(cfg, lora, "peft")
    if output.suffix != ".pt":
        output.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "inference_mode": True, **peft_config(cfg, list(wan_weights.BLOCK_LINEARS))}
        config_lib.write_json(config, output / "adapter_config.json")
        checkpoint.save_weights(output / "adapter_model.safetensors", state, {"format": "pt"})
        return
    try:
        import torch
    except ImportError as error:
        raise ValueError("writing a .pt needs PyTorch: pip install 'kvpo_jax[convert]'") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    tensors = {name: torch.from_numpy(np.array(tensor, order="C")) for name, tensor in state.items()}
    try:
        torch.save({"generator_lora": tensors}, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def write_diffusers(cfg: LoRAConfig, lora: Flat, output: Path) -> None:
    """A file for `load_lora_weights` and `load_lora_adapter`, which read rank and alpha in the metadata."""
    config = peft_config(cfg, [wan_weights.DIFFUSERS_BLOCK[module] for module in wan_weights.BLOCK_LINEARS])
    adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    metadata = {"format": "pt", "lora_adapter_metadata": adapter}
    checkpoint.save_weights(output, state_dict(cfg, lora, "diffusers"), metadata)


def write_comfyui(cfg: LoRAConfig, lora: Flat, output: Path) -> None:
    """A file for ComfyUI's LoRA loaders, with alpha beside every pair of matrices."""
    checkpoint.save_weights(output, state_dict(cfg, lora, "comfyui"), {"format": "pt"})


def write_merged(cfg: LoRAConfig, lora: Flat, base: Path, output: Path) -> None:
    """The converted weights `base` with W + alpha / rank A B for W, under official names and in the types of `base`."""
    params = {t.name: t.array for t in read_safetensors(base)}
    table = wan_weights.wan_table(cfg.num_layers)
    wan_weights.check_names(str(base), params, {path: None for path, _ in table.values()})
    for path in wan_weights.BLOCK_LINEARS.values():
        layers, fan_in, _ = lora[f"{path}/a"].shape
        expected = (layers, fan_in, lora[f"{path}/b"].shape[2])
        if params[f"{path}/kernel"].shape != expected:
            raise ValueError(f"{base}: {path}/kernel is {params[f'{path}/kernel'].shape}, the LoRA is for {expected}")
    with safetensors.safe_open(base, framework="numpy") as file:
        patch = json.loads((file.metadata() or {}).get("config", "{}")).get("patch", (1, 2, 2))

    def tensor(path: str, layer: int | None) -> np.ndarray:
        array, module = params[path] if layer is None else params[path][layer], path.removesuffix("/kernel")
        if path.endswith("/kernel") and f"{module}/a" in lora:
            update = lora[f"{module}/a"][layer] @ lora[f"{module}/b"][layer]
            array = array.astype(np.float32) + cfg.alpha / cfg.rank * update
        return wan_weights.to_official(path, array, patch)

    stored = []
    for name, (path, layer) in table.items():
        array = params[path] if layer is None else params[path][layer]
        shape = wan_weights.to_official(path, array, patch).shape
        stored.append(Stored(name, shape, array.dtype, (functools.partial(tensor, path, layer),)))
    write_safetensors(output, stored, {"format": "pt"})


# ---------------------------------------------------------------- the command


def export(
    output: Path | str,
    format: str,
    workdir: Path | str | None = None,
    lora: Path | str | None = None,
    policy: str = "online",
    base: Path | str | None = None,
) -> None:
    """What the command does; ValueError names what is wrong. The arguments are the flags."""
    output = Path(output)
    if (workdir is None) == (lora is None):
        raise ValueError("expected either --workdir or --lora")
    if format == "peft" and output.suffix not in ("", ".pt"):
        raise ValueError(f"--output={output}: peft has a folder, or LongLive a .pt")
    if format != "peft" and output.suffix != ".safetensors":
        raise ValueError(f"--output={output} does not end in .safetensors")
    cfg, tensors, trained_on = from_run(Path(workdir), policy) if workdir else (*from_file(Path(lora)), None)
    base = base or trained_on
    if format == "merged" and base is None:
        raise ValueError("--format=merged needs --base, the converted weights that the LoRA belongs to")
    writers = {"peft": write_peft, "diffusers": write_diffusers, "comfyui": write_comfyui}
    if format == "merged":
        write_merged(cfg, tensors, Path(base), output)
    else:
        writers[format](cfg, tensors, output)
    print(f"wrote {output}: {format}, rank {cfg.rank}, alpha {cfg.alpha:g}, {cfg.num_layers} layers", flush=True)


def main(arguments: list[str]) -> None:
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected argument {arguments[1]!r}")
        export(given.output, given.format, given.workdir, given.lora, given.policy, given.base)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "a .safetensors; for peft a folder, or LongLive's .pt", required=True)
    flags.DEFINE_enum("format", None, FORMATS, "of the output; merged is the base with the LoRA in it", required=True)
    flags.DEFINE_string("workdir", None, "run directory, whose newest checkpoint is read")
    flags.DEFINE_string("lora", None, "or a LoRA that tools/convert_weights.py wrote")
    flags.DEFINE_enum("policy", "online", list(POLICIES), "of the run")
    flags.DEFINE_string("base", None, "converted weights to merge with; those of the run by default")
    app.run(main)
