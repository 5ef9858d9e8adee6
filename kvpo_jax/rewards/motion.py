"""Rewards from frame differences alone: how much a video moves, and how smoothly. No model, no prompt.

They guard against the two cheap ways to please a learned reward, a still picture and flicker, and they are the
shortest example of a scorer of your own:

    --config.reward.scorer=kvpo_jax.rewards.motion:score --config.reward.weights.smoothness=1 --config.eval.scorer=
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp

from kvpo_jax.types import Array

_EPS = 1e-6


def score(pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """Scores of clips float[n, frames, h, w, 3] in [0, 1] with at least three frames, each float[n].

    motion: the root mean square change from frame to frame. Subtracting each frame's mean and dividing by its standard
      deviation first leaves brightness and contrast out, so a fade does not count as motion.
    smoothness: 1 - |second difference| / (twice |first difference|), as root mean squares; 1 for pixels that change at
      a constant rate, 0 for a flicker back and forth, 1 where nothing moves.
    """
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    if pixels.shape[1] < 3:
        raise ValueError(f"motion is scored on at least three frames, not {pixels.shape[1]}")
    over_frame, over_clip = (2, 3, 4), (1, 2, 3, 4)
    centred = pixels - pixels.mean(over_frame, keepdims=True)
    frames = centred / (jnp.sqrt(jnp.mean(centred**2, over_frame, keepdims=True)) + _EPS)
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=over_clip))
    first = jnp.diff(frames, axis=1)
    motion = rms(first)
    return {"motion": motion, "smoothness": 1 - rms(jnp.diff(first, axis=1)) / (2 * motion + _EPS)}
