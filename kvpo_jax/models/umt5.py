"""The UMT5 encoder, a pure function of token ids: its embeddings are Wan's text condition.

    embeddings = UMT5Encoder(cfg).apply({"params": params}, ids, mask)    # float[n, K, dim]

The arithmetic is upstream's: no biases in the Linears, no 1/sqrt(d) in the attention, a relative
position bias in every layer. Norms and softmax are computed in float32, products in the config's
dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.models.layers import RMSNorm, over_layers, padded_length
from kvpo_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of a UMT5 encoder; the defaults are UMT5-XXL, which encodes the prompts of Wan2.1.

    Attributes:
      vocab: rows of the token embedding.
      dim: width of the embeddings.
      heads: attention heads.
      head_dim: channels of a head; heads * head_dim need not be dim.
      ffn_dim: width of the gated MLP.
      layers: transformer blocks, each with a position bias of its own.
      buckets: buckets of relative positions, half of them for keys after the query.
      max_distance: keys that are this far away or farther share a bucket.
      eps: epsilon of the RMS norms.
      dtype: dtype of weights and products.
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
    """The bucket of each (query, key), int32[length, length].

    Near keys have a bucket per distance; the buckets of far ones grow with the distance.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half, exact = buckets // 2, buckets // 4
    # In float32 as upstream: at the bounds of buckets its rounding decides.
    octaves = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    octaves = octaves / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return (half * (offset > 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class Block(nn.Module):
    """Self-attention with a relative position bias, and a gated MLP."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, x: Array, bucket: Array, mask: Array) -> tuple[Array, None]:
        """One layer.

        Args:
          x: float[n, K, dim].
          bucket: int32[K, K], see `relative_buckets`.
          mask: bool[n, K], the keys that are attended to.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)

        y = RMSNorm(cfg.eps, name="norm1")(x)
        qkv = (linear(cfg.heads * cfg.head_dim, name)(y) for name in ("q", "k", "v"))
        q, k, v = (einops.rearrange(z, "n k (h d) -> n k h d", h=cfg.heads) for z in qkv)
        bias = nn.Embed(
            cfg.buckets, cfg.heads, dtype=jnp.float32, param_dtype=dtype, name="pos_embedding"
        )(bucket)
        bias = einops.rearrange(bias, "q k h -> 1 h q k")
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask[:, None, None, :], scale=1.0)
        x = x + linear(cfg.dim, "o")(einops.rearrange(y, "n k h d -> n k (h d)"))

        y = RMSNorm(cfg.eps, name="norm2")(x)
        gate = nn.gelu(linear(cfg.ffn_dim, "gate")(y), approximate=True)
        y = linear(cfg.ffn_dim, "fc1")(y) * gate
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
          float[n, K, dim]; the values at padding mean nothing, see `embed`.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        chex.assert_rank(ids, 2)
        chex.assert_equal_shape([ids, mask])
        tokens = nn.Embed(
            cfg.vocab, cfg.dim, dtype=dtype, param_dtype=dtype, name="token_embedding"
        )
        bucket = jnp.asarray(relative_buckets(ids.shape[1], cfg.buckets, cfg.max_distance))
        x, _ = over_layers(Block, cfg.layers)(cfg, name="blocks")(tokens(ids), bucket, mask)
        return RMSNorm(cfg.eps, name="norm")(x)


def abstract_params(cfg: UMT5Config) -> PyTree:
    """Shapes and dtypes of the collection `params`, as `checkpoint.load_weights` needs them."""
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(UMT5Encoder(cfg).init, jax.random.key(0), token, token == 0)["params"]


def embed(cfg: UMT5Config, params: PyTree, ids: Array, mask: Array) -> Array:
    """Wan's text condition, float[n, K, dim]: the encoder's output, zero past the prompt's end.

    Args:
      cfg: sizes.
      params: see `abstract_params`.
      ids: int32[n, K].
      mask: bool[n, K], True up to a prompt's end.
    """
    out: Any = UMT5Encoder(cfg).apply({"params": params}, ids, mask)
    return jnp.where(mask[..., None], out, 0)


def embed_valid(
    network: Callable[[np.ndarray, np.ndarray], Array],
    ids: np.ndarray,
    mask: np.ndarray,
    batch: int,
) -> Iterator[np.ndarray]:
    """The embeddings of prompts, one after another, without their padding.

    All batches have one size and few lengths (`padded_length`), so that there are few shapes to
    compile and little padding to compute. This changes no embedding by more than rounding.

    Args:
      network: (ids, mask) -> float[n, K, dim], `embed` with its weights bound.
      ids: int32[n, K].
      mask: bool[n, K], True up to a prompt's end.
      batch: prompts per call of the network.

    Yields:
      float[tokens, dim] of each prompt.
    """
    chex.assert_rank(ids, 2)
    chex.assert_equal_shape([ids, mask])
    for start in range(0, len(ids), batch):
        lengths = mask[start : start + batch].sum(axis=1)
        width = min(padded_length(lengths.max()), ids.shape[1])
        fill = ((0, batch - len(lengths)), (0, 0))
        some_ids, some_mask = (np.pad(x[start : start + batch, :width], fill) for x in (ids, mask))
        embeddings = np.asarray(network(some_ids, some_mask))
        for embedding, length in zip(embeddings, lengths, strict=False):  # without the fill
            yield embedding[:length]
