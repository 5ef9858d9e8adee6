"""The toy world: prompts, pictures, looks and latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.data import toy_world
from kvpo_jax.data.toy_world import (
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    SPLITS,
    VOCABULARY,
    Look,
)
from kvpo_jax.errors import UsageError

SWITCHES = (12, 24, 36)
RED_DISK_RIGHT, BLUE_SQUARE_DOWN = (0, 0, 0), (2, 1, 3)


# ---------------------------------------------------------------- prompts


def test_describe_and_parse_are_inverse():
    assert toy_world.describe(RED_DISK_RIGHT) == "a red disk moves right"
    assert toy_world.describe(BLUE_SQUARE_DOWN) == "a blue square moves down"
    assert len({toy_world.describe(a) for a in COMBINATIONS}) == 48
    for attributes in COMBINATIONS:
        assert toy_world.parse(toy_world.describe(attributes)) == tuple(attributes)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a purple disk moves left", "'purple' is not one of red, green, blue, yellow"),
        ("a red circle moves left", "'circle' is not one of disk, square, cross"),
        ("a red disk moves north", "'north' is not one of right, left, up, down"),
        ("the red disk moves left", "'the' is not one of a"),
        ("a red disk", "expected 5 words"),
        ("", "expected 5 words"),
    ],
)
def test_a_malformed_prompt_is_an_error_that_quotes_it(prompt, message):
    for read in (toy_world.parse, lambda p: toy_world.embed([p])):
        with pytest.raises(ValueError, match=message) as error:
            read(prompt)
        assert repr(prompt) in str(error.value)


def test_embedding_is_one_token_per_word():
    prompts = [toy_world.describe(a) for a in COMBINATIONS]
    tokens = toy_world.embed(prompts)
    assert (
        tokens.shape == (48, toy_world.TEXT_LEN, toy_world.TEXT_DIM) and tokens.dtype == np.float32
    )
    np.testing.assert_array_equal(tokens.sum(axis=-1), np.tile([1, 1, 1, 1, 1, 1, 0, 0], (48, 1)))
    for prompt, row in zip(prompts, tokens, strict=True):
        words = [VOCABULARY[i] for i in row[:6].argmax(axis=-1)]
        assert " ".join(words) == prompt + " </s>"


def test_splits_are_disjoint_and_cover_all_combinations():
    train, heldout = ({tuple(a) for a in SPLITS[name]} for name in ("train", "heldout"))
    assert len(train) == 32 and len(heldout) == 16 and not train & heldout
    assert train | heldout == {tuple(a) for a in SPLITS["all"]} == {tuple(a) for a in COMBINATIONS}


def test_every_word_is_seen_in_training():
    for word, count in enumerate((len(COLOURS), len(SHAPES), len(DIRECTIONS))):
        assert set(SPLITS["train"][:, word]) == set(range(count))


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_prompt_sequences_stay_in_their_split_and_change(split):
    allowed = {tuple(a) for a in SPLITS[split]}
    rng = np.random.default_rng(0)
    sequences = [toy_world.sample_attributes(rng, split, 4) for _ in range(300)]
    assert all(s.shape == (4, 3) and {tuple(a) for a in s} <= allowed for s in sequences)
    assert min(len({tuple(a) for a in s}) for s in sequences) == 2
    repeats = np.mean([(s[1:] == s[:-1]).all(axis=1).mean() for s in sequences])
    assert 0.2 < repeats < 0.35  # 1/4 by copying, and a little by chance


def test_one_segment_and_seeds():
    assert toy_world.sample_attributes(np.random.default_rng(0), "train", 1).shape == (1, 3)
    assert toy_world.sample_prompts(3, "train", 4) == toy_world.sample_prompts(3, "train", 4)
    assert toy_world.sample_prompts(3, "train", 4) != toy_world.sample_prompts(4, "train", 4)


def test_held_out_sequences_are_all_different():
    drawn = [tuple(sequence) for sequence in toy_world.heldout_prompts(200, 3)]
    assert len(set(drawn)) == 200 and drawn[:32] == [*map(tuple, toy_world.heldout_prompts(32, 3))]
    assert len(toy_world.heldout_prompts(16, 1)) == 16
    with pytest.raises(UsageError, match="16 held-out prompt sequences of 1 sentences.*not for 17"):
        toy_world.heldout_prompts(17, 1)
    with pytest.raises(UsageError, match="240 held-out"):
        toy_world.heldout_prompts(241, 2)


def test_sampling_does_not_change_the_splits():
    before = COMBINATIONS.copy()
    for seed in range(20):
        toy_world.sample_attributes(np.random.default_rng(seed), "all", 4)[:] = -1
    np.testing.assert_array_equal(SPLITS["all"], before)


# ---------------------------------------------------------------- pictures


def test_the_middle_has_the_colour_and_the_corner_the_background():
    for c, rgb in enumerate(COLOURS.values()):
        for s in range(len(SHAPES)):
            pixels = toy_world.render(jnp.array([4.0, 4.0]), jnp.array(c), jnp.array(s))
            assert pixels.shape == (SIZE, SIZE, 3)
            np.testing.assert_allclose(pixels[4, 4], rgb, atol=1e-5)
            np.testing.assert_allclose(pixels[0, 0], toy_world.BACKGROUND, atol=1e-5)


def test_shapes_differ_where_they_should():
    center = jnp.array([4.0, 4.0])
    disk, square, cross = (
        toy_world.render(center, jnp.array(0), jnp.array(s))[..., 0] - 0.5 for s in range(3)
    )
    assert (
        square[2, 2] > 0.24 and disk[2, 2] < 1e-5 and cross[2, 2] < 1e-5
    )  # two pixels off the middle, diagonally
    assert square[3, 3] > 0.49 and disk[3, 3] > 0.49 and cross[3, 3] < 0.11  # one pixel
    assert cross[4, 6] > 0.49 and square[4, 6] < 0.26  # the arm of the cross is the longest


@pytest.mark.parametrize("shape", range(3))
def test_render_is_equivariant_to_translation_on_the_torus(shape):
    look = Look(*(jnp.float32(x) for x in (0.7, 0.8, 0.0, 0.0)))

    def draw(y, x):
        return toy_world.render(jnp.array([y, x]), jnp.array(1), jnp.array(shape), look)

    pixels = draw(2.3, 4.6)
    for dy, dx in [(1, 0), (0, 1), (9, 10), (-4, -5)]:
        np.testing.assert_allclose(
            draw((2.3 + dy) % SIZE, (4.6 + dx) % SIZE),
            jnp.roll(pixels, (dy, dx), (0, 1)),
            atol=1e-5,
        )


def test_looks_fade_and_blur():
    def at(**look):
        return toy_world.render(
            jnp.array([6.0, 6.0]), jnp.array(0), jnp.array(1), toy_world.CLEAN.replace(**look)
        )

    clean = at() - toy_world.BACKGROUND
    np.testing.assert_allclose(at(saturation=0.25) - toy_world.BACKGROUND, 0.25 * clean, atol=1e-6)
    blurred = at(blur=jnp.float32(1.0)) - toy_world.BACKGROUND
    np.testing.assert_allclose(blurred.sum(), clean.sum(), rtol=1e-5)
    assert blurred[6, 6, 0] < clean[6, 6, 0] and jnp.sum(blurred**2) < jnp.sum(clean**2)


# ---------------------------------------------------------------- looks and videos


sample_looks = jax.jit(jax.vmap(lambda key: toy_world.sample_looks(key, 16)))


def test_a_block_takes_over_a_look_of_its_recent_past():
    looks = sample_looks(jax.random.split(jax.random.key(0), 400))
    looks = np.stack(jax.tree.leaves(looks), axis=-1)  # [videos, blocks, 4]
    recent = np.array(
        [[(v[max(0, b - 6) : b] == v[b]).all(axis=1).any() for b in range(16)] for v in looks]
    )
    clean = (looks == (1.0, 0.0, 0.0, 0.0)).all(axis=-1)
    # Looks that are not clean are unique, so what equals a recent one was taken over. 0.85 +- 4
    # standard errors.
    assert not recent[:, 0].any()
    assert recent[:, 1:][~clean[:, 1:]].mean() == pytest.approx(0.85, abs=0.03)
    assert clean[:, 0].mean() == pytest.approx(0.4, abs=0.1)
    # A look that left the window of six never comes back.
    for v, r, c in zip(looks, recent, clean, strict=True):
        for b in np.flatnonzero(~r & ~c):
            assert not (v[:b] == v[b]).all(axis=1).any()


def test_looks_stay_in_their_ranges():
    looks = sample_looks(jax.random.split(jax.random.key(1), 400))
    for name, low, high in [
        ("saturation", 0.25, 1.0),
        ("blur", 0.0, 1.4),
        ("speckle", 0.0, 0.06),
        ("jitter", 0.0, 0.6),
    ]:
        values = getattr(looks, name)
        assert values.shape == (400, 16) and low <= values.min() and values.max() <= high


@jax.jit
def video(seed, attributes):
    return toy_world.sample_video(jax.random.key(seed), jnp.asarray(attributes), 16, 3, SWITCHES)


def test_videos_are_deterministic():
    attributes = [RED_DISK_RIGHT, BLUE_SQUARE_DOWN, RED_DISK_RIGHT, BLUE_SQUARE_DOWN]
    assert video(0, attributes).shape == (48, SIZE, SIZE, 3)
    np.testing.assert_array_equal(video(0, attributes), video(0, attributes))
    assert not np.allclose(video(0, attributes), video(1, attributes))


def test_prompts_switch_at_their_frames_and_the_past_does_not_change():
    same = [RED_DISK_RIGHT] * 4
    for m, switch in enumerate(SWITCHES, start=1):
        changed = [*same[:m], *[BLUE_SQUARE_DOWN] * (4 - m)]
        difference = np.abs(np.asarray(video(0, same) - video(0, changed))).max(axis=(1, 2, 3))
        assert (difference[:switch] == 0).all() and (difference[switch:] > 0.01).all()


def test_the_position_does_not_jump_at_a_switch():
    directions = [RED_DISK_RIGHT, (0, 0, 3), (0, 0, 1), (0, 0, 2)]  # right, down, left, up
    steps = np.repeat([(0, 1), (1, 0), (0, -1), (-1, 0)], 12, axis=0)
    # In a video of one clean look every frame is the one before, moved by a pixel; some of 50
    # videos are such.
    errors = []
    for seed in range(50):
        pixels = np.asarray(video(seed, directions))
        moved = [
            np.roll(previous, step, (0, 1))
            for previous, step in zip(pixels[:-1], steps[1:], strict=True)
        ]
        errors.append(np.abs(pixels[1:] - moved).max())
    assert min(errors) < 1e-4


# ---------------------------------------------------------------- latents


def test_encode_and_decode_are_inverse():
    pixels = jax.random.uniform(jax.random.key(0), (2, 5, SIZE, SIZE, 3))
    latents = toy_world.encode(pixels)
    assert latents.shape == (2, 5, 4, 4, 12)
    np.testing.assert_allclose(toy_world.decode(latents), pixels, atol=1e-6)
    np.testing.assert_allclose(toy_world.encode(toy_world.decode(latents)), latents, atol=1e-5)


def test_latent_channels_are_a_pixel_square():
    pixels = jnp.arange(SIZE * SIZE * 3, dtype=jnp.float32).reshape(SIZE, SIZE, 3) / 1000
    latent = toy_world.encode(pixels)[2, 3]  # the square of rows 4-5 and columns 6-7
    expected = jnp.concatenate([pixels[4, 6], pixels[4, 7], pixels[5, 6], pixels[5, 7]])
    np.testing.assert_allclose(
        latent * toy_world.LATENT_SCALE + toy_world.BACKGROUND, expected, atol=1e-6
    )


def test_latents_have_about_unit_variance_and_decode_to_pixels():
    latents = toy_world.encode(
        video(0, [RED_DISK_RIGHT, BLUE_SQUARE_DOWN, RED_DISK_RIGHT, BLUE_SQUARE_DOWN])
    )
    assert 0.5 < latents.std() < 1.5
    decoded = toy_world.decode(10 * latents)
    assert decoded.min() == 0.0 and decoded.max() == 1.0
