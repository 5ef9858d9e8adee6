"""Decoding: what the branches share is decoded once, block by block, by programs that serve every
pivot.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax import backbone
from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.models import wan_vae
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import sharding

P, G, BLOCKS, FRAMES = 2, 4, 5, 3


def mesh_of(data, branch, context):
    """A mesh of this shape, whatever prompts and branches it is for."""
    return sharding.make_mesh(data, branch, data, branch, context=context)


class Causal:
    """A decoder with a memory: a pixel is the sum of the latents so far; the first frame is one.

    Of its frames, which have two rows, a device may have some.
    """

    rows = 2

    def __init__(self, dtype):
        self.dtype = dtype

    to_pixel = staticmethod(partial(composite.latent_to_pixel, stride=2))

    def load_decoder(self, placed):
        return jax.device_put({"scale": jnp.float32(2.0)}, placed)

    def depths(self, windows, latents):
        last = max(end for _, end in windows) // 2
        return (np.arange(latents) <= last).astype(np.int32)

    def decode(self, weights, latents, depth, state, rows=None):
        assert latents.shape[2] == (rows.of_device if rows else 2)
        total = jnp.cumsum(weights["scale"] * latents, axis=1) + (0 if state is None else state)
        pixels = jnp.repeat(total[..., :3], 2, axis=1)[:, 1 if state is None else 0 :]
        return pixels.astype(self.dtype), total[:, -1:]


def compilations(decoder):
    return {name: f._cache_size() for name, f in vars(decoder).items() if hasattr(f, "_cache_size")}


# data, branch, context; of three devices of context one has no row.
MESHES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1), (1, 2, 2), (2, 1, 3)]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_a_group_is_its_videos(shape, dtype):
    mesh = mesh_of(*shape)
    decoder = VideoDecoder(Causal(dtype), mesh, FRAMES)
    rng = np.random.default_rng(0)
    branches = rng.integers(0, 3, (P, G, BLOCKS * FRAMES, 2, 2, 4)).astype(np.float32)
    programs, whole = [], ((0, 2 * BLOCKS * FRAMES - 1),)
    for pivot in range(BLOCKS):
        branches[:, :, : pivot * FRAMES] = branches[:, :1, : pivot * FRAMES]
        anchor = np.concatenate(
            [branches[:, 0, : pivot * FRAMES], branches[:, 1, pivot * FRAMES :] + 1], axis=1
        )
        expected = np.repeat(np.cumsum(2 * branches, axis=2)[..., :3], 2, axis=2)[:, :, 1:]
        pixels = decoder.group(
            sharding.place(branches, mesh, sharding.TRAJECTORIES),
            sharding.place(anchor, mesh, sharding.PROMPTS),
            pivot,
            whole,
        )
        assert pixels.videos.dtype == dtype and pixels.videos.shape == (
            P,
            G,
            2 * BLOCKS * FRAMES - 1,
            2,
            2,
            3,
        )
        of_device = pixels.videos.addressable_shards[0].data.shape
        assert of_device == (P // shape[0], G // shape[1], *pixels.videos.shape[2:])
        np.testing.assert_array_equal(pixels.videos, expected)
        np.testing.assert_array_equal(
            pixels.anchor[:, 0], np.repeat(np.cumsum(2 * anchor, 1)[..., :3], 2, axis=1)[:, 1:]
        )
        programs.append(compilations(decoder))
    # Nothing is compiled for another pivot, once there are a first and another block before it.
    assert len(programs[0]) == 8 and programs[2] == programs[3] == programs[4]
    placed = sharding.place(branches, mesh, sharding.TRAJECTORIES)
    np.testing.assert_array_equal(decoder.videos(placed, whole).videos, expected)
    streamed, state = [], None
    for first in range(0, BLOCKS * FRAMES, FRAMES):
        pixels, state = decoder.block(branches[:, 0, first : first + FRAMES], state)
        streamed.append(pixels)
        assert state.addressable_shards[0].data.shape[3] == -(-2 // shape[2])  # rows of a device
    np.testing.assert_array_equal(np.concatenate(streamed, axis=1), expected[:, 0])


def values_of(latents, scale):
    """The pixels uint8[..., frames', h, w, 3] that `Causal` makes of [..., frames, Y, X, C]."""
    pixels = np.repeat(np.cumsum(2 * latents, axis=-4)[..., :3], 2, axis=-4)[..., 1:, :, :, :]
    return np.round(scale * pixels).astype(np.uint8)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 4, 1), (2, 1, 2), (1, 2, 3)]
)
@pytest.mark.parametrize("dtype, scale", [(jnp.float32, 255), (jnp.uint8, 1)])
def test_films_are_whole_videos_in_bytes(shape, dtype, scale):
    """Of the group of the first prompt, the anchor first; and of the first prompts, whose shards
    decode one at a time.
    """
    prompts, frames = 4, BLOCKS * FRAMES
    mesh = mesh_of(*shape)
    decoder = VideoDecoder(Causal(dtype), mesh, FRAMES)
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 2, (prompts, 1 + G, frames, 2, 2, 4)).astype(np.float32)
    latents = steps if dtype == jnp.uint8 else steps / 64  # sums stay below 1
    for pivot in (1, 3):
        latents[:, :, : pivot * FRAMES] = latents[:, :1, : pivot * FRAMES]
        branches = sharding.place(latents[:, 1:], mesh, sharding.TRAJECTORIES)
        anchor = sharding.place(latents[:, 0], mesh, sharding.PROMPTS)
        made = decoder.group_films(branches, anchor, pivot)
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, values_of(latents[0], scale))
    single = sharding.place(latents[:, :1], mesh, sharding.PROMPTS)
    for count in (0, 1, 3, 4):
        made = dict(decoder.films(single, count))
        assert sorted(made) == list(range(count))
        for number, video in made.items():
            np.testing.assert_array_equal(video, values_of(latents[number, 0], scale))


# ---------------------------------------------------------------- what is read of a VAE

# By `wan_vae.first_latents` its stages start 21.5, 5.5, 2.5 and 1.5 latents before a read frame.
VAE = wan_vae.VAEConfig(
    base_dim=4, z_dim=2, num_res_blocks=0, latent_mean=(0.0,) * 2, latent_std=(1.0,) * 2
)


class RandomVAE:
    """A Wan VAE with one residual block in a stage, whose parameters are random."""

    rows = 3

    def __init__(self, dtype):
        self.cfg = dataclasses.replace(VAE, dtype=dtype)
        self.depths = partial(wan_vae.depths, self.cfg)
        self.decode = partial(backbone.decode, self.cfg)
        self.to_pixel = composite.latent_to_pixel

    def load_decoder(self, placed):
        rng = np.random.default_rng(0)
        like = wan_vae.abstract_decoder_params(self.cfg)
        params = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), like)
        return jax.device_put(params, placed)


@pytest.mark.parametrize(
    "shape, frames, dtype",
    [((1, 1, 2), 3, "float32"), ((1, 2, 1), 2, "bfloat16"), ((2, 1, 1), 1, "float32")],
)
def test_what_is_read_is_what_decoding_everything_gives(shape, frames, dtype):
    """To the last bit: clips apart, frames of a picture, windows that overlap, at all pivots; and
    nothing is compiled for another pivot.
    """
    latents, prompts, count = 48, 2, 2
    mesh = mesh_of(*shape)
    decoder = VideoDecoder(RandomVAE(dtype), mesh, frames)
    rng = np.random.default_rng(0)
    videos = rng.normal(size=(prompts, count + 1, latents, 3, 1, 2)).astype(np.float32)
    total = composite.latent_to_pixel(latents)
    windows = ((142, 151), (160, 161), (163, 178), (172, 181))  # from latent 36 on
    read = np.concatenate([np.arange(*window) for window in windows])
    compiled = []
    for fork in (12, 24, 40, 44):
        fork -= fork % frames
        videos[:, :, :fork] = videos[:, :1, :fork]
        branches = sharding.place(videos[:, 1:], mesh, sharding.TRAJECTORIES)
        anchor = sharding.place(videos[:, 0], mesh, sharding.PROMPTS)
        ours = decoder.group(branches, anchor, fork // frames, windows)
        compiled.append(compilations(decoder))
        theirs = VideoDecoder(RandomVAE(dtype), mesh, frames).group(
            branches, anchor, fork // frames, ((0, total),)
        )
        assert ours.fork == theirs.fork == 4 * fork - 3 and ours.windows == windows
        for name in ("videos", "anchor"):
            whole = np.asarray(getattr(theirs, name))
            np.testing.assert_array_equal(getattr(ours, name), whole[:, :, read], err_msg=name)
        changed = np.any(whole[:, :, 1:] != whole[:, :, :-1], axis=(0, 1, 3, 4, 5))
        assert changed.all()  # no two frames are alike
    assert compiled[0] == compiled[1] and compiled[2] == compiled[3]  # with frames before them


def test_no_block_is_decoded_that_leads_nowhere():
    """Frames 133 to 140 are in latents 34 and 35. The last stage needs 6 frames before them, from
    127 in latent 32 on, and so on down to latent 12; block 0 makes the state.
    """
    decoder = VideoDecoder(RandomVAE("float32"), mesh_of(1, 1, 1), 3)
    stepped, step = [], decoder._step

    def counting(weights, latents, start, depth, state):
        stepped.append((start, depth.tolist()))
        return step(weights, latents, start, depth, state)

    decoder._step = counting
    latents = jax.random.normal(jax.random.key(0), (1, 1, 48, 3, 1, 2))
    decoder.videos(latents, ((133, 141),))
    assert [start for start, _ in stepped] == [0, *range(12, 36, 3)]
    depth = [0] * 3 + [1] * 16 + [2] * 3 + [3] + [4] * 4
    assert sum((of_block for _, of_block in stepped), []) == depth
