"""What a run holds in the memory of a device, stage by stage, from shapes alone.

The run's own functions are traced: nothing is allocated, and nothing is compiled. `plan` gives the
arrays and programs of a config on some devices as shapes, `estimate` their sizes in bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import programs as programs_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.backbone import Backbone
from kvpo_jax.decoder import VideoDecoder, length, make_step, spec_of, split_rows
from kvpo_jax.models import qwen2_vl, reward_model, umt5, vit, wan_vae
from kvpo_jax.models.reward_model import PAD_TOKENS, RewardConfig, VideoAlignConfig
from kvpo_jax.models.wan import abstract_variables
from kvpo_jax.rewards import (
    aesthetic,
    clip,
    composite,
    dino,
    features,
    hpsv3,
    learned,
    preprocess,
    scorers,
    videoalign,
)
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run, make_mesh
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.runtime.config import (
    branches_at_once,
    compares_energies,
    heldout_at_once,
    prompts_at_once,
    replays_old,
    rolls_ahead,
    wan_config,
)
from kvpo_jax.state import TrainState, abstract_state
from kvpo_jax.types import Array, Experience, KVCache, PromptBatch, PyTree, Rollout, TextKV, Windows

START = 30  # first frame of the block that is planned; a program serves all blocks

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


class Program(NamedTuple):
    """A compiled function, the shapes of its arguments, and the dtype that it computes in."""

    function: Any
    arguments: tuple[Any, ...]
    dtype: str


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
      experience: what `train.remember` makes of it.
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
    variables = abstract_variables(wan_config(config))
    params, backbone = variables["params"], fileless_backbone(config)
    params = placed(params, mesh, sharding.weight_specs(params, mesh))
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
        heldout=_trace_prompts(run, state, heldout_at_once(config, sharding.prompt_shards(mesh))),
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
    if config.backbone in backbone_lib.TOYS:
        return toy
    vae = backbone_lib.vae_config(config)
    return dataclasses.replace(
        toy,
        load_decoder=lambda place: wan_vae.abstract_decoder_params(vae),
        depths=partial(wan_vae.depths, vae),
        decode=partial(backbone_lib.decode, vae),
        to_pixel=composite.latent_to_pixel,
        side=vae.spatial_factor,
        rows=config.video.height,
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
    history, page = programs_lib.cache_specs(run.config, run.mesh)
    specs = Rollout(
        branches=sharding.TRAJECTORIES,
        anchor=sharding.PROMPTS,
        routed_frames=sharding.REPLICATED,
        text=sharding.TEXT,
        replay=sharding.replay_spec(history, page, own=run.config.replay.context == "own"),
    )
    rolled = jax.eval_shape(roll, variables, embeddings, explored.noise, drawn)
    return placed(rolled, run.mesh, specs)


def _trace_experience(
    run: Run, state: TrainState, batch: PromptBatch, rolled: Rollout
) -> Experience:
    """What `train.remember` returns."""
    groups = rolled.branches.shape[:2]
    of_group = placed(shape(groups, jnp.float32), run.mesh)
    config, together = run.config, compares_energies(run.config)
    return Experience(
        tuples=rolled.replay,
        embeddings=batch.embeddings,
        text=rolled.text,
        advantages=of_group,
        gate_open=placed(shape(groups[:1], bool), run.mesh),
        energies_old=of_group,
        energies_ref=of_group,
        energy_unit=state.energy_unit,
        on_policy=placed(shape((), bool), run.mesh),
        old=state.old if not together and replays_old(config) else None,
        reference=None if together or not config.objective.beta else state.reference,
    )


# ---------------------------------------------------------------- the shapes of decoding


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
    rows = split_rows(run.backbone, mesh)
    heldout, shards = len(iteration.heldout.batch.numbers), mesh.shape["branch"]
    at_once = 1 if branches % shards else shards  # as in VideoDecoder.group
    height = rows.padded if rows else sides[0]
    block = shape((1, video.block_frames, height, *sides[1:]), jnp.float32)
    depth = shape((video.block_frames,), jnp.int32)
    first, state = jax.eval_shape(decode, weights, block, depth, None)
    config, to_pixel = run.config, run.backbone.to_pixel
    _, *picture = backbone_lib.pixel_shape(config, run.backbone)
    # Whole videos, which are written to files, go to the host block by block, and take less.
    of_group = backbone_lib.windows_read(config, to_pixel, run.draw_pivot(0))
    of_heldout = backbone_lib.windows_read(config, to_pixel)

    def pixels(prompts: int, trajectories: int, windows: Windows, spec: Spec) -> Array:
        sizes = (prompts, trajectories, length(windows), *picture, 3)
        return placed(shape(sizes, first.dtype), mesh, spec)

    def memory(prompts: int, trajectories: int) -> PyTree:
        def per_video(x: Array) -> Array:
            return shape((prompts, trajectories, *x.shape[1:]), x.dtype)

        return placed(jax.tree.map(per_video, state), mesh, spec_of(mesh, trajectories, rows))

    latents = shape((prompts, at_once, frames, *sides), jnp.float32)
    latents, in_turn = placed(latents, mesh, spec_of(mesh, at_once)), memory(prompts, at_once)
    step = make_step(decode, mesh, video.block_frames, rows)
    return Decoding(
        weights=weights,
        pixels=(
            pixels(prompts, branches, of_group, sharding.TRAJECTORIES),
            pixels(prompts, 1, of_group, sharding.PROMPTS),
        ),
        memory=(memory(prompts, 1), in_turn),
        heldout_pixels=pixels(heldout, 1, of_heldout, sharding.PROMPTS),
        heldout_memory=memory(heldout, 1),
        program=Program(step, (weights, latents, START, depth, in_turn), config.decoder.dtype),
    )


# ---------------------------------------------------------------- the shapes of scoring


FPS = 16.0  # of the videos that are scored
NODE = 8  # devices that a process has at most, where there are more than these in a plan
LONG_TEXT = 512  # tokens of a reward model's instruction and of a long prompt
# A second each, of many plans.
abstract_reward = functools.cache(reward_model.abstract_params)
abstract_tower = functools.cache(vit.abstract_params)
Step = tuple[Callable[..., Array], tuple[PyTree, ...]]  # and the shapes of its inputs


class Published(NamedTuple):
    """A published reward model.

    Attributes:
      cfg: its sizes.
      abstract: cfg -> the shapes of its weights.
      batch: clips or frames that a device takes at once.
      frames: (cfg, frames of a clip) -> how many of them it takes at once.
      step: (cfg, mesh, uint8[batch, frames, h, w, 3] as a shape) -> its `Step`, behind the weights.
      reward: (weights, cfg, mesh, batch) -> the loaded model, without its tokenizer.
      score: (that model, pixels, sentences) -> its components.
    """

    cfg: Any
    abstract: Callable[[Any], PyTree]
    batch: int
    frames: Callable[[Any, int], int]
    step: Callable[[Any, Mesh, Array], Step]
    reward: Callable[..., Any]
    score: Callable[..., Mapping[str, Array]]


def _one_frame(cfg: Any, clip_frames: int) -> int:
    return 1


def _sampled_frames(cfg: VideoAlignConfig, clip_frames: int) -> int:
    return len(videoalign.sampled_frames(cfg, clip_frames, FPS))


def _text_step(resize: learned.Resize, cfg: RewardConfig, mesh: Mesh, clips: Array) -> Step:
    count, *picture = clips.shape[:4]
    tokens = cfg.vision.tokens(preprocess.grid(cfg, *picture)) + LONG_TEXT
    texts = qwen2_vl.Tokens(
        shape((count, tokens), jnp.int32), shape((count,), jnp.int32), shape((count, 1), jnp.int32)
    )
    return learned.scoring_step(cfg, mesh, resize), (texts, clips)


def _frame_step(reading: features.Reading, cfg: vit.ViTConfig, mesh: Mesh, clips: Array) -> Step:
    count, _, *picture = clips.shape
    return features.reading_step(cfg, mesh, reading), (shape((count, *picture), clips.dtype),)


def without_tokenizer(
    params: PyTree, cfg: RewardConfig, mesh: Mesh, batch: int
) -> learned.RewardModel:
    """A reward model that reads LONG_TEXT tokens, the reward tokens last, for any sentence."""

    def encode(text: str) -> list[int]:
        pads = [getattr(cfg, name) for name, token in PAD_TOKENS.items() if token in text]
        return [*pads, *[0] * (LONG_TEXT - len(cfg.token_ids)), *cfg.token_ids]

    return learned.RewardModel(params, cfg, encode, mesh, batch)


def clip_without_tokenizer(
    params: PyTree, cfg: vit.CLIPConfig, mesh: Mesh, batch: int
) -> clip.CLIP:
    """A CLIP that reads as many tokens as it can for any sentence."""

    def encode(sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        n, length = len(sentences), cfg.text.context
        return np.zeros((n, length), np.int32), np.full(n, length - 1, np.int32)

    return clip.CLIP(features.Tower(params, cfg, mesh, batch), encode)


PUBLISHED = {
    "hpsv3": Published(
        reward_model.HPSV3,
        abstract_reward,
        hpsv3.BATCH,
        _one_frame,
        partial(_text_step, preprocess.resize_pil),
        without_tokenizer,
        hpsv3.score,
    ),
    "videoalign": Published(
        reward_model.VIDEOALIGN,
        abstract_reward,
        videoalign.BATCH,
        _sampled_frames,
        partial(_text_step, preprocess.resize_torch),
        without_tokenizer,
        lambda reward, *clips: videoalign.score(reward, FPS, *clips),
    ),
    "clip": Published(
        vit.CLIP_B32,
        abstract_tower,
        features.BATCH,
        _one_frame,
        partial(_frame_step, clip.READING),
        clip_without_tokenizer,
        clip.score,
    ),
    "dino": Published(
        vit.DINO_B16,
        abstract_tower,
        features.BATCH,
        _one_frame,
        partial(_frame_step, dino.READING),
        features.Tower,
        dino.score,
    ),
    "aesthetic": Published(
        vit.AESTHETIC_L14,
        abstract_tower,
        features.BATCH,
        _one_frame,
        partial(_frame_step, aesthetic.READING),
        features.Tower,
        aesthetic.score,
    ),
}


class Reward(NamedTuple):
    """A scorer.

    Attributes:
      title: of the stage in which it scores.
      weights: of a learned one, as shapes.
      batch: the clips of a batch; the devices of a process fetch them together, each a copy.
      program: scores them on one device.
    """

    title: str
    weights: PyTree
    batch: PyTree
    program: Program | None


def trace_rewards(
    config: ml_collections.ConfigDict, mesh: Mesh, clip_frames: int, wide: bool
) -> dict[str, Reward]:
    """The scorers of groups; with `wide` the learned ones compute in float32.

    What is only watched scores single videos. It counts if it is learned, for its weights stay.
    Sizes are those of the converted file if the config names it, else those of the published model.
    """
    optimised, watched = map(scorers.names_of, (config.reward.scorer, config.eval.scorer))
    device = Mesh(mesh.devices.reshape(-1)[:1], "data")  # every device scores its own clips
    height, width = 8 * config.video.height, 8 * config.video.width
    out = {}
    for name in optimised + [name for name in watched if name in PUBLISHED]:
        if name not in PUBLISHED:
            out[name] = Reward(f"scoring: {name}, clips of {clip_frames}", {}, {}, None)
            continue
        published = reward_of(config, name)
        cfg, count = published.cfg, published.batch
        frames = published.frames(cfg, clip_frames)
        clips = shape((count, frames, height, width, 3), jnp.uint8)
        compiled = dataclasses.replace(cfg, dtype="float32") if wide else cfg
        step, inputs = published.step(compiled, device, clips)
        arguments = (published.abstract(compiled), *inputs)
        together = count * min(jax.local_device_count(), NODE)
        out[name] = Reward(
            title=f"scoring: {name}, {count} clips of {frames}",
            weights=placed(published.abstract(cfg), device),
            batch=placed(shape((together, *clips.shape[1:]), jnp.uint8), device),
            program=Program(step, placed(arguments, device), cfg.dtype),
        )
    return out


def reward_of(config: ml_collections.ConfigDict, name: str) -> Published:
    """A reward model, of the sizes of its converted file if the config names one."""
    published = PUBLISHED[name]
    if not (path := config.paths[name]):
        return published
    return published._replace(cfg=checkpoint.noted_config(path, name, type(published.cfg)))


def trace_clips(iteration: Iteration, decoding: Decoding) -> PyTree:
    """A clip of all trajectories, twice: joined and, one after the other, as a scorer takes them.

    A scorer that does not take stored pixels gets floats besides.
    """
    run, config = iteration.run, iteration.run.config
    branches, _ = decoding.pixels
    prompts, count, _, *picture = branches.shape
    frames = (prompts, count + 1, longest_clip(run), *picture)
    clip = placed(shape(frames, branches.dtype), run.mesh, sharding.PROMPTS)
    names = scorers.names_of(config.reward.scorer)
    if branches.dtype != np.uint8 or all(map(scorers.takes_bytes, names)):
        return [clip, clip]
    return [clip, clip, placed(shape(frames, jnp.float32), run.mesh, sharding.PROMPTS)]


def longest_clip(run: Run) -> int:
    """Frames of the longest clip that is scored at once."""
    to_pixel = run.backbone.to_pixel
    clips = [(clip.start, clip.end) for clip in backbone_lib.scored_clips(run.config, to_pixel)]
    window = backbone_lib.local_window(run.config, to_pixel, run.draw_pivot(0))
    return max(end - start for start, end in [*clips, window or (0, 0)])


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
    """The plan of a run on these devices; with `wide` its rewards compute in float32.

    Raises:
      UsageError: the config does not fit together, or not to so many devices.
    """
    iteration = trace_iteration(config, devices)
    decoding = trace_decoding(iteration)
    rewards = trace_rewards(config, iteration.run.mesh, longest_clip(iteration.run), wide)
    parts = _parts(iteration, decoding)
    for name, reward in rewards.items():
        parts |= {f"reward {name}": reward.weights, f"a batch of {name}": reward.batch}
    resident = _stages(config, rewards)
    somewhere = set().union(*resident.values())
    parts = {n: tree for n, tree in parts.items() if n in somewhere and jax.tree.leaves(tree)}
    stages = {title: [n for n in parts if n in held] for title, held in resident.items()}
    scoring = {reward.title: reward.program for reward in rewards.values() if reward.program}
    return Plan(parts, stages, _programs(iteration, decoding) | scoring)


def _batches(config: ml_collections.ConfigDict) -> int:
    """Micro-batches of an iteration."""
    return config.train.prompts_per_iteration // prompts_at_once(config)


def _parts(iteration: Iteration, decoding: Decoding) -> dict[str, PyTree]:
    run, state, rolled = iteration.run, iteration.state, iteration.rolled
    heldout, batches = iteration.heldout, _batches(run.config)
    latents = shape((len(heldout.batch.numbers), *rolled.anchor.shape[1:]), rolled.anchor.dtype)
    kept = (batches - 1) * (run.config.train.epochs > 1)
    return {
        "base weights": run.params,
        "LoRA: policy, old, reference, EMA": [state.lora, state.old, state.reference, state.ema],
        "optimiser": state.optimiser,
        # One is resident while the next is made, if they are summed.
        "gradient of LoRA": [state.lora] * (1 + (batches > 1)),
        "text encoder": _text_encoder(run),
        "text keys and values": iteration.explored.text,
        "history (shared by the branches)": iteration.explored.history,
        "pages (one per trajectory)": iteration.pages,
        # The history that the tuples refer to is counted above.
        "replay tuples and the anchor's page": rolled.replay.replace(history=None),
        "kept of other prompts for further epochs": [(rolled.replay, rolled.text)] * kept,
        "rollout of the prompts before, while servers score it": rolled,
        "latents of all trajectories": (rolled.branches, rolled.anchor),
        "pixels of all trajectories": decoding.pixels,
        "a clip of all trajectories": trace_clips(iteration, decoding),
        "held out: text, history": (heldout.text, heldout.history),
        "held out: latents": placed(latents, run.mesh, sharding.PROMPTS),
        "held out: pixels": decoding.heldout_pixels,
        "decoder": decoding.weights,
        "decoder's memory": decoding.memory,
        "held out: decoder's memory": decoding.heldout_memory,
    }


def _text_encoder(run: Run) -> PyTree:
    """UMT5 if it encodes prompts on the fly: it stays on the first device of every process."""
    paths = run.config.paths
    if run.config.backbone in backbone_lib.TOYS or paths.embeddings or not paths.umt5:
        return {}
    cfg = checkpoint.noted_config(paths.umt5, "umt5", umt5.UMT5Config)
    return placed(umt5.abstract_params(cfg), run.mesh)


def _stages(
    config: ml_collections.ConfigDict, rewards: Mapping[str, Reward]
) -> dict[str, set[str]]:
    standing = {
        "base weights",
        "LoRA: policy, old, reference, EMA",
        "optimiser",
        "decoder",
        "text encoder",
    }
    weights = {f"reward {name}" for name in rewards}
    if config.reward.resident:
        standing |= weights
    training = standing | {"kept of other prompts for further epochs"}
    if _batches(config) > 1:
        training |= {"gradient of LoRA"}
    if rolls_ahead(config):
        training |= {"rollout of the prompts before, while servers score it"}
    begun = training | {
        "text keys and values",
        "history (shared by the branches)",
        "latents of all trajectories",
    }
    rolled = begun | {"replay tuples and the anchor's page"}
    shown = rolled | {"pixels of all trajectories"}
    scored = shown | weights | {"a clip of all trajectories"}
    evaluated = standing | {"held out: latents"}
    return {
        "held out: a block": evaluated | {"held out: text, history"},
        "held out: decoding": evaluated | {"held out: decoder's memory", "held out: pixels"},
        "rollout: a block of the prefix": begun,
        "rollout: a block of all branches": rolled | {"pages (one per trajectory)"},
        "decoding: a block": shown | {"decoder's memory"},
        **{reward.title: scored | {f"a batch of {name}"} for name, reward in rewards.items()},
        "replay": rolled | {"gradient of LoRA"},
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


# ---------------------------------------------------------------- in bytes


class Estimate(NamedTuple):
    """A plan in bytes on one device.

    Attributes:
      sizes: name of a part -> its size.
      resident: title of a stage -> the parts that it finds, with their sizes.
      working: title of a stage -> what its program needs besides; 0 without a program.
    """

    sizes: dict[str, int]
    resident: dict[str, dict[str, int]]
    working: dict[str, float]

    def needed(self) -> dict[str, float]:
        """title of a stage -> bytes in all."""
        return {
            title: sum(parts.values()) + self.working[title]
            for title, parts in self.resident.items()
        }

    def peak(self) -> float:
        """The bytes of the largest stage."""
        return max(self.needed().values())


def estimate(planned: Plan) -> Estimate:
    """The bytes of a plan. What programs need is `working_bytes`, no compiler is asked."""
    sizes = {name: bytes_of(tree) for name, tree in planned.parts.items()}
    working = dict.fromkeys(planned.stages, 0.0)
    for title, program in planned.programs.items():
        working[title] = working_bytes(program.function.trace(*program.arguments).jaxpr.jaxpr)
    resident = {
        title: {name: sizes[name] for name in names} for title, names in planned.stages.items()
    }
    return Estimate(sizes, resident, working)


# Operations whose results stay for as long as the body that they stand in.
GATHERED = ("all_gather", "all_gather_invariant")
# Operations whose results are arrays of their own. Others are fused into what reads them, or write
# in place.
KEPT = ("scan", "dot_general", "conv_general_dilated", "gather", "concatenate")


def working_bytes(jaxpr: core.Jaxpr, on_device: bool = False) -> int:
    """About what a program needs on a device besides its arguments and results.

    It is the largest sum along a nest of loops: the results of a loop, of a loop inside it, and so
    on to the largest result in the innermost one. In a gradient these are one LoRA tree per branch,
    then what all layers save for the backward pass; in a block the keys and values that all layers
    make. What a body gathers from other devices, as the weights of a layer, it has besides.
    docs/memory.md compares it with the compiler's figures.

    Args:
      jaxpr: of the program.
      on_device: whether its shapes are those of one device, as inside `shard_map`; others are not
        counted.
    """
    most = gathered = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inside = on_device or name == "shard_map"
        inner = max((working_bytes(x, inside) for x in bodies(equation)), default=0)
        made: list[Any] = [x.aval for x in equation.outvars] if on_device else []
        own = sum(math.prod(x.shape) * x.dtype.itemsize for x in made)
        gathered += own if name in GATHERED else 0
        most = max(most, inner + (own if name in KEPT else 0))
    return most + gathered


def bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs that an operation runs: the body of a loop, the branches of a condition."""
    for parameter in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
    ):
        if isinstance(parameter, core.ClosedJaxpr):
            yield parameter.jaxpr
        elif isinstance(parameter, core.Jaxpr):
            yield parameter
