"""From a clip to a network's input, on the device: choose frames, resize, normalise, cut.

HPSv3 and VideoAlign were trained on images that Pillow and torchvision had resized, both by Keys'
cubic (a = -1/2) that widens with the scale, and both along rows before columns. They round
differently: Pillow to uint8 after each of the two passes, torchvision once. A fifth of all pixels
differ by it, so there is one function for each.

VBench resizes frames for CLIP and DINO by torchvision without antialias, and rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import chex
import einops
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import UsageError
from kvpo_jax.models import resample
from kvpo_jax.models.qwen2_vl import Grid, VisionConfig
from kvpo_jax.models.reward_model import RewardConfig
from kvpo_jax.types import Array

# CLIP's mean and standard deviation of each colour, on a scale of 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Those of ImageNet, which DINO was trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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


def middle_frames(frames: int, count: int) -> list[int]:
    """VBench's "middle" of a video: of `count` equal parts, the frame in the middle of each.

    A video of fewer frames has all of its frames.
    """
    bounds = np.linspace(0, frames, min(count, frames) + 1).astype(int)
    return ((bounds[:-1] + bounds[1:] - 1) // 2).tolist()


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
        index, weights = resample.antialiased(images.shape[axis], out)
        fixed = np.trunc(weights * 2**_PILLOW_BITS + np.copysign(0.5, weights)).astype(np.int32)
        total = resample.weighted(images, axis, index, fixed) + 2 ** (_PILLOW_BITS - 1)
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
    height, width = images.shape[-3:-1]
    columns, rows = resample.antialiased(width, size[1]), resample.antialiased(height, size[0])
    pixels = resample.resized(images.astype(jnp.float32), columns, rows)
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def normalise(images: Array) -> Array:
    """uint8[..., 3] to float32[..., 3], normalised by CLIP's mean and standard deviation."""
    _assert_images(images)
    return _standardised(images.astype(jnp.float32), MEAN, STD)


def _standardised(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """float32[..., 3] on a scale of 0 to 255, less the mean of each colour, over its deviation."""
    return (pixels / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """torchvision's size for an image whose shorter side becomes `side`."""
    shorter = min(height, width)
    new_height, new_width = (int(side * length / shorter) for length in (height, width))
    return new_height, new_width


def for_clip(images: Array, side: int) -> Array:
    """VBench's `clip_transform`: bicubic without antialias, the square in the middle, CLIP's norm.

    Args:
      images: uint8[..., h, w, 3].
      side: pixels of the square.

    Returns:
      float32[..., side, side, 3].
    """
    _assert_images(images)
    height, width = images.shape[-3:-1]
    new_height, new_width = shorter_side(height, width, side)
    pixels = resample.resized(
        images.astype(jnp.float32),
        resample.nearby(width, new_width),
        resample.nearby(height, new_height),
    )
    top, left = round((new_height - side) / 2), round((new_width - side) / 2)
    square = pixels[..., top : top + side, left : left + side, :]
    return _standardised(square, MEAN, STD)


def for_dino(images: Array, side: int) -> Array:
    """VBench's `dino_transform`: bilinear without antialias, no crop, ImageNet's norm.

    Args:
      images: uint8[..., h, w, 3].
      side: pixels of the shorter side.

    Returns:
      float32[..., new h, new w, 3].
    """
    _assert_images(images)
    height, width = images.shape[-3:-1]
    new_height, new_width = shorter_side(height, width, side)
    pixels = resample.resized(
        images.astype(jnp.float32),
        resample.nearby(width, new_width, resample.linear),
        resample.nearby(height, new_height, resample.linear),
    )
    return _standardised(pixels, IMAGENET_MEAN, IMAGENET_STD)


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
