"""What a run costs in memory, before it starts: from shapes, and from the compiled programs, without any accelerator.

    python tools/plan_memory.py --config=configs/longlive.py --devices=8 --memory_gb=141
    python tools/plan_memory.py --config=configs/longlive.py --config.train.micro_batch=8 --compile --target=h200

The first table is what lies on a device in each stage of an iteration, by arithmetic on shapes; it takes seconds. With
--compile the programs are compiled ahead of time, and XLA says what each needs besides; nothing is allocated.
--target=h200 compiles for that GPU, which need not be there: JAX's CUDA packages are enough (pip install
'kvpo_jax[cuda12]'). Otherwise the programs are compiled for CPU devices. XLA's CPU backend has no bfloat16 products and
would keep float32 copies of whole caches, so a bfloat16 model is compiled in float32 and half of what it needs shown. A
run that does not fit is told which setting would help.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_CONFIG = flags.DEFINE_string("config", "configs/longlive.py", "FILE[:PRESET]")
_DEVICES = flags.DEFINE_integer("devices", 8, "devices of the mesh")
_MEMORY = flags.DEFINE_float("memory_gb", 141.0, "memory of one device, 1e9 bytes (H200: 141)")
_COMPILE = flags.DEFINE_bool("compile", False, "compile the programs too; minutes at full size")
_TARGET = flags.DEFINE_enum("target", "cpu", ["cpu", "h100", "h200"], "what they are compiled for")
_JSON = flags.DEFINE_string("json", "", "file to write the figures to")

GB = 1e9

# What XLA has to know of a GPU; of these two only memory and its bandwidth differ.
GPUS = {"h100": (3_352_320_000_000, 84_929_347_584), "h200": (4_800_000_000_000, 150_754_820_096)}
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


class Stage(NamedTuple):
    """A moment of an iteration.

    Attributes:
      parts: names of what lies on a device.
      program: (jitted function, abstract arguments) that runs then, if it is counted.
    """

    parts: tuple[str, ...]
    program: tuple[Callable, tuple] | None = None


def target_devices(target: str, count: int) -> list:
    """Devices to compile for: CPUs of this process, or GPUs that are described and need not be there.

    Raises:
      ValueError: JAX's CUDA packages are not installed.
    """
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()[:count]
    bandwidth, memory = GPUS[target]
    try:
        description = GPU.format(bandwidth=bandwidth, memory=memory, name=target)
        return topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{count}"
        ).devices  # fmt: skip
    except NotImplementedError as error:
        raise ValueError(f"--target={target} needs JAX's CUDA packages: pip install 'kvpo_jax[cuda12]'") from error


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device: of each, its largest shard."""
    import jax
    import numpy as np

    def size(x) -> int:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def temporary_bytes(function: Callable, arguments: tuple) -> int:
    """What the compiled program needs on one device besides its arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def plan(config, devices: Sequence) -> tuple[dict[str, Any], dict[str, Stage]]:
    """(part -> its abstract arrays, title -> Stage) of an iteration and of the held-out evaluation before it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from kvpo_jax import backbone, checkpoint, decoder, heldout, rollout, sharding, train
    from kvpo_jax.models import wan_vae
    from kvpo_jax.models.wan import init_variables, wan_config
    from kvpo_jax.types import ReplayTuples

    cfg, video = wan_config(config), config.video
    p, g = rollout.prompts_at_once(config), rollout.branches_at_once(config)
    mesh = rollout.make_mesh(config, devices)
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

    # What a batch of prompts begins with.
    def begun(count: int) -> tuple:
        embeddings = array((count, m, cfg.text_len, cfg.text_dim), jnp.float32, prompts)
        text = placed(jax.eval_shape(stages.encode_text, variables, embeddings), sharding.TEXT)
        history = jax.eval_shape(lambda: stages.blank(count))
        key = rollout.NoiseKey(placed(jax.eval_shape(jax.random.key, 0), one), array((count,), jnp.int32, one))
        return embeddings, text, placed(history, sharding.history_spec(config.window.sink, bank)), key

    embeddings, text, history, key = begun(p)
    page = placed(jax.eval_shape(stages.fork, history), sharding.page_spec(config.window.sink, bank))
    block = (video.block_frames, video.height, video.width, cfg.channels)
    selected = array((p, g, rollout.routing.window(config).routed), jnp.int32, one)
    plain = sharding.replay_spec(config.window.sink)
    anchor_page = jax.eval_shape(lambda page: rollout.kv_cache.trajectory(page, 0).replace(bank=None), page)
    branches = config.rollout.branches
    tuples = ReplayTuples(
        z=array((p, branches, w, s, *block), jnp.float32, each),
        u=array((p, branches, w, s, *block), jnp.float32, each),
        history=placed(history.replace(bank=None), plain.history),
        page=placed(anchor_page, plain.page),
        rows=array((w, slots), jnp.int32, one),
        start_frame=array((w,), jnp.int32, one),
        segment=array((w,), jnp.int32, one),
        noise=array((p, w, *block), jnp.float32, prompts),
        bank=jax.tree.map(lambda x: array((*x.shape[:2], w, *x.shape[2:]), x.dtype, jax.P(None, "data")), history.bank),
    )
    vector = array((p, branches), jnp.float32, one)
    experience = train.Experience(
        tuples=tuples, embeddings=embeddings, text=text, advantages=vector, safe=array((p,), bool, one),
        energies_old=vector, energies_ref=vector, on_policy=array((), bool, one),
    )  # fmt: skip

    frames = video.blocks * video.block_frames
    toy = config.backbone == "toy"
    pixel_frames, scale = (frames, 2) if toy else (4 * frames - 3, 8)
    pixels = (pixel_frames, scale * video.height, scale * video.width, 3)
    of_all = lambda shape, dtype: [array((p, branches, *shape), dtype, each), array((p, 1, *shape), dtype, prompts)]
    micro_batches = config.train.prompts_per_iteration // p
    parts = {
        "base weights": params,
        "LoRA: policy, old, reference, EMA": [lora] * 4,
        "optimiser": state.optimiser,
        "gradient of LoRA": [lora] * min(2, micro_batches),  # of a micro-batch, and the sum of those before
        "text keys and values": text,
        "history (shared by the branches)": history,
        "pages (one per trajectory)": page,
        "replay tuples and the anchor's page": tuples.replace(history=None),
        "latents of all trajectories": of_all((frames, *block[1:]), jnp.float32),
        "pixels of all trajectories": of_all(pixels, jnp.float32 if toy else jnp.uint8),
    }

    # The held-out evaluation has videos of its own, one per prompt.
    count = heldout.batch_size(config, mesh)
    _, held_text, held_history, held_key = begun(count)
    latents = array((count, 1, frames, *block[1:]), jnp.float32, prompts)
    parts |= {
        "held out: text, history": (held_text, held_history),
        "held out: latents": latents,
        "held out: pixels": array((count, 1, *pixels), jnp.float32 if toy else jnp.uint8, prompts),
    }
    held_out, decode, vae_memory, vae_weights = "held out: decoder's memory", None, "decoder's memory", "decoder"
    if not toy:
        vae = wan_vae.VAEConfig()
        if config.paths.vae:
            vae = wan_vae.config_from_dict(checkpoint.metadata_config(config.paths.vae, "wan_vae"))
        parts[vae_weights] = weights = placed(wan_vae.abstract_params(vae), one)
        memory = jax.eval_shape(
            partial(wan_vae.decode, vae), weights, jax.ShapeDtypeStruct((1, 1, *block[1:3], vae.z_dim), jnp.float32)
        )[1]
        at_once = mesh.shape["branch"] if branches % mesh.shape["branch"] == 0 else 1
        spec = decoder.spec_of(mesh, at_once)
        remembered = lambda p, t, spec: jax.tree.map(lambda x: array((p, t, *x.shape[1:]), x.dtype, spec), memory)
        in_turn = remembered(p, at_once, spec)
        parts[vae_memory] = remembered(p, 1, prompts), in_turn  # the anchor's at the fork, and that of a branch
        parts[held_out] = remembered(count, 1, prompts)
        step = decoder.make_step(partial(backbone.decode, vae), mesh, video.block_frames)
        decode = step, (weights, array((p, at_once, frames, *block[1:]), jnp.float32, spec), 30, in_turn)

    standing = ["base weights", "LoRA: policy, old, reference, EMA", "optimiser", vae_weights]
    standing += ["gradient of LoRA"] * (micro_batches > 1)
    begin = [*standing, "text keys and values", "history (shared by the branches)", "latents of all trajectories"]
    rolled = [*begin, "replay tuples and the anchor's page"]
    shown = [*rolled, "pixels of all trajectories"]
    evaluated = [*standing, "held out: latents"]
    generate = lambda text, history, key: (stages.shared_block, (variables, text, 0, history, key, 30))
    branch_block = stages.branch_block, (variables, text, 0, history, page, selected, True, key, 30)
    energies = jax.jit(train.make_energies(config, mesh))
    held_generate = generate(held_text, held_history, held_key)
    return parts, {
        "held out: a block": Stage((*evaluated, "held out: text, history"), held_generate),
        "held out: decoding": Stage((*evaluated, held_out, "held out: pixels")),
        "rollout: a block of the prefix": Stage(tuple(begin), generate(text, history, key)),
        "rollout: a block of all branches": Stage((*rolled, "pages (one per trajectory)"), branch_block),
        "decoding: a block": Stage((*shown, vae_memory), decode),
        "scoring": Stage(tuple(shown)),
        "replay: forward": Stage(tuple(shown), (energies, (params, lora, embeddings, text, tuples))),
        "replay: gradient": Stage(
            tuple(dict.fromkeys([*rolled, "gradient of LoRA"])),
            (train.make_gradient(config, mesh), (lora, params, experience)),
        ),
    }


TEXT = 512  # tokens of a reward model's instruction and of a long prompt


def reward_models(config, device: Any, wide: bool) -> dict[str, tuple[Any, str, tuple[Callable, tuple]]]:
    """scorer -> (its weights, title, (its scoring step, abstract arguments)), of the config's learned rewards.

    Sizes are those of the converted file if the config names it, else those of the published model; `wide` is float32.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from kvpo_jax import checkpoint
    from kvpo_jax.models import qwen2_vl, reward_model
    from kvpo_jax.rewards import hpsv3, learned, preprocess, registry, videoalign

    published = {"hpsv3": reward_model.HPSV3, "videoalign": reward_model.VIDEOALIGN}
    resize = {"hpsv3": preprocess.resize_pil, "videoalign": preprocess.resize_torch}
    mesh = jax.sharding.Mesh(np.asarray([device]), "data")  # every device scores its own rows
    place = NamedSharding(mesh, jax.P())
    shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    height, width = 8 * config.video.height, 8 * config.video.width
    segment = 4 * config.video.blocks * config.video.block_frames // (len(config.video.switch_frames) + 1)
    out = {}
    for name in registry.names_of(f"{config.reward.scorer},{config.eval.scorer}"):
        if name not in published:
            continue
        cfg = published[name]
        if path := config.paths[name]:
            cfg = reward_model.config_from_dict(type(cfg), checkpoint.metadata_config(path, name))
        clips, frames = hpsv3.BATCH, 1
        if name == "videoalign":
            looked_at = videoalign.sampled_frames(cfg, config.reward.clip_frames or segment, 16.0)
            clips, frames = videoalign.BATCH, len(looked_at)
        tokens = cfg.vision.tokens(preprocess.grid(cfg, frames, height, width)) + TEXT
        batch = qwen2_vl.Tokens(
            shaped((clips, tokens), jnp.int32), shaped((clips,), jnp.int32), shaped((clips, 1), jnp.int32)
        )
        compiled = dataclasses.replace(cfg, dtype="float32") if wide else cfg
        weights = lambda cfg: jax.tree.map(lambda x: shaped(x.shape, x.dtype), reward_model.abstract_params(cfg))
        step = learned.scoring_step(compiled, mesh, resize[name])
        clip = shaped((clips, frames, height, width, 3), jnp.uint8)
        title = f"scoring: {name}, {clips} clips of {frames}"
        out[name] = weights(cfg), title, (step, (weights(compiled), batch, clip))
    return out


def advice(stage: str, parts: dict[str, float], temporary: float, config) -> str:
    """What helps against the largest of what lies there in a stage."""
    helps = {
        "history": "window.cache_frames smaller, train.micro_batch, or more devices over mesh.data",
        "pages": "rollout.branch_chunk, or more devices over mesh.branch",
        "pixels": "train.micro_batch, or more devices",
        "decoder's": "train.micro_batch, or more devices",
        "held out": "eval.batch smaller",
        "LoRA": "lora.rank smaller",
        "reward": "reward.resident=False, which loads a reward model whenever it scores",
        "base": "model.dtype=bfloat16",
    }
    if temporary > max(parts.values()):
        if stage.startswith("replay"):
            return f"replay.chunk below {config.replay.chunk}, model.remat=block"
        return "train.micro_batch or rollout.branch_chunk, or more devices"
    largest = max(parts, key=parts.get)
    return next((text for start, text in helps.items() if largest.startswith(start)), "more devices")


def main(arguments: list[str]) -> None:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_DEVICES.value}"
    )
    import jax

    from kvpo_jax import config as config_lib

    jax.config.update("jax_platforms", "cpu")
    # What was compiled for devices that are not there cannot be read again.
    jax.config.update("jax_enable_compilation_cache", _TARGET.value == "cpu")

    half = False
    try:
        config = config_lib.resolve(_CONFIG.value, None, arguments[1:])
        devices = target_devices(_TARGET.value, _DEVICES.value)
        compiled_for = config.copy_and_resolve_references()
        if _TARGET.value == "cpu":
            config_lib.use_compilation_cache()
            half = config.model.dtype == "bfloat16"
            compiled_for.model.dtype = "float32"
        elif config.model.attention == "auto":
            compiled_for.model.attention = "cudnn"  # "auto" asks the devices of this process
        parts, stages = plan(config, devices)
        compiled = plan(compiled_for, devices)[1] if _COMPILE.value else {}
        programs = {title: stage.program for title, stage in compiled.items()}
        rewards = reward_models(config, devices[0], wide=_TARGET.value == "cpu")
    except ValueError as error:
        sys.exit(f"error: {error}")

    scoring = stages.pop("scoring")
    for name, (weights, title, program) in rewards.items():
        parts[f"reward {name}"] = weights
        stages[title] = scoring
        if _COMPILE.value:
            programs[title] = program
    names = [f"reward {name}" for name in rewards]
    resident = {name: bytes_of(tree) / GB for name, tree in parts.items()}
    print(f"{_CONFIG.value} on {_DEVICES.value} devices; 1e9 bytes on each device\n")
    for name, size in resident.items():
        print(f"  {name:42s} {size:9.2f}")

    print(
        f"\n  {'stage':42s} {'lies there':>10s} {'temporary':>10s} {'in all':>8s}" + "   compiled in" * _COMPILE.value
    )
    peaks, worst = {}, None
    for title, stage in stages.items():
        there = {name: resident[name] for name in stage.parts if name in resident}
        if config.reward.resident or title.startswith("scoring"):
            there |= {name: resident[name] for name in names}
        temporary, note = 0.0, ""
        if program := programs.get(title):
            begin = time.monotonic()
            # The decoder is in float32 and the reward models in bfloat16, whatever the model is in.
            halved = half and not title.startswith("decoding") or _TARGET.value == "cpu" and title.startswith("scoring")
            temporary = temporary_bytes(*program) / GB * (0.5 if halved else 1.0)
            note = f"   {time.monotonic() - begin:.0f} s"
        peaks[title] = sum(there.values()) + temporary
        shown = f"{temporary:10.2f}" if note else f"{'':10s}"
        print(f"  {title:42s} {sum(there.values()):10.2f} {shown} {peaks[title]:8.2f}{note}", flush=True)
        if worst is None or peaks[title] > peaks[worst[0]]:
            worst = title, there, temporary
    if rewards and not config.reward.resident:
        print(
            f"  (reward.resident=False: {sum(resident[name] for name in names):.2f} of rewards are there to score only)"
        )
    largest = peaks[worst[0]]
    besides = "" if _COMPILE.value else ", without what the programs need besides (--compile)"
    if largest > _MEMORY.value:
        print(f"\ndoes not fit into {_MEMORY.value:.0f} GB{besides}; what helps: {advice(*worst, config)}")
    else:
        print(f"\nfits into {_MEMORY.value:.0f} GB by these figures: {largest:.2f} at most{besides}")
    if _JSON.value:
        figures = {"config": _CONFIG.value, "devices": _DEVICES.value, "resident_gb": resident, "stage_gb": peaks}
        Path(_JSON.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    from kvpo_jax.config import parse_flags

    app.run(main, flags_parser=parse_flags)
