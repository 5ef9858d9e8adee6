"""Scores of whole videos, each against its formula by hand on tiny frames."""

import jax.numpy as jnp
import numpy as np
import pytest
from equipment import configure, pixels_of

from kvpo_jax import backbone, programs
from kvpo_jax.rewards import composite, optical_flow, scorers, stream
from kvpo_jax.rewards.composite import Clip


def grey(values):
    """float[1, frames, 3, 3, 3] of frames of one grey each."""
    return jnp.broadcast_to(
        jnp.asarray(values, jnp.float32)[None, :, None, None, None], (1, len(values), 3, 3, 3)
    )


def footage(frames, starts=()):
    """All frames of some pixels, with these numbers in the video."""
    return composite.Footage(np.arange(len(frames)), np.asarray(frames), np.asarray(starts))


def score(pixels, frames=None, starts=()):
    frames = range(pixels.shape[1]) if frames is None else frames
    return {k: float(v[0]) for k, v in stream.score(pixels, footage(frames, starts)).items()}


def test_flicker_and_freezes_are_counted_by_the_change_from_frame_to_frame():
    # Changes 0.2, 0, 0.0005 (which is still) and 0.4.
    got = score(grey([0.1, 0.3, 0.3, 0.3005, 0.7005]))
    assert got["temporal_flickering"] == pytest.approx(1 - 0.6005 / 4, abs=1e-6)
    assert got["unfrozen"] == 2 / 4


def test_frames_that_do_not_follow_each_other_are_not_compared():
    got = score(grey([0.1, 0.2, 0.9, 0.9]), frames=(3, 4, 40, 41))
    assert got["temporal_flickering"] == pytest.approx(1 - 0.1 / 2, abs=1e-6)
    assert got["unfrozen"] == 1 / 2
    with pytest.raises(ValueError, match="two frames or more"):
        score(grey([0.1, 0.2]), frames=(3, 5))


def test_drift_is_between_the_first_and_the_last_15_percent():
    # Of 20 frames three at either end: 0.2 and (0.5 + 0.6 + 0.7) / 3.
    got = score(grey([0.2] * 3 + [0.9] * 14 + [0.5, 0.6, 0.7]))
    assert got["exposure_kept"] == pytest.approx(1 - 0.4, abs=1e-6)
    assert got["saturation_kept"] == 1.0
    red = grey([0.0, 0.0]).at[0, 1, :, :, 0].set(0.5)
    got = score(red)
    assert got["saturation_kept"] == pytest.approx(0.5, abs=1e-6)
    assert got["exposure_kept"] == pytest.approx(1 - 0.2126 * 0.5, abs=1e-6)


def test_sharpness_is_the_variance_of_the_laplacian():
    # A bright pixel inside 4x4: Laplacian -4a at it, a at its two neighbours inside, 0 at the last.
    # Mean -a / 2, mean square 18 a^2 / 4: variance 4.25 a^2.
    spot = jnp.zeros((1, 2, 4, 4, 3)).at[0, 0, 1, 1].set(1.0).at[0, 1, 1, 1].set(0.5)
    series = stream._series(spot, np.arange(2))
    np.testing.assert_allclose(series["sharpness"][:, 0], [4.25, 4.25 / 4], rtol=1e-5)
    assert score(spot)["sharpness_kept"] == pytest.approx(0.25, rel=1e-5)
    assert score(spot[:, ::-1])["sharpness_kept"] == pytest.approx(0.25, rel=1e-5)
    assert score(grey([0.1, 0.5]))["sharpness_kept"] == 1.0  # nothing sharp at either end


def test_continuity_compares_changes_inside_blocks_with_those_where_blocks_meet():
    # Blocks begin at frames 3 and 6: changes 0.3 there, 0.1 elsewhere.
    values = np.cumsum([0, 0.1, 0.1, 0.3, -0.1, -0.1, -0.3, 0.1])
    assert score(grey(values), starts=(3, 6))["continuity"] == pytest.approx(1 / 3, abs=1e-5)
    assert score(grey(values), starts=(1,))["continuity"] == 1.0  # a smaller change than inside
    assert score(grey(values[:3]), starts=(3, 6))["continuity"] == 1.0  # no two blocks meet
    assert "continuity" not in score(grey(values))


def test_bytes_score_as_floats_and_videos_apart():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 5, 6, 3), dtype=np.uint8)
    whole = stream.score(jnp.asarray(pixels), footage(range(8), (4,)))
    assert whole.keys() == set(scorers.COMPONENTS["stream"])
    for i, video in enumerate(pixels):
        alone = score(jnp.asarray(video[None], jnp.float32) / 255, starts=(4,))
        for name, value in alone.items():
            assert whole[name][i] == pytest.approx(value, abs=1e-5)


def test_footage_is_every_frame_of_the_clips_once():
    windows = ((10, 14), (12, 16), (30, 32))
    got = composite.footage_of(windows, [Clip(0, 10, 14), Clip(1, 12, 16), Clip(2, 30, 32)], (12,))
    np.testing.assert_array_equal(got.frames, [10, 11, 12, 13, 14, 15, 30, 31])
    frames_in_pixels = np.array([10, 11, 12, 13, 12, 13, 14, 15, 30, 31])
    np.testing.assert_array_equal(frames_in_pixels[got.rows], got.frames)
    np.testing.assert_array_equal(got.seams(), [0, 1, 0, 0, 0, 0])


def test_wan_blocks_begin_at_9_and_every_12_frames_later():
    config = configure("configs/longlive.py", {})
    starts = backbone.block_starts(config, composite.latent_to_pixel)
    assert starts[:3] == [9, 21, 33] and len(starts) == config.video.blocks - 1


def test_a_score_that_is_not_finite_names_component_and_prompt():
    pixels = pixels_of(jnp.full((2, 1, 4, 3, 3, 3), 0.5).at[1, 0, 2, 0, 0, 0].set(jnp.nan))
    listed = scorers.Scorers("stream", {})
    with pytest.raises(ValueError, match=r"temporal_flickering is nan for prompt 1 \('b'\)"):
        composite.video_rewards(listed.of_videos, pixels, [["a"], ["b"]], [Clip(0, 0, 4)])


def test_a_scorer_of_videos_is_not_optimised_and_shares_no_name():
    config = configure("configs/tiny.py", {"reward.scorer": "toy,stream", "eval.scorer": ""})
    with pytest.raises(ValueError, match="stream compares the frames of whole videos, which is wa"):
        backbone.check_rewards(config, backbone.load(config))
    listed = scorers.Scorers(f"stream,{__name__}:own", {})
    with pytest.raises(ValueError, match="a component 'unfrozen'"):
        listed(grey([0.1, 0.2]), ["a"])


def own(pixels, prompts):
    return {"unfrozen": np.zeros(len(prompts))}


# ---------------------------------------------------------------- optical flow and latents


def moved(steps, size=64):
    """Luma float[len(steps), size, size] of a smooth pattern, moved to the right so many pixels."""
    y, x = np.mgrid[:size, :size]
    at = [x - step for step in steps]
    return np.stack([0.5 + 0.2 * np.sin(a / 5) + 0.2 * np.cos((y + 0.3 * a) / 7) for a in at])


def test_flow_is_how_far_things_move_for_any_size():
    before, after = moved((0, 1.5))
    assert optical_flow.mean_flow(before, after) == pytest.approx(1.5 * 256 / 64, rel=0.1)
    assert optical_flow.mean_flow(before, before) == 0
    large = [np.kron(x, np.ones((4, 4))) for x in (before, after)]
    assert optical_flow.mean_flow(*large) == pytest.approx(1.5 * 256 / 64, rel=0.1)


def test_flow_of_videos_and_where_their_blocks_meet():
    pixels = np.repeat(moved((0, 1, 2, 5))[None, ..., None], 3, axis=-1).astype(np.float32)
    got = optical_flow.score(jnp.asarray(pixels), footage(range(4), (3,)))
    assert got["flow"][0] == pytest.approx((1 + 1 + 3) / 3 * 256 / 64, rel=0.1)
    assert got["flow_continuity"][0] == pytest.approx(1 / 3, rel=0.1)
    assert got.keys() == set(scorers.COMPONENTS["flow"])


def test_self_similarity_is_the_mean_cosine_at_every_lag():
    # Unit vectors at 0, 90, 90 and 180 degrees; the fifth frame does not count.
    frames = np.array([[2.0, 0], [0, 1], [0, 3], [-1, 0], [7, 7]], np.float32)
    latents = jnp.asarray(frames).reshape(1, 1, 5, 1, 2, 1)
    got = programs.self_similarity(latents, 4)
    np.testing.assert_allclose(got, [[1 / 3, 0, -1]], atol=1e-6)
