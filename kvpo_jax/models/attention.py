"""Eq. 4: softmax attention over a block and its past.

The past is never concatenated to the block: two products of logits share one softmax. It carries
no gradient, except where pretraining asks for one. Logits exist for a few (batch row, head) pairs
at a time. The backward pass computes them again from the queries, the keys and the log-sum-exp of
each query (FlashAttention, arXiv 2205.14135, with one head as its smallest tile). On NVIDIA GPUs
cuDNN does all of this, on one array of keys.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from kvpo_jax.errors import Registry
from kvpo_jax.types import Array

_MASKED = -1e30


class Keys(NamedTuple):
    """Some of the keys that queries attend to.

    Attributes:
      k: float[batch, K, H, D].
      v: float[batch, K, H, D].
      length: int32[batch], how many of the K are attended to, from the first on; None is all.
      mask: bool[batch, 1 or H, K], False where a key is left out; None is all.
    """

    k: Array
    v: Array
    length: Array | None = None
    mask: Array | None = None


def attention(
    q: Array,
    block: Keys,
    past: Keys | None = None,
    implementation: str = "auto",
    *,
    past_gradient: bool = False,
) -> Array:
    """Eq. 4: softmax(Q [K_sink; K_local; K_block]^T / sqrt(d)) [V_sink; V_local; V_block].

    `past` holds the sink and the local slots, `block` the block itself. Their order does not matter
    to a softmax. Gradients flow to `q` and to the keys and values of `block`, and with
    `past_gradient` to those of `past`.

    Args:
      q: float[batch, T, H, D].
      block: keys with a gradient; every batch row must attend to at least one of them or of `past`.
      past: any number of keys; None is the same as no keys.
      implementation: a name in IMPLEMENTATIONS. cuDNN takes half precision without masks only; what
        it does not take goes through tiles.
      past_gradient: whether the past carries a gradient too. Then all logits exist at once, which
        suits small models only.

    Returns:
      float[batch, T, H, D].
    """
    batch, _, heads, head_dim = q.shape
    parts: tuple[Keys, ...] = (block,)
    if past is not None and past.k.shape[1]:
        parts = (block, past if past_gradient else _without_gradient(past))
    for part in parts:
        chex.assert_shape([part.k, part.v], (batch, part.k.shape[1], heads, head_dim))
    if past_gradient:
        return _at_once(q, parts)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    masked = block.length is not None or any(part.mask is not None for part in parts)
    fused = IMPLEMENTATIONS[implementation]()
    return fused(q, *parts) if fused and half and not masked else _tiled(q, parts)


def _without_gradient(part: Keys) -> Keys:
    return part._replace(k=jax.lax.stop_gradient(part.k), v=jax.lax.stop_gradient(part.v))


def _softmax(q: Array, parts: tuple[Keys, ...]) -> tuple[Array, Array]:
    """Eq. 4 for R (batch row, head) pairs.

    Args:
      q: float[R, T, D].
      parts: keys as `_per_head` returns them; one softmax goes over all of them.

    Returns:
      float[R, T, D], and the log-sum-exp of each query's logits, float32[R, T, 1].
    """
    logits = [_logits(q, part) for part in parts]
    # The result does not depend on it, so that it needs no gradient.
    top = jax.lax.stop_gradient(
        jnp.stack([x.max(axis=-1, keepdims=True) for x in logits]).max(axis=0)
    )
    weights = [jnp.exp(x - top) for x in logits]
    total = _sum(w.sum(axis=-1, keepdims=True) for w in weights)
    out = _sum(
        _product("rqk,rkd->rqd", w.astype(q.dtype), part.v)
        for w, part in zip(weights, parts, strict=True)
    )
    return (out / total).astype(q.dtype), top + jnp.log(total)


def _logits(q: Array, part: Keys) -> Array:
    """Q K^T / sqrt(D), float32[R, T, K]; a key that is left out gets -1e30."""
    out = _product("rqd,rkd->rqk", q, part.k) * q.shape[-1] ** -0.5
    if part.length is not None:
        out = jnp.where(jnp.arange(out.shape[-1]) < part.length[:, None, None], out, _MASKED)
    return out if part.mask is None else jnp.where(part.mask[:, None], out, _MASKED)


def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum in the operands' type, summed in float32 at least."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _sum(terms: Iterable[Array]) -> Array:
    """The sum of at least one array (`sum` would start from an int)."""
    return functools.reduce(operator.add, terms)


# ---------------------------------------------------------------- cuDNN


def _joined(block: Keys, past: Keys | None) -> Keys:
    """All keys in one array.

    The past stands behind the block, so that its length cuts off what is not attended to.
    """
    if past is None:
        return block
    k = jnp.concatenate([block.k, past.k], axis=1)
    v = jnp.concatenate([block.v, past.v], axis=1)
    length = jnp.full(len(k), k.shape[1]) if past.length is None else block.k.shape[1] + past.length
    return Keys(k, v, length.astype(jnp.int32))


def _library(
    q: Array, block: Keys, past: Keys | None = None, *, implementation: Literal["cudnn", "xla"]
) -> Array:
    """Eq. 4 by JAX's own function, which takes no masks."""
    keys, batch = _joined(block, past), len(q)
    queries = None if past is None else jnp.full(batch, q.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        keys.k,
        keys.v,
        query_seq_lengths=queries,
        key_value_seq_lengths=keys.length,
        implementation=implementation,
    )


_cudnn = functools.partial(_library, implementation="cudnn")


def _as_cudnn(q: Array, block: Keys, past: Keys | None = None) -> Array:
    """Eq. 4 in tiles, with cuDNN's products: those of the gradients of all keys too.

    JAX traces cuDNN's only where its CUDA packages are; this is what a plan counts anywhere.
    """
    return _tiled(q, (_joined(block, past),))


# Eq. 4 of (q, block, past) without masks; None: in tiles.
Fused = Callable[..., Array] | None

# name -> what is used where it can be.
IMPLEMENTATIONS: Registry[Callable[[], Fused]] = Registry(
    "model.attention",
    {
        "auto": lambda: _cudnn if jax.default_backend() == "gpu" else None,
        "cudnn": lambda: _cudnn,
        "xla": lambda: None,
        "as_cudnn": lambda: _as_cudnn,
    },
)


def saves_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint` that keeps cuDNN's output and statistics.

    The tiles need none: their output and log-sum-exp are saved by the name "attention".
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


# ---------------------------------------------------------------- in tiles


def logits_at_once() -> int:
    """How many logits exist at once: 1 GiB of float32; on CPU 4 MiB per core, which fits its cache.

    A head is always processed whole, even if it has more.
    """
    if jax.default_backend() != "cpu":
        return 2**28
    # Not every system can say which cores this process may use.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cores * 2**20


def _in_tiles(tile: Callable[..., tuple], key_count: int, rows: tuple) -> tuple:
    """tile(*rows), for as many rows at a time as `logits_at_once` allows.

    Args:
      tile: arrays [n, ...] to arrays [n, ...], for any n.
      key_count: keys that a query attends to.
      rows: arguments of `tile`, a pytree of arrays [R, ...]; the first is float[R, queries, D].
    """
    count, queries = rows[0].shape[:2]
    most = max(1, logits_at_once() // (queries * key_count))
    size = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    if size == count:
        return tile(*rows)
    tiles = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
    out = jax.lax.map(lambda x: tile(*x), tiles)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


def _heads_as_rows(x: Array) -> Array:
    return rearrange(x, "b t h d -> (b h) t d")


def _per_head(part: Keys, heads: int) -> Keys:
    """The keys of (batch row, head) pairs.

    k and v become float[R, K, D], length int32[R] and mask bool[R, K].
    """
    mask, length = part.mask, part.length
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], heads, mask.shape[2]))
        mask = rearrange(mask, "b h k -> (b h) k")
    if length is not None:
        length = jnp.repeat(length, heads)
    return Keys(_heads_as_rows(part.k), _heads_as_rows(part.v), length, mask)


def _rows_of(q: Array, parts: tuple[Keys, ...]) -> tuple[Array, tuple[Keys, ...]]:
    """Queries and keys of (batch row, head) pairs, as `_softmax` takes them."""
    return _heads_as_rows(q), tuple(_per_head(part, q.shape[2]) for part in parts)


def _heads_of(rows: Array, heads: int) -> Array:
    return rearrange(rows, "(b h) t d -> b t h d", h=heads)


def _at_once(q: Array, parts: tuple[Keys, ...]) -> Array:
    """`_softmax` of everything, whose gradient JAX derives: it reaches every part."""
    return _heads_of(_softmax(*_rows_of(q, parts))[0], q.shape[2])


@jax.custom_vjp
def _tiled(q: Array, parts: tuple[Keys, ...]) -> Array:
    """`_softmax` tile by tile. The first part has a gradient, the others have none."""
    return _tiled_forward(q, parts)[0]


def _tiled_forward(q: Array, parts: tuple[Keys, ...]) -> tuple[Array, tuple]:
    heads, key_count = q.shape[2], sum(part.k.shape[1] for part in parts)
    out, lse = _in_tiles(_softmax, key_count, _rows_of(q, parts))
    out = _heads_of(out, heads)
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, parts, out, lse)


def _tiled_backward(residuals: tuple, d_out: Array) -> tuple:
    q, parts, out, lse = residuals
    heads, key_count = q.shape[2], sum(part.k.shape[1] for part in parts)
    rows = (*_rows_of(q, parts), _heads_as_rows(out), lse, _heads_as_rows(d_out))
    gradients = _in_tiles(_softmax_gradients, key_count, rows)
    d_q, d_k, d_v = (_heads_of(x, heads) for x in gradients)
    return d_q, (Keys(d_k, d_v), *[None] * (len(parts) - 1))


def _softmax_gradients(
    q: Array, parts: tuple[Keys, ...], out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, and of the first part's keys and values; arrays as in `_softmax`."""
    scale = q.shape[-1] ** -0.5
    mean = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)

    def weights_and_gradient(part: Keys) -> tuple[Array, Array]:
        """Softmax weights and the gradient of the products Q K^T, both float[R, T, K]."""
        weights = jnp.exp(_logits(q, part) - lse)
        d_product = weights * (_product("rqd,rkd->rqk", d_out, part.v) - mean) * scale
        return weights.astype(q.dtype), d_product.astype(q.dtype)

    pairs = [weights_and_gradient(part) for part in parts]
    d_q = _sum(
        _product("rqk,rkd->rqd", d_product, part.k)
        for (_, d_product), part in zip(pairs, parts, strict=True)
    )
    weights, d_product = pairs[0]
    d_k = _product("rqk,rqd->rkd", d_product, q)
    d_v = _product("rqk,rqd->rkd", weights, d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)


_tiled.defvjp(_tiled_forward, _tiled_backward)
