"""The KV cache: an immutable ring of past frames that is read by absolute frame index.

Frame f has one possible slot, `slot_of(f)`: the first `sink` frames have their own for ever, the others share a ring.
A branch does not copy the history that it forked from: it writes into a small cache of its own (its page), and
`read` looks a frame up in the page first and in the shared history after it.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from kvpo_jax import memory_bank
from kvpo_jax.types import Array, BlockKV, Context, KVCache


def empty(
    layers: int, batch: tuple[int, ...], slots: int, tokens: int, heads: int, head_dim: int, sink: int, dtype
) -> KVCache:
    """A cache without frames for trajectories of shape `batch`, e.g. (P,) for histories or (P, T) for pages."""
    if slots <= sink:
        raise ValueError(f"a cache of {slots} frames cannot hold a sink of {sink} and a ring")
    kv = jnp.zeros((layers, *batch, slots, tokens, heads, head_dim), dtype)
    return KVCache(k=kv, v=kv, frame=jnp.full((*batch, slots), -1, jnp.int32), sink=sink)


def slot_of(cache: KVCache, frame: Array) -> Array:
    """The slot that `frame` has if it is resident; int32 of frame's shape."""
    ring = cache.frame.shape[-1] - cache.sink
    return jnp.where(frame < cache.sink, frame, cache.sink + (frame - cache.sink) % ring)


def append(cache: KVCache, new: BlockKV, start_frame: Array) -> KVCache:
    """The cache with the frames start_frame, start_frame + 1, ... of every trajectory written, the oldest evicted.

    `new` is float[L, batch, F, N, H, D] with the trajectories flattened into `batch`; start_frame is int32[].
    """
    frames = new.k.shape[2]
    batch = cache.frame.shape[:-1]
    frame = start_frame + jnp.arange(frames, dtype=jnp.int32)
    slots = slot_of(cache, frame)
    axis = 1 + len(batch)
    at = (slice(None),) * axis
    unflatten = lambda x: x.reshape(x.shape[0], *batch, *x.shape[2:]).astype(cache.k.dtype)
    return cache.replace(
        k=cache.k.at[(*at, slots)].set(unflatten(new.k)),
        v=cache.v.at[(*at, slots)].set(unflatten(new.v)),
        frame=cache.frame.at[..., slots].set(frame),
    )


def _take(x: Array, slots: Array, batch_axes: int) -> Array:
    """x float[L, *batch, slots, N, H, D] at slots int32[*batch, A] -> float[L, *batch, A, N, H, D]."""
    take = lambda row, index: row[:, index]
    for _ in range(batch_axes):
        take = jax.vmap(take, in_axes=(1, 0), out_axes=1)
    return take(x, slots)


def read(frames: Array, history: KVCache, page: KVCache | None = None) -> Context:
    """The keys and values of absolute frames int32[P, T, A] as a Context of P * T batch rows.

    Each frame comes from the trajectory's own page (frame int32[P, T, slots]) if it is there, else from the history
    (int32[P, slots]) that the trajectories of a prompt share. -1, and a frame that neither holds, is empty.
    """
    chex.assert_rank(frames, 3)
    p, t, a = frames.shape
    asked = frames.reshape(p, t * a)
    slots = slot_of(history, asked)
    found = (jnp.take_along_axis(history.frame, slots, axis=1) == asked) & (asked >= 0)
    shape = lambda x: x.reshape(x.shape[0], p, t, a, *x.shape[3:])
    k, v = (shape(_take(x, jnp.maximum(slots, 0), 1)) for x in (history.k, history.v))
    found = found.reshape(p, t, a)
    if page is not None:
        slots = slot_of(page, frames)
        own = (jnp.take_along_axis(page.frame, slots, axis=2) == frames) & (frames >= 0)
        select = own[None, ..., None, None, None]
        k = jnp.where(select, _take(page.k, jnp.maximum(slots, 0), 2), k)
        v = jnp.where(select, _take(page.v, jnp.maximum(slots, 0), 2), v)
        found |= own
    flat = lambda x: x.reshape(x.shape[0], p * t, *x.shape[3:])
    frame = jnp.where(found, frames, -1).reshape(p * t, a)
    return Context(k=flat(k), v=flat(v), frame=frame, chunk=(frame >= 0) & (frame < history.sink))


def repeat(cache: KVCache, trajectories: int) -> KVCache:
    """Pages with frame int32[P, T, slots] that all hold what `cache`, frame int32[P, slots], holds."""
    kv = lambda x: jnp.repeat(x[:, :, None], trajectories, axis=2)
    return cache.replace(
        k=kv(cache.k),
        v=kv(cache.v),
        frame=jnp.repeat(cache.frame[:, None], trajectories, axis=1),
        bank=memory_bank.repeat(cache.bank, trajectories),
    )


def trajectory(pages: KVCache, index: int) -> KVCache:
    """The cache with frame int32[P, slots] of one trajectory of pages with frame int32[P, T, slots]."""
    return pages.replace(
        k=pages.k[:, :, index],
        v=pages.v[:, :, index],
        frame=pages.frame[:, index],
        bank=memory_bank.trajectory(pages.bank, index),
    )
