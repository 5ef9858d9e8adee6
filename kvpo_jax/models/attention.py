"""Softmax attention over a block's own keys and over those of its past, which carry no gradient.

The past is never concatenated to the rest: two products of logits share one softmax. Logits exist for some (batch row,
head) pairs at a time, in the backward pass too, which makes them again from the queries, the keys and the log-sum-exp
of each query (FlashAttention, arXiv 2205.14135, at the granularity of a head). On NVIDIA GPUs cuDNN does all of it, on
one array of keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from kvpo_jax.types import Array

_MASKED = -1e30


class Keys(NamedTuple):
    """Some of the keys that queries attend to.

    Attributes:
      k: float[batch, K, H, D].
      v: float[batch, K, H, D].
      length: int32[batch], how many of the K count, from the first on; None is all.
      mask: bool[batch, 1 or H, K], False for those that do not count; None is all.
    """

    k: Array
    v: Array
    length: Array | None = None
    mask: Array | None = None


def attention(q: Array, own: Keys, past: Keys | None = None, implementation: str = "auto") -> Array:
    """softmax(q k^T / sqrt(D)) v over the keys of `own` and `past` together, float[batch, T, H, D].

    Gradients flow to q and to the keys and values of `own`.

    Args:
      q: float[batch, T, H, D].
      own: at least one key of every batch row must count.
      past: of any number; None is no more than `own`.
      implementation: "cudnn" is its flash attention for half precision and unless there is a mask, "auto" the same
        where the devices are GPUs, "xla" never.
    """
    parts = (own,)
    if past is not None and past.k.shape[1]:
        parts += (Keys(*map(jax.lax.stop_gradient, past[:2]), *past[2:]),)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    masked = own.length is not None or any(part.mask is not None for part in parts)
    wanted = implementation == "cudnn" or (implementation == "auto" and jax.default_backend() == "gpu")
    if wanted and half and not masked:
        return _library(q, *parts, implementation="cudnn")
    return _attention(q, parts)


def _library(q: Array, own: Keys, past: Keys | None = None, *, implementation: str) -> Array:
    """By JAX's own function: no masks, and of the past's keys, behind the others, as many as its length says."""
    if past is None:
        return jax.nn.dot_product_attention(q, own.k, own.v, implementation=implementation)
    batch, queries = q.shape[:2]
    k, v = (jnp.concatenate([a, b], axis=1) for a, b in zip(own[:2], past[:2], strict=True))
    length = jnp.full(batch, k.shape[1]) if past.length is None else own.k.shape[1] + past.length
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=jnp.full(batch, queries, jnp.int32), key_value_seq_lengths=length.astype(jnp.int32),
        implementation=implementation,
    )  # fmt: skip


def saved(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: cuDNN's output and statistics are kept. Those of the tiles are by name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


# ---------------------------------------------------------------- in tiles


def logits_at_once() -> int:
    """Unless one head has more: 1 GiB in float32, and on CPU the 4 MiB that a core's cache holds, for every core."""
    if jax.default_backend() != "cpu":
        return 2**28
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores * 2**20


def _rows(x: Array) -> Array:
    return rearrange(x, "b t h d -> (b h) t d")


def _part_rows(part: Keys, heads: int) -> Keys:
    """The keys of (batch row, head) pairs: k, v float[R, K, D], length int32[R], mask bool[R, K]."""
    mask, length = part.mask, part.length
    if mask is not None:
        mask = rearrange(jnp.broadcast_to(mask, (mask.shape[0], heads, mask.shape[2])), "b h k -> (b h) k")
    return Keys(_rows(part.k), _rows(part.v), None if length is None else jnp.repeat(length, heads), mask)


def _in_tiles(tile: Callable, keys: int, rows: tuple) -> tuple:
    """tile(*rows), arrays [R, ...] to arrays [R, ...], so many rows at a time as `logits_at_once` allows."""
    count, queries = rows[0].shape[:2]
    most = max(1, logits_at_once() // (queries * keys))
    some = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    if some == count:
        return tile(*rows)
    out = jax.lax.map(lambda x: tile(*x), jax.tree.map(lambda x: x.reshape(-1, some, *x.shape[1:]), rows))
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum in the operands' type, summed in float32 at least."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _logits(q: Array, part: Keys) -> Array:
    out = _product("rqd,rkd->rqk", q, part.k) * q.shape[-1] ** -0.5
    if part.length is not None:
        out = jnp.where(jnp.arange(out.shape[-1]) < part.length[:, None, None], out, _MASKED)
    return out if part.mask is None else jnp.where(part.mask[:, None], out, _MASKED)


def _forward_tile(q: Array, parts: tuple[Keys, ...]) -> tuple[Array, Array]:
    """Attention of rows, float[R, T, D], and the log-sum-exp of their logits, float32[R, T, 1]."""
    logits = [_logits(q, part) for part in parts]
    top = jnp.stack([x.max(axis=-1, keepdims=True) for x in logits]).max(axis=0)
    weights = [jnp.exp(x - top) for x in logits]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    out = sum(_product("rqk,rkd->rqd", w.astype(q.dtype), part.v) for w, part in zip(weights, parts, strict=True))
    return (out / total).astype(q.dtype), top + jnp.log(total)


def _backward_tile(q: Array, parts: tuple[Keys, ...], out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
    """Gradients of q, and of the first part's keys and values."""
    own, scale = parts[0], q.shape[-1] ** -0.5
    mean = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)
    d_q, of_own = 0.0, None
    for part in parts:
        weights = jnp.exp(_logits(q, part) - lse)
        d_logits = weights * (_product("rqd,rkd->rqk", d_out, part.v) - mean) * scale
        d_logits, weights = d_logits.astype(q.dtype), weights.astype(q.dtype)
        d_q += _product("rqk,rkd->rqd", d_logits, part.k)
        if part is own:
            of_own = _product("rqk,rqd->rkd", d_logits, q), _product("rqk,rqd->rkd", weights, d_out)
    return d_q.astype(q.dtype), *(x.astype(q.dtype) for x in of_own)


@jax.custom_vjp
def _attention(q: Array, parts: tuple[Keys, ...]) -> Array:
    return _attention_forward(q, parts)[0]


def _attention_forward(q: Array, parts: tuple[Keys, ...]) -> tuple[Array, tuple]:
    heads, keys = q.shape[2], sum(part.k.shape[1] for part in parts)
    rows = (_rows(q), tuple(_part_rows(part, heads) for part in parts))
    out, lse = _in_tiles(_forward_tile, keys, rows)
    out = rearrange(out, "(b h) t d -> b t h d", h=heads)
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, parts, out, lse)


def _attention_backward(residuals: tuple, d_out: Array) -> tuple:
    q, parts, out, lse = residuals
    heads, keys = q.shape[2], sum(part.k.shape[1] for part in parts)
    of_rows = tuple(_part_rows(part, heads) for part in parts)
    gradients = _in_tiles(_backward_tile, keys, (_rows(q), of_rows, _rows(out), lse, _rows(d_out)))
    d_q, d_k, d_v = (rearrange(x, "(b h) t d -> b t h d", h=heads) for x in gradients)
    return d_q, (Keys(d_k, d_v), *[None] * (len(parts) - 1))


_attention.defvjp(_attention_forward, _attention_backward)
