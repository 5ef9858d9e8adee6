"""Qwen2-VL without its language head, as a pure function of token ids and of the patches of one clip per row.

`Qwen2VL(cfg).apply({"params": params}, ids, lengths, patches, grid) -> float[n, K, dim]`: the hidden states after the
final norm, which the heads of HPSv3 and VideoAlign read at the places of their reward tokens. Norms, softmax and
rotary embeddings are computed in float32, products in the config's dtype.

A clip is an image or a video. Its grid (t, h, w), upstream's `grid_thw`, counts slabs of `temporal_patch` frames (an
image is one frame, repeated), and rows and columns of patches. Patches are ordered by slab and, within one, by
merge x merge squares, as upstream's processor writes them: every merge^2 rows become one visual token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvpo_jax.models.layers import RMSNorm, wide
from kvpo_jax.models.umt5 import LENGTH_STEP
from kvpo_jax.types import Array, PyTree

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; the defaults are those of every published Qwen2-VL.

    Attributes:
      dim: width.
      ffn_dim: of the MLP.
      heads: attention heads; their width is a multiple of 4, a half of it for rows and a half for columns.
      layers: transformer blocks.
      channels: of a frame.
      temporal_patch: frames of a patch.
      patch: pixels of a patch's side.
      merge: side of the square of patches that becomes one visual token.
      eps: of the LayerNorms.
      rope_theta: base of the rotary frequencies.
    """

    dim: int = 1280
    ffn_dim: int = 5120
    heads: int = 16
    layers: int = 32
    channels: int = 3
    temporal_patch: int = 2
    patch: int = 14
    merge: int = 2
    eps: float = 1e-6
    rope_theta: float = 1e4

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, ordered (channel, frame, y, x)."""
        return self.channels * self.temporal_patch * self.patch**2

    def tokens(self, grid: Grid) -> int:
        """Visual tokens of a clip of this grid."""
        t, h, w = grid
        return t * (h // self.merge) * (w // self.merge)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the language model.

    Attributes:
      vocab: rows of the token embedding; reward models add theirs.
      dim: width.
      heads: of the queries.
      kv_heads: of the keys and values.
      ffn_dim: of the gated MLP.
      layers: transformer layers.
      eps: of the RMS norms.
      rope_theta: base of the rotary frequencies.
    """

    vocab: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    layers: int
    eps: float = 1e-6
    rope_theta: float = 1e6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Rotary frequencies that turn with a token's t, h and w: 16, 24 and 24 of a head of 128 channels."""
        return self.head_dim // 8, self.head_dim * 3 // 16, self.head_dim * 3 // 16


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """A Qwen2-VL.

    Attributes:
      text: sizes of the language model.
      vision: sizes of the vision tower.
      image_token: id of the pad token that an image's visual tokens stand for.
      video_token: the same of a video.
      dtype: of weights and products.
    """

    text: TextConfig
    vision: VisionConfig = VisionConfig()
    image_token: int = 151655
    video_token: int = 151656
    dtype: str = "bfloat16"


# What HPSv3 (7B) and VideoAlign (2B) are built on; their vocabularies are replaced by those of the checkpoints.
QWEN2_VL_2B = Qwen2VLConfig(TextConfig(vocab=151936, dim=1536, heads=12, kv_heads=2, ffn_dim=8960, layers=28))
QWEN2_VL_7B = Qwen2VLConfig(TextConfig(vocab=152064, dim=3584, heads=28, kv_heads=4, ffn_dim=18944, layers=28))


def config_from_dict(values: Mapping[str, Any]) -> Qwen2VLConfig:
    """The inverse of `dataclasses.asdict`: the config that a converted file notes."""
    parts = {"text": TextConfig(**values["text"]), "vision": VisionConfig(**values["vision"])}
    return Qwen2VLConfig(**{**values, **parts})


# ---------------------------------------------------------------- rotary embeddings


def _frequencies(count: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(count, dtype=np.float64) / count)


def vision_rope(cfg: VisionConfig, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32[h * w, head_dim / 2], of the patches of a slab: its rows' angles, then its columns'."""
    _, h, w = grid
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    place = einops.rearrange(place, "(y i) (x j) yx -> (y x i j) yx 1", i=cfg.merge, j=cfg.merge)
    angle = (place * _frequencies(cfg.head_dim // 4, cfg.rope_theta)).reshape(h * w, -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def text_rope(cfg: TextConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin, float32[n, K, head_dim / 2], of tokens at positions [n, K], or [3, n, K] for M-RoPE."""
    axis = np.repeat(np.arange(3), cfg.mrope_section)
    turning = jnp.broadcast_to(positions, (3, *positions.shape[-2:]))[axis]
    frequency = _frequencies(cfg.head_dim // 2, cfg.rope_theta).astype(np.float32)
    angle = jnp.moveaxis(turning, 0, -1).astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the channel pairs (i, i + D / 2) of x float[n, tokens, H, D] by tables [..., tokens, D / 2], in float32."""
    first, second = jnp.split(wide(x), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def mrope_positions(cfg: Qwen2VLConfig, ids: Array, grid: Grid) -> Array:
    """Qwen2-VL's own positions, int32[3, n, K]: t, h and w of every token (HPSv3 and VideoAlign do without them).

    Text counts equally on all three axes, visual tokens by their place in the grid from where the text before them
    ended, and the text after them from one past the largest of theirs.

    Args:
      cfg: of the model.
      ids: int[n, K]; the pad tokens of a row's clip follow each other.
      grid: of every clip.
    """
    t, h, w = grid
    merged = (t, h // cfg.vision.merge, w // cfg.vision.merge)
    slot, count = _is_visual(cfg, ids), cfg.vision.tokens(grid)
    place, start = jnp.arange(ids.shape[1]), jnp.argmax(slot, axis=1)[:, None]
    in_grid = jnp.stack(jnp.unravel_index(jnp.clip(place - start, 0, count - 1), merged))
    text = place - jnp.where(place < start, 0, count - max(merged))
    return jnp.where(slot, start + in_grid, text).astype(jnp.int32)


# ---------------------------------------------------------------- network


def _linear(cfg: Qwen2VLConfig, features: int, name: str, use_bias: bool = True) -> nn.Dense:
    dtype = jnp.dtype(cfg.dtype)
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, param_dtype=dtype, name=name)


def _vision_norm(cfg: Qwen2VLConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=cfg.vision.eps, use_fast_variance=False, dtype=jnp.float32, name=name)


class VisionBlock(nn.Module):
    """Self-attention over the patches of a slab, and an MLP."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array]) -> tuple[Array, None]:
        """x float[slabs, patches, dim], rope of `vision_rope`."""
        cfg, vision = self.cfg, self.cfg.vision
        y = _linear(cfg, 3 * vision.dim, "qkv")(_vision_norm(cfg, "norm1")(x))
        q, k, v = einops.rearrange(y, "b p (three h d) -> three b p h d", three=3, h=vision.heads)
        y = jax.nn.dot_product_attention(rotate(q, *rope), rotate(k, *rope), v)
        x = x + _linear(cfg, vision.dim, "proj")(einops.rearrange(y, "b p h d -> b p (h d)"))

        y = _linear(cfg, vision.ffn_dim, "fc1")(_vision_norm(cfg, "norm2")(x))
        return x + _linear(cfg, vision.dim, "fc2")(y * nn.sigmoid(1.702 * y)), None


class VisionTower(nn.Module):
    """Patches to visual tokens. No slab sees another one: frames meet in the language model."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, patches: Array, grid: Grid) -> Array:
        """float[n, t*h*w, patch_dim] -> float[n, tokens, dim of the text]."""
        cfg, vision = self.cfg, self.cfg.vision
        t, h, w = grid
        if h % vision.merge or w % vision.merge:
            raise ValueError(f"a grid of {h} x {w} patches is not made of squares of {vision.merge} x {vision.merge}")
        chex.assert_shape(patches, (None, t * h * w, vision.patch_dim))
        x = _linear(cfg, vision.dim, "patch_embed", use_bias=False)(patches)
        x = einops.rearrange(x, "n (t p) d -> (n t) p d", t=t)
        over_layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": vision.layers}
        x, _ = nn.scan(VisionBlock, **over_layers, in_axes=nn.broadcast)(cfg, name="blocks")(
            x, vision_rope(vision, grid)
        )

        x = _vision_norm(cfg, "merger_norm")(x)
        x = einops.rearrange(x, "(n t) (m square) d -> n (t m) (square d)", t=t, square=vision.merge**2)
        x = nn.gelu(_linear(cfg, x.shape[-1], "merger_fc1")(x), approximate=False)
        return _linear(cfg, cfg.text.dim, "merger_fc2")(x)


class TextLayer(nn.Module):
    """Causal self-attention with grouped queries, and a gated MLP."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], lengths: Array) -> tuple[Array, None]:
        """x float[n, K, dim], rope of `text_rope`, lengths int32[n]."""
        cfg, text = self.cfg, self.cfg.text
        y = RMSNorm(text.eps, name="norm1")(x)
        q, k, v = (
            einops.rearrange(_linear(cfg, heads * text.head_dim, name)(y), "n k (h d) -> n k h d", h=heads)
            for name, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads))
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        # No token sees the padding on its right anyway; the lengths hide it from the padding itself.
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
        x = x + _linear(cfg, text.dim, "o", use_bias=False)(einops.rearrange(y, "n k h d -> n k (h d)"))

        y = RMSNorm(text.eps, name="norm2")(x)
        gate, up = (_linear(cfg, text.ffn_dim, name, use_bias=False)(y) for name in ("gate", "up"))
        return x + _linear(cfg, text.dim, "down", use_bias=False)(nn.silu(gate) * up), None


class Qwen2VL(nn.Module):
    """The model at any size."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, ids: Array, lengths: Array, patches: Array, grid: Grid, positions: Array | None = None) -> Array:
        """Token ids and clips to hidden states.

        Args:
          ids: int32[n, K], padded on the right; every row has as many pad tokens of images and videos as its clip has
            visual tokens, which replace them in their order. A row with another number comes out as NaN.
          lengths: int32[n], tokens that are no padding.
          patches: float[n, t*h*w, patch_dim], normalised pixels.
          grid: (t, h, w) of every clip of the call.
          positions: int32[n, K], or [3, n, K] for M-RoPE; None is 0 .. K - 1, as the reward models have it.

        Returns:
          float[n, K, dim] after the final norm; what stands at padding means nothing.
        """
        cfg, text = self.cfg, self.cfg.text
        n, width = ids.shape
        chex.assert_shape(lengths, (n,))
        positions = jnp.broadcast_to(jnp.arange(width), (n, width)) if positions is None else positions
        chex.assert_shape(positions, (3, n, width) if positions.ndim == 3 else (n, width))

        dtype = jnp.dtype(cfg.dtype)
        x = nn.Embed(text.vocab, text.dim, dtype=dtype, param_dtype=dtype, name="embed_tokens")(ids)
        x = _with_visual(x, VisionTower(cfg, name="visual")(patches, grid), _is_visual(cfg, ids))
        over_layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": text.layers}
        layers = nn.scan(TextLayer, **over_layers, in_axes=nn.broadcast)(cfg, name="layers")
        x, _ = layers(x, text_rope(text, positions), lengths)
        return RMSNorm(text.eps, name="norm")(x)


def _is_visual(cfg: Qwen2VLConfig, ids: Array) -> Array:
    return (ids == cfg.image_token) | (ids == cfg.video_token)


def _with_visual(x: Array, visual: Array, slot: Array) -> Array:
    """x float[n, K, dim] with visual float[n, tokens, dim] where slot bool[n, K] is, NaN where their numbers differ."""
    fits = slot.sum(axis=1) == visual.shape[1]
    visual = jnp.where(fits[:, None, None], visual, jnp.nan)
    order = jnp.clip(jnp.cumsum(slot, axis=1) - 1, 0, visual.shape[1] - 1)
    return jnp.where(slot[..., None], jnp.take_along_axis(visual, order[..., None], axis=1), x)


def abstract_params(cfg: Qwen2VLConfig) -> PyTree:
    """Shapes and dtypes of the collection `params`: what `checkpoint.load_weights` loads a file like."""
    grid = (1, cfg.vision.merge, cfg.vision.merge)
    patches = jnp.zeros((1, cfg.vision.merge**2, cfg.vision.patch_dim))
    ids, lengths = jnp.full((1, 1), cfg.image_token, jnp.int32), jnp.ones(1, jnp.int32)
    return jax.eval_shape(lambda: Qwen2VL(cfg).init(jax.random.key(0), ids, lengths, patches, grid))["params"]


# ---------------------------------------------------------------- hidden states of some tokens


@struct.dataclass
class Tokens:
    """Tokenized texts, cut after the last token whose hidden state is asked for.

    Attributes:
      ids: int32[n, K], padded on the right.
      lengths: int32[n].
      at: int32[n, wanted], places of the tokens that are asked for.
    """

    ids: Array
    lengths: Array
    at: Array


def cut_after(texts: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tokens:
    """Token ids without what follows the last of the `wanted` ones, which no earlier hidden state depends on.

    Widths are multiples of LENGTH_STEP, so that there are few shapes to compile.

    Args:
      texts: the token ids of each text.
      wanted: special tokens, each of which is in every text once.

    Raises:
      ValueError: a text has one of them more or less often; names both.
    """
    at = np.zeros((len(texts), len(wanted)), np.int32)
    for row, text in enumerate(texts):
        for column, token in enumerate(wanted):
            places = np.flatnonzero(np.asarray(text) == token)
            if len(places) != 1:
                raise ValueError(f"text {row} has the token {token} {len(places)} times, expected once")
            at[row, column] = places[0]
    lengths = at.max(axis=1) + 1
    ids = np.zeros((len(texts), -(-lengths.max() // LENGTH_STEP) * LENGTH_STEP), np.int32)
    for row, text, length in zip(ids, texts, lengths, strict=True):
        row[:length] = text[:length]
    return Tokens(ids=ids, lengths=lengths, at=at)


def hidden_at(cfg: Qwen2VLConfig, params: PyTree, tokens: Tokens, patches: Array, grid: Grid) -> Array:
    """What a reward head reads: float[n, wanted, dim], the hidden states of the tokens asked for, 1-D positions."""
    hidden = Qwen2VL(cfg).apply({"params": params}, tokens.ids, tokens.lengths, patches, grid)
    return jnp.take_along_axis(hidden, tokens.at[..., None], axis=1)
