"""The toy world: a coloured shape that drifts over a torus of 8x8 pixels as its prompts say.

It is small enough to pretrain a generator on a laptop, and has what KVPO needs of a world:

* prompts with segments: colour, shape and direction may all change at a prompt switch, the position
  never jumps;
* nuisances that a person would mark down: a block may be faded, blurred, speckled or shaky (its
  *look*);
* content that only history knows: no prompt names the look. A block takes over the look of a block
  of its recent past, so the frames in the cache decide what comes next, and routing matters.

Pixels are float[..., 8, 8, 3], nominally in [0, 1]. Latents are the pixels folded 2x2 into channels
and scaled to a standard deviation of about 0.8 (`encode`, `decode`): a fixed stand-in for the video
VAE, one latent frame per pixel frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import chex
import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvpo_jax.errors import UsageError
from kvpo_jax.types import Array, Windows

SIZE = 8  # pixels per side
SIDE = 2  # pixels along a side of a latent pixel
CHANNELS = 3 * SIDE**2  # of a latent
SPEED = 1.0  # pixels per frame
BACKGROUND = 0.5
LATENT_SCALE = 0.16  # pixels per unit of latent

COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.2),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (1.0, 0.95, 0.1),
}
SHAPES = ("disk", "square", "cross")
# Word -> (y, x).
DIRECTIONS = {"right": (0.0, 1.0), "left": (0.0, -1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}

# A prompt is a sentence like "a red disk moves left". Token embeddings are one-hot, so the text
# width bounds the vocabulary.
VOCABULARY = ("a", "moves", *COLOURS, *SHAPES, *DIRECTIONS, "</s>")
TEXT_DIM = 16
TEXT_LEN = 8

# All (colour, shape, direction). Training holds out those whose indices sum to a multiple of three:
# a third of them, in a pattern that leaves every word in training.
COMBINATIONS = np.array(
    list(itertools.product(range(len(COLOURS)), range(len(SHAPES)), range(len(DIRECTIONS)))),
    np.int32,
)
_HELD_OUT = COMBINATIONS.sum(axis=1) % 3 == 0
SPLITS = {
    "train": COMBINATIONS[~_HELD_OUT],
    "heldout": COMBINATIONS[_HELD_OUT],
    "all": COMBINATIONS,
}


@struct.dataclass
class Look:
    """How a block is rendered; the prompt does not say it.

    Attributes:
      saturation: float[...], 1 is the full colour, 0 is the background.
      blur: float[...], standard deviation in pixels.
      speckle: float[...], standard deviation of the per-pixel noise.
      jitter: float[...], standard deviation of the per-frame displacement, in pixels.
    """

    saturation: Array | float
    blur: Array | float
    speckle: Array | float
    jitter: Array | float


CLEAN = Look(saturation=1.0, blur=0.0, speckle=0.0, jitter=0.0)


# ---------------------------------------------------------------- prompts


def describe(attributes: Sequence[int]) -> str:
    """The sentence of (colour, shape, direction) indices."""
    colour, shape, direction = (int(a) for a in attributes)
    return f"a {tuple(COLOURS)[colour]} {SHAPES[shape]} moves {tuple(DIRECTIONS)[direction]}"


def parse(prompt: str) -> tuple[int, int, int]:
    """The (colour, shape, direction) indices of a sentence.

    Raises:
      UsageError: a word does not fit; names the first of them.
    """
    words = prompt.split()
    form = ("a", tuple(COLOURS), SHAPES, "moves", tuple(DIRECTIONS))
    if len(words) != len(form):
        raise UsageError(
            f"toy prompt {prompt!r}: expected {len(form)} words like 'a red disk moves left'"
        )
    for word, allowed in zip(words, form, strict=True):
        allowed = (allowed,) if isinstance(allowed, str) else allowed
        if word not in allowed:
            raise UsageError(f"toy prompt {prompt!r}: {word!r} is not one of {', '.join(allowed)}")
    return form[1].index(words[1]), form[2].index(words[2]), form[4].index(words[4])


def check(prompts: Sequence[str]) -> None:
    """UsageError for the first sentence that says nothing of the toy world."""
    for prompt in prompts:
        parse(prompt)


def embed(prompts: Sequence[str]) -> np.ndarray:
    """Token embeddings float[n, TEXT_LEN, TEXT_DIM]: one-hot words, an end token, then zeros."""
    out = np.zeros((len(prompts), TEXT_LEN, TEXT_DIM), np.float32)
    for row, prompt in zip(out, prompts, strict=True):
        parse(prompt)
        for position, word in enumerate([*prompt.split(), "</s>"]):
            row[position, VOCABULARY.index(word)] = 1.0
    return out


def sample_attributes(rng: np.random.Generator, split: str, segments: int) -> np.ndarray:
    """int32[segments, 3]: a prompt sequence with two or more different prompts.

    Each segment but the first repeats the one before it with probability 1/4.
    """
    combinations = SPLITS[split]
    while True:
        out = combinations[rng.integers(len(combinations), size=segments)]
        for m in range(1, segments):
            if rng.random() < 0.25:
                out[m] = out[m - 1]
        if segments == 1 or len(np.unique(out, axis=0)) > 1:
            return out


def sample_prompts(seed: int | tuple[int, ...], split: str, segments: int) -> list[str]:
    """A prompt sequence: `segments` sentences whose combinations belong to `split`."""
    return [describe(a) for a in sample_attributes(np.random.default_rng(seed), split, segments)]


def heldout_prompts(count: int, segments: int) -> list[list[str]]:
    """The first `count` held-out prompt sequences, all different.

    Raises:
      UsageError: there are not so many.
    """
    sentences = len(SPLITS["heldout"])
    there_are = sentences**segments - (sentences if segments > 1 else 0)
    if count > there_are:
        raise UsageError(
            f"the toy has {there_are} held-out prompt sequences of {segments} sentences; ask for at"
            f" most that many with --config.eval.prompts, not for {count}"
        )
    stream = (tuple(sample_prompts((0, i), "heldout", segments)) for i in itertools.count())
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[next(stream)] = None
    return [list(sequence) for sequence in found]


# ---------------------------------------------------------------- pictures


def _coverage(center: Array, shape: Array) -> Array:
    """How much of each pixel the shape covers, float[..., 8, 8].

    Args:
      center: float[..., 2], (y, x).
      shape: int32[...], index into SHAPES.
    """
    grid = jnp.arange(SIZE, dtype=jnp.float32)

    def offset(axis: int) -> Array:
        """Pixels from the centre along an axis of the torus, float[..., SIZE]."""
        return (grid - center[..., axis, None] + SIZE / 2) % SIZE - SIZE / 2

    dy, dx = jnp.abs(offset(0))[..., :, None], jnp.abs(offset(1))[..., None, :]
    disk = 2.2 - jnp.sqrt(dy**2 + dx**2 + 1e-6)
    square = 2.0 - jnp.maximum(dy, dx)
    cross = jnp.maximum(jnp.minimum(2.6 - dy, 0.7 - dx), jnp.minimum(2.6 - dx, 0.7 - dy))
    distance = jnp.stack(jnp.broadcast_arrays(disk, square, cross), axis=-3)
    inside = jnp.take_along_axis(distance, shape[..., None, None, None], axis=-3)[..., 0, :, :]
    return jnp.clip(inside + 0.5, 0.0, 1.0)


def _blur(image: Array, sigma: Array) -> Array:
    """Periodic Gaussian blur of float[..., 8, 8] by sigma float[...] pixels."""
    frequency = 2 * jnp.pi * jnp.fft.fftfreq(SIZE)
    decay = jnp.exp(
        -0.5 * (sigma[..., None, None] ** 2) * (frequency[:, None] ** 2 + frequency[None, :] ** 2)
    )
    return jnp.fft.ifft2(jnp.fft.fft2(image) * decay).real


def render(center: Array, colour: Array, shape: Array, look: Look = CLEAN) -> Array:
    """Pixels float[..., 8, 8, 3], without speckle.

    Args:
      center: float[..., 2], (y, x).
      colour: int32[...], index into COLOURS.
      shape: int32[...], index into SHAPES.
      look: float[...] or scalars; speckle and jitter are not used.
    """
    chex.assert_axis_dimension(center, -1, 2)
    palette = jnp.asarray(tuple(COLOURS.values())) - BACKGROUND
    batch = jnp.broadcast_shapes(center.shape[:-1], jnp.shape(colour), jnp.shape(shape))
    cover = _coverage(jnp.broadcast_to(center, (*batch, 2)), jnp.broadcast_to(shape, batch))
    cover = _blur(cover, jnp.broadcast_to(look.blur, batch))
    cover = cover * jnp.broadcast_to(look.saturation, batch)[..., None, None]
    return BACKGROUND + cover[..., None] * palette[colour][..., None, None, :]


def sample_looks(key: Array, blocks: int) -> Look:
    """A look per block, float[blocks] each.

    With probability 0.85 a block repeats the look of one of its six predecessors, chosen uniformly.
    Otherwise, and at the start, it draws a new look, which is clean with probability 0.4.
    """
    fresh_key, source_key, repeat_key = jax.random.split(key, 3)
    u = jax.random.uniform(fresh_key, (blocks, 5))
    clean = u[:, 4] < 0.4
    fresh = Look(
        saturation=jnp.where(clean, 1.0, 0.25 + 0.75 * u[:, 0]),
        blur=jnp.where(clean, 0.0, 1.4 * u[:, 1]),
        speckle=jnp.where(clean, 0.0, 0.06 * u[:, 2]),
        jitter=jnp.where(clean, 0.0, 0.6 * u[:, 3]),
    )
    index = jnp.arange(blocks)
    back = jax.random.randint(source_key, (blocks,), 1, jnp.clip(index, 1, 6) + 1)
    repeat = (jax.random.uniform(repeat_key, (blocks,)) < 0.85) & (index > 0)

    def step(drawn_at: Array, block: Array) -> tuple[Array, None]:
        """Sets at which block the look of `block` was drawn."""
        source = jnp.where(repeat[block], drawn_at[block - back[block]], block)
        return drawn_at.at[block].set(source), None

    drawn_at, _ = jax.lax.scan(step, index, index)
    return jax.tree.map(lambda x: x[drawn_at], fresh)


def sample_video(
    key: Array, attributes: Array, blocks: int, block_frames: int, switch_frames: Sequence[int]
) -> Array:
    """Pixels of a random video, float[blocks * block_frames, 8, 8, 3].

    Speckle is not clipped, so that the generator learns the noise as it is: a pixel may be a little
    outside [0, 1].

    Args:
      key: PRNG key.
      attributes: int32[M, 3], colour, shape and direction of each prompt segment.
      blocks: number of blocks, each with a look.
      block_frames: frames of a block.
      switch_frames: M - 1 frames at which the next segment begins.
    """
    chex.assert_shape(attributes, (len(switch_frames) + 1, 3))
    start_key, look_key, jitter_key, speckle_key = jax.random.split(key, 4)
    frames = blocks * block_frames
    switches = jnp.asarray(switch_frames, jnp.int32)
    segment = jnp.sum(jnp.arange(frames)[:, None] >= switches[None, :], axis=1)
    colour, shape, direction = attributes[segment].T
    look = jax.tree.map(lambda x: jnp.repeat(x, block_frames), sample_looks(look_key, blocks))
    velocity = SPEED * jnp.asarray(tuple(DIRECTIONS.values()))[direction]
    track = jax.random.uniform(start_key, (2,), maxval=SIZE) + jnp.cumsum(velocity, axis=0)
    track = track + look.jitter[:, None] * jax.random.normal(jitter_key, track.shape)
    pixels = render(track % SIZE, colour, shape, look)
    return pixels + look.speckle[:, None, None, None] * jax.random.normal(speckle_key, pixels.shape)


# ---------------------------------------------------------------- latents


def encode(pixels: Array) -> Array:
    """float[..., 8, 8, 3] pixels -> float[..., 4, 4, 12] latents."""
    chex.assert_shape(pixels, (..., SIZE, SIZE, 3))
    folded = einops.rearrange(pixels, "... (y py) (x px) c -> ... y x (py px c)", py=SIDE, px=SIDE)
    return (folded - BACKGROUND) / LATENT_SCALE


def depths(windows: Windows, latents: int) -> np.ndarray:
    """int32[latents]: 1 for frames [start, end) that are read; a pixel frame is a latent frame."""
    depth = np.zeros(latents, np.int32)
    for start, end in windows:
        depth[start:end] = 1
    return depth


def decode(latents: Array) -> Array:
    """float[..., 4, 4, 12] latents -> float[..., 8, 8, 3] pixels in [0, 1]."""
    chex.assert_shape(latents, (..., SIZE // SIDE, SIZE // SIDE, CHANNELS))
    folded = latents * LATENT_SCALE + BACKGROUND
    pixels = einops.rearrange(folded, "... y x (py px c) -> ... (y py) (x px) c", py=SIDE, px=SIDE)
    return jnp.clip(pixels, 0.0, 1.0)
