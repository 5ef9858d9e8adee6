"""What a run costs in memory, before it starts: from shapes, and from the compiled programs, without any accelerator.

    python tools/plan_memory.py --config=configs/longlive.py --devices=8 --memory_gb=141
    python tools/plan_memory.py --config=configs/longlive.py --config.train.prompts_per_iteration=8 --compile

The first table is arithmetic on shapes and takes seconds. With --compile the programs of an iteration are lowered and
compiled ahead of time for as many CPU devices, and XLA says what each needs besides its arguments; nothing is
allocated. XLA's CPU backend has no bfloat16 products and would keep float32 copies of whole caches, so a bfloat16 model
is compiled in float32 and half of what it needs is shown. A run that does not fit is told which setting would help.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

_CONFIG = flags.DEFINE_string("config", "configs/longlive.py", "FILE[:PRESET]")
_DEVICES = flags.DEFINE_integer("devices", 8, "devices of the mesh")
_MEMORY = flags.DEFINE_float("memory_gb", 141.0, "memory of one device, 1e9 bytes (H200: 141)")
_COMPILE = flags.DEFINE_bool("compile", False, "compile the programs too; minutes at full size")
_JSON = flags.DEFINE_string("json", "", "file to write the figures to")

GB = 1e9
PAGES, VAE = "pages (one per trajectory)", "VAE: memory of all trajectories"


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device: of each, its largest shard."""
    import jax
    import numpy as np

    def size(x) -> int:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def programs(config) -> tuple[dict[str, Any], dict[str, tuple[Callable, tuple]]]:
    """(part -> its abstract arrays, program -> (jitted function, abstract arguments)) of an iteration."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from kvpo_jax import checkpoint, rollout, sharding, train
    from kvpo_jax.models import wan_vae
    from kvpo_jax.models.wan import init_variables, wan_config
    from kvpo_jax.types import ReplayTuples

    cfg, video = wan_config(config), config.video
    p, g = config.train.micro_batch or config.train.prompts_per_iteration, config.rollout.branches
    at_once = rollout.branches_at_once(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.branch, p, at_once)
    stages, optimiser = rollout.build(config, mesh), train.make_optimiser(config.train)
    m, w = len(video.switch_frames) + 1, rollout.recorded_blocks(config)
    s, slots = len(config.sampler.steps), config.window.sink + config.window.past

    def placed(tree, spec):
        named = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, jax.P))
        if isinstance(named, NamedSharding):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named), tree)
        return jax.tree.map(lambda x, n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=n), tree, named)

    array = lambda shape, dtype, spec: placed(jax.ShapeDtypeStruct(shape, dtype), spec)
    one, prompts, each = sharding.REPLICATED, sharding.PROMPTS, sharding.TRAJECTORIES
    bank = config.window.bank > 0
    variables = placed(jax.eval_shape(partial(init_variables, cfg), jax.random.key(0)), one)
    params, lora = variables["params"], variables["lora"]
    state = train.TrainState(
        array((), jnp.int32, one), lora, lora, lora, lora, placed(jax.eval_shape(optimiser.init, lora), one)
    )
    embeddings = array((p, m, cfg.text_len, cfg.text_dim), jnp.float32, prompts)
    text = placed(jax.eval_shape(stages.encode_text, variables, embeddings), sharding.TEXT)
    history = placed(jax.eval_shape(lambda: stages.blank(p)), sharding.history_spec(config.window.sink, bank))
    page = placed(jax.eval_shape(stages.fork, history), sharding.page_spec(config.window.sink, bank))
    key = rollout.NoiseKey(placed(jax.eval_shape(jax.random.key, 0), one), array((p,), jnp.int32, one))
    block = (video.block_frames, video.height, video.width, cfg.channels)
    routed = config.window.sink + config.window.past - config.window.near
    routed -= config.window.sink if config.window.keep_sink else 0
    selected = array((p, at_once, routed), jnp.int32, one)
    plain = sharding.replay_spec(config.window.sink)
    anchor_page = jax.eval_shape(lambda page: rollout.kv_cache.trajectory(page, 0).replace(bank=None), page)
    tuples = ReplayTuples(
        z=array((p, g, w, s, *block), jnp.float32, each),
        u=array((p, g, w, s, *block), jnp.float32, each),
        history=placed(history.replace(bank=None), plain.history),
        page=placed(anchor_page, plain.page),
        rows=array((w, slots), jnp.int32, one),
        start_frame=array((w,), jnp.int32, one),
        segment=array((w,), jnp.int32, one),
        noise=array((p, w, *block), jnp.float32, prompts),
        bank=jax.tree.map(lambda x: array((*x.shape[:2], w, *x.shape[2:]), x.dtype, jax.P(None, "data")), history.bank),
    )
    vector = lambda dtype: array((p, g), dtype, each)
    experience = train.Experience(
        tuples=tuples, embeddings=embeddings, text=text, advantages=array((p, g), jnp.float32, one),
        safe=array((p,), bool, one), energies_old=vector(jnp.float32), energies_ref=vector(jnp.float32),
        on_policy=array((), bool, one),
    )  # fmt: skip

    frames = video.blocks * video.block_frames
    toy = config.backbone == "toy"
    pixel_frames, scale = (frames, 2) if toy else (4 * frames - 3, 8)
    pixels = (pixel_frames, scale * video.height, scale * video.width, 3)
    of_all = lambda shape, dtype: [array((p, g, *shape), dtype, each), array((p, 1, *shape), dtype, prompts)]
    parts = {
        "base weights": params,
        "LoRA: policy, old, reference, EMA": [lora] * 4,
        "optimiser": state.optimiser,
        "text keys and values": text,
        "history (shared by the branches)": history,
        PAGES: page,
        "replay tuples and the anchor's page": tuples.replace(history=None),
        "latents of all trajectories": of_all((frames, *block[1:]), jnp.float32),
        "pixels of all trajectories": of_all(pixels, jnp.float32 if toy else jnp.uint8),
    }
    if not toy:
        vae = wan_vae.VAEConfig()
        if config.paths.vae:
            vae = wan_vae.config_from_dict(checkpoint.metadata_config(config.paths.vae, "wan_vae"))
        weights = wan_vae.abstract_params(vae)
        latent = jax.ShapeDtypeStruct((1, 1, *block[1:3], vae.z_dim), jnp.float32)
        memory = jax.eval_shape(partial(wan_vae.decode, vae), weights, latent)[1]
        parts[VAE] = [of_all(x.shape[1:], x.dtype) for x in jax.tree.leaves(memory)]
        parts["VAE: weights"] = weights
    return parts, {
        "block of the prefix (generate)": (stages.shared_block, (variables, text, 0, history, key, 30)),
        "block of all branches": (
            stages.branch_block, (variables, text, 0, history, page, selected, True, key, 30),
        ),
        "replay forward": (
            jax.jit(train.make_energies(config, mesh)), (params, lora, embeddings, text, tuples),
        ),
        "gradient": (train.make_gradient(config, mesh), (lora, params, experience)),
    }  # fmt: skip


# Of a device's batch: clips, the frames of each that the model sees, and text and visual tokens, rounded up.
SCORED = {"hpsv3": (16, 1, 640), "videoalign": (8, 4, 1408)}


def reward_models(config) -> dict[str, tuple[Any, tuple[Callable, tuple]]]:
    """scorer -> (its weights, (its scoring step, abstract arguments)), of the config's learned rewards.

    Sizes are those of the converted file if the config names it, else those of the published model.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvpo_jax import checkpoint
    from kvpo_jax.models import qwen2_vl, reward_model
    from kvpo_jax.rewards import learned, preprocess, registry

    published = {"hpsv3": reward_model.HPSV3, "videoalign": reward_model.VIDEOALIGN}
    resize = {"hpsv3": preprocess.resize_pil, "videoalign": preprocess.resize_torch}
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "data")  # every device scores its own rows
    shaped, out = jax.ShapeDtypeStruct, {}
    for name in registry.names_of(f"{config.reward.scorer},{config.eval.scorer}"):
        if name in published:
            cfg = published[name]
            if path := config.paths[name]:
                cfg = reward_model.config_from_dict(type(cfg), checkpoint.metadata_config(path, name))
            clips, frames, width = SCORED[name]
            tokens = qwen2_vl.Tokens(
                shaped((clips, width), jnp.int32), shaped((clips,), jnp.int32), shaped((clips, 1), jnp.int32)
            )
            pixels = shaped((clips, frames, 8 * config.video.height, 8 * config.video.width, 3), jnp.uint8)
            wide = dataclasses.replace(cfg, dtype="float32")
            step = learned.scoring_step(wide, mesh, resize[name])
            out[name] = (
                reward_model.abstract_params(cfg), (step, (reward_model.abstract_params(wide), tokens, pixels)),
            )  # fmt: skip
    return out


def advice(rows: dict[str, float], config) -> str:
    """The setting that helps most against the largest part."""
    helps = {
        "history": "window.cache_frames smaller, train.micro_batch, or more devices over mesh.data",
        "pages": "rollout.branch_chunk, or more devices over mesh.branch",
        "pixels": "train.micro_batch, or more devices",
        "replay": f"replay.chunk below {config.replay.chunk}, model.remat=block",
        "gradient": f"replay.chunk below {config.replay.chunk}, model.remat=block",
        "block of": "train.micro_batch or rollout.branch_chunk, or more devices",
        "LoRA": "lora.rank smaller",
        "reward": "reward.resident=False, which loads a reward model whenever it scores",
        "base": "model.dtype=bfloat16",
    }
    largest = max(rows, key=rows.get)
    return next((text for start, text in helps.items() if largest.startswith(start)), "more devices")


def main(arguments: list[str]) -> None:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_DEVICES.value}"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    from kvpo_jax import config as config_lib

    try:
        config = config_lib.resolve(_CONFIG.value, None, arguments[1:])
        config_lib.use_compilation_cache()
        parts, compiled = programs(config)
        wide = config.copy_and_resolve_references()
        wide.model.dtype = "float32"
        as_float32 = programs(wide)[1] if _COMPILE.value else {}
        for name, (weights, program) in reward_models(config).items():
            parts[f"reward {name}"], title = weights, f"reward {name}, {SCORED[name][0]} clips"
            compiled[title] = (program[0], (weights, *program[1][1:]))
            if _COMPILE.value:
                as_float32[title] = program
    except ValueError as error:
        sys.exit(f"error: {error}")
    resident = {name: bytes_of(tree) / GB for name, tree in parts.items()}
    print(f"{_CONFIG.value} on {_DEVICES.value} devices; 1e9 bytes on each device\n")
    for name, size in resident.items():
        print(f"  {name:42s} {size:9.2f}")
    released = sum(size for name, size in resident.items() if name.startswith("reward ") and not config.reward.resident)
    # When videos are decoded, the pages are gone.
    together = sum(resident.values()) - released - min(resident[PAGES], resident.get(VAE, 0.0))
    print(f"  {'the most of it at once':42s} {together:9.2f}   of {_MEMORY.value:.0f}")
    if VAE in resident:
        print("  (pages or the VAE's memory, whichever is larger: the pages are gone when videos are decoded)")
    if released:
        print(f"  (without {released:.2f} of rewards, which are loaded to score and released)")
    print()
    peaks = {}
    if _COMPILE.value:
        print(
            f"  {'compiled program':42s} {'arguments':>9s} {'results':>9s} {'temporary':>9s} {'in all':>9s}   seconds"
        )
        for name, (function, args) in as_float32.items():
            share = 0.5 if config.model.dtype == "bfloat16" or name.startswith("reward ") else 1.0
            begin = time.monotonic()
            memory = function.lower(*args).compile().memory_analysis()
            given = bytes_of(compiled[name][1]) / GB
            out = share * (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GB
            temporary = share * memory.temp_size_in_bytes / GB
            peaks[name] = given + out + temporary
            seconds = time.monotonic() - begin
            print(
                f"  {name:42s} {given:9.2f} {out:9.2f} {temporary:9.2f} {peaks[name]:9.2f}   {seconds:.0f}", flush=True
            )
        print("  (a result that takes the place of an argument is not counted again)\n")
    largest = max([together, *peaks.values()])
    if largest > _MEMORY.value:
        print(f"does not fit into {_MEMORY.value:.0f} GB; what helps: {advice({**resident, **peaks}, config)}")
    else:
        print(f"fits into {_MEMORY.value:.0f} GB by these figures")
    if _JSON.value:
        figures = {"config": _CONFIG.value, "devices": _DEVICES.value, "resident_gb": resident, "program_gb": peaks}
        Path(_JSON.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    from kvpo_jax.config import parse_flags

    app.run(main, flags_parser=parse_flags)
