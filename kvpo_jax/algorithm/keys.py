"""Every random draw of a run comes from one seed: fold_in(fold_in(seed, stream), step), then more.

    stream    step        then folded in      what is drawn
    lora      0           -                   a fresh adapter
    pivot     iteration   -                   the first perturbed block, one for all prompts
    routing   iteration   prompt, branch      the frames that CHR routes
    noise     iteration   frame, prompt       the noise of a block
    noise     iteration   OWN, frame, prompt, branch    what a branch explores with
    noise     iteration   FRESH, frame, prompt          what end points are noised with anew
    noise     iteration   STEPS, prompt                 which steps of a group are replayed
    shuffle   iteration   prompt              a permutation of advantages (a control)
    heldout   0           frame, prompt       the noise of a held-out video
    suite     sample      frame, prompt       the noise of a video of an evaluation suite
    reward    iteration   prompt              what is added to rewards (an experiment)

A key is never split and folded in both, and nothing is folded in that must not change the draw: the
noise of a block does not depend on the branch. What is below OWN, FRESH and STEPS, which are no
frames, is apart from it. The order of the streams is part of what a checkpoint means.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvpo_jax.types import Array

STREAMS = ("lora", "pivot", "routing", "noise", "shuffle", "heldout", "suite", "reward")
# Folded into the key of the noise in place of a frame.
OWN, FRESH, STEPS = 2**32 - 1, 2**32 - 2, 2**32 - 3


def draw_key(seed: int, stream: str, step: int) -> Array:
    """The key of one of STREAMS at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


class NoiseKey(struct.PyTreeNode):
    """What the noise of a batch is drawn from.

    Attributes:
      key: of the stream "noise", "heldout" or "suite".
      prompts: int32[P], the number of each prompt in its iteration; it does not depend on how the
        prompts are batched.
      first: int32[], the number of the first branch that is rolled out with it; the others of a
        group are rolled out before or after (config.rollout.branch_chunk).
    """

    key: Array
    prompts: Array | np.ndarray
    first: Array | np.ndarray | np.int32 = np.int32(0)


def block_noise(noise: NoiseKey, start_frame: Array | int, shape: tuple[int, ...]) -> Array:
    """Noise float[P, *shape] of the block that begins at start_frame.

    It is a function of seed, prompt and frame, never of the branch or the policy.
    """
    key = jax.random.fold_in(noise.key, start_frame)

    def draw(prompt: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, prompt), shape)

    return jax.vmap(draw)(jnp.asarray(noise.prompts))


def own_noise(
    noise: NoiseKey, branches: np.ndarray, start_frame: Array | int, shape: tuple[int, ...]
) -> Array:
    """Noise float[P, T, *shape] of each trajectory itself, for the block at start_frame.

    `branches` are int32[T], counted from `noise.first`. It is independent of `block_noise`.
    """
    key = jax.random.fold_in(jax.random.fold_in(noise.key, OWN), start_frame)

    def draw(prompt: Array, branch: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, prompt), branch)
        return jax.random.normal(own, shape)

    of_prompt = jax.vmap(draw, in_axes=(None, 0))
    of_prompts = jax.vmap(of_prompt, in_axes=(0, None))
    return of_prompts(jnp.asarray(noise.prompts), jnp.asarray(noise.first) + branches)


def fresh_noise(noise: NoiseKey, start_frame: Array | int, shape: tuple[int, ...]) -> Array:
    """Noise float[P, *shape] for the end points of the block at start_frame, as in `block_noise`.

    It is the same for all branches of a prompt, and independent of what made them.
    """
    return block_noise(noise.replace(key=jax.random.fold_in(noise.key, FRESH)), start_frame, shape)


def drawn_steps(noise: NoiseKey, count: int, steps: int) -> Array:
    """int32[P, count]: which `count` of so many steps a group replays, in their order.

    Each prompt has its own; all branches and blocks of it have the same.
    """
    key = jax.random.fold_in(noise.key, STEPS)

    def draw(prompt: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(key, prompt), steps)
        return jnp.sort(order[:count])

    return jax.vmap(draw)(jnp.asarray(noise.prompts))
