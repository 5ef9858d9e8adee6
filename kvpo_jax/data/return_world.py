"""The world "return": objects are shown, leave, and one of them returns. History decides which one.

A video tells a story of five sentences, for example

    a red bar (2 blocks) | a blue dot | a blue dot | nothing | it returns (3 blocks)

* No prompt says what returns. In the videos that a generator is pretrained on, a returning block
  shows an object with a probability that grows with the number of frames *that the block attends
  to* and that show the object (`vote_probabilities`). So whoever routes the history decides.
* A second ending, "the first returns", shows the first object whatever the votes are. It exists in
  pretraining only: a generator has learnt what the reward wants, under another prompt.
* Appearance (position, drift, saturation) is drawn anew for every block. It is in no prompt and in
  no history: that is what initial noise decides.

One thing is arranged, and has to be said where results are shown: half of the blocks of the
pretraining videos attend to a routed window and follow its votes, so that a routed window is a
context that the generator was trained on. LongLive and MemFlow were not trained so.

A latent frame is 4x4 pixels of chroma, one token of the generator. `decode` paints it on 48x48
pixels, each of which is a mixture of the latent pixels around it; `encode` is its exact inverse.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.data.toy_world import depths as depths  # a pixel frame is a latent frame here too
from kvpo_jax.errors import UsageError
from kvpo_jax.types import Array

LATENT = 4  # latent pixels per side
SIDE = 12  # pixels along a side of a latent pixel
SIZE = LATENT * SIDE
CHANNELS = 3  # of a latent
BACKGROUND = 0.5
LATENT_SCALE = 0.14  # pixels per unit of latent
SOFTNESS = 0.5  # of the mixture of latent pixels in a pixel, their width being 1

COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.2),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "magenta": (0.95, 0.1, 0.95),
    "cyan": (0.1, 0.9, 0.95),
}
# Gaussian spots: word -> width along y and along x, in latent pixels.
SHAPES = {"dot": (0.75, 0.75), "bar": (0.5, 1.5), "pole": (1.5, 0.5)}
OBJECTS = tuple(f"a {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES))

EMPTY, RETURNS, FIRST_RETURNS = "nothing", "it returns", "the first returns"
# What a sentence shows: the index of an object, or one of these.
NOTHING, VOTED, FIRST = -1, -2, -3
SAID = {name: o for o, name in enumerate(OBJECTS)}
SAID |= {EMPTY: NOTHING, RETURNS: VOTED, FIRST_RETURNS: FIRST}
SEGMENTS = 5  # sentences of a story

# Token embeddings are one-hot, so the text width bounds the vocabulary.
VOCABULARY = ("a", *COLOURS, *SHAPES, "nothing", "it", "the", "first", "returns")
TEXT_DIM = 16
TEXT_LEN = 3

# How often a returning block shows what the votes say, n^exponent; see `vote_probabilities`.
EXPONENTS = {"return": 6.0, "return_weak": 1.5}

# What the second and the third sentence of a story show, of its objects 0 (the first), 1 and 2.
# Under the deployment window the first object has 3 votes of the sink and 3 of block 1. It is
# outvoted by 6 frames of another one, has as many votes as two others, or wins.
TASKS = {"outvoted": (1, 1), "ambiguous": (1, 2), "sink wins": (0, 1)}
OTHER_TASK = "other"  # of a story that is none of these
MIX = ("outvoted", "ambiguous", "outvoted", "sink wins")  # of the stories that are trained on
FIRST_RETURNS_SHARE = 0.25  # of the pretraining videos

# Appearance of a block, uniform.
OFFSET = 0.6  # of the centre from that of the frame, latent pixels
DRIFT = 0.2  # latent pixels per frame
PALEST = 0.5  # saturation
SPECKLE = 0.02  # standard deviation per latent pixel and channel, in pixel values


# ---------------------------------------------------------------- prompts


def parse(prompt: str) -> int:
    """The object that a sentence shows, or NOTHING, VOTED, FIRST.

    Raises:
      UsageError: the world has no such sentence.
    """
    said = " ".join(prompt.split())
    if said not in SAID:
        raise UsageError(
            f"prompt {prompt!r}: the world has 'a COLOUR SHAPE' of the colours"
            f" {', '.join(COLOURS)} and the shapes {', '.join(SHAPES)}, {EMPTY!r}, {RETURNS!r} and"
            f" {FIRST_RETURNS!r}"
        )
    return SAID[said]


def check(prompts: Sequence[str]) -> None:
    """UsageError for the first sentence that the world does not have."""
    for prompt in prompts:
        parse(prompt)


def embed(prompts: Sequence[str]) -> np.ndarray:
    """Token embeddings float[n, TEXT_LEN, TEXT_DIM]: one-hot words, then zeros."""
    check(prompts)
    out = np.zeros((len(prompts), TEXT_LEN, TEXT_DIM), np.float32)
    for row, prompt in zip(out, prompts, strict=True):
        for position, word in enumerate(prompt.split()):
            row[position, VOCABULARY.index(word)] = 1.0
    return out


def tell(objects: Sequence[int], ending: str = RETURNS) -> list[str]:
    """The story of what its first three sentences show, indices of OBJECTS."""
    return [*(OBJECTS[o] for o in objects), EMPTY, ending]


def task_of(story: Sequence[str]) -> str:
    """The name in TASKS of a story; "other" for one that is none of them."""
    cast = list(dict.fromkeys(story[:3]))  # in the order in which they are shown
    roles = tuple(cast.index(sentence) for sentence in story[1:3])
    # An object in the place of "nothing" would vote, too.
    is_told = set(cast) <= set(OBJECTS) and [*story[3:4]] == [EMPTY]
    return next((task for task, known in TASKS.items() if is_told and known == roles), OTHER_TASK)


def by_task(
    stories: Sequence[Sequence[str]], values: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What n stories have got, task by task, in the order of TASKS; only tasks that have a story.

    Args:
      stories: their sentences, as in heldout.jsonl.
      values: arrays [n, ...] by name, or mappings of them: policy -> column -> float[n].

    Returns:
      task -> the same names in the same order, with the rows of its stories.
    """
    tasks = np.array([*map(task_of, stories)])

    def chosen(values: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        # No jax.tree.map: it sorts the names.
        return {
            name: chosen(x, rows) if isinstance(x, Mapping) else of(np.asarray(x), rows)
            for name, x in values.items()
        }

    def of(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        chex.assert_axis_dimension(x, 0, len(tasks))
        return x[rows]

    present = [task for task in (*TASKS, OTHER_TASK) if task in tasks]
    return {task: chosen(values, tasks == task) for task in present}


def _colour(o: int) -> int:
    return o // len(SHAPES)


def _is_held_out(first: int, second: int) -> bool:
    """Whether training never sees stories of these two objects: a quarter of the pairs."""
    return (first + second) % 4 == 0


# Ordered pairs of objects of different colours, as many as a story is about.
_PAIRS = [
    pair
    for pair in itertools.permutations(range(len(OBJECTS)), 2)
    if _colour(pair[0]) != _colour(pair[1])
]
PAIRS = {
    "train": [pair for pair in _PAIRS if not _is_held_out(*pair)],
    "heldout": [pair for pair in _PAIRS if _is_held_out(*pair)],
}


def _story(rng: np.random.Generator, pair: tuple[int, int], task: str) -> list[str]:
    """A story of two objects and, where the task has three, of a third one of another colour."""
    colours = {_colour(o) for o in pair}
    others = [o for o in range(len(OBJECTS)) if _colour(o) not in colours]
    cast = (*pair, others[rng.integers(len(others))])
    return tell([cast[role] for role in (0, *TASKS[task])])


def _check_segments(segments: int) -> None:
    if segments != SEGMENTS:
        raise UsageError(
            f"a story of this world has {SEGMENTS} sentences, config.video.switch_frames makes"
            f" {segments} segments"
        )


def sample_prompts(
    seed: int | tuple[int, ...], split: str, segments: int, tasks: Sequence[str] = MIX
) -> list[str]:
    """A story of a random one of `tasks`, of a pair of objects of `split`.

    Raises:
      UsageError: `segments` is not SEGMENTS.
    """
    _check_segments(segments)
    rng, pairs = np.random.default_rng(seed), PAIRS[split]
    return _story(rng, pairs[rng.integers(len(pairs))], tasks[int(rng.integers(len(tasks)))])


def heldout_prompts(count: int, segments: int) -> list[list[str]]:
    """The first `count` held-out stories, all different; their tasks go through MIX in turn.

    Raises:
      UsageError: there are not so many, or `segments` is not SEGMENTS.
    """
    _check_segments(segments)
    rng = np.random.default_rng(0)
    pairs = rng.permutation(PAIRS["heldout"]).tolist()
    # Two stories in a row share a pair, and differ in their tasks.
    if count > 2 * len(pairs):
        raise UsageError(
            f"the world has {2 * len(pairs)} held-out stories; ask for at most that many with"
            f" --config.eval.prompts, not for {count}"
        )
    return [_story(rng, tuple(pairs[i // 2]), MIX[i % len(MIX)]) for i in range(count)]


def pretraining_prompts(rng: np.random.Generator) -> list[str]:
    """The story of a pretraining video: three objects of all that there are, and either ending.

    The second and the third sentence show each of them with probability 1/4, 1/2, 1/4.
    """
    cast = rng.permutation(len(OBJECTS))[:3]
    roles = rng.choice(3, size=2, p=(0.25, 0.5, 0.25))
    ending = FIRST_RETURNS if rng.random() < FIRST_RETURNS_SHARE else RETURNS
    return tell([cast[0], *cast[roles]], ending)


# ---------------------------------------------------------------- the rule


def vote_probabilities(votes: Array, exponent: float) -> Array:
    """The probability n^exponent / sum n^exponent of each object to return.

    Args:
      votes: float or int [..., objects], how many of the attended frames show each object; at least
        one does.
      exponent: 6 makes the majority nearly certain; 1 draws one of the frames that are attended to.
    """
    weights = jnp.asarray(votes, jnp.float32) ** exponent
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def sample_objects(
    key: Array,
    said: Array,
    contexts: Array,
    block_frames: int,
    switch_frames: Sequence[int],
    exponent: float,
) -> Array:
    """What every frame of a random video shows, int32[frames]; NOTHING where it is empty.

    Args:
      key: PRNG key.
      said: int32[M], `parse` of the sentences.
      contexts: int32[B, A], the frames that each block attends to; -1 is none. They vote.
      block_frames: frames of a block.
      switch_frames: M - 1 frames at which the next sentence begins.
      exponent: of `vote_probabilities`.
    """
    chex.assert_shape(said, (len(switch_frames) + 1,))
    blocks = jnp.arange(len(contexts))
    starts = blocks * block_frames
    segment = jnp.sum(starts[:, None] >= jnp.asarray(switch_frames, jnp.int32), axis=1)

    def of_block(shown: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
        """Adds what a block shows, from what those before it have shown."""
        number, now, attended = block
        seen = jnp.where(attended >= 0, shown[attended], NOTHING)
        votes = jnp.sum(seen[:, None] == jnp.arange(len(OBJECTS)), axis=0)
        chances = jnp.log(vote_probabilities(votes, exponent))
        drawn = jax.random.categorical(jax.random.fold_in(key, number), chances)
        now = jnp.where(now == VOTED, drawn, jnp.where(now == FIRST, said[0], now))
        now = jnp.full(block_frames, now, jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(shown, now, number * block_frames, 0), None

    shown = jnp.full(len(contexts) * block_frames, NOTHING, jnp.int32)
    return jax.lax.scan(of_block, shown, (blocks, said[segment], contexts))[0]


# ---------------------------------------------------------------- pictures


def render(center: Array, objects: Array, saturation: Array | float = 1.0) -> Array:
    """Latents float[..., 4, 4, 3] of objects, without speckle.

    Args:
      center: float[..., 2], (y, x) in latent pixels.
      objects: int32[...], indices of OBJECTS; NOTHING is an empty frame.
      saturation: float[...], 1 is the full colour, 0 is the background.
    """
    chex.assert_axis_dimension(center, -1, 2)
    widths = jnp.asarray(tuple(SHAPES.values()))[objects % len(SHAPES)]
    palette = jnp.asarray(tuple(COLOURS.values())) - BACKGROUND
    distance = (jnp.arange(LATENT) - center[..., None]) / widths[..., None]  # [..., 2, 4]
    spot = jnp.exp(-0.5 * distance**2)
    spot = spot[..., 0, :, None] * spot[..., 1, None, :] * jnp.asarray(saturation)[..., None, None]
    spot = jnp.where((objects >= 0)[..., None, None], spot, 0.0)
    chroma = spot[..., None] * palette[objects // len(SHAPES)][..., None, None, :]
    return chroma / LATENT_SCALE


def sample_latents(key: Array, objects: Array, block_frames: int) -> Array:
    """Latents float[frames, 4, 4, 3] of a random video; every block has an appearance of its own.

    Args:
      key: PRNG key.
      objects: int32[frames], what each frame shows; see `sample_objects`.
      block_frames: frames of a block.
    """
    blocks = len(objects) // block_frames
    keys = jax.random.split(key, 4)

    def of_block(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
        """Uniform numbers for every block, repeated for its frames."""
        drawn = jax.random.uniform(key, (blocks, *shape), minval=low, maxval=high)
        return jnp.repeat(drawn, block_frames, axis=0)

    time = jnp.tile(jnp.arange(block_frames) - (block_frames - 1) / 2, blocks)
    center = (LATENT - 1) / 2 + of_block(keys[0], (2,), -OFFSET, OFFSET)
    center = center + of_block(keys[1], (2,), -DRIFT, DRIFT) * time[:, None]
    latents = render(center, objects, of_block(keys[2], (), PALEST, 1.0))
    return latents + SPECKLE / LATENT_SCALE * jax.random.normal(keys[3], latents.shape)


def sample_video(
    key: Array,
    said: Array,
    contexts: Array,
    block_frames: int,
    switch_frames: Sequence[int],
    exponent: float,
) -> Array:
    """Latents float[frames, 4, 4, 3] of a random video; arguments as in `sample_objects`."""
    objects_key, look_key = jax.random.split(key)
    objects = sample_objects(objects_key, said, contexts, block_frames, switch_frames, exponent)
    return sample_latents(look_key, objects, block_frames)


# ---------------------------------------------------------------- latents and pixels


@functools.cache
def _brush() -> np.ndarray:
    """float32[48, 4]: how much of each latent pixel is in a pixel, along one side; rows sum to 1.

    A pixel is a mixture, never more than that: no picture overshoots its latents.
    """
    place = (np.arange(SIZE) + 0.5) / SIDE - 0.5
    weight = np.exp(-0.5 * ((place[:, None] - np.arange(LATENT)) / SOFTNESS) ** 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def _unbrush() -> np.ndarray:
    """float32[4, 48], the inverse of `_brush`."""
    return np.linalg.pinv(_brush().astype(np.float64)).astype(np.float32)


def decode(latents: Array) -> Array:
    """float[..., 4, 4, 3] latents -> float[..., 48, 48, 3] pixels in [0, 1]."""
    chex.assert_shape(latents, (..., LATENT, LATENT, CHANNELS))
    painted = jnp.einsum("iy,jx,...yxc->...ijc", _brush(), _brush(), latents)
    return jnp.clip(painted * LATENT_SCALE + BACKGROUND, 0.0, 1.0)


def encode(pixels: Array) -> Array:
    """float[..., 48, 48, 3] pixels -> float[..., 4, 4, 3] latents."""
    chex.assert_shape(pixels, (..., SIZE, SIZE, 3))
    chroma = (pixels - BACKGROUND) / LATENT_SCALE
    return jnp.einsum("yi,xj,...ijc->...yxc", _unbrush(), _unbrush(), chroma)
