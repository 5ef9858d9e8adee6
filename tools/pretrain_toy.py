"""Pretrains the toy generator that ships with the package, from scratch, by flow matching on the toy world.

    python tools/pretrain_toy.py --output=kvpo_jax/assets/toy_generator.safetensors

Every video is walked through block by block, exactly as at deployment: a clean pass (sigma 0) writes the KV cache,
noisy copies of the block are denoised under the same context, and at a prompt switch the last frames are recached.
Half of the blocks see the deployment window and half a routed one, so that a routed history is something that the
generator knows how to read. Gradients flow through the cache.
"""

from __future__ import annotations

import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from absl import app, flags

from kvpo_jax import checkpoint, flow, kv_cache, rollout, routing
from kvpo_jax import config as config_lib
from kvpo_jax.data import toy_world
from kvpo_jax.models.wan import Wan, WanConfig, init_variables

_OUTPUT = flags.DEFINE_string("output", None, "safetensors file to write", required=True)
_STEPS = flags.DEFINE_integer("steps", 3600, "optimiser steps")
_BATCH = flags.DEFINE_integer("batch", 8, "videos per step")
_COPIES = flags.DEFINE_integer("copies", 2, "noise levels per block")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-2, "peak learning rate (warm-up, cosine decay)")
_EMA = flags.DEFINE_float("ema", 0.99, "decay of the weights that are saved")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the weights and of the data")


def initial_params(cfg: WanConfig, seed: int):
    """Random weights that a small Wan learns quickly from; nothing in the model is changed by them.

    * Every residual branch begins with gate 1, whatever the noise level, and the head with zero: the time embedding
      starts small. With the gates that plain random weights make, of either sign and different at every level, shapes
      come many times later.
    * Every head begins with a place to look at. On a grid of 2x2 tokens only the fastest rotary frequency of an axis
      tells tokens apart, in few channels of a head; biases on these make a head attend to the token at its own
      offset and, weakly, to recent frames.
    """
    params_key, time_key = jax.random.split(jax.random.key(seed))
    params = flax.core.unfreeze(init_variables(cfg, params_key)["params"])
    for key, name in zip(jax.random.split(time_key), ("time_embedding_0", "time_embedding_2"), strict=True):
        kernel = params[name]["kernel"]
        params[name]["kernel"] = 0.02 * jax.random.normal(key, kernel.shape)
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    params["head_modulation"] = jnp.zeros_like(params["head_modulation"])
    blocks = params["blocks"]
    blocks["modulation"] = jnp.zeros_like(blocks["modulation"]).at[:, jnp.array([2, 5])].set(1.0)

    rng = np.random.default_rng(seed)
    pairs = cfg.head_dim // 2
    spatial = pairs // 3
    time_pair, y, x = 1, pairs - 2 * spatial, pairs - spatial  # second frequency of time, first of y and x
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


def make_loss(config, cfg: WanConfig, copies: int):
    """(params, latents float[P, frames, Y, X, C], text float[P, M, K, text_dim], key) -> scalar flow-matching loss."""
    video, model = config.video, Wan(cfg)
    window = routing.window(config)
    frames_in_block = video.block_frames
    levels = flow.schedule(config.sampler.steps, config.sampler.shift, "euler", 0.0).sigma[:-1]
    tokens = cfg.tokens_per_frame(video.height, video.width)
    bounds = (0, *video.switch_frames, video.blocks * frames_in_block)

    def loss(params, latents, text, key):
        network = lambda *args: model.apply({"params": params}, *args)
        encode = lambda t: model.apply({"params": params}, t, method="encode_text")
        p = latents.shape[0]
        cache = kv_cache.empty(
            cfg.num_layers, (p,), video.blocks * frames_in_block, tokens, cfg.num_heads, cfg.head_dim,
            window.sink, cfg.dtype,
        )  # fmt: skip

        def block(cache, xs, text_kv):
            start, block_key = xs
            noise_key, level_key, mix_key, row_key, choose_key = jax.random.split(block_key, 5)
            x = jax.lax.dynamic_slice_in_dim(latents, start, frames_in_block, axis=1)
            # What each video attends to: the deployment window, or a routed one where there is history enough.
            bounds = routing.routable(window, start, start)
            selected = routing.draw_independent(row_key, window, p, latents.shape[1], *bounds)
            routed = routing.routed_rows(window, selected, start)
            use_routed = (bounds[1] - bounds[0] >= window.routed) & jax.random.bernoulli(choose_key, 0.5, (p,))
            rows = jnp.where(use_routed[:, None], routed, routing.deployment_row(window, start))
            context = kv_cache.read(rows[:, None], cache)

            # Rows of the batch: every video's clean block, then `copies` noisy ones.
            from_list = levels[jax.random.randint(level_key, (copies, p), 0, len(levels))]
            uniform = jax.random.uniform(mix_key, (2, copies, p))
            sigma = jnp.where(uniform[0] < 0.6, from_list, jnp.maximum(uniform[1], 0.02))
            noise = jax.random.normal(noise_key, (copies, *x.shape))
            noisy = flow.add_noise(x, noise, sigma[..., None, None, None, None])
            rows_of = lambda t: jnp.concatenate([t] * (1 + copies), axis=1)
            velocity, kv = network(
                jnp.concatenate([x[None], noisy]).reshape(-1, *x.shape[1:]),
                jnp.concatenate([jnp.zeros((1, p)), sigma]).reshape(-1),
                jax.tree.map(rows_of, text_kv),
                context.take(jnp.tile(jnp.arange(p), 1 + copies)),
                jnp.full(((1 + copies) * p,), start, jnp.int32),
            )
            error = jnp.mean(jnp.square(velocity.reshape(1 + copies, *x.shape)[1:] - (noise - x)))
            return kv_cache.append(cache, jax.tree.map(lambda t: t[:, :p], kv), start), error

        errors = []
        for m in range(len(bounds) - 1):
            text_kv = encode(text[:, m])
            if m:
                start = bounds[m] - config.window.recache_frames
                clean = latents[:, None, start : bounds[m]]
                cache = kv_cache.append(cache, rollout.recache(network, text_kv, cache, None, clean, start), start)
            starts = jnp.arange(bounds[m], bounds[m + 1], frames_in_block)
            keys = jax.random.split(jax.random.fold_in(key, m), len(starts))
            cache, error = jax.lax.scan(
                jax.checkpoint(lambda c, xs, kv=text_kv: block(c, xs, kv)), cache, (starts, keys)
            )
            errors.append(error)
        return jnp.mean(jnp.concatenate(errors))

    return loss


def make_optimiser(schedule: optax.Schedule, params) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, AdamW on everything else; both at the same rate.

    Half as many steps as AdamW alone needs for the same loss.
    """
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0 is the stack of layers
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


def main(_):
    config = config_lib.load(str(config_lib.shipped(config_lib.TINY)))  # the one home of the toy's sizes
    sizes = {**config.model}
    cfg = WanConfig(**sizes)
    video = config.video
    params = initial_params(cfg, _SEED.value)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters; {_STEPS.value} steps of {_BATCH.value} videos", flush=True)

    schedule = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE.value, 100, _STEPS.value)
    optimiser = make_optimiser(schedule, params)
    state, ema = optimiser.init(params), params
    loss_fn = make_loss(config, cfg, _COPIES.value)
    sample = jax.vmap(
        lambda key, attributes: toy_world.sample_video(
            key, attributes, video.blocks, video.block_frames, video.switch_frames
        )
    )

    @jax.jit
    def update(params, ema, state, attributes, text, key):
        data_key, loss_key = jax.random.split(key)
        latents = toy_world.encode(sample(jax.random.split(data_key, len(attributes)), attributes))
        loss, grads = jax.value_and_grad(loss_fn)(params, latents, text, loss_key)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, ema, 1 - _EMA.value)
        return params, ema, state, loss

    rng = np.random.default_rng(_SEED.value)
    segments = len(video.switch_frames) + 1
    begin, losses = time.time(), []
    for step in range(_STEPS.value):
        attributes = np.stack([toy_world.sample_attributes(rng, "all", segments) for _ in range(_BATCH.value)])
        text = toy_world.embed([toy_world.describe(a) for a in attributes.reshape(-1, 3)])
        text = text.reshape(_BATCH.value, segments, *text.shape[1:])
        key = jax.random.fold_in(jax.random.key(_SEED.value + 1), step)
        params, ema, state, loss = update(params, ema, state, attributes, text, key)
        losses.append(float(loss))
        if step % 50 == 49 or step == 0:
            seconds = time.time() - begin
            left = seconds / (step + 1) * (_STEPS.value - step - 1)
            print(
                f"step {step + 1:5d}/{_STEPS.value}  loss {np.mean(losses[-50:]):.4f}  "
                f"{seconds / (step + 1):.2f} s/step  {seconds / 60:.1f} min, {left / 60:.1f} min left",
                flush=True,
            )
    minutes = (time.time() - begin) / 60
    metadata = {
        "command": "python tools/pretrain_toy.py " + " ".join(f"--{k}={v}" for k, v in _arguments().items()),
        "seed": str(_SEED.value),
        "steps": str(len(losses)),
        "minutes": f"{minutes:.1f}",
        "final_loss": f"{np.mean(losses[-200:]):.4f}",
        "model": str(sizes),
    }
    checkpoint.save_weights(Path(_OUTPUT.value), ema, metadata)
    print(f"wrote {_OUTPUT.value}: {metadata}", flush=True)


def _arguments() -> dict[str, object]:
    return {f.name: f.value for f in (_STEPS, _BATCH, _COPIES, _LEARNING_RATE, _EMA, _SEED)}


if __name__ == "__main__":
    app.run(main)
