"""HPSv3: the visual quality VQ of a video is the mean of its frames' scores (paper §3.4).

    scorer = hpsv3.load("weights/hpsv3.safetensors")
    scorer(pixels, prompts)["VQ"]

A frame's score is the first of the head's two outputs, mu; the other says how uncertain it is. docs/rewards.md tells
what the numbers mean, and tools/convert_weights.py makes the weights.
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
from kvpo_jax.rewards.composite import Scorer
from kvpo_jax.types import Array


def load(
    path: Path | str,
    tokenizer_folder: Path | str | None = None,
    mesh: Mesh | None = None,
    batch: int = 16,
    best: float = 1.0,
) -> Scorer:
    """The scorer of a converted HPSv3, {"VQ": float[n]}; its weights go with the last reference to it.

    Args:
      path: weights, as tools/convert_weights.py wrote them.
      tokenizer_folder: None is the folder that was written with them.
      mesh: to run on, None is all devices of this process.
      batch: frames that a device takes at once.
      best: share of a video's frames, the best ones, that its score is the mean of.
    """
    if not 0 < best <= 1:
        raise ValueError(f"best={best} is not a share of frames, above 0 and up to 1")
    reward = learned.load(path, "hpsv3", RewardConfig, tokenizer_folder, mesh, batch)
    return partial(score, reward, best)


def score(reward: learned.Reward, best: float, pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """Scores of videos float[n, frames, h, w, 3] in [0, 1]; see `load`."""
    n, frames, height, width, _ = pixels.shape
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    cfg = reward.cfg
    visual = cfg.vision.tokens(preprocess.grid(cfg, 1, height, width))
    tokens = cut_after(learned.texts(reward, prompts, cfg.image_token, visual), cfg.token_ids)
    video, frame = np.divmod(np.arange(n * frames), frames)
    clips = lambda row: preprocess.to_uint8(pixels[video[row], frame[row]])[:, None]
    mu = learned.raw_scores(reward, preprocess.resize_pil, tokens, video, clips)[:, 0, 0].reshape(n, frames)
    counted = max(1, int(frames * best))
    return {"VQ": jnp.sort(mu, axis=1)[:, frames - counted :].mean(axis=1)}
