"""The KV cache: an immutable ring of past frames that is read by absolute frame index.

Frame f has one possible slot, `slot_of(f)`: the first `sink` frames have their own for ever, the others share a ring.
A branch does not copy the history that it forked from: it writes into a small cache of its own (its page), and
`read` looks a frame up in the page first and in the shared history after it.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from kvpo_jax import memory_bank
from kvpo_jax.types import Array, BlockKV, Context, KVCache, Store


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


def _find(cache: KVCache, frames: Array) -> Array:
    """The slots of absolute frames int32[..., A] in a cache with frame int32[..., slots]; -1 if absent."""
    slots = slot_of(cache, frames)
    there = jnp.take_along_axis(cache.frame, slots, axis=-1) == frames
    return jnp.where(there & (frames >= 0), slots, -1)


def read(frames: Array, history: KVCache, page: KVCache | None = None) -> Context:
    """The keys and values of absolute frames int32[P, T, A] as a Context of P * T batch rows.

    Each frame comes from the page if it is there, else from the history (frame int32[P, slots]) that the trajectories
    of a prompt share; -1, and a frame that neither holds, is empty. The page is the trajectory's own (frame int32[P, T,
    slots]) or shared too (int32[P, slots]).
    """
    chex.assert_rank(frames, 3)
    p, t, a = frames.shape
    stores, rows, slots = [], [], []
    for cache in (history,) if page is None else (history, page):
        own = cache.frame.ndim == 3
        found = _find(cache, frames if own else frames.reshape(p, t * a))
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-4:])
        stores.append(Store(k=flat(cache.k), v=flat(cache.v)))
        rows.append(jnp.arange(p * t) if own else jnp.repeat(jnp.arange(p), t))
        slots.append(found.reshape(p * t, a))
    found = jnp.stack(slots).max(axis=0) >= 0
    frame = jnp.where(found, frames.reshape(p * t, a), -1)
    return Context(tuple(stores), tuple(rows), tuple(slots), frame, (frame >= 0) & (frame < history.sink))


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
