"""Generators of Wan2.1's design beside LongLive: what their presets do."""

import math

import jax
import numpy as np
import pytest
from equipment import configure

from kvpo_jax import backbone, run
from kvpo_jax.algorithm import flow
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import abstract_variables
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config

SPECS = (
    "configs/self_forcing.py",
    "configs/causal_forcing.py",
    "configs/causal_forcing.py:frame",
    "configs/krea14b.py",
)
FRAMES = 21  # latent, of the videos that these models were distilled on


@pytest.mark.parametrize(
    "spec, published, blocks, pivots",
    [
        # Of 7 blocks of 3, two are perturbed, and 12 past frames fill the window. Behind frame 12
        # lie 6 routable ones for 6 slots, which is one way; behind frame 15 there are 9.
        ("configs/self_forcing.py", "published", 7, (5,)),
        ("configs/causal_forcing.py", "chunk_published", 7, (5,)),
        ("configs/krea14b.py", "published", 7, (5,)),
        # Of 21 blocks of 1, six are. 7 routable frames have 7 subsets for 8 branches, 8 have 28.
        ("configs/causal_forcing.py:frame", "frame_published", 21, (14, 15)),
    ],
)
def test_videos_are_as_long_as_the_models_were_made_for(spec, published, blocks, pivots):
    config, to_pixel = config_lib.load(spec), composite.latent_to_pixel
    config_lib.check(config)
    video = config.video
    assert video.blocks == blocks and blocks * video.block_frames == FRAMES
    assert run.eligible_pivots(config, to_pixel) == pivots
    (clip,) = backbone.scored_clips(config, to_pixel)
    assert (clip.start, clip.end) == (0, 81)  # 5 seconds at 16 frames per second
    assert config.backbone in backbone.BACKBONES

    whole = config_lib.load(f"{spec.partition(':')[0]}:{published}")
    assert whole.video == config.video
    window = whole.window
    assert window.sink + window.past + video.block_frames == FRAMES  # all past frames, always
    with pytest.raises(UsageError, match="no block can be a pivot"):  # and so none to choose from
        run.eligible_pivots(whole, to_pixel)


@pytest.mark.parametrize("spec", SPECS)
def test_the_sampler_is_the_published_one(spec):
    """Four steps, 1000 to 250 of a table of 1000 timesteps, shifted by 5; a clean context."""
    config = config_lib.load(spec)
    table = [1 - i / 1000 for i in range(1000)]
    shifted = [5 * s / (1 + 4 * s) for s in table]
    schedule = flow.schedule(config.sampler)
    expected = [*(shifted[1000 - step] for step in (1000, 750, 500, 250)), 0]
    np.testing.assert_allclose(schedule.sigma, expected, atol=1e-6)
    np.testing.assert_allclose(schedule.sigma_cond, expected, atol=1e-6)
    assert schedule.solver == "renoise"
    assert (config.video.height, config.video.width) == (60, 104)


def test_krea_has_the_parameters_of_14b():
    config = config_lib.load("configs/krea14b.py")
    variables = abstract_variables(wan_config(config))
    count = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
        for name, tree in variables.items()
    }
    dim, ffn, rank = 5120, 13824, 64
    block = 8 * dim * (dim + 1) + ffn * (dim + 1) + dim * (ffn + 1) + 12 * dim
    assert count["params"] == 40 * block + 232_719_424 == 14_288_491_584
    assert count["lora"] == 40 * rank * (8 * 2 * dim + 2 * (dim + ffn)) == 306_708_480


def test_blocks_of_one_frame_are_scored_with_their_neighbours():
    """The first block is one pixel frame, every other is four."""
    fields = {"eval.by_block": True, "reward.scorer": "motion", "reward.weights.motion": 1.0}
    config = configure("configs/causal_forcing.py:frame", fields)
    to_pixel = composite.latent_to_pixel
    clips = backbone.block_clips(config, to_pixel)
    assert len(clips) == FRAMES
    assert [(clip.start, clip.end) for clip in clips[:3]] == [(0, 3), (1, 5), (5, 9)]
    assert backbone.block_starts(config, to_pixel)[:3] == [1, 5, 9]
    assert backbone.blocks_read(config, to_pixel, ((0, 57),), 14) == 20  # the last that is replayed
