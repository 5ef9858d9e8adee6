"""Preprocessing of the learned rewards against Pillow, torch and transformers, on photographs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from kvpo_jax.models.qwen2_vl import TextConfig, VisionConfig
from kvpo_jax.models.reward_model import RewardConfig
from kvpo_jax.rewards import preprocess

PIXELS = 256 * 28 * 28  # both of HPSv3's bounds, and VideoAlign's upper bound
RESIZE_PIL = jax.jit(preprocess.resize_pil, static_argnums=1)
RESIZE_TORCH = jax.jit(preprocess.resize_torch, static_argnums=1)
# The photographs are 300 x 451, 400 x 600 and 427 x 640.
SIZES = [(336, 588), (112, 644), (700, 448)]


@pytest.fixture(scope="module")
def photographs():
    return [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]


@pytest.fixture(scope="module")
def frame():
    """A photograph of the size of the videos."""
    return np.asarray(Image.fromarray(skimage.data.coffee()).resize((832, 480)))


def pil_passes(image, size):
    """Pillow's resize of the rows, then of the columns, each rounded."""
    rows = Image.fromarray(image).resize((size[1], image.shape[0]), Image.BICUBIC)
    return np.asarray(rows.resize((size[1], size[0]), Image.BICUBIC))


def torch_once(image, size):
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()


def mismatches(got, want):
    """The share of numbers that differ, and the largest difference."""
    difference = np.abs(np.asarray(got).astype(int) - want)
    return (difference > 0).mean(), difference.max()


# ---------------------------------------------------------------- which frames


@pytest.mark.parametrize(
    ("frames", "count"),
    [(2, 2), (3, 2), (5, 4), (36, 4), (57, 8), (81, 10), (147, 18), (585, 74), (9000, 768)],
)
def test_uniform_counts(frames, count):
    got = preprocess.sample_uniform(frames)
    assert (len(got), got[0], got[-1]) == (count, 0, frames - 1)


def test_uniform_by_hand():
    assert preprocess.sample_uniform(36) == [0, 12, 23, 35]
    assert preprocess.sample_uniform(57) == [0, 8, 16, 24, 32, 40, 48, 56]
    # 5 frames are two and a half pairs, rounded to two; 7 are three and a half, rounded to four.
    assert preprocess.sample_uniform(40) == [0, 13, 26, 39]
    assert preprocess.sample_uniform(56) == [0, 8, 16, 24, 31, 39, 47, 55]
    assert preprocess.sample_uniform(9, fps=8.0, source_fps=8.0) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert preprocess.sample_uniform(9, fps=8.0, source_fps=8.0, max_frames=5) == [0, 3, 5, 8]
    assert preprocess.sample_uniform(30, min_frames=5) == [0, 6, 12, 17, 23, 29]


def test_evenly_spaced_is_torch_linspace_rounded():
    assert preprocess.evenly_spaced(54, 27)[13] == 27  # at 26.5, which float32 puts above
    for frames in range(2, 600):
        counts = {2, 4, 10, 18, 24, frames // 3, frames // 2, frames - 1, frames}
        for count in counts & set(range(2, frames + 1)):
            want = torch.linspace(0, frames - 1, count).round().long().tolist()
            assert preprocess.evenly_spaced(frames, count) == want, (frames, count)


def test_multi_pts_by_hand():
    def six(*starts):
        return [start + i for start in starts for i in range(6)]

    assert preprocess.sample_multi_pts(7) == six(0, 0, 0, 0)
    assert preprocess.sample_multi_pts(24) == six(0, 6, 11, 17)
    assert preprocess.sample_multi_pts(40, source_fps=8.0) == six(0, 11, 22, 33)
    # 81 frames at half the rate are 40, every other one up to rounding: 40 steps of 80 / 39.
    want = np.rint(np.array(six(0, 11, 22, 33)) * 80 / 39)
    assert preprocess.sample_multi_pts(81) == want.astype(int).tolist()


def test_clips_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="at least 2 frames, the clip has 1"):
        preprocess.sample_uniform(1)
    with pytest.raises(ValueError, match="at least 7 frames, the clip has 6"):
        preprocess.sample_multi_pts(6)


# ---------------------------------------------------------------- which size


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "want"),
    [
        (480, 832, PIXELS, PIXELS, (336, 588)),
        (832, 480, PIXELS // 2, PIXELS, (588, 336)),
        (448, 448, PIXELS, PIXELS, (448, 448)),
        (256, 448, PIXELS, PIXELS, (364, 616)),  # too small: above both bounds
        (256, 448, PIXELS // 2, PIXELS, (252, 448)),
        (70, 70, 1, PIXELS, (56, 56)),  # two and a half
        (10, 1000, 1, 28 * 280, (28, 868)),  # a side of 28 is the least, whatever the bound
    ],
)
def test_smart_resize(height, width, least, most, want):
    assert preprocess.smart_resize(height, width, min_pixels=least, max_pixels=most) == want


def test_smart_resize_is_that_of_transformers():
    for height in range(28, 1200, 37):
        for width in range(28, 1200, 41):
            for least in (PIXELS // 2, PIXELS):
                want = hf.smart_resize(height, width, 28, least, PIXELS)
                got = preprocess.smart_resize(height, width, min_pixels=least, max_pixels=PIXELS)
                assert got == want, (height, width)


def test_smart_resize_refuses_stripes():
    with pytest.raises(ValueError, match="1 x 201 pixels"):
        preprocess.smart_resize(1, 201, min_pixels=1, max_pixels=PIXELS)


def config(**kwargs):
    text = TextConfig(vocab=8, dim=8, heads=1, kv_heads=1, ffn_dim=8, layers=1)
    return RewardConfig(
        text,
        head=(1,),
        head_bias=False,
        tokens=(),
        token_ids=(),
        template="",
        min_pixels=PIXELS,
        max_pixels=PIXELS,
        **kwargs,
    )


def test_grid():
    assert preprocess.grid(config(), 1, 480, 832) == (1, 24, 42)
    assert preprocess.grid(config(), 5, 480, 832) == (3, 24, 42)
    other = config(vision=VisionConfig(patch=56, temporal_patch=1))
    assert preprocess.grid(other, 5, 448, 448) == (5, 8, 8)


# ---------------------------------------------------------------- pixels


def test_to_uint8():
    pixels = jnp.array([-0.1, 0.0, 0.5, 1.5 / 255, 2.5 / 255, 254.4 / 255, 1.0, 1.2])
    assert preprocess.to_uint8(pixels).tolist() == [0, 0, 128, 2, 2, 254, 255, 255]
    assert preprocess.to_uint8(jnp.arange(256) / 255).tolist() == list(range(256))
    stored = jnp.arange(256, dtype=jnp.uint8)
    floats = preprocess.to_float(stored)
    assert preprocess.to_uint8(stored) is stored and preprocess.to_float(floats) is floats
    np.testing.assert_allclose(floats, np.arange(256) / 255, rtol=1e-6)
    np.testing.assert_array_equal(preprocess.to_uint8(floats), stored)


def test_grayscale():
    colours = jnp.array(
        [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [100, 10, 1]], jnp.uint8
    )
    # 254.97, 76.2, 149.7, 29.1 and 35.9
    expected = [[value] * 3 for value in (254, 76, 149, 29, 35)]
    assert preprocess.grayscale(colours).tolist() == expected


def test_grayscale_is_that_of_torchvision():
    colours = np.random.default_rng(0).integers(0, 256, (1 << 20, 3), dtype=np.uint8)
    red, green, blue = torch.tensor(colours).unbind(-1)
    want = (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8).numpy()
    # float32 puts 20 of all 2^24 colours, whose grey is a whole number, on the other side of it
    share, largest = mismatches(preprocess.grayscale(colours)[:, 0], want)
    assert share < 1e-5 and largest <= 1


@pytest.mark.parametrize("size", SIZES)
def test_resize_pil_is_pillow(photographs, size):
    for image in photographs:
        np.testing.assert_array_equal(RESIZE_PIL(image, size), pil_passes(image, size))


@pytest.mark.parametrize("size", SIZES)
def test_resize_torch_is_torch(photographs, size):
    for image in photographs:
        share, largest = mismatches(RESIZE_TORCH(image, size), torch_once(image, size))
        assert share < 2e-4 and largest <= 1


def test_frames_of_480x832(frame):
    size = (336, 588)
    want = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.BICUBIC))
    np.testing.assert_array_equal(RESIZE_PIL(frame, size), want)
    assert mismatches(RESIZE_TORCH(frame, size), torch_once(frame, size))[0] < 2e-4
    assert mismatches(RESIZE_TORCH(frame, size), want)[0] > 0.1  # why there are two functions


def test_black_and_white_noise_is_clipped_as_by_pillow():
    noise = np.random.default_rng(1).choice(np.uint8([0, 255]), (90, 130, 3))
    for size in ((56, 84), (168, 196), (28, 28), (90, 130)):
        np.testing.assert_array_equal(RESIZE_PIL(noise, size), pil_passes(noise, size))
        share, largest = mismatches(RESIZE_TORCH(noise, size), torch_once(noise, size))
        assert share < 1e-3 and largest <= 1


@pytest.mark.parametrize("resize", [RESIZE_PIL, RESIZE_TORCH])
def test_resize_takes_clips(frame, resize):
    clips = np.stack([frame[:40, :60], frame[40:80, :60], frame[:40, 60:120]] * 2).reshape(
        2, 3, 40, 60, 3
    )
    got = resize(clips, (28, 56))
    assert got.shape == (2, 3, 28, 56, 3) and got.dtype == jnp.uint8
    np.testing.assert_array_equal(got[1, 2], resize(clips[1, 2], (28, 56)))


@pytest.mark.parametrize(
    "function", [preprocess.grayscale, preprocess.normalise, RESIZE_PIL, RESIZE_TORCH]
)
def test_pixels_are_uint8(function):
    args = ((28, 28),) if function in (RESIZE_PIL, RESIZE_TORCH) else ()
    with pytest.raises(AssertionError, match="uint8"):
        function(jnp.zeros((28, 28, 3)), *args)


def test_normalise():
    got = preprocess.normalise(jnp.array([[0, 0, 0], [255, 255, 255]], jnp.uint8))
    want = [
        [-0.48145466 / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711],
        [0.51854534 / 0.26862954, 0.5421725 / 0.26130258, 0.59178927 / 0.27577711],
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---------------------------------------------------------------- patches


def test_a_frame_is_what_transformers_makes_of_it(frame):
    processor = hf.Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    want = processor(images=Image.fromarray(frame), return_tensors="np")
    t, h, w = preprocess.grid(config(), 1, *frame.shape[:2])
    resized = RESIZE_PIL(frame, (h * 14, w * 14))
    got = preprocess.patchify(preprocess.normalise(resized)[None, None])
    assert want["image_grid_thw"].tolist() == [[t, h, w]]
    np.testing.assert_allclose(got[0], want["pixel_values"], atol=1e-6)


def test_patches_of_a_clip():
    frames = np.random.default_rng(2).normal(size=(2, 4, 56, 84, 3)).astype(np.float32)
    t, h, w = 2, 4, 6
    cut = frames.transpose(0, 1, 4, 2, 3).reshape(2, t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    want = cut.transpose(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(2, t * h * w, 1176)
    np.testing.assert_array_equal(preprocess.patchify(frames), want)


def test_order_of_patches():
    # Each pixel says which patch it is in: 1000 t + 10 y + x.
    y, x = np.mgrid[:56, :84] // 14
    frames = np.stack([1000 * (frame // 2) + 10 * y + x for frame in range(4)])
    patches = preprocess.patchify(
        jnp.asarray(np.repeat(frames[None, ..., None], 3, -1), jnp.float32)
    )
    np.testing.assert_array_equal(patches, jnp.broadcast_to(patches[:, :, :1], patches.shape))
    assert patches[0, :8, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert patches[0, 12, 0] == 20 and patches[0, 24, 0] == 1000


def test_an_odd_frame_is_repeated():
    frames = jnp.arange(3 * 28 * 28 * 3, dtype=jnp.float32).reshape(1, 3, 28, 28, 3)
    got = preprocess.patchify(frames)
    np.testing.assert_array_equal(got, preprocess.patchify(frames[:, jnp.array([0, 1, 2, 2])]))
    last = got[0, 4].reshape(3, 2, 14, 14)
    np.testing.assert_array_equal(last[:, 0], last[:, 1])


def test_patches_of_another_tower():
    vision = VisionConfig(patch=2, temporal_patch=1, merge=1)
    frames = jnp.arange(2 * 4 * 2 * 3, dtype=jnp.float32).reshape(1, 2, 4, 2, 3)
    got = preprocess.patchify(frames, vision)
    assert got.shape == (1, 4, vision.patch_dim)
    assert got[0, 1].tolist() == [12, 15, 18, 21, 13, 16, 19, 22, 14, 17, 20, 23]


def test_frames_that_are_not_made_of_merge_squares_are_refused():
    with pytest.raises(ValueError, match="42 x 56 pixels: both have to be multiples of 28"):
        preprocess.patchify(jnp.zeros((1, 1, 42, 56, 3)))


# ---------------------------------------------------------------- CLIP and DINO


def torchvision(image, side, mode):
    """torchvision's Resize of float pixels to a shorter side, without antialias, over 255."""
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    size = [int(side * length / min(image.shape[:2])) for length in image.shape[:2]]
    resized = torch.nn.functional.interpolate(pixels, size, mode=mode, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy() / 255


@pytest.mark.parametrize("side", [224, 350])  # smaller and larger than the photograph
def test_clips_pictures_are_vbenchs(photographs, side):
    noise = np.random.default_rng(1).choice(np.uint8([0, 255]), photographs[0].shape)
    for image in (photographs[0], noise):
        resized = torchvision(image, side, "bicubic")
        left = round((resized.shape[1] - side) / 2)
        want = (resized[:, left : left + side] - preprocess.MEAN) / preprocess.STD
        got = jax.jit(preprocess.for_clip, static_argnums=1)(image[None], side)
        assert got.shape == (1, side, side, 3)
        np.testing.assert_allclose(got[0], want, atol=2e-4)
    assert resized.max() > 1.1  # beyond white, which is not clipped


def test_dinos_pictures_are_vbenchs(photographs):
    for image in photographs[:2]:
        resized = torchvision(image, 224, "bilinear")
        want = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        got = jax.jit(preprocess.for_dino, static_argnums=1)(image, 224)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_picture_of_clips_size_is_what_transformers_makes_of_it(photographs):
    """Crop and norm: nothing is resized. Of 225 pixels the middle 224 begin at the first."""
    for width in (224, 300, 301):
        image = photographs[0][:224, :width]
        want = CLIPImageProcessorPil()(images=Image.fromarray(image), return_tensors="np")
        got = preprocess.for_clip(image, 224)
        np.testing.assert_allclose(got, want["pixel_values"][0].transpose(1, 2, 0), atol=1e-5)


def test_middle_frames_by_hand():
    """VBench's parts of 36 frames begin at 0, 4, 9, 13, 18, 22, 27 and 31."""
    assert preprocess.middle_frames(36, 8) == [1, 6, 10, 15, 19, 24, 28, 33]
    assert preprocess.middle_frames(3, 8) == [0, 1, 2]
