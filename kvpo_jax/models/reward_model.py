"""HPSv3 and VideoAlign: Qwen2-VL with a reward head, as pure functions of token ids and patches.

The instruction, which is the text behind the clip, asks for ratings with reward tokens: special
tokens that the checkpoint's authors added at the end of the vocabulary. The head reads the hidden
states of these tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from kvpo_jax.models import qwen2_vl
from kvpo_jax.models.qwen2_vl import QWEN2_VL_2B, QWEN2_VL_7B, Grid, Qwen2VLConfig, Tokens
from kvpo_jax.types import Array, PyTree

HPSV3_TOKENS = ("<|Reward|>",)
VIDEOALIGN_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
# Field of Qwen2VLConfig -> the pad token whose id it is.
PAD_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
# Pixels of a frame, counted in squares of 28 x 28: HPSv3 was trained with 256 of them, and
# VideoAlign's videos have at least 128.
HPSV3_PIXELS, VIDEO_MIN_PIXELS = 256 * 28 * 28, 128 * 28 * 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Qwen2VLConfig):
    """A Qwen2-VL with a reward head.

    Attributes:
      head: widths of the head's Linears, with a ReLU between them.
      head_bias: whether these Linears have biases.
      tokens: the reward tokens, in the order in which the instruction has them.
      token_ids: the id of each reward token.
      template: the instruction as a format string with {text_prompt}.
      min_pixels, max_pixels: bounds of the number of pixels that a frame is resized to.
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
      mean, std: statistics of the raw score at each reward token; a score is (x - mean) / std.
      sample_type: "uniform" or "multi_pts", see `rewards.preprocess`.
      fps: frames per second that are sampled.
      num_frames: if not None, so many frames are sampled instead, whatever the clip's length.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sample_type: str
    fps: float
    num_frames: int | None


# The published checkpoints, without their instructions, for plans of memory. The converter takes a
# config from the files that it converts.
HPSV3 = RewardConfig(
    dataclasses.replace(QWEN2_VL_7B.text, vocab=151658),
    head=(1024, 16, 2),
    head_bias=True,
    tokens=HPSV3_TOKENS,
    token_ids=(151657,),
    template="",
    min_pixels=HPSV3_PIXELS,
    max_pixels=HPSV3_PIXELS,
)
VIDEOALIGN = VideoAlignConfig(
    dataclasses.replace(QWEN2_VL_2B.text, vocab=151660),
    head=(3,),
    head_bias=False,
    tokens=VIDEOALIGN_TOKENS,
    token_ids=(151657, 151658, 151659),
    template="",
    min_pixels=VIDEO_MIN_PIXELS,
    max_pixels=200_704,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    sample_type="uniform",
    fps=2.0,
    num_frames=None,
)


class RewardHead(nn.Module):
    """Hidden states to raw scores, in float32."""

    cfg: RewardConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """float[..., dim] -> float32[..., last width of the head]."""
        x = hidden.astype(jnp.float32)
        for i, width in enumerate(self.cfg.head):
            linear = nn.Dense(width, use_bias=self.cfg.head_bias, name=f"fc{i + 1}")
            x = linear(nn.relu(x) if i else x)
        return x


def raw_scores(
    cfg: RewardConfig, params: PyTree, tokens: Tokens, patches: Array, grid: Grid
) -> Array:
    """The head's outputs at the wanted tokens, float32[n, wanted, last width of the head].

    Args:
      cfg: sizes.
      params: see `abstract_params`.
      tokens: n texts, see `qwen2_vl.cut_after`.
      patches: float[n, t*h*w, patch_dim], the normalised pixels of a clip per text.
      grid: (t, h, w), the same for all clips.
    """
    n, (t, h, w) = len(tokens.ids), grid
    chex.assert_shape(tokens.ids, (n, None))
    chex.assert_shape(patches, (n, t * h * w, cfg.vision.patch_dim))
    hidden = qwen2_vl.hidden_at(cfg, params["backbone"], tokens, patches, grid)
    scores: Any = RewardHead(cfg).apply({"params": params["head"]}, hidden)
    return scores


def abstract_params(cfg: RewardConfig) -> PyTree:
    """Shapes and dtypes of the weights, as `checkpoint.load_weights` needs them."""
    hidden = jnp.zeros((1, cfg.text.dim))
    head = jax.eval_shape(RewardHead(cfg).init, jax.random.key(0), hidden)["params"]
    return {"backbone": qwen2_vl.abstract_params(cfg), "head": head}
