"""Motion rewards on clips whose scores are known by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.rewards import motion


def clip(frames):
    """float[1, frames, 1, n, 3] from rows of grey values."""
    return jnp.repeat(jnp.asarray(frames, jnp.float32)[None, :, None, :, None], 3, axis=-1)


def score(frames):
    return {name: float(value[0]) for name, value in motion.score(clip(frames), ["a"]).items()}


def test_flicker_moves_most_and_is_least_smooth():
    got = score([[0, 1], [1, 0], [0, 1], [1, 0]])
    np.testing.assert_allclose([got["motion"], got["smoothness"]], [2.0, 0.0], atol=1e-4)


def test_a_still_picture_does_not_move():
    assert score([[0.2, 0.9]] * 4) == {"motion": 0.0, "smoothness": 1.0}


def test_brightness_and_contrast_do_not_count():
    got = score([[0.0, 1.0], [0.4, 0.6], [0.7, 0.8]])
    np.testing.assert_allclose(got["motion"], 0.0, atol=1e-4)


def test_constant_rate_is_smooth():
    # After normalisation a pattern that turns by a fixed angle: second differences are 2 sin(a / 2)
    # of the first.
    angle = 0.2
    steps = [
        [np.cos(angle * t + phase) for phase in (0, 2 * np.pi / 3, 4 * np.pi / 3)] for t in range(6)
    ]
    got = score(steps)
    np.testing.assert_allclose(
        got["motion"], np.sqrt(2) * 2 * np.sin(angle / 2) / np.sqrt(2), rtol=1e-4
    )
    np.testing.assert_allclose(got["smoothness"], 1 - np.sin(angle / 2), rtol=1e-3)


def test_two_frames_are_refused():
    with pytest.raises(ValueError, match="three frames, not 2"):
        score([[0, 1], [1, 0]])
