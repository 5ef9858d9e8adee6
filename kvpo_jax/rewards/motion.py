"""Rewards from frame differences alone: how much a video moves, and how smoothly.

They need neither a model nor a prompt. They guard against the two cheap ways to please a learned
reward, a still picture and flicker, and they are the shortest example of a scorer of your own:

    --config.reward.scorer=kvpo_jax.rewards.motion:score --config.reward.weights.smoothness=1
    --config.eval.scorer=
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp

from kvpo_jax.errors import UsageError
from kvpo_jax.types import Array

MIN_FRAMES = 3  # a second difference needs three
_EPS = 1e-6


def score(pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """Scores of clips, each float[n].

    motion: the root mean square change from frame to frame. Each frame is normalised to mean 0 and
      standard deviation 1 first, so a change of brightness or contrast is not motion.
    smoothness: 1 - |second difference| / (2 |first difference|), both as root mean squares. It is 1
      for pixels that change at a constant rate or not at all, 0 for flicker back and forth.

    Args:
      pixels: float[n, frames, h, w, 3] in [0, 1], at least three frames.
      prompts: n sentences, which are not used.

    Raises:
      UsageError: the clips have fewer than three frames.
    """
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    if pixels.shape[1] < MIN_FRAMES:
        raise UsageError(f"motion is scored on at least three frames, not {pixels.shape[1]}")
    over_frame, over_clip = (2, 3, 4), (1, 2, 3, 4)
    centred = pixels - pixels.mean(over_frame, keepdims=True)
    frames = centred / (jnp.sqrt(jnp.mean(centred**2, over_frame, keepdims=True)) + _EPS)

    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=over_clip))

    first = jnp.diff(frames, axis=1)
    motion = rms(first)
    return {"motion": motion, "smoothness": 1 - rms(jnp.diff(first, axis=1)) / (2 * motion + _EPS)}
