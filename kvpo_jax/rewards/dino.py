"""VBench's subject consistency: how alike the frames of a clip are to DINO.

    scorer = dino.load("weights/dino.safetensors")
    scorer(pixels, prompts)["subject_consistency"]

VBench takes DINO ViT-B/16, VBench-Long also DINOv2 ViT-B/14. docs/evaluation.md has the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import chex
from jax.sharding import Mesh

from kvpo_jax.models import vit
from kvpo_jax.rewards import features, preprocess
from kvpo_jax.rewards.composite import Scorer, Shared
from kvpo_jax.types import Array

SIDE = 224  # pixels of a frame's shorter side, whatever square the positions are of


def _side(cfg: vit.VisionConfig) -> int:
    return SIDE


READING = features.Reading(preprocess.for_dino, _side, vit.image_features)


def load(path: Path | str, mesh: Mesh | None = None, batch: int = features.BATCH) -> Scorer:
    """The scorer of a converted DINO or DINOv2.

    Its component, float[n] in [0, 1], is subject_consistency.

    Args:
      path: weights that `kvpo-convert` wrote.
      mesh: the devices to run on; None is all devices of this process.
      batch: frames that a device takes at once.
    """
    return partial(score, features.load(path, "dino", vit.ViTConfig, mesh, batch))


def score(
    tower: features.Tower, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
) -> dict[str, Array]:
    """Scores of clips [n, frames, h, w, 3], float in [0, 1] or uint8; see `load`."""
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    seen = features.of_frames(tower, READING, pixels, shared)
    return {"subject_consistency": features.consistency(seen)}
