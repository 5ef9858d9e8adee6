"""Vision transformers, pure functions of pixels: CLIP with its text tower, DINO, LAION's head.

    features = image_features(cfg, params, pixels)       # float32[n, width], of length 1
    features = text_features(cfg, params, ids, ends)     # CLIP's, of the same width

All are made of the same pre-norm blocks. CLIP has a norm behind its embeddings and projects both
towers to one width; DINOv2 scales what a block adds. Norms are computed in float32, products in the
config's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from kvpo_jax.models.layers import over_layers
from kvpo_jax.models.resample import nearby, resized
from kvpo_jax.types import Array, PyTree


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation of GELU: x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact GELU."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of blocks.

    Attributes:
      dim: width.
      ffn_dim: width of the MLP.
      heads: attention heads.
      layers: blocks.
      activation: of the MLP, a name in ACTIVATIONS.
      eps: epsilon of the LayerNorms.
      layer_scale: whether what a block adds is scaled channel by channel (DINOv2).
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    activation: str = "gelu"
    eps: float = 1e-6
    layer_scale: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(StackConfig):
    """Sizes of an image tower.

    Attributes:
      patch: pixels along a patch's side.
      side: patches along the side of the square that the tower has positions for.
      projection: width that the class token is projected to; 0 is no projection.
      pre_norm: whether a norm follows the embeddings, and the patches have no bias (CLIP).
      offset: what the authors of DINO add to the patches of a side where they interpolate
        positions, so that rounding loses none; transformers adds 0.
    """

    patch: int
    side: int
    projection: int = 0
    pre_norm: bool = False
    offset: float = 0.1

    @property
    def pixels(self) -> int:
        """Pixels along the side of the square that the tower has positions for."""
        return self.side * self.patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(StackConfig):
    """Sizes of CLIP's text tower.

    Attributes:
      vocab: rows of the token embedding.
      context: tokens that it has positions for.
      projection: width that the last token is projected to.
    """

    vocab: int
    context: int
    projection: int


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """An image tower: DINO or DINOv2.

    Attributes:
      vision: its sizes.
      dtype: dtype of weights and products.
    """

    vision: VisionConfig
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(ViTConfig):
    """A CLIP.

    Attributes:
      text: sizes of its text tower.
    """

    text: TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AestheticConfig(ViTConfig):
    """CLIP's image tower with LAION's head.

    Attributes:
      head: widths of the head's Linears; nothing is between them.
    """

    head: tuple[int, ...]


# The published models that the papers' metrics are made of.
CLIP_B32 = CLIPConfig(
    VisionConfig(
        768, 3072, 12, 12, "quick_gelu", 1e-5, patch=32, side=7, projection=512, pre_norm=True
    ),
    text=TextConfig(512, 2048, 8, 12, "quick_gelu", 1e-5, vocab=49408, context=77, projection=512),
)
AESTHETIC_L14 = AestheticConfig(
    VisionConfig(
        1024, 4096, 16, 24, "quick_gelu", 1e-5, patch=14, side=16, projection=768, pre_norm=True
    ),
    head=(1,),
)
DINO_B16 = ViTConfig(VisionConfig(768, 3072, 12, 12, patch=16, side=14))


# ---------------------------------------------------------------- networks


def _linear(features: int, dtype: str, name: str, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(
        features, use_bias=use_bias, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), name=name
    )


def _norm(cfg: StackConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=cfg.eps, use_fast_variance=False, dtype=jnp.float32, name=name)


class Block(nn.Module):
    """Self-attention and an MLP, each behind a norm."""

    cfg: StackConfig
    dtype: str
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        """float[n, K, dim] -> float[n, K, dim]."""
        cfg = self.cfg
        y = _norm(cfg, "norm1")(x)
        q, k, v = (
            einops.rearrange(
                _linear(cfg.dim, self.dtype, name)(y), "n k (h d) -> n k h d", h=cfg.heads
            )
            for name in ("q", "k", "v")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        y = _linear(cfg.dim, self.dtype, "o")(einops.rearrange(y, "n k h d -> n k (h d)"))
        x = x + self._scaled(y, "scale1")

        y = _linear(cfg.ffn_dim, self.dtype, "fc1")(_norm(cfg, "norm2")(x))
        y = _linear(cfg.dim, self.dtype, "fc2")(ACTIVATIONS[cfg.activation](y))
        return x + self._scaled(y, "scale2"), None

    def _scaled(self, y: Array, name: str) -> Array:
        if not self.cfg.layer_scale:
            return y
        scale = self.param(name, nn.initializers.ones, (self.cfg.dim,), jnp.dtype(self.dtype))
        return y * scale


class ImageTower(nn.Module):
    """Normalised pixels to the embedding of a picture."""

    cfg: VisionConfig
    dtype: str

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """float[n, h, w, 3] -> float[n, projection or dim], of the class token.

        Pixels that fill no patch, on the right and below, are left out.
        """
        cfg, p = self.cfg, self.cfg.patch
        chex.assert_shape(pixels, (None, None, None, 3))
        height, width = pixels.shape[1:3]
        rows, columns = height // p, width // p
        patches = einops.rearrange(
            pixels[:, : rows * p, : columns * p], "n (y i) (x j) c -> n (y x) (c i j)", i=p, j=p
        )
        x = _linear(cfg.dim, self.dtype, "patch_embed", use_bias=not cfg.pre_norm)(patches)
        normal = nn.initializers.normal(0.02)
        cls = self.param("class_token", normal, (cfg.dim,), jnp.float32)
        positions = self.param("positions", normal, (cfg.side**2 + 1, cfg.dim), jnp.float32)
        if (height, width) != (cfg.pixels, cfg.pixels):
            positions = interpolated(cfg, positions, rows, columns)
        cls = jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, cfg.dim))
        x = jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)
        if cfg.pre_norm:
            x = _norm(cfg, "pre_norm")(x).astype(x.dtype)
        x, _ = over_layers(Block, cfg.layers)(cfg, self.dtype, name="blocks")(x)
        x = _norm(cfg, "norm")(x[:, 0])
        return _linear(cfg.projection, self.dtype, "projection", False)(x) if cfg.projection else x


def interpolated(cfg: VisionConfig, positions: Array, rows: int, columns: int) -> Array:
    """Positions float[1 + side^2, dim] for another grid of patches, float[1 + rows * columns, dim].

    They are resampled by a bicubic, as DINO's authors do it (see `VisionConfig.offset`); that of
    the class token stays.
    """
    square = positions[1:].reshape(cfg.side, cfg.side, -1)
    across, down = (
        nearby(cfg.side, out, scale=cfg.side / (out + cfg.offset)) for out in (columns, rows)
    )
    return jnp.concatenate([positions[:1], resized(square, across, down).reshape(-1, cfg.dim)])


class TextTower(nn.Module):
    """Token ids to the embedding of a text (CLIP)."""

    cfg: TextConfig
    dtype: str

    @nn.compact
    def __call__(self, ids: Array, ends: Array) -> Array:
        """int32[n, K], and int32[n], where each text ends -> float[n, projection].

        A token does not see those behind it, so that what pads a text does not matter.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.dtype)
        chex.assert_shape(ids, (len(ends), None))
        tokens = nn.Embed(cfg.vocab, cfg.dim, dtype=dtype, param_dtype=dtype, name="tokens")
        normal = nn.initializers.normal(0.01)
        positions = self.param("positions", normal, (cfg.context, cfg.dim), jnp.float32)
        x = tokens(ids) + positions[: ids.shape[1]].astype(dtype)
        x, _ = over_layers(Block, cfg.layers)(cfg, self.dtype, causal=True, name="blocks")(x)
        x = _norm(cfg, "norm")(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])
        return _linear(cfg.projection, self.dtype, "projection", use_bias=False)(x)


class LinearHead(nn.Module):
    """Linears with nothing between them, in float32: LAION's head."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float32[n, width] -> float32[n, last width]."""
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"fc{i + 1}")(x)
        return x


# ---------------------------------------------------------------- features


def _of_length_one(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def image_features(cfg: ViTConfig, params: PyTree, pixels: Array) -> Array:
    """The embeddings of normalised pictures float[n, h, w, 3], float32[n, width] of length 1."""
    tower = ImageTower(cfg.vision, cfg.dtype)
    out: Any = tower.apply({"params": params["vision"]}, pixels)
    return _of_length_one(out)


def text_features(cfg: CLIPConfig, params: PyTree, ids: Array, ends: Array) -> Array:
    """The embeddings of texts, float32[n, width] of length 1; see `TextTower`."""
    out: Any = TextTower(cfg.text, cfg.dtype).apply({"params": params["text"]}, ids, ends)
    return _of_length_one(out)


def aesthetic_scores(cfg: AestheticConfig, params: PyTree, pixels: Array) -> Array:
    """LAION's score of normalised pictures float[n, h, w, 3], about 0 to 10, float32[n, 1]."""
    features = image_features(cfg, params, pixels)
    out: Any = LinearHead(cfg.head).apply({"params": params["head"]}, features)
    return out


def abstract_params(cfg: ViTConfig) -> PyTree:
    """Shapes and dtypes of the weights, as `checkpoint.load_weights` needs them."""

    def shapes(network: nn.Module, *inputs: Array) -> PyTree:
        return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]

    vision, side = cfg.vision, cfg.vision.pixels
    out = {"vision": shapes(ImageTower(vision, cfg.dtype), jnp.zeros((1, side, side, 3)))}
    if isinstance(cfg, CLIPConfig):
        ids = jnp.zeros((1, 1), jnp.int32)
        out["text"] = shapes(TextTower(cfg.text, cfg.dtype), ids, ids[0])
    if isinstance(cfg, AestheticConfig):
        features = jnp.zeros((1, vision.projection))
        out["head"] = shapes(LinearHead(cfg.head), features)
    return out
