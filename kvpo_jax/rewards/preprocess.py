"""From a clip to the input of Qwen2-VL, on the device: choose frames, resize, normalise, cut.

HPSv3 and VideoAlign were trained on images that Pillow and torchvision had resized, both by Keys'
cubic (a = -1/2) that widens with the scale, and both along rows before columns. They round
differently: Pillow to uint8 after each of the two passes, torchvision once. A fifth of all pixels
differ by it, so there is one function for each.

A resampled row is a sum of a few weighted, shifted rows, and is computed that way: matrix products
in an accelerator's default precision would lose the digits that distinguish the two.
"""

from __future__ import annotations

import functools
import math
import operator

import chex
import einops
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import UsageError
from kvpo_jax.models.qwen2_vl import Grid, VisionConfig
from kvpo_jax.models.reward_model import RewardConfig
from kvpo_jax.types import Array

# CLIP's mean and standard deviation of each colour, on a scale of 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_VISION = VisionConfig()
# Bits of the fraction of Pillow's fixed-point weights: their sums with uint8 fit into int32.
_PILLOW_BITS = 22


# ---------------------------------------------------------------- which frames


def evenly_spaced(frames: int, count: int) -> list[int]:
    """Indices of `count` >= 2 of `frames` frames, from the first to the last, evenly spaced.

    They are those of torch.linspace, rounded: one half of the places is counted from either end, in
    float32, and its rounding decides about a place halfway between two frames.
    """
    i, last = np.arange(count, dtype=np.float32), np.float32(frames - 1)
    step = last / np.float32(count - 1)
    places = np.where(i < count // 2, i * step, last - (count - 1 - i) * step)
    return np.rint(places).astype(int).tolist()


def sample_uniform(
    frames: int,
    fps: float = 2.0,
    source_fps: float = 16.0,
    min_frames: int = 4,
    max_frames: int = 768,
) -> list[int]:
    """VideoAlign's 'uniform': an even number of frames, at about `fps` per second.

    Args:
      frames: frames of the clip.
      fps: frames per second to sample.
      source_fps: frames per second of the clip.
      min_frames: lower bound, where the clip has as many; an odd bound is rounded up.
      max_frames: upper bound; an odd bound is rounded down.

    Returns:
      Ascending indices of frames.

    Raises:
      UsageError: the clip has one frame.
    """
    if frames < 2:
        raise UsageError(f"VideoAlign scores at least 2 frames, the clip has {frames}")
    fewest, most = math.ceil(min_frames / 2) * 2, min(max_frames, frames) // 2 * 2
    wanted = min(max(frames / source_fps * fps, fewest), most)
    return evenly_spaced(frames, round(wanted / 2) * 2)


def sample_multi_pts(frames: int, fps: float = 8.0, source_fps: float = 16.0) -> list[int]:
    """VideoAlign's 'multi_pts': six frames in a row around each of four points.

    A clip that is too short for 24 frames at `fps` is sampled more densely, or in full, as KVPO
    does; then the points overlap.

    Args:
      frames: frames of the clip.
      fps: frames per second to sample, about.
      source_fps: frames per second of the clip.

    Returns:
      24 indices of frames.

    Raises:
      UsageError: the clip has fewer than seven frames.
    """
    if frames < 7:
        raise UsageError(f"'multi_pts' needs at least 7 frames, the clip has {frames}")
    rate = evenly_spaced(frames, min(max(int(frames * fps // source_fps), 24), frames))
    points = (round(3 + i * (len(rate) - 7) / 3) for i in range(4))
    return [frame for point in points for frame in rate[point - 3 : point + 3]]


# ---------------------------------------------------------------- which size


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """Qwen2-VL's size for an image: multiples of `factor`, close to the image's aspect ratio.

    The bounds go before the aspect ratio. A size above `max_pixels` is brought below it (but no
    side below `factor`), a size below `min_pixels` above it; the other bound is then not checked.

    Args:
      height, width: size of the image.
      min_pixels, max_pixels: bounds of height times width.
      factor: pixels along a visual token's side.

    Raises:
      UsageError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UsageError(
            f"a frame of {height} x {width} pixels: one side is more than 200 times the other"
        )
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = (math.floor(side / shrink / factor) * factor for side in (height, width))
        h, w = (max(factor, side) for side in sides)
    elif h * w < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * stretch / factor) * factor for side in (height, width))
    return h, w


def grid(cfg: RewardConfig, frames: int, height: int, width: int) -> Grid:
    """(t, h, w) of the patches of a clip whose frames are resized by `smart_resize`."""
    vision = cfg.vision
    h, w = smart_resize(
        height,
        width,
        min_pixels=cfg.min_pixels,
        max_pixels=cfg.max_pixels,
        factor=vision.patch * vision.merge,
    )
    return math.ceil(frames / vision.temporal_patch), h // vision.patch, w // vision.patch


# ---------------------------------------------------------------- pixels


def to_uint8(pixels: Array) -> Array:
    """float[...] in [0, 1] to uint8[...], rounded; other values are clipped. uint8 stays as it is.

    The inverse of `to_float`, exactly.
    """
    if pixels.dtype == np.uint8:
        return pixels
    chex.assert_type(pixels, float)
    return jnp.clip(jnp.round(pixels.astype(jnp.float32) * 255), 0, 255).astype(jnp.uint8)


def to_float(pixels: Array) -> Array:
    """uint8[...] to float32[...] in [0, 1]. Floats stay as they are."""
    return jnp.asarray(pixels, jnp.float32) / 255 if pixels.dtype == np.uint8 else pixels


def grayscale(images: Array) -> Array:
    """torchvision's grey of uint8[..., 3], in all three colours.

    Grey is 0.2989 R + 0.587 G + 0.114 B, truncated.
    """
    _assert_images(images)
    red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
    grey = (2989 * red + 5870 * green + 1140 * blue) // 10000
    return jnp.broadcast_to(grey[..., None], images.shape).astype(jnp.uint8)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """How to resample a row of `size` pixels to `out`.

    Returns:
      int[out, K], the pixels that each new pixel is a sum of, and their weights float64[out, K].
    """
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum(np.floor(centre - 2 * stretch + 0.5), 0).astype(int)
    end = np.minimum(np.floor(centre + 2 * stretch + 0.5), size).astype(int)
    index = first[:, None] + np.arange((end - first).max())
    weights = np.where(index < end[:, None], _cubic((index - centre[:, None] + 0.5) / stretch), 0.0)
    return np.minimum(index, size - 1), weights / weights.sum(axis=1, keepdims=True)


def _weighted(images: Array, axis: int, index: np.ndarray, weights: np.ndarray) -> Array:
    """The sums that `_taps` describes, along an axis of the images."""
    shape = [1] * images.ndim
    shape[axis] = -1
    taps = (
        weight.reshape(shape) * jnp.take(images, pixels, axis=axis, mode="clip")
        for pixels, weight in zip(index.T, weights.T, strict=True)
    )
    return functools.reduce(operator.add, taps)


def _assert_images(images: Array) -> None:
    chex.assert_type(images, jnp.uint8)
    chex.assert_axis_dimension(images, -1, 3)


def resize_pil(images: Array, size: tuple[int, int]) -> Array:
    """Pillow's bicubic `Image.resize`, to the last bit.

    Rows come before columns. Pillow 13 takes columns first for some sizes that lose more height
    than width.

    Args:
      images: uint8[..., h, w, 3].
      size: (height, width).

    Returns:
      uint8[..., *size, 3].
    """
    _assert_images(images)
    for axis, out in ((-2, size[1]), (-3, size[0])):
        index, weights = _taps(images.shape[axis], out)
        fixed = np.trunc(weights * 2**_PILLOW_BITS + np.copysign(0.5, weights)).astype(np.int32)
        total = _weighted(images, axis, index, fixed) + 2 ** (_PILLOW_BITS - 1)
        images = jnp.clip(total >> _PILLOW_BITS, 0, 255).astype(jnp.uint8)
    return images


def resize_torch(images: Array, size: tuple[int, int]) -> Array:
    """torchvision's bicubic `transforms.functional.resize` with antialias, which rounds once.

    Args:
      images: uint8[..., h, w, 3].
      size: (height, width).

    Returns:
      uint8[..., *size, 3].
    """
    _assert_images(images)
    pixels = images.astype(jnp.float32)
    for axis, out in ((-2, size[1]), (-3, size[0])):
        index, weights = _taps(images.shape[axis], out)
        pixels = _weighted(pixels, axis, index, weights.astype(np.float32))
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def normalise(images: Array) -> Array:
    """uint8[..., 3] to float32[..., 3], normalised by CLIP's mean and standard deviation."""
    _assert_images(images)
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def patchify(frames: Array, vision: VisionConfig = _VISION) -> Array:
    """Cuts clips into the patches of the vision tower.

    Args:
      frames: float[n, frames, h, w, 3]; h and w are multiples of `patch` * `merge` (28) pixels. The
        last frame is repeated until `temporal_patch` (2) divides their number, so that an image is
        a clip of one frame.
      vision: sizes of the tower.

    Returns:
      float[n, t*h*w, patch_dim]: patches ordered by slab and merge square, the numbers of a patch
      by (channel, frame, y, x).

    Raises:
      UsageError: h or w is not such a multiple.
    """
    chex.assert_shape(frames, (None, None, None, None, vision.channels))
    side = vision.patch * vision.merge
    if frames.shape[2] % side or frames.shape[3] % side:
        raise UsageError(
            f"frames of {frames.shape[2]} x {frames.shape[3]} pixels: both have to be multiples of"
            f" {side}"
        )
    missing = -frames.shape[1] % vision.temporal_patch
    frames = jnp.pad(frames, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
    return einops.rearrange(
        frames,
        "n (t f) (h i y) (w j x) c -> n (t h w i j) (c f y x)",
        f=vision.temporal_patch,
        i=vision.merge,
        j=vision.merge,
        y=vision.patch,
        x=vision.patch,
    )
