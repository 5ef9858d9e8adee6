"""What a run costs in memory, before it starts: from shapes, and from the compiled programs.

    kvpo-plan --config=configs/longlive.py --devices=8 --memory_gb=141
    kvpo-plan --config=configs/longlive.py --config.train.micro_batch=8 \\
        --compile --target=h200

The first table shows the arrays of an iteration, the second how much of them is resident on a
device in each stage. Both take seconds: the run's own functions are traced, and nothing is
allocated. With --compile the programs are compiled ahead of time, and XLA says how much memory each
of them needs besides. --target=h200 compiles for that GPU, which need not be there: JAX's CUDA
packages are enough (pip install 'kvpo_jax[cuda12]'). Otherwise the programs are compiled for CPU
devices. XLA's CPU backend has no bfloat16 products and would keep float32 copies of whole caches,
so what computes in bfloat16 is compiled in float32 there, and half of what it needs is shown. If a
run does not fit, the last line says which setting helps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import programs as programs_lib
from kvpo_jax import train
from kvpo_jax.algorithm import keys
from kvpo_jax.backbone import Backbone
from kvpo_jax.decoder import VideoDecoder, make_step, spec_of
from kvpo_jax.errors import UsageError
from kvpo_jax.models import qwen2_vl, reward_model, wan_vae
from kvpo_jax.models.wan import init_variables
from kvpo_jax.rewards import hpsv3, learned, preprocess, scorers, videoalign
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run, make_mesh
from kvpo_jax.runtime import checkpoint, command, progress, sharding, workdir
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.config import branches_at_once, heldout_at_once, prompts_at_once, wan_config
from kvpo_jax.state import TrainState, abstract_state
from kvpo_jax.types import Array, Experience, KVCache, PromptBatch, PyTree, Rollout, TextKV

GB = 1e9
START = 30  # first frame of the block that is planned; a program serves all blocks

# ---------------------------------------------------------------- devices

# What XLA has to know of a GPU. Of these two only the bandwidth and the size of the memory differ.
GPUS = {"h100": (3_352_320_000_000, 84_929_347_584), "h200": (4_800_000_000_000, 150_754_820_096)}
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
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


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Devices to compile for: CPUs of this process, or GPUs that need not be there.

    Raises:
      UsageError: JAX's CUDA packages are not installed.
    """
    if target == "cpu":
        return jax.devices()[:count]
    bandwidth, memory = GPUS[target]
    description = GPU.format(bandwidth=bandwidth, memory=memory, name=target)
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{count}"
        ).devices
    except NotImplementedError as error:
        raise UsageError(
            f"--target={target} needs JAX's CUDA packages: pip install 'kvpo_jax[cuda12]'"
        ) from error


# ---------------------------------------------------------------- shapes


def shape(sizes: Sequence[int], dtype: Any) -> Array:
    """The shape of an array, in place of the array."""
    return cast(Array, jax.ShapeDtypeStruct(tuple(sizes), dtype))


def placed(tree: PyTree, mesh: Mesh, specs: PyTree = sharding.REPLICATED) -> PyTree:
    """The shapes of a tree on a mesh. `specs` is one spec, or a tree of them."""

    def place(spec: Spec, part: PyTree) -> PyTree:
        named = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named), part)

    return jax.tree.map(place, specs, tree)


def bytes_of(tree: PyTree) -> int:
    """Bytes that the arrays of a tree, or their shapes, take on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# ---------------------------------------------------------------- the shapes of an iteration


class Prompts(NamedTuple):
    """Some prompts and what their videos begin with."""

    batch: PromptBatch
    text: TextKV
    history: KVCache
    noise: keys.NoiseKey


class Iteration(NamedTuple):
    """The arrays of an iteration, as shapes.

    Attributes:
      run: its programs, and the base weights as shapes.
      state: every policy and the optimiser.
      explored: the prompts that are rolled out together.
      heldout: the prompts that are evaluated together.
      routed_frames: draws of the branches that are rolled out together.
      pages: caches of these branches and their anchor.
      rolled: what `rollout` returns.
      experience: what `train.remember` returns.
    """

    run: Run
    state: TrainState
    explored: Prompts
    heldout: Prompts
    routed_frames: Array
    pages: KVCache
    rolled: Rollout
    experience: Experience


def trace_iteration(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Iteration:
    """Traces the functions of an iteration, so that the plan knows whatever they make."""
    mesh = make_mesh(config, devices)
    variables = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))
    params, backbone = placed(variables["params"], mesh), fileless_backbone(config)
    decoder = VideoDecoder(backbone, mesh, config.video.block_frames)
    run = Run(config, mesh, backbone, params, programs_lib.build(config, mesh), decoder)
    state = abstract_state(config, mesh)
    explored = _trace_prompts(run, state, prompts_at_once(config))
    noise, together = explored.noise, branches_at_once(config)
    drawn = placed(jax.eval_shape(run.programs.draw, noise.key, noise.prompts, START), mesh)
    pages = jax.eval_shape(run.programs.fork, explored.history)
    rolled = _trace_rollout(run, state, explored, drawn)
    return Iteration(
        run=run,
        state=state,
        explored=explored,
        heldout=_trace_prompts(run, state, heldout_at_once(config, mesh.shape["data"])),
        routed_frames=placed(jax.eval_shape(lambda x: x[:, :together], drawn), mesh),
        pages=placed(pages, mesh, programs_lib.cache_specs(config, mesh)[1]),
        rolled=rolled,
        experience=_trace_experience(run, state, explored.batch, rolled),
    )


def fileless_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """A backbone that needs no file: it decodes as that of the config does, and scores nothing.

    `load_decoder` gives shapes.
    """
    config = config.copy_and_resolve_references()
    config.weights = config.reward.scorer = config.eval.scorer = ""
    toy = backbone_lib.toy_backbone(config)
    if config.backbone == "toy":
        return toy
    vae = wan_vae.VAEConfig()
    if path := config.paths.vae:
        vae = wan_vae.config_from_dict(checkpoint.metadata_config(path, "wan_vae"))
    return dataclasses.replace(
        toy,
        load_decoder=lambda place: wan_vae.abstract_decoder_params(vae),
        decode=partial(backbone_lib.decode, vae),
    )


def _trace_prompts(run: Run, state: TrainState, prompts: int) -> Prompts:
    config, mesh = run.config, run.mesh
    segments = len(config.video.switch_frames) + 1
    sizes = (prompts, segments, config.model.text_len, config.model.text_dim)
    embeddings = placed(shape(sizes, jnp.float32), mesh, sharding.PROMPTS)
    batch = PromptBatch(
        embeddings=embeddings,
        changed=np.zeros((prompts, segments), bool),  # a prompt switch makes no other shapes
        numbers=np.arange(prompts, dtype=np.int32),
        sentences=(("",) * segments,) * prompts,
    )
    text = jax.eval_shape(run.programs.encode_text, run.variables(state.lora), embeddings)
    history = jax.eval_shape(lambda: run.programs.blank(prompts))
    key = jax.eval_shape(lambda: keys.draw_key(0, "noise", 0))
    return Prompts(
        batch=batch,
        text=placed(text, mesh, sharding.TEXT),
        history=placed(history, mesh, programs_lib.cache_specs(config, mesh)[0]),
        noise=placed(keys.NoiseKey(key, shape((prompts,), jnp.int32)), mesh),
    )


def _trace_rollout(run: Run, state: TrainState, explored: Prompts, drawn: Array) -> Rollout:
    pivot = run.draw_pivot(0)

    def roll(variables: PyTree, embeddings: Array, noise: keys.NoiseKey, drawn: Array) -> Rollout:
        batch = dataclasses.replace(explored.batch, embeddings=embeddings)
        return rollout(run, variables, batch, noise, drawn, pivot)

    variables, embeddings = run.variables(state.lora), explored.batch.embeddings
    history, _ = programs_lib.cache_specs(run.config, run.mesh)
    specs = Rollout(
        branches=sharding.TRAJECTORIES,
        anchor=sharding.PROMPTS,
        text=sharding.TEXT,
        replay=sharding.replay_spec(history),
    )
    rolled = jax.eval_shape(roll, variables, embeddings, explored.noise, drawn)
    return placed(rolled, run.mesh, specs)


def _trace_experience(
    run: Run, state: TrainState, batch: PromptBatch, rolled: Rollout
) -> Experience:
    def unjudged(state: TrainState, rolled: Rollout, embeddings: Array) -> Experience:
        traced_batch = dataclasses.replace(batch, embeddings=embeddings)
        return train.unjudged(run, state, rolled, traced_batch, on_policy=True)

    made = jax.eval_shape(unjudged, state, rolled, batch.embeddings)
    return placed(made, run.mesh).replace(
        tuples=rolled.replay, embeddings=batch.embeddings, text=rolled.text
    )


# ---------------------------------------------------------------- the shapes of decoding


class Program(NamedTuple):
    """A compiled function, the shapes of its arguments, and the dtype that it computes in."""

    function: Any
    arguments: tuple[Any, ...]
    dtype: str


class Decoding(NamedTuple):
    """What decoding needs, as shapes.

    Attributes:
      weights: of the decoder.
      pixels: of the branches and of the anchor.
      memory: what the decoder remembers of the anchor at the fork, and of the branches in turn.
      heldout_pixels: of the held-out videos.
      heldout_memory: what it remembers of them.
      program: the next block of the branches in turn.
    """

    weights: PyTree
    pixels: tuple[Array, Array]
    memory: tuple[PyTree, PyTree]
    heldout_pixels: Array
    heldout_memory: PyTree
    program: Program


def trace_decoding(iteration: Iteration) -> Decoding:
    """Traces the decoder of a run."""
    run, rolled = iteration.run, iteration.rolled
    video, mesh, decode = run.config.video, run.mesh, run.backbone.decode
    weights = placed(run.backbone.load_decoder(None), mesh)
    prompts, branches, frames, *sides = rolled.branches.shape
    heldout, shards = len(iteration.heldout.batch.numbers), mesh.shape["branch"]
    at_once = 1 if branches % shards else shards  # as in VideoDecoder.group
    block = shape((1, video.block_frames, *sides), jnp.float32)
    first, state = jax.eval_shape(decode, weights, block, None)
    later, _ = jax.eval_shape(decode, weights, block, state)
    length = first.shape[1] + (video.blocks - 1) * later.shape[1]

    def pixels(prompts: int, trajectories: int, spec: Spec) -> Array:
        sizes = (prompts, trajectories, length, *later.shape[2:])
        return placed(shape(sizes, later.dtype), mesh, spec)

    def memory(prompts: int, trajectories: int) -> PyTree:
        def per_video(x: Array) -> Array:
            return shape((prompts, trajectories, *x.shape[1:]), x.dtype)

        return placed(jax.tree.map(per_video, state), mesh, spec_of(mesh, trajectories))

    latents = shape((prompts, at_once, frames, *sides), jnp.float32)
    latents, in_turn = placed(latents, mesh, spec_of(mesh, at_once)), memory(prompts, at_once)
    step = make_step(decode, mesh, video.block_frames)
    return Decoding(
        weights=weights,
        pixels=(
            pixels(prompts, branches, sharding.TRAJECTORIES),
            pixels(prompts, 1, sharding.PROMPTS),
        ),
        memory=(memory(prompts, 1), in_turn),
        heldout_pixels=pixels(heldout, 1, sharding.PROMPTS),
        heldout_memory=memory(heldout, 1),
        program=Program(step, (weights, latents, START, in_turn), "float32"),
    )


# ---------------------------------------------------------------- the shapes of rewards

PUBLISHED = {
    "hpsv3": (reward_model.HPSV3, preprocess.resize_pil),
    "videoalign": (reward_model.VIDEOALIGN, preprocess.resize_torch),
}
LONG_TEXT = 512  # tokens of a reward model's instruction and of a long prompt


class RewardModel(NamedTuple):
    """Its weights as shapes, and the program that scores clips on one device."""

    weights: PyTree
    title: str
    program: Program


def reward_models(
    config: ml_collections.ConfigDict, device: jax.Device, wide: bool
) -> dict[str, RewardModel]:
    """The learned rewards of the config, by scorer; with `wide` they compute in float32.

    Sizes are those of the converted file if the config names it, else those of the published model.
    """
    mesh = Mesh(np.asarray([device]), "data")  # every device scores its own clips
    out = {}
    for name in scorers.names_of(f"{config.reward.scorer},{config.eval.scorer}"):
        if name not in PUBLISHED:
            continue
        cfg, resize = PUBLISHED[name]
        if path := config.paths[name]:
            cfg = reward_model.config_from_dict(type(cfg), checkpoint.metadata_config(path, name))
        clips = _clips_at_once(config, cfg)
        tokens = cfg.vision.tokens(preprocess.grid(cfg, *clips[1:4])) + LONG_TEXT
        compiled = dataclasses.replace(cfg, dtype="float32") if wide else cfg
        arguments = (
            reward_model.abstract_params(compiled),
            qwen2_vl.Tokens(
                shape((clips[0], tokens), jnp.int32),
                shape((clips[0],), jnp.int32),
                shape((clips[0], 1), jnp.int32),
            ),
            shape(clips, jnp.uint8),
        )
        step = learned.scoring_step(compiled, mesh, resize)
        out[name] = RewardModel(
            weights=placed(reward_model.abstract_params(cfg), mesh),
            title=f"scoring: {name}, {clips[0]} clips of {clips[1]}",
            program=Program(step, placed(arguments, mesh), cfg.dtype),
        )
    return out


def _clips_at_once(
    config: ml_collections.ConfigDict, cfg: reward_model.RewardConfig
) -> tuple[int, int, int, int, int]:
    """[clips, frames, h, w, 3] of what one device scores at once."""
    video, clips, frames = config.video, hpsv3.BATCH, 1
    if isinstance(cfg, reward_model.VideoAlignConfig):
        segments = len(video.switch_frames) + 1
        length = config.reward.clip_frames or 4 * video.blocks * video.block_frames // segments
        clips, frames = videoalign.BATCH, len(videoalign.sampled_frames(cfg, length, 16.0))
    return clips, frames, 8 * video.height, 8 * video.width, 3


# ---------------------------------------------------------------- the plan


class Plan(NamedTuple):
    """The plan of an iteration, and of the held-out evaluation before it.

    Attributes:
      parts: name -> arrays as shapes.
      stages: title -> the names of the parts that are resident in this stage.
      programs: title -> what runs then and needs memory of its own.
    """

    parts: dict[str, PyTree]
    stages: dict[str, list[str]]
    programs: dict[str, Program]


def plan(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device], wide: bool = False
) -> Plan:
    """The plan of a run; with `wide` its rewards compute in float32."""
    iteration = trace_iteration(config, devices)
    decoding = trace_decoding(iteration)
    rewards = reward_models(config, devices[0], wide)
    parts = _parts(iteration, decoding)
    parts |= {f"reward {name}": reward.weights for name, reward in rewards.items()}
    parts = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
    stages = {
        title: [name for name in parts if name in resident]
        for title, resident in _stages(config, rewards).items()
    }
    scoring = {reward.title: reward.program for reward in rewards.values()}
    return Plan(parts, stages, _programs(iteration, decoding) | scoring)


def _has_micro_batches(config: ml_collections.ConfigDict) -> bool:
    """Whether gradients are summed, so that one is resident while the next is made."""
    return config.train.prompts_per_iteration > prompts_at_once(config)


def _parts(iteration: Iteration, decoding: Decoding) -> dict[str, PyTree]:
    run, state, rolled = iteration.run, iteration.state, iteration.rolled
    heldout = iteration.heldout
    latents = shape((len(heldout.batch.numbers), *rolled.anchor.shape[1:]), rolled.anchor.dtype)
    return {
        "base weights": run.params,
        "LoRA: policy, old, reference, EMA": state.replace(iteration=None, optimiser=None),
        "optimiser": state.optimiser,
        "gradient of LoRA": [state.lora] * (1 + _has_micro_batches(run.config)),
        "text keys and values": iteration.explored.text,
        "history (shared by the branches)": iteration.explored.history,
        "pages (one per trajectory)": iteration.pages,
        # The history that the tuples refer to is counted above.
        "replay tuples and the anchor's page": rolled.replay.replace(history=None),
        "latents of all trajectories": (rolled.branches, rolled.anchor),
        "pixels of all trajectories": decoding.pixels,
        "held out: text, history": (heldout.text, heldout.history),
        "held out: latents": placed(latents, run.mesh, sharding.PROMPTS),
        "held out: pixels": decoding.heldout_pixels,
        "decoder": decoding.weights,
        "decoder's memory": decoding.memory,
        "held out: decoder's memory": decoding.heldout_memory,
    }


def _stages(
    config: ml_collections.ConfigDict, rewards: Mapping[str, RewardModel]
) -> dict[str, set[str]]:
    standing = {"base weights", "LoRA: policy, old, reference, EMA", "optimiser", "decoder"}
    weights = {f"reward {name}" for name in rewards}
    if config.reward.resident:
        standing |= weights
    if _has_micro_batches(config):
        standing |= {"gradient of LoRA"}
    begun = standing | {
        "text keys and values",
        "history (shared by the branches)",
        "latents of all trajectories",
    }
    rolled = begun | {"replay tuples and the anchor's page"}
    shown = rolled | {"pixels of all trajectories"}
    evaluated = standing | {"held out: latents"}
    return {
        "held out: a block": evaluated | {"held out: text, history"},
        "held out: decoding": evaluated | {"held out: decoder's memory", "held out: pixels"},
        "rollout: a block of the prefix": begun,
        "rollout: a block of all branches": rolled | {"pages (one per trajectory)"},
        "decoding: a block": shown | {"decoder's memory"},
        "replay": rolled | {"gradient of LoRA"},
        **{reward.title: shown | weights for reward in rewards.values()},
    }


def _programs(iteration: Iteration, decoding: Decoding) -> dict[str, Program]:
    run, explored, experience = iteration.run, iteration.explored, iteration.experience
    lora, dtype = iteration.state.lora, run.config.model.dtype
    variables, window_blocks = run.variables(lora), (0, run.config.rollout.window_blocks)

    def shared_block(prompts: Prompts) -> Program:
        arguments = (variables, prompts.text, 0, prompts.history, prompts.noise, START)
        return Program(run.programs.shared_block, arguments, dtype)

    branch_block = (
        *(variables, explored.text, 0, explored.history, iteration.pages, iteration.routed_frames),
        *(window_blocks, explored.noise, START),
    )
    replay = (lora, run.params, experience, shape((), bool))
    return {
        "held out: a block": shared_block(iteration.heldout),
        "rollout: a block of the prefix": shared_block(explored),
        "rollout: a block of all branches": Program(run.programs.branch_block, branch_block, dtype),
        "decoding: a block": decoding.program,
        "replay": Program(run.programs.replay, replay, dtype),
    }


def advice(
    config: ml_collections.ConfigDict, title: str, resident: Mapping[str, float], temporary: float
) -> str:
    """What helps in a stage, against the largest of what it has: its parts and its temporaries."""
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
    if temporary > max(resident.values()):
        if title.startswith("replay"):
            chunk = config.replay.chunk
            smaller = f"replay.chunk below {chunk}" if chunk else "a replay.chunk"
            return f"{smaller}, model.remat=block"
        return "train.micro_batch or rollout.branch_chunk, or more devices"
    largest = max(resident, key=lambda name: resident[name])
    fitting = (text for start, text in helps.items() if largest.startswith(start))
    return next(fitting, "more devices")


# ---------------------------------------------------------------- the command


class Temporary(NamedTuple):
    """What a program needs on one device besides its arguments and results."""

    gb: float
    compile_seconds: float


def compile_programs(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    target: str,
    planned: Mapping[str, Program],
) -> dict[str, Temporary]:
    """title -> Temporary, of the programs that are planned, as they are compiled for the target."""
    wide, compiled = target == "cpu", config.copy_and_resolve_references()
    if wide:
        command.use_compilation_cache()
        compiled.model.dtype = "float32"
    elif config.model.attention == "auto":
        compiled.model.attention = "cudnn"  # "auto" asks the devices of this process
    programs, out = plan(compiled, devices, wide).programs, {}
    with progress.bar("compile", len(programs)) as advance:
        for title, program in programs.items():
            begin = time.monotonic()
            memory = program.function.lower(*program.arguments).compile().memory_analysis()
            share = 0.5 if wide and planned[title].dtype == "bfloat16" else 1.0
            gb = share * memory.temp_size_in_bytes / GB
            out[title] = Temporary(gb, time.monotonic() - begin)
            advance(1, f"compile: {title}")
    return out


def report(config: ml_collections.ConfigDict, given: flags.FlagValues) -> None:
    """Prints both tables, and whether the run fits."""
    devices = target_devices(given.target, given.devices)
    planned = plan(config, devices)
    sizes = {name: bytes_of(tree) / GB for name, tree in planned.parts.items()}
    title = f"{given.config} on {given.devices} devices; 1e9 bytes on each device"
    progress.table(title, ("part", "GB"), [(name, f"{gb:.2f}") for name, gb in sizes.items()])
    temporaries = {}
    if given.compile:
        temporaries = compile_programs(config, devices, given.target, planned.programs)
    resident = {
        title: {name: sizes[name] for name in names} for title, names in planned.stages.items()
    }
    needed = {title: temporaries[title].gb if title in temporaries else 0.0 for title in resident}
    peaks = {title: sum(parts.values()) + needed[title] for title, parts in resident.items()}
    print()
    _print_stages(resident, temporaries, peaks)
    if rewards := [] if config.reward.resident else [n for n in sizes if n.startswith("reward")]:
        gb = sum(sizes[name] for name in rewards)
        print(f"reward.resident=False: {gb:.2f} GB of rewards are resident only to score")
    worst = max(peaks, key=lambda title: peaks[title])
    besides = "" if given.compile else ", without what the programs need besides (--compile)"
    if peaks[worst] > given.memory_gb:
        helps = advice(config, worst, resident[worst], needed[worst])
        print(f"\ndoes not fit into {given.memory_gb:.0f} GB{besides}; what helps: {helps}")
    else:
        print(f"\nfits into {given.memory_gb:.0f} GB: {peaks[worst]:.2f} at most{besides}")
    if given.json:
        figures = {"config": given.config, "devices": given.devices}
        write_json({**figures, "resident_gb": sizes, "stage_gb": peaks}, Path(given.json))


def _print_stages(
    resident: Mapping[str, Mapping[str, float]],
    temporaries: Mapping[str, Temporary],
    peaks: Mapping[str, float],
) -> None:
    rows: list[tuple[str, ...]] = []
    for title, parts in resident.items():
        there, peak = f"{sum(parts.values()):.2f}", f"{peaks[title]:.2f}"
        if not temporaries:
            rows.append((title, there, peak))
        elif title in temporaries:
            gb, seconds = temporaries[title]
            rows.append((title, there, f"{gb:.2f}", peak, f"{seconds:.0f} s"))
        else:
            rows.append((title, there, "", peak, ""))
    columns = ("temporary", "in all", "compiled in") if temporaries else ("in all",)
    progress.table("", ("stage", "resident", *columns), rows)


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", given.devices)
    # What was compiled for devices that are not there cannot be read again.
    jax.config.update("jax_enable_compilation_cache", given.target == "cpu")
    try:
        report(workdir.resolve(given.config, None, arguments[1:]), given)
    except (UsageError, OSError) as error:
        command.fail(error)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "config", "configs/longlive.py", "FILE[:PRESET]; --config.FIELD=VALUE changes a field"
    )
    flags.DEFINE_integer("devices", 8, "devices of the mesh", lower_bound=1)
    flags.DEFINE_float("memory_gb", 141.0, "memory of one device, in 1e9 bytes (H200: 141)")
    flags.DEFINE_bool("compile", False, "compile the programs too; minutes at full size")
    flags.DEFINE_enum("target", "cpu", ["cpu", *GPUS], "what to compile for")
    command.define_path("json", "", "file to write the figures to")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.plan_memory", define_flags, main)


if __name__ == "__main__":
    cli()
