"""Pretrains the generators that ship with the package, by flow matching on their worlds.

    python tools/pretrain_toy.py --output=kvpo_jax/assets/toy_generator.safetensors
    python tools/pretrain_toy.py --config=configs/return.py \\
        --output=kvpo_jax/assets/return_generator.safetensors
    python tools/pretrain_toy.py --config=configs/return.py:weak \\
        --output=kvpo_jax/assets/return_weak_generator.safetensors

It starts from scratch. Every block of a video sees what it would see at deployment: the clean
latents of its past (sigma 0), made anew where the prompt switches. Half of the blocks attend to the
deployment window and half to a routed one, so that the generator learns to read a routed history.

All blocks are one pass. A video becomes rows of F frames: its clean blocks, the frames that prompt
switches cache anew, and noisy copies of the blocks. In every layer a row attends to itself and to
the keys that the rows of its past have just made (`kv_cache.Peers`), which is a block-causal mask.
That equals the walk through the video with a cache, and gradients flow through the keys and values
of the past.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib
from absl import flags

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.algorithm import flow, kv_cache, routing
from kvpo_jax.data import return_world, toy_world
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import Wan, WanConfig, init_variables
from kvpo_jax.runtime import checkpoint, command
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.types import Array, PyTree

# ---------------------------------------------------------------- what a world gives


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long a generator is trained, and with what.

    Attributes:
      steps: optimiser steps.
      batch: videos per step.
      copies: noise levels per block.
      learning_rate: at its peak, after a warm-up and before a cosine decay.
      ema: decay of the weights that are saved.
      seed: of the weights; that of the data is one more.
    """

    steps: int
    batch: int
    copies: int
    learning_rate: float
    ema: float
    seed: int


@dataclasses.dataclass(frozen=True)
class World:
    """What a world gives to pretraining.

    Attributes:
      story: (rng, M) -> the sentences of a video.
      parse: sentence -> what it says, as ints.
      embed: sentences -> float[n, K, text_dim].
      video: (key, said int32[M, ...], contexts int32[B, A], video section) -> latents float[frames,
        Y, X, C]. The contexts are the frames that each block attends to.
      importance: block -> weight of its loss.
      steps: see Recipe; the default of the flag.
      batch: as steps.
    """

    story: Callable[[np.random.Generator, int], list[str]]
    parse: Callable[[str], Any]
    embed: Callable[[Sequence[str]], np.ndarray]
    video: Callable[[Array, Array, Array, ml_collections.ConfigDict], Array]
    importance: Callable[[int], float]
    steps: int
    batch: int


def _toy_story(rng: np.random.Generator, segments: int) -> list[str]:
    return [toy_world.describe(a) for a in toy_world.sample_attributes(rng, "all", segments)]


def _toy_video(key: Array, said: Array, contexts: Array, video: ml_collections.ConfigDict) -> Array:
    pixels = toy_world.sample_video(
        key, said, video.blocks, video.block_frames, video.switch_frames
    )
    return toy_world.encode(pixels)


def _returning(exponent: float) -> World:
    def video(key, said, contexts, video):
        return return_world.sample_video(
            key, said, contexts, video.block_frames, video.switch_frames, exponent
        )

    return World(
        story=lambda rng, segments: return_world.pretraining_prompts(rng),
        parse=return_world.parse,
        embed=return_world.embed,
        video=video,
        # The block in which something returns decides; an empty one is soon learnt.
        importance=lambda block: {4: 0.5, 5: 2.0, 6: 1.5, 7: 1.5}.get(block, 1.0),
        steps=3000,
        batch=48,
    )


WORLDS = {
    "toy": World(
        _toy_story, toy_world.parse, toy_world.embed, _toy_video, lambda block: 1.0, 3000, 8
    ),
    **{name: _returning(exponent) for name, exponent in return_world.EXPONENTS.items()},
}


class Videos(NamedTuple):
    """Videos that are trained on.

    Attributes:
      latents: float[P, B, F, Y, X, C].
      text: float[P, M, K, text_dim].
      changed: bool[P, M], whether a sentence is another one than that before it.
      contexts: int32[P, B, A], the frames that each block attends to; -1 is none.
    """

    latents: Array
    text: Array
    changed: Array
    contexts: Array


def draw_contexts(key: Array, window: routing.Window, frames: int, block_frames: int) -> Array:
    """int32[B, A]: of each block the deployment window or, where there is enough, a routed one.

    Either has probability 1/2.
    """

    def of_block(key: Array, start: Array) -> Array:
        draw_key, choose_key = jax.random.split(key)
        pool = routing.routable(window, frames, start, start)
        drawn = routing.draw_subset(draw_key, window, pool)
        use_routed = jax.random.bernoulli(choose_key) & (jnp.sum(pool) >= window.routed)
        routed = routing.routed_context(window, drawn, start)
        return jnp.where(use_routed, routed, routing.deployment_frames(window, start))

    starts = jnp.arange(0, frames, block_frames)
    return jax.vmap(of_block)(jax.random.split(key, len(starts)), starts)


def sample_videos(
    config: ml_collections.ConfigDict,
    world: World,
    key: Array,
    said: Array,
    text: Array,
    changed: Array,
) -> Videos:
    """Random videos of P stories: said int32[P, M, ...], text float[P, M, K, text_dim]."""
    video, window = config.video, routing.window(config.window)

    def of_story(key: Array, said: Array) -> tuple[Array, Array]:
        context_key, video_key = jax.random.split(key)
        frames = video.blocks * video.block_frames
        contexts = draw_contexts(context_key, window, frames, video.block_frames)
        latents = world.video(video_key, said, contexts, video)
        return latents.reshape(video.blocks, video.block_frames, *latents.shape[1:]), contexts

    latents, contexts = jax.vmap(of_story)(jax.random.split(key, len(said)), said)
    return Videos(latents, text, changed, contexts)


# ---------------------------------------------------------------- a video as one pass


class Rows(NamedTuple):
    """The rows of a video: B clean blocks, the frames that are cached anew, copies of B noisy ones.

    Attributes:
      start: int[rows], first frame of each.
      segment: int[rows], whose sentence it is made under.
      own: bool[rows, F], which of its own frames it attends to.
      first_noisy: the number of the first noisy row.
    """

    start: np.ndarray
    segment: np.ndarray
    own: np.ndarray
    first_noisy: int


def _recached(config: ml_collections.ConfigDict, switch: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames that the prompt switch at a frame caches anew, and which of them are keys.

    As `block.recache`: the oldest are queries only, except the sink.
    """
    count, sink = config.window.recache_frames, config.window.sink
    frames = np.arange(switch - count, switch)
    return frames, (np.arange(count) >= sink) | (frames < sink)


def rows_of(config: ml_collections.ConfigDict, copies: int) -> Rows:
    """The rows of a video with so many noisy copies of every block."""
    video = config.video
    f = video.block_frames
    block_starts = np.arange(video.blocks) * f
    starts, segments = [block_starts], [_segments(config, block_starts)]
    owns = [np.ones((video.blocks, f), bool)]
    for m, switch in enumerate(video.switch_frames, start=1):
        frames, keys = _recached(config, switch)
        starts.append(frames[::f])
        segments.append(np.full(len(frames) // f, m))
        owns.append(keys.reshape(-1, f))
    first_noisy = sum(map(len, starts))
    for _ in range(copies):
        starts.append(block_starts)
        segments.append(segments[0])
        owns.append(owns[0])
    return Rows(*map(np.concatenate, (starts, segments, owns)), first_noisy)


def _segments(config: ml_collections.ConfigDict, frames: np.ndarray) -> np.ndarray:
    return np.array([config_lib.segment_of(frame, config.video.switch_frames) for frame in frames])


def entries_of(
    config: ml_collections.ConfigDict, changed: Array, contexts: Array, copies: int
) -> Array:
    """What each row reads of the other rows of its video, int32[P, rows, entries].

    An entry is row * F + frame of that row, as in `kv_cache.Peers`; -1 is none. Entry f is frame f
    of the clean blocks.

    Args:
      config: its video and window.
      changed: bool[P, M], see Videos.
      contexts: int32[P, B, A], see Videos.
      copies: noisy copies of every block.
    """
    video, sink, f = config.video, config.window.sink, config.video.block_frames
    frames = video.blocks * f
    p = len(contexts)
    newest = jnp.broadcast_to(jnp.arange(frames), (p, frames))  # the newest entry of each frame
    of_blocks: list[Array] = []
    of_recached: list[Array] = []
    first = frames  # entry of the next frame that is cached anew
    for m, (start, end) in enumerate(itertools.pairwise((0, *video.switch_frames, frames))):
        if m:
            again, keys = _recached(config, start)
            entries = first + np.arange(len(again))
            for row in range(0, len(again), f):
                peers = np.where(keys, entries, -1)
                peers[row : row + f] = -1  # its own frames are no peers
                before = newest[:, :sink] if again[0] >= sink else jnp.full((p, sink), -1)
                peers = jnp.broadcast_to(jnp.asarray(peers), (p, len(peers)))
                of_recached.append(jnp.concatenate([before, peers], axis=1))
            renewed = jnp.where(changed[:, m, None], entries, newest[:, again])
            newest = newest.at[:, again].set(renewed)
            first += len(again)
        for block in range(start // f, end // f):
            read = contexts[:, block]
            found = jnp.take_along_axis(newest, jnp.maximum(read, 0), axis=1)
            of_blocks.append(jnp.where(read >= 0, found, -1))
    rows = [*of_blocks, *of_recached, *copies * of_blocks]
    width = max(row.shape[1] for row in rows)
    padded = [jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in rows]
    return jnp.stack(padded, axis=1)


def velocities(
    config: ml_collections.ConfigDict,
    model: Wan,
    params: PyTree,
    videos: Videos,
    noisy: Array,
    sigma: Array,
) -> Array:
    """The velocities float[P, copies, B, F, Y, X, C] of noisy copies of every block, in one pass.

    Args:
      config: its video and window.
      model: without adapters.
      params: the collection `params`.
      videos: their clean latents, texts and contexts.
      noisy: float[P, copies, B, F, Y, X, C].
      sigma: float[P, copies, B], their noise levels.
    """
    network: Any = partial(model.apply, {"params": params})
    p, copies, blocks, f = noisy.shape[:4]
    chex.assert_equal_shape([videos.latents, noisy[:, 0]])
    rows = rows_of(config, copies)
    count, frame_shape = len(rows.start), noisy.shape[4:]
    clean = videos.latents.reshape(p, blocks * f, *frame_shape)
    first = rows.start[: rows.first_noisy, None] + np.arange(f)
    x = jnp.concatenate([clean[:, first], noisy.reshape(p, copies * blocks, f, *frame_shape)], 1)
    levels = jnp.pad(sigma.reshape(p, copies * blocks), ((0, 0), (rows.first_noisy, 0)))

    segments = videos.text.shape[1]
    text = network(videos.text.reshape(-1, *videos.text.shape[2:]), method=Wan.encode_text)
    of_row = (np.arange(p)[:, None] * segments + rows.segment).reshape(-1)
    entries = entries_of(config, videos.changed, videos.contexts, copies)
    of_video = jnp.arange(p)[:, None, None] * (count * f)
    entries = jnp.where(entries >= 0, entries + of_video, -1)
    velocity, _ = network(
        x.reshape(p * count, f, *frame_shape),
        levels.reshape(-1),
        jax.tree.map(lambda t: t[:, of_row], text),
        kv_cache.Peers(entries.reshape(p * count, -1)),
        jnp.asarray(np.tile(rows.start, p), jnp.int32),
        own_keys=jnp.asarray(np.tile(rows.own, (p, 1))),
    )
    return velocity.reshape(p, count, f, *frame_shape)[:, rows.first_noisy :].reshape(noisy.shape)


def make_loss(
    config: ml_collections.ConfigDict, cfg: WanConfig, world: World, copies: int
) -> Callable[[PyTree, Videos, Array], tuple[Array, Array]]:
    """(params, videos, key) -> the flow-matching loss float[], and that of every block float[B].

    Three of five noise levels are the sampler's, the others uniform.
    """
    model, levels = Wan(cfg), flow.schedule(config.sampler).sigma[:-1]
    importance = jnp.asarray([world.importance(b) for b in range(config.video.blocks)])

    def loss(params: PyTree, videos: Videos, key: Array) -> tuple[Array, Array]:
        noise_key, level_key, mix_key, uniform_key = jax.random.split(key, 4)
        x = videos.latents[:, None]
        shape = (len(x), copies, config.video.blocks)
        listed = levels[jax.random.randint(level_key, shape, 0, len(levels))]
        uniform = jax.random.uniform(uniform_key, shape, minval=0.02)
        sigma = jnp.where(jax.random.bernoulli(mix_key, 0.6, shape), listed, uniform)
        noise = jax.random.normal(noise_key, (*shape, *x.shape[3:]))
        noisy = flow.add_noise(x, noise, sigma[..., None, None, None, None])
        velocity = velocities(config, model, params, videos, noisy, sigma)
        error = jnp.square(velocity - (noise - x)).mean(axis=(0, 1, *range(3, x.ndim)))
        return jnp.sum(error * importance) / jnp.sum(importance), error

    return loss


# ---------------------------------------------------------------- weights and optimiser


def initial_params(cfg: WanConfig, tokens: int, seed: int) -> PyTree:
    """Random weights from which a small Wan learns quickly; the model itself stays as it is.

    * Every residual branch begins with gate 1, whatever the noise level, and the head with zero:
      the time embedding starts small. With the gates that plain random weights make, of either sign
      and different at every level, shapes come many times later.
    * Where a frame has several `tokens`, every head begins with a place to look at (`_places`).
    """
    params_key, time_key = jax.random.split(jax.random.key(seed))
    params = flax.core.unfreeze(init_variables(cfg, params_key)["params"])
    for key, name in zip(
        jax.random.split(time_key), ("time_embedding_0", "time_embedding_2"), strict=True
    ):
        kernel = params[name]["kernel"]
        params[name]["kernel"] = 0.02 * jax.random.normal(key, kernel.shape)
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    params["head_modulation"] = jnp.zeros_like(params["head_modulation"])
    blocks = params["blocks"]
    blocks["modulation"] = jnp.zeros_like(blocks["modulation"]).at[:, jnp.array([2, 5])].set(1.0)
    if tokens > 1:
        bias_q, bias_k, scale = _places(cfg, seed)
        blocks["self_q"]["bias"], blocks["self_k"]["bias"] = bias_q, bias_k
        blocks["self_norm_q"]["scale"] = blocks["self_norm_k"]["scale"] = scale
    return params


def _places(cfg: WanConfig, seed: int) -> tuple[Array, Array, Array]:
    """Biases of queries and keys, and scales of their norms, float[L, dim] each.

    On a grid of 2x2 tokens only the fastest rotary frequency of an axis tells tokens apart, in few
    channels of a head. Biases on these make a head attend to the token at its own offset and,
    weakly, to recent frames.
    """
    rng = np.random.default_rng(seed)
    pairs = cfg.head_dim // 2
    spatial = pairs // 3
    # The second frequency of time, the first of y and of x.
    time_pair, y, x = 1, pairs - 2 * spatial, pairs - spatial
    bias_q, bias_k = np.zeros((2, cfg.num_layers, cfg.dim), np.float32)
    scale = np.ones((cfg.num_layers, cfg.dim), np.float32)
    for layer in range(cfg.num_layers):
        for head in range(cfg.num_heads):
            for pair, offset in ((time_pair, 0), (y, rng.integers(2)), (x, rng.integers(2))):
                real = head * cfg.head_dim + 2 * pair
                bias_q[layer, real : real + 2] = 3 * np.cos(offset), 3 * np.sin(offset)
                bias_k[layer, real] = 3
                scale[layer, real : real + 2] = 2
    return jnp.asarray(bias_q), jnp.asarray(bias_k), jnp.asarray(scale)


def make_optimiser(recipe: Recipe, params: PyTree) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, AdamW on everything else; both at the same rate.

    It needs half as many steps as AdamW alone for the same loss.
    """
    warmup = min(100, recipe.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, recipe.steps)
    # Axis 0 is the stack of layers.
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    dimensions = jax.tree_util.tree_map_with_path(
        lambda path, x: matrices if path[-1].key == "kernel" and x.ndim == 3 else None, params
    )
    muon = optax.contrib.muon(
        schedule,
        adam_b2=0.98,
        consistent_rms=0.2,  # the size of an Adam update
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


# ---------------------------------------------------------------- training


def told(world: World, rng: np.random.Generator, count: int, segments: int) -> tuple:
    """What random stories say: int32[P, M, ...], their texts float[P, M, ...], changed bool[P, M].

    The last is as in Videos.
    """
    stories = [world.story(rng, segments) for _ in range(count)]
    said = np.array([[world.parse(s) for s in story] for story in stories], np.int32)
    text = world.embed([sentence for story in stories for sentence in story])
    changed = [[m == 0 or s[m] != s[m - 1] for m in range(segments)] for s in stories]
    return said, text.reshape(count, segments, *text.shape[1:]), np.array(changed)


def check_finite(losses: Sequence[float], recipe: Recipe) -> None:
    """UsageError if the last loss is not finite."""
    if not np.isfinite(losses[-1]):
        raise UsageError(
            f"the loss of step {len(losses)} is {losses[-1]}: lower --learning_rate, which is"
            f" {recipe.learning_rate}"
        )


def train(
    config: ml_collections.ConfigDict,
    recipe: Recipe,
    report: Callable[[list[float], np.ndarray], None] = lambda losses, by_block: None,
) -> tuple[PyTree, list[float]]:
    """The weights of a generator that is trained from scratch, and the loss of every step.

    Args:
      config: the model, its world and its window.
      recipe: how long, and with what.
      report: told the losses so far and the last loss of every block, after each step.

    Raises:
      UsageError: a loss is not finite.
    """
    world, video = WORLDS[config.backbone], config.video
    cfg = WanConfig(**config.model)
    params = initial_params(cfg, cfg.tokens_per_frame(video.height, video.width), recipe.seed)
    optimiser, loss = make_optimiser(recipe, params), make_loss(config, cfg, world, recipe.copies)

    @jax.jit
    def update(params, ema, state, told, key):
        data_key, loss_key = jax.random.split(key)
        videos = sample_videos(config, world, data_key, *told)
        (value, by_block), grads = jax.value_and_grad(loss, has_aux=True)(params, videos, loss_key)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 1 - recipe.ema), state, value, by_block

    ema, state, losses = params, optimiser.init(params), []
    rng, key = np.random.default_rng(recipe.seed), jax.random.key(recipe.seed + 1)
    for step in range(recipe.steps):
        batch = told(world, rng, recipe.batch, len(video.switch_frames) + 1)
        own = jax.random.fold_in(key, step)
        params, ema, state, value, by_block = update(params, ema, state, batch, own)
        losses.append(float(value))
        check_finite(losses, recipe)
        report(losses, np.asarray(by_block))
    return ema, losses


def pretrain(spec: str, recipe: Recipe, output: Path) -> list[float]:
    """Trains the generator of the configuration `spec` and writes it; returns the losses."""
    config = config_lib.load(spec)
    begin, commit = time.monotonic(), workdir_lib.versions()["git_commit"]
    print(f"{config.backbone}: {recipe.steps} steps of {recipe.batch} videos", flush=True)

    def report(losses: list[float], by_block: np.ndarray) -> None:
        step, seconds = len(losses), time.monotonic() - begin
        if step % 50 and step != 1:
            return
        print(
            f"step {step:5d}/{recipe.steps}  loss {np.mean(losses[-50:]):.4f}  by block"
            f" {' '.join(f'{x:.2f}' for x in by_block)}  {seconds / step:.2f} s/step "
            f" {seconds / 60:.1f} min, {seconds / step * (recipe.steps - step) / 60:.1f} min left",
            flush=True,
        )

    params, losses = train(config, recipe, report)
    given = {"config": spec, **dataclasses.asdict(recipe), "output": output}
    said = [f"--{name}={value}" for name, value in given.items()]
    metadata = {
        "command": shlex.join(["python", "tools/pretrain_toy.py", *said]),
        "commit": str(commit),
        "seed": str(recipe.seed),
        "steps": str(len(losses)),
        "minutes": f"{(time.monotonic() - begin) / 60:.1f}",
        "cpu_minutes": f"{time.process_time() / 60:.1f}",
        "final_loss": f"{np.mean(losses[-200:]):.4f}",
        "model": str({**config.model}),
    }
    checkpoint.save_weights(output, params, metadata)
    print(f"wrote {output}: {metadata}", flush=True)
    return losses


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    given = flags.FLAGS
    config = config_lib.load(given.config)
    if config.backbone not in WORLDS:
        raise UsageError(
            f"--config={given.config}: backbone {config.backbone!r} has no world to pretrain in;"
            f" there are {', '.join(WORLDS)}"
        )
    config_lib.check(config)
    backbone_lib.check_size(config)
    output = command.writable("output", given.output)  # now, and not when the training is done
    command.use_compilation_cache()
    world = WORLDS[config.backbone]
    recipe = Recipe(
        given.steps or world.steps,
        given.batch or world.batch,
        given.copies,
        given.learning_rate,
        given.ema,
        given.seed,
    )
    pretrain(given.config, recipe, output)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("config", config_lib.TINY, "configuration of the world and its generator")
    command.define_path("output", None, "safetensors file to write", required=True)
    flags.DEFINE_integer("steps", None, "optimiser steps; by default the world's own", 1)
    flags.DEFINE_integer("batch", None, "videos per step; by default the world's own", 1)
    flags.DEFINE_integer("copies", 2, "noise levels per block", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-2, "peak learning rate (warm-up, cosine decay)")
    flags.DEFINE_float("ema", 0.99, "decay of the weights that are saved", 0.0, 1.0)
    flags.DEFINE_integer(
        "seed",
        0,
        "seed of the weights; that of the data is one more",
        lower_bound=0,
        upper_bound=config_lib.SEEDS - 2,
    )


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
