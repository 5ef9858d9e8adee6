"""Qwen2-VL with a reward head, which HPSv3 and VideoAlign are, as a pure function of token ids and patches.

A head reads the hidden states of the reward tokens, special tokens that the checkpoint's authors added at the end of
the vocabulary and that the instruction, the text behind the clip, has at the places where a rating is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvpo_jax.models import qwen2_vl
from kvpo_jax.models.qwen2_vl import QWEN2_VL_2B, QWEN2_VL_7B, Grid, Qwen2VLConfig, TextConfig, Tokens, VisionConfig
from kvpo_jax.types import Array, PyTree

HPSV3_TOKENS = ("<|Reward|>",)
VIDEOALIGN_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
# Pixels of a frame, in squares of 28 x 28: HPSv3's 256 are its training's, VideoAlign's 128 the least of a video.
HPSV3_PIXELS, VIDEO_MIN_PIXELS = 256 * 28 * 28, 128 * 28 * 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Qwen2VLConfig):
    """A Qwen2-VL with a reward head.

    Attributes:
      head: widths of the head's Linears, with a ReLU between them.
      head_bias: whether these have biases.
      tokens: the reward tokens, in the order in which the instruction has them.
      token_ids: of each.
      template: the instruction as a format string with {text_prompt}.
      min_pixels, max_pixels: bounds of the size that a frame is resized to.
    """

    head: tuple[int, ...]
    head_bias: bool
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    template: str
    min_pixels: int
    max_pixels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoAlignConfig(RewardConfig):
    """VideoAlign; the names are those of its model_config.json.

    Attributes:
      mean, std: of the raw score at each reward token; scores are (x - mean) / std.
      sample_type: "uniform" or "multi_pts", see `rewards.preprocess`.
      fps: frames per second that are sampled.
      num_frames: sampled instead, whatever the clip's length, if not None.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sample_type: str
    fps: float
    num_frames: int | None


# The published checkpoints, without their instructions; the converter reads a config from the files that it converts.
HPSV3 = RewardConfig(
    dataclasses.replace(QWEN2_VL_7B.text, vocab=151658), head=(1024, 16, 2), head_bias=True, tokens=HPSV3_TOKENS,
    token_ids=(151657,), template="", min_pixels=HPSV3_PIXELS, max_pixels=HPSV3_PIXELS,
)  # fmt: skip
VIDEOALIGN = VideoAlignConfig(
    dataclasses.replace(QWEN2_VL_2B.text, vocab=151660), head=(3,), head_bias=False, tokens=VIDEOALIGN_TOKENS,
    token_ids=(151657, 151658, 151659), template="", min_pixels=VIDEO_MIN_PIXELS, max_pixels=200_704, mean=(0.0,) * 3,
    std=(1.0,) * 3, sample_type="uniform", fps=2.0, num_frames=None,
)  # fmt: skip


def config_from_dict(kind: type[RewardConfig], values: Mapping[str, Any]) -> RewardConfig:
    """The inverse of `dataclasses.asdict`, also by way of JSON: the config that a converted file notes."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**{**values, "text": TextConfig(**values["text"]), "vision": VisionConfig(**values["vision"])})


class RewardHead(nn.Module):
    """Hidden states to raw scores, in float32."""

    cfg: RewardConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """float[..., dim] -> float32[..., last width of the head]."""
        x = hidden.astype(jnp.float32)
        for i, width in enumerate(self.cfg.head):
            x = nn.Dense(width, use_bias=self.cfg.head_bias, name=f"fc{i + 1}")(nn.relu(x) if i else x)
        return x


def raw_scores(cfg: RewardConfig, params: PyTree, tokens: Tokens, patches: Array, grid: Grid) -> Array:
    """The head's outputs, float32[n, wanted, last width of the head], at the tokens that `tokens.at` asks for.

    Args:
      cfg: of the model.
      params: see `abstract_params`.
      tokens: of n texts.
      patches: float[n, t*h*w, patch_dim], normalised pixels of a clip per text.
      grid: (t, h, w) of every clip.
    """
    hidden = qwen2_vl.hidden_at(cfg, params["backbone"], tokens, patches, grid)
    return RewardHead(cfg).apply({"params": params["head"]}, hidden)


def abstract_params(cfg: RewardConfig) -> PyTree:
    """Shapes and dtypes of the weights: what `checkpoint.load_weights` loads a file like."""
    hidden = jnp.zeros((1, cfg.text.dim))
    head = jax.eval_shape(lambda: RewardHead(cfg).init(jax.random.key(0), hidden))["params"]
    return {"backbone": qwen2_vl.abstract_params(cfg), "head": head}
