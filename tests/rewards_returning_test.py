"""Rewards of the world "return" on rendered clips: what is semantic, what is appearance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.data import return_world as world
from kvpo_jax.errors import UsageError
from kvpo_jax.rewards import returning
from kvpo_jax.rewards.composite import Sentence

A, B, C, D = (
    world.OBJECTS.index(name) for name in ("a red bar", "a blue dot", "a green pole", "a cyan bar")
)
EVERY = jnp.arange(len(world.OBJECTS))
CENTER = (1.5, 1.5)


def clip(objects, center=CENTER, saturation=1.0, frames=9, speckle=0.0):
    """A clip of each object, float[n, frames, 48, 48, 3]."""
    objects = jnp.asarray(objects)[:, None] + jnp.zeros(frames, int)
    latents = world.render(
        jnp.broadcast_to(jnp.asarray(center), (*objects.shape, 2)), objects, saturation
    )
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    return world.decode(latents + speckle / world.LATENT_SCALE * noise)


def returns(*cast, ending=world.RETURNS):
    """The last sentence of a story."""
    return Sentence.of(world.tell(cast, ending), 4)


def test_clean_clips_of_what_is_asked_for_get_full_marks():
    scores = returning.score(clip(EVERY), world.OBJECTS)
    for name, expected in (("SC", 1), ("VQ", 1), ("wanted", 1), ("shown", 0), ("other", 0)):
        assert scores[name].shape == (18,)
        # A dot resembles a bar and a pole a little.
        np.testing.assert_allclose(scores[name], expected, atol=0.07)


@pytest.mark.parametrize("ending", [world.RETURNS, world.FIRST_RETURNS])
def test_the_first_object_of_the_story_is_to_return(ending):
    prompts = [returns(A, B, C, ending=ending)] * 4
    scores = returning.score(clip([A, B, C, D]), prompts)
    np.testing.assert_allclose(scores["SC"], [1, 0, 0, 0], atol=0.07)
    np.testing.assert_array_equal(scores["wanted"], [1, 0, 0, 0])
    np.testing.assert_array_equal(scores["shown"], [0, 1, 1, 0])
    np.testing.assert_array_equal(scores["other"], [0, 0, 0, 1])
    np.testing.assert_allclose(scores["VQ"], 1, atol=0.02)


def test_appearance_does_not_see_which_object_it_is():
    right, wrong = (
        returning.score(clip([B], saturation=0.7), [returns(*cast)])
        for cast in ((B, A, A), (A, B, B))
    )
    np.testing.assert_array_equal(right["VQ"], wrong["VQ"])
    assert right["SC"] > 0.9 and wrong["SC"] < 0.05


@pytest.mark.parametrize("saturation", [0.9, 0.5, 0.25])
def test_semantics_do_not_see_how_pale_an_object_is(saturation):
    pale = returning.score(clip(EVERY, saturation=saturation), world.OBJECTS)
    # The error is (1 - saturation)^2 of the template's energy.
    np.testing.assert_allclose(pale["VQ"], np.exp(-3 * (1 - saturation) ** 2), atol=0.01)
    assert pale["SC"].min() > 0.85 and (pale["wanted"] == 1).all()


def test_semantics_do_not_see_where_an_object_is():
    for center in ((0.9, 1.1), (2.1, 1.8), (1.2, 2.2)):
        moved = returning.score(clip(EVERY, center), world.OBJECTS)
        assert moved["SC"].min() > 0.9 and moved["VQ"].min() > 0.9


def test_a_vanished_object_is_nothing():
    gone = returning.score(clip([A, A], saturation=0.0), [returns(A, B, B), world.EMPTY])
    np.testing.assert_allclose(gone["SC"], [0, 1], atol=1e-3)
    np.testing.assert_allclose(gone["VQ"], [np.exp(-3), 1], atol=1e-3)
    np.testing.assert_array_equal(gone["other"], [1, 0])
    there = returning.score(clip([A]), [world.EMPTY])
    assert there["SC"] < 0.01 and there["VQ"] < 0.1 and there["other"] == 1


def test_a_mixture_of_two_objects_is_unclear():
    mixed = (clip([A]) + clip([B])) / 2
    scores = returning.score(mixed, [returns(A, B, B)])
    assert scores["SC"] < 0.9 and scores["VQ"] < 0.7


def test_shares_are_of_frames():
    half = jnp.concatenate([clip([A], frames=6), clip([B], frames=3)], axis=1)
    scores = returning.score(half, [returns(A, B, B)])
    for name, expected in (("SC", 2 / 3), ("wanted", 2 / 3), ("shown", 1 / 3), ("other", 0)):
        assert float(scores[name][0]) == pytest.approx(expected, abs=0.03)


def test_the_data_leaves_room_to_improve():
    keys = jax.random.split(jax.random.key(0), 180)
    objects = jnp.repeat(EVERY, 10)
    latents = jax.vmap(lambda key, o: world.sample_latents(key, jnp.full(9, o), 3))(keys, objects)
    scores = returning.score(world.decode(latents), [world.OBJECTS[int(o)] for o in objects])
    assert scores["SC"].mean() > 0.95 and scores["wanted"].min() == 1
    assert 0.7 < scores["VQ"].mean() < 0.8


def test_scores_do_not_depend_on_the_batch():
    pixels, prompts = clip(EVERY, saturation=0.6, speckle=0.03), [returns(A, B, C)] * 18
    together, alone = returning.score(pixels, prompts), returning.score(pixels[4:5], prompts[:1])
    for name in together:
        np.testing.assert_allclose(alone[name][0], together[name][4], atol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_pixels_that_are_not_finite_are_not_scored(value):
    pixels = clip([A, B]).at[1, 2, 4, 5, 1].set(value)
    for values in returning.score(pixels, ["a red bar", "a blue dot"]).values():
        assert np.isfinite(values[0]) and np.isnan(values[1])


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(UsageError, match="'it returns': no sentence before it shows an object"):
        returning.score(clip([A]), ["it returns"])
    with pytest.raises(UsageError, match="'a red disk': the world has"):
        returning.score(clip([A]), ["a red disk"])
    with pytest.raises(AssertionError):
        returning.score(clip([A]), [])
