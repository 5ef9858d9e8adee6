"""Rewards of the world "return": is it the right object (SC), and does it look well (VQ)?

They stand for the two parts of a preference. SC is semantic: which object a frame shows, however
pale it is and wherever it stands. VQ is appearance: how vivid and well formed the object is,
whichever it is. "it returns" asks for the *first* object of the story, which neither the sentence
nor any other prompt of the generator says.

A frame is compared with the clean pictures of all objects at 49 places.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.data.return_world import (
    FIRST,
    LATENT,
    LATENT_SCALE,
    NOTHING,
    OBJECTS,
    SIZE,
    VOTED,
    encode,
    parse,
    render,
)
from kvpo_jax.errors import UsageError
from kvpo_jax.models import layers
from kvpo_jax.types import Array

# VQ = exp(-rate * squared error / template energy): 0.47 at half saturation, 0.05 for an empty
# frame.
_ERROR_RATE = 3.0
_TEMPERATURE = 0.05  # of the share of a frame's energy that an object does not explain
_VISIBLE = 0.15  # saturation below which an object counts as vanished
_CLEAR = 0.5  # probability from which a frame shows an object
_REACH = 0.8  # the places: so far from the centre of the frame, in latent pixels


def _templates() -> Array:
    """Chroma float[objects, places, 48] of every object at full saturation."""
    offset = np.linspace(-_REACH, _REACH, 7) + (LATENT - 1) / 2
    places = np.stack(np.meshgrid(offset, offset, indexing="ij"), axis=-1).reshape(-1, 2)
    objects = jnp.arange(len(OBJECTS))[:, None]
    pictures = render(jnp.broadcast_to(places, (len(OBJECTS), *places.shape)), objects)
    return (pictures * LATENT_SCALE).reshape(*pictures.shape[:2], -1)


@jax.jit
@layers.exact
def recognise(pixels: Array) -> tuple[Array, Array, Array]:
    """What frames float[..., 48, 48, 3] show.

    Returns:
      the probability of each object float[..., objects], whose sum is how visible anything is; the
      appearance float[...] in [0, 1] of what is shown, and of the frame as an empty one.
    """
    chex.assert_shape(pixels, (..., SIZE, SIZE, 3))
    latents = encode(pixels)
    chroma = LATENT_SCALE * latents.reshape(*latents.shape[:-3], -1)
    templates = _templates()
    template_energy = jnp.sum(templates**2, axis=-1)
    energy = jnp.sum(chroma**2, axis=-1)[..., None]
    overlap = jnp.maximum(jnp.einsum("...d,opd->...op", chroma, templates), 0.0)

    explained = jnp.max(overlap**2 / template_energy, axis=-1)  # at any saturation
    saturation = jnp.max(overlap / template_energy, axis=(-2, -1))
    visible = 1 - jnp.exp(-((saturation / _VISIBLE) ** 2))
    unexplained = (energy - explained) / (energy + 1e-3)
    probability = jax.nn.softmax(-unexplained / _TEMPERATURE) * visible[..., None]

    error = (energy[..., None] - 2 * overlap + template_energy) / template_energy
    quality = jnp.exp(-_ERROR_RATE * jnp.min(error, axis=(-2, -1)))
    emptiness = jnp.exp(-_ERROR_RATE * energy[..., 0] / jnp.mean(template_energy))
    return probability, quality, emptiness


@jax.jit
def _score(pixels: Array, wanted: Array, told: Array) -> dict[str, Array]:
    """`score` on arrays: wanted int32[n], told bool[n, objects] (what was shown before)."""
    probability, quality, emptiness = recognise(pixels)  # [n, frames, ...]
    empty = (wanted == NOTHING)[:, None]
    nothing = 1 - jnp.sum(probability, axis=-1)
    of_wanted = jnp.take_along_axis(probability, jnp.maximum(wanted, 0)[:, None, None], axis=-1)
    match = jnp.where(empty, nothing, of_wanted[..., 0])
    clear = probability >= _CLEAR
    is_told = told & (jnp.arange(len(OBJECTS)) != wanted[:, None])
    right, shown = match >= _CLEAR, jnp.any(clear & is_told[:, None], axis=-1)
    scores = {
        "SC": match,
        "VQ": jnp.where(empty, emptiness, quality),
        "wanted": right,
        "shown": shown & ~right,
        "other": ~right & ~shown,
    }
    # XLA's fast min and max on CPU may drop a NaN; a broken clip must not get a score.
    broken = ~jnp.isfinite(jnp.sum(pixels, axis=(1, 2, 3, 4)))
    means = {name: jnp.mean(x.astype(jnp.float32), axis=1) for name, x in scores.items()}
    return {name: jnp.where(broken, jnp.nan, x) for name, x in means.items()}


def _asked_for(prompt: str) -> tuple[int, list[int]]:
    """The object that a sentence asks for (or NOTHING), and the objects that were told before."""
    said = parse(prompt)
    told = [o for o in map(parse, getattr(prompt, "before", ())) if o >= 0]
    if said not in (VOTED, FIRST):
        return said, told
    if not told:
        raise UsageError(f"prompt {prompt!r}: no sentence before it shows an object that returns")
    return told[0], told


def score(pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """Scores of clips, each float[n] in [0, 1]: means over the frames.

    SC: the probability that a frame shows what the sentence asks for: its object, nothing, or where
      something returns the first object of the story.
    VQ: how close a frame is to the best clean picture of any object; of "nothing", how empty it is.
    wanted, shown, other: the shares of the frames that clearly show what is asked for, another
      object of the sentences before, or anything else: an object that was never shown, an unclear
      one or none. Their sum is 1. They are not optimised.
    A clip with a pixel that is not finite scores NaN.

    Args:
      pixels: float[n, frames, 48, 48, 3].
      prompts: n sentences of the world, as `composite.Sentence` where something returns.

    Raises:
      UsageError: the world has no such sentence, or something returns that was never shown.
    """
    chex.assert_shape(pixels, (len(prompts), None, SIZE, SIZE, 3))
    asked = [_asked_for(prompt) for prompt in prompts]
    told = np.zeros((len(prompts), len(OBJECTS)), bool)
    for row, (_, objects) in zip(told, asked, strict=True):
        row[objects] = True
    wanted = np.array([o for o, _ in asked], np.int32)
    return _score(jnp.asarray(pixels), wanted, told)
