"""VBench's aesthetic quality: LAION's head on CLIP ViT-L/14.

    scorer = aesthetic.load("weights/aesthetic.safetensors")
    scorer(pixels, prompts)["aesthetic_quality"]

The file has the head and CLIP's image tower. docs/evaluation.md has the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import chex
from jax.sharding import Mesh

from kvpo_jax.models import vit
from kvpo_jax.rewards import features
from kvpo_jax.rewards.clip import side_of
from kvpo_jax.rewards.composite import Scorer, Shared
from kvpo_jax.rewards.preprocess import for_clip
from kvpo_jax.types import Array

READING = features.Reading(for_clip, side_of, vit.aesthetic_scores)


def load(path: Path | str, mesh: Mesh | None = None, batch: int = features.BATCH) -> Scorer:
    """The scorer of a converted aesthetic head.

    Its component, float[n], is aesthetic_quality: the mean over the frames of LAION's score, a
    tenth of it. People rated pictures from 1 to 10; nothing bounds the score.

    Args:
      path: weights that `kvpo-convert` wrote.
      mesh: the devices to run on; None is all devices of this process.
      batch: frames that a device takes at once.
    """
    return partial(score, features.load(path, "aesthetic", vit.AestheticConfig, mesh, batch))


def score(
    tower: features.Tower, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
) -> dict[str, Array]:
    """Scores of clips [n, frames, h, w, 3], float in [0, 1] or uint8; see `load`."""
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    ratings = features.of_frames(tower, READING, pixels, shared)
    return {"aesthetic_quality": ratings[..., 0].mean(axis=1) / 10}
