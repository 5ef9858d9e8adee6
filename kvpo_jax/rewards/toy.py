"""Analytic rewards of the toy world: visual quality, motion quality and text alignment of a rendered clip.

They stand for what HPSv3 and VideoAlign judge, and like theirs VQ and MQ cannot see the prompt. A frame is compared
with the twelve clean templates (colour x shape) at the estimated centre of its object, so a faded, blurred or speckled
object loses VQ, a shaky one MQ, and a wrong or invisible one TA. Apart from the choice of the best template and the
bounds of speed, every score is a smooth function of the pixels: small improvements count.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.data.toy_world import BACKGROUND, COLOURS, DIRECTIONS, SHAPES, SIZE, SPEED, parse, render
from kvpo_jax.types import Array

MIN_FRAMES = 3  # a second difference needs three

# Scales on which a score falls, in the units of what it judges.
_ERROR_RATE = 3.0  # VQ = exp(-rate * squared error / template energy): 0.47 at half saturation, 0.05 for an empty frame
_ACCELERATION = 1.0  # pixels per frame^2 at which smoothness is 1/2
_VISIBLE = 0.1  # saturation below which an object counts as vanished
_COLOUR_TEMPERATURE = 0.1  # of cosine similarities: those of two palette colours are at most 0.39
_SHAPE_TEMPERATURE = 0.01  # of cosine similarities: those of two shapes reach 0.97


def wrap(displacement: Array) -> Array:
    """The shortest way on the torus: float[...] pixels in [-SIZE/2, SIZE/2)."""
    return (displacement + SIZE / 2) % SIZE - SIZE / 2


def centroid(pixels: Array) -> Array:
    """Centre of the object on the torus, float[..., 2] (y, x) in [0, SIZE), of pixels float[..., 8, 8, 3].

    Circular mean of the chroma along the frame's dominant colour. The projection is signed, so that background noise
    mostly cancels, and the power keeps what is left of it small; on clean frames the centre is within 0.05 pixels.
    """
    chroma = pixels - BACKGROUND
    strength = jnp.sum(chroma**2, axis=-1, keepdims=True)
    colour = jnp.sum(strength**2 * chroma, axis=(-3, -2), keepdims=True)
    weight = jnp.maximum(jnp.sum(chroma * colour, axis=-1), 0.0) / (jnp.linalg.norm(colour, axis=-1) + 1e-12)
    weight = weight**1.5
    angle = 2 * jnp.pi * jnp.arange(SIZE) / SIZE
    mean = lambda marginal: jnp.arctan2(marginal @ jnp.sin(angle), marginal @ jnp.cos(angle))
    angles = jnp.stack([mean(jnp.sum(weight, axis=-1)), mean(jnp.sum(weight, axis=-2))], axis=-1)
    return (angles * SIZE / (2 * jnp.pi)) % SIZE


@jax.jit
def _score(pixels: Array, attributes: Array) -> dict[str, Array]:
    """`score` on arrays: pixels float[n, frames, 8, 8, 3], attributes int32[n, 3] -> float[n] each."""
    chroma = pixels - BACKGROUND
    center = centroid(pixels)  # [n, frames, 2]
    colours, shapes = jnp.arange(len(COLOURS))[:, None], jnp.arange(len(SHAPES))[None, :]
    templates = render(center[:, :, None, None], colours, shapes) - BACKGROUND  # [n, frames, colour, shape, 8, 8, 3]
    overlap = jnp.einsum("nfyxc,nfksyxc->nfks", chroma, templates)
    template_energy = jnp.sum(templates**2, axis=(-3, -2, -1))
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
    choose = lambda scores, index: jnp.take_along_axis(scores, index[:, None, None], axis=-1)[..., 0]
    colour, shape, direction = attributes.T
    colour_match = choose(jax.nn.softmax(jnp.max(similarity, axis=-1) / _COLOUR_TEMPERATURE), colour)
    shape_match = choose(jax.nn.softmax(jnp.max(similarity, axis=-2) / _SHAPE_TEMPERATURE), shape)
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

    VQ: closeness of each frame to its best clean template. MQ: smoothness of the track of an object that is seen and
    moves. TA: mean of colour, shape and motion match with the prompt, of what is visible.

    Args:
      pixels: float[n, frames, 8, 8, 3], frames >= 3 and all of one prompt (a turn costs MQ).
      prompts: n sentences of the toy world; ValueError names the word that does not fit.

    A clip with a pixel that is not finite scores NaN.
    """
    n = len(prompts)
    chex.assert_shape(pixels, (n, None, SIZE, SIZE, 3))
    if pixels.shape[1] < MIN_FRAMES:
        raise ValueError(f"toy rewards need clips of at least {MIN_FRAMES} frames, not {pixels.shape[1]}")
    return _score(jnp.asarray(pixels), np.array([parse(p) for p in prompts], np.int32).reshape(n, 3))
