"""How rows of pixels, or of positions, are resampled: sums of a few weighted, shifted rows.

Resampling is computed as such sums, because matrix products in an accelerator's default precision
would lose the digits that distinguish one library's result from another's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kvpo_jax.types import Array


class Taps(NamedTuple):
    """How to make a row of `out` numbers of another row.

    Attributes:
      places: int[out, K], the numbers that each new number is a sum of.
      weights: float64[out, K].
    """

    places: np.ndarray
    weights: np.ndarray


def keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic: a = -1/2 is Pillow's and torch's with antialias, -3/4 torch's without."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def linear(x: np.ndarray) -> np.ndarray:
    """The triangle of linear interpolation."""
    return np.maximum(1 - np.abs(x), 0.0)


def antialiased(size: int, out: int) -> Taps:
    """A row of `size` numbers to `out`, by Keys' cubic (a = -1/2) that widens with the scale."""
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum(np.floor(centre - 2 * stretch + 0.5), 0).astype(int)
    end = np.minimum(np.floor(centre + 2 * stretch + 0.5), size).astype(int)
    index = first[:, None] + np.arange((end - first).max())
    offset = (index - centre[:, None] + 0.5) / stretch
    weights = np.where(index < end[:, None], keys_cubic(offset, -0.5), 0.0)
    return Taps(np.minimum(index, size - 1), weights / weights.sum(axis=1, keepdims=True))


def nearby(
    size: int,
    out: int,
    kernel: Callable[[np.ndarray], np.ndarray] | None = None,
    scale: float | None = None,
) -> Taps:
    """A row of `size` numbers to `out`, from the nearest four at any scale.

    It is torch's `interpolate` with align_corners=False and without antialias: beyond its ends the
    row goes on as it ends.

    Args:
      size, out: numbers.
      kernel: what weighs a number by its distance; None is Keys' cubic with a = -3/4.
      scale: numbers of the row per new number; None is size / out.
    """
    place = (np.arange(out) + 0.5) * (size / out if scale is None else scale) - 0.5
    index = np.floor(place).astype(int)[:, None] + np.arange(-1, 3)
    distance = index - place[:, None]
    weights = keys_cubic(distance, -0.75) if kernel is None else kernel(distance)
    return Taps(np.clip(index, 0, size - 1), weights)


def weighted(x: Array, axis: int, places: np.ndarray, weights: np.ndarray) -> Array:
    """The sums that `Taps` describe, along an axis of x; weights have the dtype to compute in."""
    shape = [1] * x.ndim
    shape[axis] = -1
    taps = (
        weight.reshape(shape) * jnp.take(x, place, axis=axis, mode="clip")
        for place, weight in zip(places.T, weights.T, strict=True)
    )
    return functools.reduce(operator.add, taps)


def resized(x: Array, columns: Taps, rows: Taps) -> Array:
    """float[..., h, w, c] resampled along rows, then along columns, in float32."""
    for axis, taps in ((-2, columns), (-3, rows)):
        x = weighted(x, axis, taps.places, taps.weights.astype(np.float32))
    return x
