"""The UMT5 encoder, whose token embeddings are Wan's text condition, as a pure function of token ids.

`UMT5Encoder(cfg).apply({"params": params}, ids, mask) -> float[n, K, dim]`. Arithmetic as upstream: no biases in the
Linears, no 1/sqrt(d) in the attention, a relative position bias in every layer. Norms and softmax are computed in
float32, products in the config's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.models.layers import RMSNorm
from kvpo_jax.types import Array, PyTree

LENGTH_STEP = 64  # prompts are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of a UMT5 encoder; the defaults are UMT5-XXL, which Wan2.1 reads its prompts with.

    Attributes:
      vocab: rows of the token embedding.
      dim: width of the embeddings.
      heads: attention heads.
      head_dim: of each; heads * head_dim need not be dim.
      ffn_dim: of the gated MLP.
      layers: each has a position bias of its own.
      buckets: of relative positions, half of them for keys after the query.
      max_distance: from there on, all keys share a bucket.
      eps: of the RMS norms.
      dtype: of weights and products.
    """

    vocab: int = 256384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "bfloat16"


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32[length, length], the bucket of each (query, key): exact when near, then logarithmic in the distance."""
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half, exact = buckets // 2, buckets // 4
    # float32 as upstream, whose rounding decides at the bounds of buckets.
    octaves = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return (half * (offset > 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class Block(nn.Module):
    """Self-attention with a relative position bias, and a gated MLP."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, x: Array, bucket: Array, mask: Array) -> tuple[Array, None]:
        """x float[n, K, dim], bucket int32[K, K], mask bool[n, K] of the keys that are attended to."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        linear = lambda features, name: nn.Dense(features, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)

        y = RMSNorm(cfg.eps, name="norm1")(x)
        q, k, v = (
            einops.rearrange(linear(cfg.heads * cfg.head_dim, name)(y), "n k (h d) -> n k h d", h=cfg.heads)
            for name in ("q", "k", "v")
        )
        bias = nn.Embed(cfg.buckets, cfg.heads, dtype=jnp.float32, param_dtype=dtype, name="pos_embedding")(bucket)
        bias = einops.rearrange(bias, "q k h -> 1 h q k")
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask[:, None, None, :], scale=1.0)
        x = x + linear(cfg.dim, "o")(einops.rearrange(y, "n k h d -> n k (h d)"))

        y = RMSNorm(cfg.eps, name="norm2")(x)
        y = linear(cfg.ffn_dim, "fc1")(y) * nn.gelu(linear(cfg.ffn_dim, "gate")(y), approximate=True)
        return x + linear(cfg.dim, "fc2")(y), None


class UMT5Encoder(nn.Module):
    """The encoder at any size."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """Token ids to embeddings.

        Args:
          ids: int32[n, K].
          mask: bool[n, K], False for padding, which no token attends to.

        Returns:
          float[n, K, dim]; what stands at padding means nothing, see `embed`.
        """
        cfg = self.cfg
        chex.assert_equal_shape([ids, mask])
        dtype = jnp.dtype(cfg.dtype)
        x = nn.Embed(cfg.vocab, cfg.dim, dtype=dtype, param_dtype=dtype, name="token_embedding")(ids)
        bucket = jnp.asarray(relative_buckets(ids.shape[1], cfg.buckets, cfg.max_distance))
        over_layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": cfg.layers}
        blocks = nn.scan(Block, **over_layers, in_axes=nn.broadcast)(cfg, name="blocks")
        x, _ = blocks(x, bucket, mask)
        return RMSNorm(cfg.eps, name="norm")(x)


def abstract_params(cfg: UMT5Config) -> PyTree:
    """Shapes and dtypes of the collection `params`: what `checkpoint.load_weights` loads a file like."""
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(UMT5Encoder(cfg).init, jax.random.key(0), token, token == 0)["params"]


def embed(cfg: UMT5Config, params: PyTree, ids: Array, mask: Array) -> Array:
    """Wan's text condition, float[n, K, dim]: the encoder's output, zero past the prompt's end."""
    return jnp.where(mask[..., None], UMT5Encoder(cfg).apply({"params": params}, ids, mask), 0)


def embed_valid(
    network: Callable[[Array, Array], Array], ids: np.ndarray, mask: np.ndarray, batch: int
) -> Iterator[np.ndarray]:
    """The embeddings of prompts one by one, without their padding.

    Batches have one size and their lengths are multiples of LENGTH_STEP: few shapes to compile and little padding to
    compute, which changes no embedding by more than rounding.

    Args:
      network: (ids, mask) -> float[n, K, dim], `embed` of some weights.
      ids: int32[n, K].
      mask: bool[n, K], True up to a prompt's end.
      batch: prompts per call of the network.

    Yields:
      float[tokens, dim] of each prompt.
    """
    for start in range(0, len(ids), batch):
        lengths = mask[start : start + batch].sum(axis=1)
        width = min(-(-lengths.max() // LENGTH_STEP) * LENGTH_STEP, ids.shape[1])
        fill = ((0, batch - len(lengths)), (0, 0))
        rows = (np.pad(x[start : start + batch, :width], fill) for x in (ids, mask))
        yield from (x[:n] for x, n in zip(np.asarray(network(*rows)), lengths, strict=False))
