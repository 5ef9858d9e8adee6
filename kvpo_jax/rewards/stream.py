"""What becomes of a stream over time: flicker, freezes, drift, and jumps where blocks meet.

A scorer of whole videos that needs no weights and no prompt; `optical_flow` is another. Every score
is in [0, 1] with 1 best. docs/evaluation.md says where each formula comes from.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.rewards.composite import Footage
from kvpo_jax.types import Array

ENDS = 0.15  # of the frames: what is compared with as many at the other end (Helios-Bench)
FROZEN = 0.001  # mean absolute change up to which a picture stands still (ffmpeg's freezedetect)
_EPS = 1e-12


def score(pixels: Array, footage: Footage) -> dict[str, Array | np.ndarray]:
    """Scores of videos, each float[n].

    temporal_flickering: 1 - the mean absolute change from frame to frame (VBench's formula, without
      the filter that gives VBench static videos only). Motion lowers it too.
    unfrozen: the share of changes that are more than FROZEN.
    exposure_kept, saturation_kept: 1 - |first - last|, the means (`looks`) over the first and the
      last 15 % of the frames.
    sharpness_kept: the smaller over the larger variance of the Laplacian, at the two ends.
    continuity: the mean change inside blocks over that where blocks meet, at most 1; left out where
      nobody knows the blocks.

    Args:
      pixels: [n, m, h, w, 3], float in [0, 1] or uint8.
      footage: which frames of the video they are.

    Raises:
      UsageError: no two frames follow each other.
    """
    chex.assert_shape(pixels, (None, None, None, None, 3))
    series = {name: np.asarray(x, np.float64) for name, x in _series(pixels, footage.rows).items()}
    following = footage.following()
    change = series["change"][1:][following]
    first, last = (
        {name: x[frames].mean(axis=0) for name, x in series.items()} for frames in _ends(footage)
    )
    smaller, larger = (f(first["sharpness"], last["sharpness"]) for f in (np.minimum, np.maximum))
    return {
        "temporal_flickering": 1 - change.mean(axis=0),
        "unfrozen": (change > FROZEN).mean(axis=0),
        "exposure_kept": 1 - np.abs(first["exposure"] - last["exposure"]),
        "saturation_kept": 1 - np.abs(first["saturation"] - last["saturation"]),
        "sharpness_kept": (smaller + _EPS) / (larger + _EPS),
    } | ({"continuity": continuity(change, footage)} if footage.starts.size else {})


def continuity(change: np.ndarray, footage: Footage) -> np.ndarray:
    """The mean change inside blocks over that where blocks meet, at most 1, float[n].

    It is 1 where the footage shows no two blocks meet, or nothing but that.

    Args:
      change: float[pairs, n], from each frame to the one that follows it.
      footage: which frames they are.
    """
    seams = footage.seams()
    if seams.all() or not seams.any():
        return np.ones(change.shape[1])
    inside, between = change[~seams].mean(axis=0), change[seams].mean(axis=0)
    return (inside + _EPS) / (np.maximum(inside, between) + _EPS)


def looks(frames: Array) -> dict[str, Array]:
    """How bright and how colourful frames float[..., h, w, 3] are, name -> float[...].

    Channels are in [0, 1], as they are stored, not linear light.

    exposure: luma (`luma`).
    saturation: the largest channel less the smallest one, 0 for greys.
    clipped: the share of pixels with a luma of 254/255 or more: white, with no detail left.
    """
    light = luma(frames)
    clipped = light >= 253.99 / 255  # rounded, 254 of 255 may be a little less
    saturation = frames.max(axis=-1) - frames.min(axis=-1)
    maps = {"exposure": light, "saturation": saturation, "clipped": clipped.astype(jnp.float32)}
    return {name: x.mean(axis=(-2, -1)) for name, x in maps.items()}


def luma(frames: Array) -> Array:
    """0.2126 R + 0.7152 G + 0.0722 B (Rec. 709) of pixels float[..., 3]."""
    return jnp.sum(frames * jnp.array([0.2126, 0.7152, 0.0722]), axis=-1)


def frame_of(pixels: Array, row: Array | int, axis: int) -> Array:
    """A frame of pixels, float in [0, 1] or uint8, as float32 in [0, 1]."""
    frame = jax.lax.dynamic_index_in_dim(pixels, row, axis, keepdims=False)
    return frame.astype(jnp.float32) / (255.0 if pixels.dtype == jnp.uint8 else 1.0)


@jax.jit
def _series(pixels: Array, rows: Array) -> dict[str, Array]:
    """name -> float[frames, n]: `looks`, sharpness, and the change from the frame before."""

    def of_frame(row: Array, before: Array) -> dict[str, Array]:
        frame = frame_of(pixels, row, 1)
        change = jnp.abs(frame - frame_of(pixels, before, 1)).mean(axis=(1, 2, 3))
        return looks(frame) | {"sharpness": _sharpness(luma(frame)), "change": change}

    # A frame at a time, so that no float copy of the videos is made.
    rows = jnp.asarray(rows)
    before = jnp.concatenate([rows[:1], rows[:-1]])
    return jax.lax.map(lambda pair: of_frame(*pair), (rows, before))


def _sharpness(light: Array) -> Array:
    """The variance of the Laplacian of luma float[n, h, w], over the pixels inside, float[n]."""
    sides = light[:, 1:-1, :-2] + light[:, 1:-1, 2:] + light[:, :-2, 1:-1] + light[:, 2:, 1:-1]
    return jnp.var(sides - 4 * light[:, 1:-1, 1:-1], axis=(1, 2))


def _ends(footage: Footage) -> tuple[slice, slice]:
    """The first and the last frames of the footage that are compared."""
    count = max(round(ENDS * len(footage.frames)), 1)
    return slice(None, count), slice(-count, None)
