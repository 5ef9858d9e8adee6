"""HPSv3: the visual quality VQ of a video is the mean of its frames' scores (paper §3.4).

    scorer = hpsv3.load("weights/hpsv3.safetensors")
    scorer(pixels, prompts)["VQ"]

A frame's score is mu, the first of the head's two outputs; the second says how uncertain mu is.
docs/rewards.md explains the numbers. `kvpo-convert` makes the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvpo_jax.models.qwen2_vl import cut_after
from kvpo_jax.models.reward_model import RewardConfig
from kvpo_jax.rewards import learned, preprocess
from kvpo_jax.rewards.composite import Scorer, Shared
from kvpo_jax.types import Array

BATCH = 16  # frames that a device takes at once
BEST = 0.3  # VQ_best is the mean over this share of a video's frames


def load(
    path: Path | str,
    tokenizer_folder: Path | str | None = None,
    mesh: Mesh | None = None,
    batch: int = BATCH,
) -> Scorer:
    """The scorer of a converted HPSv3; its weights are freed with the last reference to it.

    Its components, each float[n], are VQ, the mean over all frames, and VQ_best, the mean over the
    best 30 % of them.

    Args:
      path: weights that `kvpo-convert` wrote.
      tokenizer_folder: None is the folder that was written with the weights.
      mesh: the devices to run on; None is all devices of this process.
      batch: frames that a device takes at once.
    """
    reward = learned.load(path, "hpsv3", RewardConfig, tokenizer_folder, mesh, batch)
    return partial(score, reward)


def score(
    reward: learned.RewardModel, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
) -> dict[str, Array]:
    """Scores of videos [n, frames, h, w, 3], float in [0, 1] or uint8; see `load`.

    A frame of several videos (`shared`) is scored once.
    """
    n, frames, height, width, _ = pixels.shape
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    cfg = reward.cfg
    visual = cfg.vision.tokens(preprocess.grid(cfg, 1, height, width))
    tokens = cut_after(learned.texts(reward, prompts, cfg.image_token, visual), cfg.token_ids)
    video, frame, which = learned.distinct_frames(n, frames, shared)

    def clips(rows: np.ndarray) -> Array:
        """Clips of one frame, uint8[rows, 1, h, w, 3]; a row is a frame of a video."""
        return preprocess.to_uint8(pixels[video[rows], frame[rows]])[:, None]

    raw = learned.raw_scores(
        reward,
        preprocess.resize_pil,
        tokens,
        video,
        clips,
        at_once=learned.frames_at_once(n, frames, reward.mesh, reward.batch),
    )
    mu = raw[which, 0, 0].reshape(n, frames)
    best = jnp.sort(mu, axis=1)[:, frames - max(1, int(frames * BEST)) :]
    return {"VQ": mu.mean(axis=1), "VQ_best": best.mean(axis=1)}
