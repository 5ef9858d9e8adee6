"""Decoding: what the branches share is decoded once, block by block, by programs that serve every
pivot.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import sharding

P, G, BLOCKS, FRAMES = 2, 4, 5, 3


class Causal:
    """A decoder with a memory, like the VAE's: a pixel is the sum of the latents so far; the first
    frame is one.
    """

    def __init__(self, dtype):
        self.dtype = dtype

    to_pixel = staticmethod(partial(composite.latent_to_pixel, stride=2))

    def load_decoder(self, placed):
        return jax.device_put({"scale": jnp.float32(2.0)}, placed)

    def decode(self, weights, latents, state):
        total = jnp.cumsum(weights["scale"] * latents, axis=1) + (
            0 if state is None else state[:, None]
        )
        pixels = jnp.repeat(total[..., :3], 2, axis=1)[:, 1 if state is None else 0 :]
        return pixels.astype(self.dtype), total[:, -1]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_a_group_is_its_videos(shape, dtype):
    mesh = sharding.make_mesh(*shape, P, G)
    decoder = VideoDecoder(Causal(dtype), mesh, FRAMES)
    rng = np.random.default_rng(0)
    branches = rng.integers(0, 3, (P, G, BLOCKS * FRAMES, 2, 2, 4)).astype(np.float32)
    programs = []
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
        )
        assert pixels.videos.dtype == dtype and pixels.videos.shape == (
            P,
            G,
            2 * BLOCKS * FRAMES - 1,
            2,
            2,
            3,
        )
        np.testing.assert_array_equal(pixels.videos, expected)
        np.testing.assert_array_equal(
            pixels.anchor[:, 0], np.repeat(np.cumsum(2 * anchor, 1)[..., :3], 2, axis=1)[:, 1:]
        )
        programs.append(
            {
                name: f._cache_size()
                for name, f in vars(decoder).items()
                if hasattr(f, "_cache_size")
            }
        )
    # Nothing is compiled for another pivot, once there are a first and another block before it.
    assert len(programs[0]) == 6 and programs[2] == programs[3] == programs[4]
    np.testing.assert_array_equal(
        decoder.videos(sharding.place(branches, mesh, sharding.TRAJECTORIES)).videos, expected
    )
