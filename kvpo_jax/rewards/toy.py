"""Analytic rewards of the toy world: visual quality, motion quality and text alignment of a clip.

They stand for the scores of HPSv3 and VideoAlign, and like theirs VQ and MQ cannot see the prompt.
A frame is compared with the twelve clean templates (colour x shape) at the estimated centre of its
object. So a faded, blurred or speckled object loses VQ, a shaky one MQ, and a wrong or invisible
one TA. Apart from the choice of the best template and the bounds of speed, every score is a smooth
function of the pixels, so that small improvements count.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.data.toy_world import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    SPEED,
    parse,
    render,
)
from kvpo_jax.errors import UsageError
from kvpo_jax.models import layers
from kvpo_jax.types import Array

MIN_FRAMES = 3  # a second difference needs three

# VQ = exp(-rate * squared error / template energy): 0.47 at half saturation, 0.05 for an empty
# frame.
_ERROR_RATE = 3.0
_ACCELERATION = 1.0  # pixels per frame^2 at which smoothness is 1/2
_VISIBLE = 0.1  # saturation below which an object counts as vanished
# Temperatures of cosine similarities. Two colours of the palette have at most 0.39, two shapes up
# to 0.97.
_COLOUR_TEMPERATURE = 0.1
_SHAPE_TEMPERATURE = 0.01


def wrap(displacement: Array) -> Array:
    """A displacement, float[...] pixels, by the shortest way on the torus: in [-SIZE/2, SIZE/2)."""
    return (displacement + SIZE / 2) % SIZE - SIZE / 2


def centroid(pixels: Array) -> Array:
    """The centre of the object on the torus, float[..., 2] (y, x) in [0, SIZE).

    It is the circular mean of the chroma along the frame's dominant colour. The projection is
    signed, so that background noise mostly cancels, and a power keeps the rest of it small. On
    clean frames the error is below 0.05 pixels.

    Args:
      pixels: float[..., 8, 8, 3].
    """
    chex.assert_shape(pixels, (..., SIZE, SIZE, 3))
    chroma = pixels - BACKGROUND
    strength = jnp.sum(chroma**2, axis=-1, keepdims=True)
    colour = jnp.sum(strength**2 * chroma, axis=(-3, -2), keepdims=True)
    weight = jnp.maximum(jnp.sum(chroma * colour, axis=-1), 0.0) / (
        jnp.linalg.norm(colour, axis=-1) + 1e-12
    )
    weight = weight**1.5
    angle = 2 * jnp.pi * jnp.arange(SIZE) / SIZE

    def circular_mean(marginal: Array) -> Array:
        """The angle of float[..., SIZE] weights along an axis."""
        return jnp.arctan2(marginal @ jnp.sin(angle), marginal @ jnp.cos(angle))

    y, x = circular_mean(jnp.sum(weight, axis=-1)), circular_mean(jnp.sum(weight, axis=-2))
    return (jnp.stack([y, x], axis=-1) * SIZE / (2 * jnp.pi)) % SIZE


def templates(center: Array) -> Array:
    """The chroma of every clean object there, float[..., colours, shapes, 8, 8, 3].

    Args:
      center: float[..., 2], as `centroid` finds it.
    """
    colours, shapes = jnp.arange(len(COLOURS))[:, None], jnp.arange(len(SHAPES))[None, :]
    return render(center[..., None, None, :], colours, shapes) - BACKGROUND


@jax.jit
@layers.exact
def _score(pixels: Array, attributes: Array) -> dict[str, Array]:
    """`score` on arrays: pixels float[n, frames, 8, 8, 3] and attributes int32[n, 3]."""
    chroma = pixels - BACKGROUND
    center = centroid(pixels)  # [n, frames, 2]
    clean = templates(center)  # [n, frames, colour, shape, 8, 8, 3]
    overlap = jnp.einsum("nfyxc,nfksyxc->nfks", chroma, clean)
    template_energy = jnp.sum(clean**2, axis=(-3, -2, -1))
    energy = jnp.sum(chroma**2, axis=(-3, -2, -1))[..., None, None]

    error = (energy - 2 * overlap + template_energy) / template_energy
    quality = jnp.exp(-_ERROR_RATE * jnp.min(error, axis=(-2, -1)))  # [n, frames]
    saturation = jnp.maximum(jnp.max(overlap / template_energy, axis=(-2, -1)), 0.0)
    visible = 1 - jnp.exp(-((saturation / _VISIBLE) ** 2))

    velocity = wrap(jnp.diff(center, axis=1))  # [n, frames - 1, 2]
    acceleration = jnp.diff(velocity, axis=1)
    smooth = 1 / (1 + jnp.sum(acceleration**2, axis=-1) / _ACCELERATION**2)
    speed = jnp.linalg.norm(velocity[:, 1:] + velocity[:, :-1], axis=-1) / 2
    moving = jnp.minimum(speed / SPEED, 1.0)
    seen = jnp.min(jnp.stack([visible[:, :-2], visible[:, 1:-1], visible[:, 2:]]), axis=0)

    similarity = overlap / jnp.sqrt(template_energy * energy + 1e-12)

    def choose(scores: Array, index: Array) -> Array:
        """scores float[n, frames, choices] at index int32[n]."""
        return jnp.take_along_axis(scores, index[:, None, None], axis=-1)[..., 0]

    colour, shape, direction = attributes.T
    colours_seen = jax.nn.softmax(jnp.max(similarity, axis=-1) / _COLOUR_TEMPERATURE)
    shapes_seen = jax.nn.softmax(jnp.max(similarity, axis=-2) / _SHAPE_TEMPERATURE)
    colour_match, shape_match = choose(colours_seen, colour), choose(shapes_seen, shape)
    heading = jnp.asarray(tuple(DIRECTIONS.values()))[direction]
    progress = jnp.sum(jnp.mean(velocity, axis=1) * heading, axis=-1) / SPEED
    motion_match = jnp.clip(progress, 0.0, 1.0)[:, None]

    scores = {
        "VQ": jnp.mean(quality, axis=1),
        "MQ": jnp.mean(smooth * moving * seen, axis=1),
        "TA": jnp.mean(visible * (colour_match + shape_match + motion_match) / 3, axis=1),
    }
    # XLA's fast min and max on CPU may drop a NaN; a broken clip must not get a score.
    broken = ~jnp.isfinite(jnp.sum(energy, axis=(1, 2, 3)))
    return {name: jnp.where(broken, jnp.nan, values) for name, values in scores.items()}


def score(pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """VQ, MQ and TA of clips, each float[n] in [0, 1] with 1 best.

    VQ: how close each frame is to its best clean template.
    MQ: how smooth the track of the object is, where it is seen and moves.
    TA: how well colour, shape and motion match the prompt, where the object is seen; their mean.
    A clip with a pixel that is not finite scores NaN.

    Args:
      pixels: float[n, frames, 8, 8, 3], at least three frames, all of one prompt (a turn costs MQ).
      prompts: n sentences of the toy world.

    Raises:
      UsageError: the clips are too short, or a word of a prompt does not fit; names it.
    """
    n = len(prompts)
    chex.assert_shape(pixels, (n, None, SIZE, SIZE, 3))
    if pixels.shape[1] < MIN_FRAMES:
        raise UsageError(
            f"toy rewards need clips of at least {MIN_FRAMES} frames, not {pixels.shape[1]}"
        )
    attributes = np.array([parse(prompt) for prompt in prompts], np.int32).reshape(n, 3)
    return _score(jnp.asarray(pixels), attributes)
