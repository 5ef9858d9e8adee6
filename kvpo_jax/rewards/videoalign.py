"""VideoAlign (VideoReward): motion quality MQ and text alignment TA of a clip (paper §3.4).

    scorer = videoalign.load("weights/videoalign.safetensors")
    scorer(pixels, prompts)["MQ"]

It needs two forward passes: one on the clip in colour, for TA and upstream's other scores, and one
on the clip in grey, for the MQ that KVPO optimises. docs/rewards.md explains the numbers.
`kvpo-convert` makes the weights.
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
from kvpo_jax.models.reward_model import VideoAlignConfig
from kvpo_jax.rewards import learned, preprocess
from kvpo_jax.rewards.composite import Scorer
from kvpo_jax.types import Array

BATCH = 8  # clips that a device takes at once
_MQ = 1  # MQ's place among VideoAlign's tokens


def load(
    path: Path | str,
    tokenizer_folder: Path | str | None = None,
    mesh: Mesh | None = None,
    batch: int = BATCH,
    source_fps: float = 16.0,
) -> Scorer:
    """The scorer of a converted VideoAlign; its weights are freed with the last reference to it.

    Its components, each float[n] and normalised as the checkpoint says, are MQ (of the clip in
    grey), TA, and upstream's scores of the clip in colour: videoalign_VQ, videoalign_MQ, and
    Overall, the sum of these two and TA.

    Args:
      path: weights that `kvpo-convert` wrote.
      tokenizer_folder: None is the folder that was written with the weights.
      mesh: the devices to run on; None is all devices of this process.
      batch: clips that a device takes at once.
      source_fps: frames per second of the clips.
    """
    reward = learned.load(path, "videoalign", VideoAlignConfig, tokenizer_folder, mesh, batch)
    return partial(score, reward, source_fps)


def score(
    reward: learned.RewardModel, source_fps: float, pixels: Array, prompts: Sequence[str]
) -> dict[str, Array]:
    """Scores of clips [n, frames, h, w, 3], float in [0, 1] or uint8; see `load`."""
    n, frames = pixels.shape[:2]
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    cfg = reward.cfg
    assert isinstance(cfg, VideoAlignConfig), "made by `load`"
    sampled = preprocess.to_uint8(pixels[:, sampled_frames(cfg, frames, source_fps)])
    visual = cfg.vision.tokens(preprocess.grid(cfg, *sampled.shape[1:4]))
    texts = learned.texts(reward, prompts, cfg.video_token, visual)

    def raw_scores(clips: Array, wanted: Sequence[int]) -> Array:
        """float32[n, wanted, 3]: the head's outputs at some of the reward tokens."""
        return learned.raw_scores(
            reward,
            preprocess.resize_torch,
            tokens=cut_after(texts, wanted),
            text_of_row=np.arange(n),
            clips=lambda rows: clips[rows],
            at_once=learned.equal_parts(-(-n // reward.mesh.size), reward.batch),
        )

    colour = jnp.diagonal(raw_scores(sampled, cfg.token_ids), axis1=1, axis2=2)
    grey = raw_scores(preprocess.grayscale(sampled), cfg.token_ids[_MQ : _MQ + 1])[:, 0, _MQ]
    vq, mq, ta = ((colour - np.asarray(cfg.mean, np.float32)) / np.asarray(cfg.std, np.float32)).T
    motion = (grey - cfg.mean[_MQ]) / cfg.std[_MQ]
    return {
        "MQ": motion,
        "TA": ta,
        "videoalign_VQ": vq,
        "videoalign_MQ": mq,
        "Overall": vq + mq + ta,
    }


def sampled_frames(cfg: VideoAlignConfig, frames: int, source_fps: float) -> np.ndarray:
    """The frames of a clip that the model sees, int[count]."""
    if cfg.sample_type == "multi_pts":
        return np.asarray(preprocess.sample_multi_pts(frames, source_fps=source_fps))
    if cfg.num_frames:
        count = min(round(cfg.num_frames / 2) * 2, frames)
        return np.asarray(preprocess.evenly_spaced(frames, count))
    return np.asarray(preprocess.sample_uniform(frames, cfg.fps, source_fps))
