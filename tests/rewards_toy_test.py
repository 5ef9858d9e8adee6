"""The toy's analytic rewards on rendered clips: what each score sees, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.data import toy_world
from kvpo_jax.data.toy_world import COMBINATIONS, DIRECTIONS, SIZE, Look, describe
from kvpo_jax.rewards import toy

FRAMES = 12
PROMPTS = [describe(a) for a in COMBINATIONS]  # one clip of each combination


@jax.jit
def _clips(look, speed):
    start_key, jitter_key, speckle_key = jax.random.split(jax.random.key(0), 3)
    colour, shape, direction = jnp.asarray(COMBINATIONS).T
    start = jax.random.uniform(start_key, (len(PROMPTS), 1, 2), maxval=SIZE)
    velocity = speed * jnp.asarray(tuple(DIRECTIONS.values()))[direction][:, None]
    track = start + velocity * jnp.arange(FRAMES)[:, None]
    track = track + look.jitter * jax.random.normal(jitter_key, track.shape)
    pixels = toy_world.render(track % SIZE, colour[:, None], shape[:, None], look)
    return pixels + look.speckle * jax.random.normal(speckle_key, pixels.shape)


def clips(saturation=1.0, blur=0.0, speckle=0.0, jitter=0.0, speed=1.0):
    """Every combination once, float[48, 12, 8, 8, 3]; all looks have the same starts and noise."""
    return _clips(Look(saturation, blur, speckle, jitter), speed)


def means(**look):
    scores = toy.score(clips(**look), PROMPTS)
    return {name: float(values.mean()) for name, values in scores.items()}


# ---------------------------------------------------------------- clean clips


def test_clean_clips_get_full_marks():
    for name, values in toy.score(clips(), PROMPTS).items():
        assert values.shape == (48,)
        assert 0.95 <= values.min() and values.max() <= 1.0, name


def test_centroid_is_the_rendered_centre():
    center = jax.random.uniform(jax.random.key(1), (300, 2), maxval=SIZE)
    pixels = toy_world.render(center, jnp.arange(300) % 4, jnp.arange(300) % 3)
    np.testing.assert_allclose(toy.wrap(toy.centroid(pixels) - center), 0.0, atol=0.05)


def test_centroid_is_not_drawn_to_background_noise():
    center = jax.random.uniform(jax.random.key(1), (300, 2), maxval=SIZE)
    pixels = toy_world.render(center, jnp.arange(300) % 4, jnp.arange(300) % 3)
    pixels = pixels + 0.06 * jax.random.normal(jax.random.key(2), pixels.shape)
    error = toy.wrap(toy.centroid(pixels) - center)
    assert jnp.abs(error.mean()) < 0.01 and jnp.abs(error).max() < 0.25


def test_wrap_is_the_shortest_way():
    np.testing.assert_array_equal(
        toy.wrap(jnp.array([0.0, 1.0, 3.5, 4.0, 7.0, -7.0])), [0.0, 1.0, 3.5, -4.0, -1.0, 1.0]
    )


def test_scores_do_not_see_where_the_border_is():
    pixels = clips(jitter=0.3, speckle=0.02)
    expected = toy.score(pixels, PROMPTS)
    shifted = toy.score(jnp.roll(pixels, (5, 7), axis=(2, 3)), PROMPTS)
    for name in expected:
        np.testing.assert_allclose(shifted[name], expected[name], atol=1e-4)


# ---------------------------------------------------------------- nuisances


@pytest.mark.parametrize(
    "nuisance, levels, component",
    [
        ("saturation", (1.0, 0.75, 0.5, 0.25, 0.1, 0.0), "VQ"),
        ("blur", (0.0, 0.3, 0.6, 1.0, 1.4), "VQ"),
        ("speckle", (0.0, 0.02, 0.04, 0.06), "VQ"),
        ("jitter", (0.0, 0.1, 0.25, 0.5, 1.0), "MQ"),
        ("blur", (0.0, 0.3, 0.6, 1.0, 1.4), "TA"),
        ("saturation", (0.5, 0.25, 0.1, 0.05, 0.0), "MQ"),
        ("saturation", (0.5, 0.25, 0.1, 0.05, 0.0), "TA"),
    ],
)
def test_more_of_a_nuisance_scores_lower(nuisance, levels, component):
    scores = [means(**{nuisance: level})[component] for level in levels]
    assert all(better > worse for better, worse in zip(scores, scores[1:], strict=False)), scores
    assert scores[-1] < scores[0] - 0.15


@pytest.mark.parametrize("saturation", [0.9, 0.5, 0.25])
def test_quality_of_a_faded_clip(saturation):
    # The error is (1 - saturation)^2 of the template's energy.
    assert means(saturation=saturation)["VQ"] == pytest.approx(
        np.exp(-3 * (1 - saturation) ** 2), abs=0.01
    )


def test_smoothness_of_a_zigzag():
    # A sideways offset of +-1/2 pixel in turn: second differences of 2 pixels, so the smoothness is
    # 1 / (1 + 4).
    frame = jnp.arange(FRAMES)
    track = jnp.stack([4 + 0.5 * (-1.0) ** frame, frame.astype(float)], axis=-1)
    pixels = toy_world.render(track, jnp.zeros(FRAMES, int), jnp.zeros(FRAMES, int))[None]
    assert float(toy.score(pixels, ["a red disk moves right"])["MQ"][0]) == pytest.approx(
        0.2, abs=1e-3
    )


def test_a_vanished_object_gets_nothing_for_free():
    empty = means(saturation=0.0)
    assert (
        empty["VQ"] == pytest.approx(np.exp(-3), abs=1e-3) and empty["MQ"] == 0 and empty["TA"] == 0
    )
    noise = means(saturation=0.0, speckle=0.06)
    assert noise["VQ"] < 0.06 and noise["MQ"] < 0.02 and noise["TA"] < 0.06


def test_an_object_that_stands_still_has_no_motion():
    for speed in (0.0, 0.5, 1.0):
        scores = means(speed=speed)
        assert scores["MQ"] == pytest.approx(speed, abs=0.01)
        assert scores["TA"] == pytest.approx((2 + speed) / 3, abs=0.02)


def test_small_improvements_count():
    start = means(saturation=0.4, blur=0.5, speckle=0.03, jitter=0.4)
    assert means(saturation=0.42, blur=0.5, speckle=0.03, jitter=0.4)["VQ"] > start["VQ"] + 0.01
    assert means(saturation=0.4, blur=0.45, speckle=0.03, jitter=0.4)["VQ"] > start["VQ"]
    assert means(saturation=0.4, blur=0.5, speckle=0.03, jitter=0.38)["MQ"] > start["MQ"] + 0.005


def test_the_data_leaves_room_to_improve():
    rng = np.random.default_rng(0)
    attributes = np.stack([toy_world.sample_attributes(rng, "all", 4) for _ in range(12)])
    sample = jax.jit(jax.vmap(lambda key, a: toy_world.sample_video(key, a, 16, 3, (12, 24, 36))))
    segments = sample(jax.random.split(jax.random.key(0), 12), attributes).reshape(
        48, FRAMES, SIZE, SIZE, 3
    )
    scores = toy.score(segments, [describe(a) for a in attributes.reshape(48, 3)])
    assert 0.5 < np.mean([values.mean() for values in scores.values()]) < 0.8


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "word, offset", [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
)
def test_each_wrong_word_costs_a_third_of_alignment(word, offset):
    other = COMBINATIONS.copy()
    other[:, word] = (other[:, word] + offset) % (4, 3, 4)[word]
    right, wrong = (
        toy.score(clips(), [describe(a) for a in attributes])
        for attributes in (COMBINATIONS, other)
    )
    # Shapes of a few pixels resemble each other, the more so between pixel positions.
    np.testing.assert_allclose(right["TA"] - wrong["TA"], 1 / 3, atol=0.1 if word == 1 else 0.05)
    np.testing.assert_array_equal(right["VQ"], wrong["VQ"])
    np.testing.assert_array_equal(right["MQ"], wrong["MQ"])


def test_all_words_wrong_is_no_alignment():
    other = (COMBINATIONS + 1) % np.array([4, 3, 4])
    assert toy.score(clips(), [describe(a) for a in other])["TA"].max() < 0.04


# ---------------------------------------------------------------- contract


def test_scores_are_deterministic_and_independent_of_the_batch():
    pixels = clips(saturation=0.6, jitter=0.3, speckle=0.03)
    together, again = toy.score(pixels, PROMPTS), toy.score(pixels, PROMPTS)
    alone = toy.score(pixels[7:8], PROMPTS[7:8])
    for name in together:
        np.testing.assert_array_equal(together[name], again[name])
        np.testing.assert_allclose(alone[name][0], together[name][7], atol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_pixels_that_are_not_finite_are_not_scored(value):
    pixels = clips().at[3, 2, 4, 5, 1].set(value)
    for values in toy.score(pixels, PROMPTS).values():
        assert np.isnan(values[3]) and np.isfinite(np.delete(values, 3)).all()


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ValueError, match="at least 3 frames, not 2"):
        toy.score(clips()[:, :2], PROMPTS)
    with pytest.raises(ValueError, match="'purple' is not one of red"):
        toy.score(clips()[:1], ["a purple disk moves left"])
    with pytest.raises(AssertionError):
        toy.score(clips(), PROMPTS[:-1])
