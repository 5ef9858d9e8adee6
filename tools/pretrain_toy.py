"""Pretrains the toy generator that ships with the package, by flow matching on the toy world.

    python tools/pretrain_toy.py --output=kvpo_jax/assets/toy_generator.safetensors

It starts from scratch and walks through every video block by block, exactly as at deployment: a
clean pass (sigma 0) writes the KV cache, noisy copies of the block are denoised under the same
context, and at a prompt switch the last frames are cached anew. Half of the blocks see the
deployment window and half a routed one, so that the generator learns to read a routed history.
Gradients flow through the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib
from absl import flags

from kvpo_jax.algorithm import block as block_lib
from kvpo_jax.algorithm import flow, kv_cache, routing
from kvpo_jax.data import toy_world
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import Wan, WanConfig, init_variables
from kvpo_jax.runtime import checkpoint, command
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Array, KVCache, PyTree, TextKV

# Flags that decide the weights; they are noted in the file.
RECIPE = ("steps", "batch", "copies", "learning_rate", "ema", "seed")


def initial_params(cfg: WanConfig, seed: int) -> PyTree:
    """Random weights from which a small Wan learns quickly; the model itself stays as it is.

    * Every residual branch begins with gate 1, whatever the noise level, and the head with zero:
      the time embedding starts small. With the gates that plain random weights make, of either sign
      and different at every level, shapes come many times later.
    * Every head begins with a place to look at. On a grid of 2x2 tokens only the fastest rotary
      frequency of an axis tells tokens apart, in few channels of a head; biases on these make a
      head attend to the token at its own offset and, weakly, to recent frames.
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
    for name, value in (("self_q", bias_q), ("self_k", bias_k)):
        blocks[name]["bias"] = jnp.asarray(value)
    for name in ("self_norm_q", "self_norm_k"):
        blocks[name]["scale"] = jnp.asarray(scale)
    return params


def make_loss(
    config: ml_collections.ConfigDict, cfg: WanConfig, copies: int
) -> Callable[[PyTree, Array, Array, Array], Array]:
    """(params, latents float[P, frames, Y, X, C], text float[P, M, K, text_dim], key) -> float[].

    It is the flow-matching loss of `copies` noisy copies of every block.
    """
    video, model = config.video, Wan(cfg)
    window = routing.window(config.window)
    levels = flow.schedule(config.sampler).sigma[:-1]
    frames_in_block = video.block_frames
    bounds = (0, *video.switch_frames, video.blocks * frames_in_block)

    def loss(params: PyTree, latents: Array, text: Array, key: Array) -> Array:
        network: Any = partial(model.apply, {"params": params})
        p, frames = latents.shape[:2]
        kv = cfg.kv_shape(video.height, video.width)
        cache = kv_cache.empty(kv, (p,), frames, window.sink, jnp.dtype(cfg.dtype))

        def block(
            text_kv: TextKV, cache: KVCache, xs: tuple[Array, Array]
        ) -> tuple[KVCache, Array]:
            start, block_key = xs
            noise_key, level_key, mix_key, draw_key, choose_key = jax.random.split(block_key, 5)
            x = jax.lax.dynamic_slice_in_dim(latents, start, frames_in_block, axis=1)
            # Each video attends to the deployment window, or where there is enough history perhaps
            # to a routed one.
            pool = routing.routable(window, frames, start, start)
            drawn = jax.vmap(routing.draw_subset, (0, None, None))(
                jax.random.split(draw_key, p), window, pool
            )
            routed = routing.routed_context(window, drawn, start)
            use_routed = jax.random.bernoulli(choose_key, 0.5, (p,))
            use_routed &= jnp.sum(pool) >= window.routed
            deployed = routing.deployment_frames(window, start)
            context_frames = jnp.where(use_routed[:, None], routed, deployed)
            context = kv_cache.read(context_frames[:, None], cache)

            # Every video's clean block comes first in the batch, then `copies` noisy ones.
            from_list = levels[jax.random.randint(level_key, (copies, p), 0, len(levels))]
            uniform = jax.random.uniform(mix_key, (2, copies, p))
            sigma = jnp.where(uniform[0] < 0.6, from_list, jnp.maximum(uniform[1], 0.02))
            noise = jax.random.normal(noise_key, (copies, *x.shape))
            noisy = flow.add_noise(x, noise, sigma[..., None, None, None, None])
            velocity, kv = network(
                jnp.concatenate([x[None], noisy]).reshape(-1, *x.shape[1:]),
                jnp.concatenate([jnp.zeros((1, p)), sigma]).reshape(-1),
                jax.tree.map(lambda t: jnp.concatenate([t] * (1 + copies), axis=1), text_kv),
                context.take(jnp.tile(jnp.arange(p), 1 + copies)),
                jnp.full(((1 + copies) * p,), start, jnp.int32),
            )
            error = jnp.mean(jnp.square(velocity.reshape(1 + copies, *x.shape)[1:] - (noise - x)))
            return kv_cache.append(cache, jax.tree.map(lambda t: t[:, :p], kv), start), error

        errors = []
        for m in range(len(bounds) - 1):
            text_kv = network(text[:, m], method=Wan.encode_text)
            if m:
                start = bounds[m] - config.window.recache_frames
                clean = latents[:, None, start : bounds[m]]
                new = block_lib.recache(network, text_kv, cache, None, clean, start)
                cache = kv_cache.append(cache, new, start)
            starts = jnp.arange(bounds[m], bounds[m + 1], frames_in_block)
            block_keys = jax.random.split(jax.random.fold_in(key, m), len(starts))
            segment = jax.checkpoint(partial(block, text_kv))
            cache, error = jax.lax.scan(segment, cache, (starts, block_keys))
            errors.append(error)
        return jnp.mean(jnp.concatenate(errors))

    return loss


def make_optimiser(schedule: optax.Schedule, params: PyTree) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, AdamW on everything else; both at the same rate.

    It needs half as many steps as AdamW alone for the same loss.
    """
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


def pretrain(given: flags.FlagValues) -> None:
    """What the command does."""
    # The toy's sizes are written down in its configuration alone.
    config = config_lib.load(str(config_lib.shipped(config_lib.TINY)))
    cfg, video = WanConfig(**config.model), config.video
    params = initial_params(cfg, given.seed)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters; {given.steps} steps of {given.batch} videos", flush=True)

    warmup = min(100, given.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, given.learning_rate, warmup, given.steps)
    optimiser = make_optimiser(schedule, params)
    state, ema = optimiser.init(params), params
    loss_fn = make_loss(config, cfg, given.copies)

    def sample(key: Array, attributes: Array) -> Array:
        return toy_world.sample_video(
            key, attributes, video.blocks, video.block_frames, video.switch_frames
        )

    @jax.jit
    def update(params, ema, state, attributes, text, key):
        data_key, loss_key = jax.random.split(key)
        videos = jax.vmap(sample)(jax.random.split(data_key, len(attributes)), attributes)
        latents = toy_world.encode(videos)
        loss, grads = jax.value_and_grad(loss_fn)(params, latents, text, loss_key)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, ema, 1 - given.ema)
        return params, ema, state, loss

    rng = np.random.default_rng(given.seed)
    segments = len(video.switch_frames) + 1
    begin, losses = time.monotonic(), []
    for step in range(given.steps):
        sampled = [toy_world.sample_attributes(rng, "all", segments) for _ in range(given.batch)]
        attributes = np.stack(sampled)
        text = toy_world.embed([toy_world.describe(a.tolist()) for a in attributes.reshape(-1, 3)])
        text = text.reshape(given.batch, segments, *text.shape[1:])
        key = jax.random.fold_in(jax.random.key(given.seed + 1), step)
        params, ema, state, loss = update(params, ema, state, attributes, text, key)
        losses.append(float(loss))
        if step % 50 == 49 or step == 0:
            seconds = time.monotonic() - begin
            each = seconds / (step + 1)
            print(
                f"step {step + 1:5d}/{given.steps}  loss {np.mean(losses[-50:]):.4f}"
                f"  {each:.2f} s/step  {seconds / 60:.1f} min,"
                f" {each * (given.steps - step - 1) / 60:.1f} min left",
                flush=True,
            )
    recipe = " ".join(f"--{name}={given[name].value}" for name in RECIPE)
    metadata = {
        "command": f"python tools/pretrain_toy.py {recipe}",
        "seed": str(given.seed),
        "steps": str(len(losses)),
        "minutes": f"{(time.monotonic() - begin) / 60:.1f}",
        "final_loss": f"{np.mean(losses[-200:]):.4f}",
        "model": str({**config.model}),
    }
    checkpoint.save_weights(Path(given.output), ema, metadata)
    print(f"wrote {given.output}: {metadata}", flush=True)


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    pretrain(flags.FLAGS)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("output", None, "safetensors file to write", required=True)
    flags.DEFINE_integer("steps", 3600, "optimiser steps", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "videos per step", lower_bound=1)
    flags.DEFINE_integer("copies", 2, "noise levels per block", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-2, "peak learning rate (warm-up, cosine decay)")
    flags.DEFINE_float("ema", 0.99, "decay of the weights that are saved")
    flags.DEFINE_integer(
        "seed",
        0,
        "seed of the weights; that of the data is one more",
        lower_bound=0,
        upper_bound=config_lib.SEEDS - 2,
    )


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
