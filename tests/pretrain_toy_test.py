"""Pretraining: one pass is the walk with a cache, and a file says how it was made."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pretrain_toy
import pytest
from equipment import SMALL, configure, run_command

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.algorithm import block as block_lib
from kvpo_jax.algorithm import kv_cache
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import Wan, WanConfig
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import weight_file

PROMPTS, COPIES = 3, 2
SPECS = ("configs/tiny.py", "configs/return.py")
RECIPE = pretrain_toy.Recipe(steps=6, batch=4, copies=1, learning_rate=1e-2, ema=0.5, seed=0)
# The losses of RECIPE with a SMALL generator in the world "return".
CURVE = (1.643509, 1.703469, 1.717643, 1.600930, 1.605702, 1.553345)


def small(spec):
    """The configuration with a SMALL generator, and its model."""
    config = configure(spec, SMALL)
    return config, Wan(WanConfig(**config.model))


def random_params(config):
    """Weights far from the initial ones, whose head is zero."""

    @jax.jit
    def make():
        params = pretrain_toy.initial_params(WanConfig(**config.model), 4, seed=0)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        pairs = zip(leaves, keys, strict=True)
        return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in pairs])

    return make()


def random_videos(config):
    """Videos, noisy copies of their blocks, and noise levels."""
    world, segments = pretrain_toy.WORLDS[config.backbone], len(config.video.switch_frames) + 1
    told = pretrain_toy.told(world, np.random.default_rng(1), PROMPTS, segments)
    sample = jax.jit(partial(pretrain_toy.sample_videos, config, world))
    videos = sample(jax.random.key(0), *told)
    noisy = jax.random.normal(jax.random.key(2), (PROMPTS, COPIES, *videos.latents.shape[1:]))
    sigma = jax.random.uniform(jax.random.key(3), (PROMPTS, COPIES, config.video.blocks))
    return videos, noisy, sigma


def walk(config, model, params, videos, noisy, sigma):
    """The same velocities, block by block with the cache of a rollout."""
    # A program for every kind of pass: without them it is a thousand small ones.
    network = jax.jit(partial(model.apply, {"params": params}))
    encode = jax.jit(partial(model.apply, {"params": params}, method=Wan.encode_text))
    switch = jax.jit(partial(block_lib.switch_prompt, network, global_sink=True))
    read, append, f = jax.jit(kv_cache.read), jax.jit(kv_cache.append), config.video.block_frames
    frames, (height, width) = config.video.blocks * f, (config.video.height, config.video.width)
    clean = videos.latents.reshape(PROMPTS, frames, *videos.latents.shape[3:])
    kv = model.cfg.kv_shape(height, width)
    cache = kv_cache.empty(kv, (PROMPTS,), frames, config.window.sink, jnp.float32)
    out = []
    for b in range(config.video.blocks):
        start = b * f
        m = config_lib.segment_of(start, config.video.switch_frames)
        text = encode(videos.text[:, m])
        if start in config.video.switch_frames:
            first = start - config.window.recache_frames
            again = clean[:, None, first:start]
            cache = switch(text, videos.changed[:, m], cache, None, again, first)
        context = read(videos.contexts[:, None, b], cache)
        starts = jnp.full(PROMPTS, start, jnp.int32)
        velocities = [
            network(noisy[:, c, b], sigma[:, c, b], text, context, starts)[0] for c in range(COPIES)
        ]
        out.append(jnp.stack(velocities, axis=1))
        kv = network(clean[:, start : start + f], jnp.zeros(PROMPTS), text, context, starts)[1]
        cache = append(cache, kv, start)
    return jnp.stack(out, axis=2)


@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_is_the_walk_with_the_cache(spec):
    config, model = small(spec)
    params, (videos, noisy, sigma) = random_params(config), random_videos(config)
    # Some sentences do not change, and then nothing is cached anew.
    assert not videos.changed.all() and videos.changed[:, 1:].any()
    # Some blocks attend to a routed window.
    deployed = pretrain_toy.routing.window(config.window)
    starts = config.video.block_frames * np.arange(config.video.blocks)
    usual = [pretrain_toy.routing.deployment_frames(deployed, start) for start in starts]
    assert np.any(videos.contexts != jnp.stack(usual))
    arguments = (config, model, params, videos, noisy, sigma)
    found = jax.jit(partial(pretrain_toy.velocities, config, model))(*arguments[2:])
    assert jnp.abs(found).mean() > 0.1
    np.testing.assert_allclose(found, walk(*arguments), atol=1e-5)


def test_gradients_flow_through_the_keys_of_the_past():
    config, model = small("configs/return.py")
    params, (videos, noisy, sigma) = random_params(config), random_videos(config)

    def of_last(latents):
        velocity = pretrain_toy.velocities(
            config, model, params, videos._replace(latents=latents), noisy, sigma
        )
        return jnp.sum(jnp.square(velocity[:, :, -1]))

    gradient = jax.jit(jax.grad(of_last))(videos.latents)
    largest = jnp.abs(gradient).max(axis=(0, *range(2, 6)))
    # The last block attends to the sink and to blocks before it, not to its own clean latents.
    assert largest[0] > 1e-4 and largest[-2] > 1e-4 and largest[-1] == 0
    # It is the slope: neither keys nor values are left out.
    step = 0.002 * jax.random.normal(jax.random.key(4), videos.latents.shape)
    rise = jax.jit(jax.vmap(of_last))(jnp.stack([videos.latents + step, videos.latents - step]))
    np.testing.assert_allclose(2 * jnp.sum(gradient * step), rise[0] - rise[1], rtol=0.015)


def test_a_generator_is_made_from_one_command(tmp_path):
    """Its losses are those of a run that was stored, and its file says where it is from."""
    spec = tmp_path / "small.py"
    spec.write_text(
        "from kvpo_jax.runtime.config import derive\n"
        "def get_config():\n"
        "    c = derive('configs/return.py', 'strong')\n"
        f"    c.update_from_flattened_dict({SMALL})\n"
        "    return c\n"
    )
    output = tmp_path / "generator.safetensors"
    losses = pretrain_toy.pretrain(str(spec), RECIPE, output)
    np.testing.assert_allclose(losses, CURVE, rtol=2e-3)
    metadata = weight_file.open_file(output).metadata
    assert metadata["command"] == (
        f"python tools/pretrain_toy.py --config={spec} --steps=6 --batch=4 --copies=1"
        f" --learning_rate=0.01 --ema=0.5 --seed=0 --output={output}"
    )
    assert "commit" in metadata and metadata["seed"] == "0" and float(metadata["minutes"]) >= 0
    config = config_lib.load(str(spec))
    backbone_lib.load_params(output, WanConfig(**config.model))


def test_the_average_of_the_weights_is_what_is_saved():
    """After one step: with a decay of 0 the weights as they are then, and of 0.9 a tenth of the way
    there.
    """
    config = configure("configs/return.py", {**SMALL, "model.num_layers": 1})
    recipe = dataclasses.replace(RECIPE, steps=1, batch=1)
    begin = pretrain_toy.initial_params(WanConfig(**config.model), 1, RECIPE.seed)
    last, average = (
        pretrain_toy.train(config, dataclasses.replace(recipe, ema=ema))[0] for ema in (0.0, 0.9)
    )
    for name in ("bias", "kernel"):  # of the head, from which the others learn nothing at first
        first, moved, between = (tree["head"][name] for tree in (begin, last, average))
        assert jnp.abs(moved - first).max() > 1e-3
        np.testing.assert_allclose(between - first, 0.1 * (moved - first), rtol=1e-3, atol=1e-8)


def test_a_loss_that_is_not_finite_stops_it():
    pretrain_toy.check_finite([1.0, 2.0], RECIPE)
    with pytest.raises(UsageError, match="loss of step 2 is nan: lower --learning_rate, .* 0.01"):
        pretrain_toy.check_finite([1.0, float("nan")], RECIPE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/longlive.py"], "backbone 'longlive' has no world to pretrain in"),
        (["--config=configs/nowhere.py"], "there is no configuration file"),
        (["--output={folder}"], "cannot be written; name a file in a folder of yours"),
        (["--ema=2"], "ema"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, arguments, message):
    given = [argument.format(folder=tmp_path) for argument in arguments]
    done = run_command(pretrain_toy.__file__, f"--output={tmp_path / 'x'}", *given)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("spec", SPECS)
def test_half_of_the_blocks_with_enough_history_are_routed(spec):
    config = config_lib.load(spec)
    window = pretrain_toy.routing.window(config.window)
    frames, f = config.video.blocks * config.video.block_frames, config.video.block_frames
    keys = jax.random.split(jax.random.key(0), 400)
    contexts = jax.vmap(lambda key: pretrain_toy.draw_contexts(key, window, frames, f))(keys)
    starts = np.arange(0, frames, f)
    usual = np.stack([pretrain_toy.routing.deployment_frames(window, start) for start in starts])
    share = (contexts != usual).any(axis=2).mean(axis=0)
    # Six routable frames are those of the deployment window; six of nine are so once in 84.
    assert (share[:5] == 0).all() and np.all(np.abs(share[5:] - 0.5) < 0.1)
    for context, start in zip(contexts[0], starts, strict=True):
        assert context.max() < max(start, 1)  # causal
