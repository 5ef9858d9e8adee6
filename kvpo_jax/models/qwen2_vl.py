"""Qwen2-VL without its language head, a pure function of token ids and of one clip per row.

    hidden = Qwen2VL(cfg).apply({"params": params}, ids, lengths, patches, grid)  # float[n, K, dim]

The heads of HPSv3 and VideoAlign read these hidden states, which come after the final norm, at
their reward tokens. Like these two, the model leaves M-RoPE out: a token's position is its index.
Norms, softmax and rotary embeddings are computed in float32, products in the config's dtype.

A clip is an image or a video. Its grid (t, h, w), upstream's `grid_thw`, counts slabs of
`temporal_patch` frames (an image is one frame, repeated), and rows and columns of patches. Patches
are ordered by slab and, within a slab, by merge x merge squares, as upstream's processor writes
them: every merge^2 rows become one visual token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from kvpo_jax.errors import UsageError
from kvpo_jax.models.layers import RMSNorm, over_layers, padded_length, wide
from kvpo_jax.types import Array, PyTree

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; the defaults are those of every published Qwen2-VL.

    Attributes:
      dim: width.
      ffn_dim: width of the MLP.
      heads: attention heads. Their width is a multiple of 4: one half of it is rotated by the row,
        the other by the column.
      layers: transformer blocks.
      channels: channels of a frame.
      temporal_patch: frames of a patch.
      patch: pixels along a patch's side.
      merge: patches along a side of the square that becomes one visual token.
      eps: epsilon of the LayerNorms.
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
        """Channels of a head."""
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
      vocab: rows of the token embedding; reward models add some.
      dim: width.
      heads: heads of the queries.
      kv_heads: heads of the keys and values.
      ffn_dim: width of the gated MLP.
      layers: transformer layers.
      eps: epsilon of the RMS norms.
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
        """Channels of a head."""
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """A Qwen2-VL.

    Attributes:
      text: sizes of the language model.
      vision: sizes of the vision tower.
      image_token: id of the pad token that an image's visual tokens replace.
      video_token: id of the pad token that a video's visual tokens replace.
      dtype: dtype of weights and products.
    """

    text: TextConfig
    vision: VisionConfig = VisionConfig()
    image_token: int = 151655
    video_token: int = 151656
    dtype: str = "bfloat16"


# HPSv3 is built on 7B, VideoAlign on 2B; the vocabulary of a checkpoint replaces the one here.
QWEN2_VL_2B = Qwen2VLConfig(
    TextConfig(vocab=151936, dim=1536, heads=12, kv_heads=2, ffn_dim=8960, layers=28)
)
QWEN2_VL_7B = Qwen2VLConfig(
    TextConfig(vocab=152064, dim=3584, heads=28, kv_heads=4, ffn_dim=18944, layers=28)
)


# ---------------------------------------------------------------- rotary embeddings


def _frequencies(count: int, theta: float) -> np.ndarray:
    """Rotary frequencies from 1 down to about 1 / theta, float64[count]."""
    return theta ** (-np.arange(count, dtype=np.float64) / count)


def vision_rope(cfg: VisionConfig, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32[h * w, head_dim / 2], of the patches of a slab.

    The first half of the angles belongs to a patch's row, the second to its column.
    """
    _, h, w = grid
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    place = einops.rearrange(place, "(y i) (x j) yx -> (y x i j) yx 1", i=cfg.merge, j=cfg.merge)
    angle = (place * _frequencies(cfg.head_dim // 4, cfg.rope_theta)).reshape(h * w, -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def text_rope(cfg: TextConfig, tokens: int) -> tuple[Array, Array]:
    """cos and sin, float32[K, head_dim / 2], of K tokens."""
    frequency = _frequencies(cfg.head_dim // 2, cfg.rope_theta).astype(np.float32)
    angle = jnp.arange(tokens)[:, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: ArrayLike, sin: ArrayLike) -> Array:
    """Turns the channel pairs (i, i + D / 2) of x by the tables, in float32.

    x is float[n, K, H, D], the tables are float32[K, D / 2].
    """
    chex.assert_shape([cos, sin], (x.shape[1], x.shape[3] // 2))
    first, second = jnp.split(wide(x), 2, axis=-1)
    cos, sin = (jnp.asarray(table)[:, None, :] for table in (cos, sin))
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


# ---------------------------------------------------------------- network


def _linear(cfg: Qwen2VLConfig, features: int, name: str, use_bias: bool = True) -> nn.Dense:
    dtype = jnp.dtype(cfg.dtype)
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, param_dtype=dtype, name=name)


def _vision_norm(cfg: Qwen2VLConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=cfg.vision.eps, use_fast_variance=False, dtype=jnp.float32, name=name
    )


class VisionBlock(nn.Module):
    """Self-attention over the patches of a slab, and an MLP."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[ArrayLike, ArrayLike]) -> tuple[Array, None]:
        """x is float[slabs, patches, dim], rope what `vision_rope` returns."""
        cfg, vision = self.cfg, self.cfg.vision
        y = _linear(cfg, 3 * vision.dim, "qkv")(_vision_norm(cfg, "norm1")(x))
        q, k, v = einops.rearrange(y, "b p (three h d) -> three b p h d", three=3, h=vision.heads)
        y = jax.nn.dot_product_attention(rotate(q, *rope), rotate(k, *rope), v)
        x = x + _linear(cfg, vision.dim, "proj")(einops.rearrange(y, "b p h d -> b p (h d)"))

        y = _linear(cfg, vision.ffn_dim, "fc1")(_vision_norm(cfg, "norm2")(x))
        return x + _linear(cfg, vision.dim, "fc2")(y * nn.sigmoid(1.702 * y)), None


class VisionTower(nn.Module):
    """Patches to visual tokens, slab by slab: frames meet in the language model only."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, patches: Array, grid: Grid) -> Array:
        """float[n, t*h*w, patch_dim] -> float[n, visual tokens, dim of the language model]."""
        cfg, vision = self.cfg, self.cfg.vision
        t, h, w = grid
        if h % vision.merge or w % vision.merge:
            raise UsageError(
                f"a grid of {h} x {w} patches is not made of squares of {vision.merge} x"
                f" {vision.merge}"
            )
        chex.assert_shape(patches, (None, t * h * w, vision.patch_dim))
        x = _linear(cfg, vision.dim, "patch_embed", use_bias=False)(patches)
        x = einops.rearrange(x, "n (t p) d -> (n t) p d", t=t)
        blocks = over_layers(VisionBlock, vision.layers)(cfg, name="blocks")
        x, _ = blocks(x, vision_rope(vision, grid))

        x = _vision_norm(cfg, "merger_norm")(x)
        square = vision.merge**2
        x = einops.rearrange(x, "(n t) (m square) d -> n (t m) (square d)", t=t, square=square)
        x = nn.gelu(_linear(cfg, x.shape[-1], "merger_fc1")(x), approximate=False)
        return _linear(cfg, cfg.text.dim, "merger_fc2")(x)


class TextLayer(nn.Module):
    """Causal self-attention with grouped queries, and a gated MLP."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], lengths: Array) -> tuple[Array, None]:
        """x is float[n, K, dim], rope what `text_rope` returns, lengths int32[n]."""
        cfg, text = self.cfg, self.cfg.text
        y = RMSNorm(text.eps, name="norm1")(x)

        def split_heads(name: str, heads: int) -> Array:
            z = _linear(cfg, heads * text.head_dim, name)(y)
            return einops.rearrange(z, "n k (h d) -> n k h d", h=heads)

        q, k = split_heads("q", text.heads), split_heads("k", text.kv_heads)
        v = split_heads("v", text.kv_heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        # Causality hides the padding, which is on the right, from all tokens; the lengths hide it
        # from itself.
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
        y = einops.rearrange(y, "n k h d -> n k (h d)")
        x = x + _linear(cfg, text.dim, "o", use_bias=False)(y)

        y = RMSNorm(text.eps, name="norm2")(x)
        gate, up = (_linear(cfg, text.ffn_dim, name, use_bias=False)(y) for name in ("gate", "up"))
        return x + _linear(cfg, text.dim, "down", use_bias=False)(nn.silu(gate) * up), None


class Qwen2VL(nn.Module):
    """The model at any size."""

    cfg: Qwen2VLConfig

    @nn.compact
    def __call__(self, ids: Array, lengths: Array, patches: Array, grid: Grid) -> Array:
        """Token ids and clips to hidden states.

        Args:
          ids: int32[n, K], padded on the right. A row has as many pad tokens of images and videos
            as its clip has visual tokens, which replace them in order; a row with another number
            comes out as NaN.
          lengths: int32[n], tokens that are not padding.
          patches: float[n, t*h*w, patch_dim], normalised pixels.
          grid: (t, h, w), the same for all clips.

        Returns:
          float[n, K, dim] after the final norm; the values at padding mean nothing.
        """
        cfg, text = self.cfg, self.cfg.text
        chex.assert_rank(ids, 2)
        chex.assert_shape(lengths, (ids.shape[0],))

        dtype = jnp.dtype(cfg.dtype)
        tokens = nn.Embed(text.vocab, text.dim, dtype=dtype, param_dtype=dtype, name="embed_tokens")
        visual = VisionTower(cfg, name="visual")(patches, grid)
        is_visual = (ids == cfg.image_token) | (ids == cfg.video_token)
        x = _with_visual(tokens(ids), visual, is_visual)
        layers = over_layers(TextLayer, text.layers)(cfg, name="layers")
        x, _ = layers(x, text_rope(text, ids.shape[1]), lengths)
        return RMSNorm(text.eps, name="norm")(x)


def _with_visual(x: Array, visual: Array, is_visual: Array) -> Array:
    """x with the visual tokens in the places bool[n, K] that are theirs.

    Args:
      x: float[n, K, dim].
      visual: float[n, tokens, dim]; NaN replaces a row's if its places are not as many.
      is_visual: bool[n, K].
    """
    fits = is_visual.sum(axis=1) == visual.shape[1]
    visual = jnp.where(fits[:, None, None], visual, jnp.nan)
    order = jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, visual.shape[1] - 1)
    visual = jnp.take_along_axis(visual, order[..., None], axis=1)
    return jnp.where(is_visual[..., None], visual, x)


def abstract_params(cfg: Qwen2VLConfig) -> PyTree:
    """Shapes and dtypes of the collection `params`, as `checkpoint.load_weights` needs them."""
    grid = (1, cfg.vision.merge, cfg.vision.merge)
    patches = jnp.zeros((1, cfg.vision.merge**2, cfg.vision.patch_dim))
    ids, lengths = jnp.full((1, 1), cfg.image_token, jnp.int32), jnp.ones(1, jnp.int32)
    init = partial(Qwen2VL(cfg).init, grid=grid)
    return jax.eval_shape(init, jax.random.key(0), ids, lengths, patches)["params"]


# ---------------------------------------------------------------- hidden states of some tokens


@struct.dataclass
class Tokens:
    """Token ids of n texts, each cut after the last of its wanted tokens.

    Attributes:
      ids: int32[n, K], padded on the right.
      lengths: int32[n].
      at: int32[n, wanted], the places of the wanted tokens.
    """

    ids: Array | np.ndarray
    lengths: Array | np.ndarray
    at: Array | np.ndarray


def cut_after(texts: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tokens:
    """Cuts each text after the last of its wanted tokens.

    No earlier hidden state depends on what is cut off. K is a `padded_length`.

    Args:
      texts: the token ids of each text.
      wanted: special tokens; every text has each of them once.

    Raises:
      UsageError: a text has a wanted token twice or not at all; names both.
    """
    at = np.zeros((len(texts), len(wanted)), np.int32)
    for i, text in enumerate(texts):
        for j, token in enumerate(wanted):
            places = np.flatnonzero(np.asarray(text) == token)
            if len(places) != 1:
                raise UsageError(
                    f"text {i} has the token {token} {len(places)} times, expected once"
                )
            at[i, j] = places[0]
    lengths = at.max(axis=1) + 1
    ids = np.zeros((len(texts), padded_length(lengths.max())), np.int32)
    for row, text, length in zip(ids, texts, lengths, strict=True):
        row[:length] = text[:length]
    return Tokens(ids=ids, lengths=lengths, at=at)


def hidden_at(
    cfg: Qwen2VLConfig, params: PyTree, tokens: Tokens, patches: Array, grid: Grid
) -> Array:
    """The hidden states of the wanted tokens, float[n, wanted, dim]: a reward head's input.

    Args:
      cfg: sizes.
      params: see `abstract_params`.
      tokens: n texts, see `cut_after`.
      patches: float[n, t*h*w, patch_dim], the normalised pixels of a clip per text.
      grid: (t, h, w), the same for all clips.
    """
    chex.assert_shape(tokens.at, (len(tokens.ids), None))
    hidden: Any = Qwen2VL(cfg).apply({"params": params}, tokens.ids, tokens.lengths, patches, grid)
    return jnp.take_along_axis(hidden, tokens.at[..., None], axis=1)
