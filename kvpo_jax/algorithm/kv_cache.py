"""The KV cache K_<b: an immutable ring of past frames that is read by absolute frame index.

Frame f has one possible slot, `slot_of(f)`: the first `sink` frames have slots of their own for
ever, and so have those that `keep` chooses, which are routed later; the others share a ring. So a
history takes the same memory however long its video is. A branch does not copy the history that it
forked from: it writes into a small cache of its own (its page), and `read` looks a frame up in the
page first and in the shared history after it. A memory bank (MemFlow) belongs to its cache: `admit`
lets the newest frame in, `read` puts it in front of the context, `append` records what the next
block may admit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from kvpo_jax.algorithm import memory_bank
from kvpo_jax.errors import Registry, UsageError
from kvpo_jax.types import Array, BlockKV, KVCache, TextKV

# Whether positions are counted within the window (`positions`), or from the first frame on.
POSITIONS: Registry[bool] = Registry("window.positions", {"absolute": False, "relative": True})


class KVShape(NamedTuple):
    """Sizes of the keys of one frame: L, N, H and D."""

    layers: int
    tokens: int
    heads: int
    head_dim: int


# ---------------------------------------------------------------- what a block reads


class Store(struct.PyTreeNode):
    """Where keys and values lie: a history, the pages of the branches, or a bank.

    Attributes:
      k: float[L, R, slots, N, H, D], after the key norm and RoPE.
      v: float[L, R, slots, N, H, D].
      frame: int32[L, R, slots], where layers hold different frames (a bank); None elsewhere.
    """

    k: Array
    v: Array
    frame: Array | None = None


class Context(struct.PyTreeNode):
    """What a block may read of its past, in the order in which it is attended to.

    It points into the stores and copies nothing: each layer gathers its own keys and values when it
    needs them.

    Attributes:
      stores: an entry is taken from the last store that has it.
      row: of each store, int32[batch]: the R that a batch row reads.
      slot: of each store, int32[batch, A]: the slot of each entry; -1 where the store does not have
        it.
      frame: int32[batch, A], absolute frame of each entry; -1 is empty and masked.
      far: bool[batch, A], entries of the far past (sink and bank), of which sparse memory
        activation picks some; None if the network does without it.
      sink: as of the caches (static).
      span: as of the caches (static).
    """

    stores: tuple[Store, ...]
    row: tuple[Array, ...]
    slot: tuple[Array, ...]
    frame: Array
    far: Array | None = None
    sink: int = struct.field(pytree_node=False, default=0)
    span: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, k: Array, v: Array, frame: Array, far: Array | None = None) -> Context:
        """The context whose entries are k, v float[L, batch, A, N, H, D] themselves."""
        batch, entries = frame.shape
        slot = jnp.broadcast_to(jnp.arange(entries), (batch, entries))
        return cls((Store(k=k, v=v),), (jnp.arange(batch),), (slot,), frame, far)

    @staticmethod
    def join(contexts: Sequence[Context]) -> Context:
        """The batch rows of several contexts that point into the same stores, one after another."""
        pointers = [context.replace(stores=()) for context in contexts]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *pointers)
        return joined.replace(stores=contexts[0].stores)

    def layer(self, index: Array | int) -> tuple[Array, Array]:
        """Keys and values float[batch, A, N, H, D] of one layer; empty entries hold anything."""

        def gather(name: str) -> Array:
            first, *others = [
                getattr(store, name)[index, row[:, None], jnp.maximum(slot, 0)]
                for store, row, slot in zip(self.stores, self.row, self.slot, strict=True)
            ]
            for entries, slot in zip(others, self.slot[1:], strict=True):
                first = jnp.where(slot[..., None, None, None] >= 0, entries, first)
            return first

        return gather("k"), gather("v")

    def frames(self, index: Array | int) -> Array:
        """int32[batch, A]: the absolute frames of one layer's entries; empty ones are anything."""
        frame = self.frame
        for store, row, slot in zip(self.stores, self.row, self.slot, strict=True):
            if store.frame is not None:
                own = store.frame[index, row[:, None], jnp.maximum(slot, 0)]
                frame = jnp.where(slot >= 0, own, frame)
        return frame

    def take(self, rows: Array) -> Context:
        """The context of some batch rows, int32[...]."""
        pointers = jax.tree.map(lambda x: x[rows], self.replace(stores=()))
        return pointers.replace(stores=self.stores)

    def valid_first(self) -> Context:
        """The same entries, the empty ones last; attention does not depend on their order."""
        order = jnp.argsort(self.frame < 0, axis=1, stable=True)

        def sort(x: Array) -> Array:
            return jnp.take_along_axis(x, order, axis=1)

        pointers = self.replace(stores=(), row=())
        return jax.tree.map(sort, pointers).replace(stores=self.stores, row=self.row)

    @property
    def k(self) -> Array:
        """float[L, batch, A, N, H, D]: the keys of all layers, gathered."""
        return jnp.stack([self.layer(i)[0] for i in range(self.stores[0].k.shape[0])])

    @property
    def v(self) -> Array:
        """float[L, batch, A, N, H, D]: the values of all layers, gathered."""
        return jnp.stack([self.layer(i)[1] for i in range(self.stores[0].k.shape[0])])


class Peers(struct.PyTreeNode):
    """A context of other rows of the same batch: the frames of a whole video are one pass.

    Each layer attends to the keys and values that it has just made for those rows, and their
    gradient flows. Pretraining knows every block beforehand and reads its past so; see
    tools/pretrain_toy.py.

    Attributes:
      frame: int32[batch, A], each entry as row * F + frame of that row; -1 is empty and masked.
    """

    frame: Array

    def gather(self, x: Array) -> Array:
        """Entries float[batch, A, N, H, D] of what the rows made, float[batch, F, N, H, D]."""
        return x.reshape(-1, *x.shape[2:])[jnp.maximum(self.frame, 0)]

    def valid_first(self) -> Peers:
        """The same entries, the empty ones last."""
        order = jnp.argsort(self.frame < 0, axis=1, stable=True)
        return Peers(jnp.take_along_axis(self.frame, order, axis=1))


def positions(frame: Array, end: Array, sink: int, span: int) -> Array:
    """Where frames stand in the window of a block, int32[batch, A] from 0 to span - 1.

    The sink stays in front, right before the local window; the block is the end of the window. As
    long as the window has cut nothing off, a frame stands where it stands in the video. What is
    older than the window and not of the sink, as a bank has it, stands where the oldest local frame
    does. Source: Infinity-RoPE (arXiv 2511.20649), and LongLive as it adopted it.

    Args:
      frame: int32[batch, A], absolute frames.
      end: int32[batch], the frame after the block.
      sink: how many frames the sink has.
      span: frames of the window: the sink, the local ones and the block.
    """
    left_out = jnp.maximum(end - span, 0)[:, None]
    local = jnp.maximum(frame - left_out, sink)
    return jnp.where(frame < sink, jnp.maximum(frame, 0), local)


def _flat(x: Array) -> Array:
    """Keys [L, ..., slots, N, H, D] with the trajectories flattened, [L, R, slots, N, H, D]."""
    return x.reshape(x.shape[0], -1, *x.shape[-4:])


def _find(cache: KVCache, frames: Array) -> Array:
    """The slots of absolute frames int32[..., A]; -1 where the cache does not hold a frame."""
    slots = slot_of(cache, frames)
    there = jnp.take_along_axis(cache.frame, slots, axis=-1) == frames
    return jnp.where(there & (frames >= 0), slots, -1)


def look_up(frames: Array, history: KVCache, page: KVCache | None = None) -> Context:
    """`read` without the bank."""
    chex.assert_rank(frames, 3)
    p, t, a = frames.shape
    stores, rows, slots = [], [], []
    for cache in (history,) if page is None else (history, page):
        own = cache.frame.ndim == 3
        found = _find(cache, frames if own else frames.reshape(p, t * a))
        stores.append(Store(k=_flat(cache.k), v=_flat(cache.v)))
        rows.append(jnp.arange(p * t) if own else jnp.repeat(jnp.arange(p), t))
        slots.append(found.reshape(p * t, a))
    found = jnp.stack(slots).max(axis=0) >= 0
    frame = jnp.where(found, frames.reshape(p * t, a), -1)
    far = (frame >= 0) & (frame < history.sink)
    pointers = tuple(stores), tuple(rows), tuple(slots), frame, far
    return Context(*pointers, history.sink, history.span)


def read(
    frames: Array, history: KVCache, page: KVCache | None = None, bank_row: Array | None = None
) -> Context:
    """What blocks read: absolute frames int32[P, T, A], as a Context of P * T batch rows.

    Each frame comes from the page if it is there, else from the history (frame int32[P, slots])
    that the trajectories of a prompt share; -1, and a frame that neither holds, is empty. The page
    is the trajectory's own (frame int32[P, T, slots]) or shared too (int32[P, slots]). In front
    stand the frames of the memory bank, if there is one: the page's, or without a page the
    history's.

    Args:
      frames: see above.
      history: see above.
      page: see above.
      bank_row: int32[P * T], which of the bank's trajectories, flattened, each batch row attends
        to; None: its own.
    """
    context = look_up(frames, history, page)
    far = (context.frame >= 0) & (context.frame < history.sink)
    bank = (history if page is None else page).bank
    if bank is None:
        return context
    batch, slots = context.frame.shape[0], bank.frame.shape[-1]
    bank_row = jnp.arange(batch) if bank_row is None else bank_row
    # Layers hold different frames but equally many, which is all that a mask needs.
    frame = bank.frame[0].reshape(-1, slots)[bank_row]

    def in_front(fill: Array | int, x: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(fill, (batch, slots)), x], axis=1)

    own = jnp.concatenate([jnp.arange(slots), jnp.full(context.frame.shape[1], -1)])
    of_layers = bank.frame.reshape(len(bank.frame), -1, slots)
    return context.replace(
        stores=(*context.stores, Store(k=_flat(bank.k), v=_flat(bank.v), frame=of_layers)),
        row=(*context.row, bank_row),
        slot=(*(in_front(-1, s) for s in context.slot), jnp.broadcast_to(own, (batch, own.size))),
        frame=in_front(frame, context.frame),
        far=in_front(frame >= 0, far),
    )


# ---------------------------------------------------------------- the cache


def empty(
    kv: KVShape,
    batch: tuple[int, ...],
    slots: int,
    sink: int,
    dtype,
    *,
    kept: int = 0,
    span: int = 0,
) -> KVCache:
    """A cache without frames for trajectories of shape `batch`.

    (P,) makes histories, (P, T) makes pages, which keep no chosen frames. `kept` of the slots and
    `span` are those of KVCache.
    """
    if slots <= sink + kept:
        raise UsageError(f"a cache of {slots} frames cannot hold a sink of {sink} and a ring")
    blank = jnp.zeros((kv.layers, *batch, slots, kv.tokens, kv.heads, kv.head_dim), dtype)
    frame = jnp.full((*batch, slots), -1, jnp.int32)
    return KVCache(k=blank, v=blank, frame=frame, sink=sink, kept=kept, span=span)


def keep(cache: KVCache, frames: Array) -> KVCache:
    """A history without frames that will keep these, once they come, until its end.

    Args:
      cache: frame int32[P, slots]. It has as many slots to keep frames in as there are `frames` of
        a prompt, or none: then it has room for all of them in its ring.
      frames: int32[P, ...], which of each prompt; also some twice, or -1.
    """
    if not cache.kept:
        return cache
    frames = frames.reshape(len(frames), cache.kept)
    return cache.replace(frame=cache.frame.at[:, -cache.kept :].set(_awaited(frames)))


def _awaited(frame: Array) -> Array:
    """What stands in the table of a cache where `frame` will come; -1 where that is -1."""
    return -2 - frame


def slot_of(cache: KVCache, frame: Array) -> Array:
    """The slot that `frame` has if it is resident.

    It is an int32 of frame's shape, or of a cache that keeps frames int32[P, A] of int32[A] or
    int32[P, A].
    """
    ring = cache.frame.shape[-1] - cache.sink - cache.kept
    slot = jnp.where(frame < cache.sink, frame, cache.sink + (frame - cache.sink) % ring)
    if not cache.kept:
        return slot
    there, asked = cache.frame[:, None, -cache.kept :], frame[..., None]
    own = ((there == asked) | (there == _awaited(asked))) & (asked >= cache.sink)
    return jnp.where(own.any(axis=-1), cache.sink + ring + jnp.argmax(own, axis=-1), slot)


def admit(cache: KVCache, text: TextKV) -> KVCache:
    """The cache as the next block reads it: its bank has taken in the frame recorded last."""
    if cache.bank is None:
        return cache
    return cache.replace(bank=memory_bank.admit(cache.bank, text))


def append(cache: KVCache, new: BlockKV, start_frame: Array | int) -> KVCache:
    """The cache with a new block of every trajectory; the oldest frames are evicted.

    Args:
      cache: trajectories in any shape.
      new: float[L, batch, F, N, H, D] with the trajectories flattened into `batch`.
      start_frame: int32[], first frame of the block.
    """
    cache = rewrite(cache, new, start_frame)
    if cache.bank is None:
        return cache
    return cache.replace(bank=memory_bank.record(cache.bank, new, start_frame))


def rewrite(cache: KVCache, new: BlockKV, start_frame: Array | int) -> KVCache:
    """`append` of frames that the bank has met already, made anew at a prompt switch."""
    chex.assert_rank([new.k, new.v], 6)
    batch = cache.frame.shape[:-1]
    frame = start_frame + jnp.arange(new.k.shape[2], dtype=jnp.int32)
    slots = slot_of(cache, frame)
    of_each: tuple = (slice(None),) * len(batch)
    if slots.ndim > 1:  # each prompt has slots of its own
        of_each = (jnp.arange(len(slots))[:, None],)

    def unflatten(x: Array) -> Array:
        return x.reshape(x.shape[0], *batch, *x.shape[2:]).astype(cache.k.dtype)

    return cache.replace(
        k=cache.k.at[(slice(None), *of_each, slots)].set(unflatten(new.k)),
        v=cache.v.at[(slice(None), *of_each, slots)].set(unflatten(new.v)),
        frame=cache.frame.at[(*of_each, slots)].set(frame),
    )


def forget(changed: Array, cache: KVCache, frames: int | None = None) -> KVCache:
    """The cache with zero keys and values for the prompts bool[P] that changed.

    `frames` limits it to the first so many slots. The frames stay resident and are attended to as
    zeros, as LongLive without `global_sink` leaves its sink.
    """
    select = changed.reshape(1, -1, *[1] * (cache.k.ndim - 2))
    slots = cache.frame.shape[-1]
    slot = jnp.arange(slots)[:, None, None, None]
    select &= slot < (slots if frames is None else frames)
    return cache.replace(k=jnp.where(select, 0, cache.k), v=jnp.where(select, 0, cache.v))


def repeat(cache: KVCache, trajectories: int) -> KVCache:
    """Pages with frame int32[P, T, slots] that all hold what `cache`, int32[P, slots], holds."""
    return cache.replace(
        k=jnp.repeat(cache.k[:, :, None], trajectories, axis=2),
        v=jnp.repeat(cache.v[:, :, None], trajectories, axis=2),
        frame=jnp.repeat(cache.frame[:, None], trajectories, axis=1),
        bank=memory_bank.repeat(cache.bank, trajectories),
    )


def trajectory(pages: KVCache, index: int) -> KVCache:
    """The cache with frame int32[P, slots] of one trajectory of pages int32[P, T, slots]."""
    return pages.replace(
        k=pages.k[:, :, index],
        v=pages.v[:, :, index],
        frame=pages.frame[:, index],
        bank=memory_bank.trajectory(pages.bank, index),
    )


def map_trajectories(function: Callable[[Array], Array], pages: KVCache) -> KVCache:
    """`function` of [P, T, ...] on pages int32[P, T, slots] without a bank, layer by layer."""
    assert pages.bank is None
    k, v = jax.vmap(function)(pages.k), jax.vmap(function)(pages.v)
    return pages.replace(k=k, v=v, frame=function(pages.frame))


def join_trajectories(pages: KVCache, others: KVCache) -> KVCache:
    """The trajectories of pages int32[P, T, slots], then those of `others`; the first's bank."""
    return pages.replace(
        k=jnp.concatenate([pages.k, others.k], axis=2),
        v=jnp.concatenate([pages.v, others.v], axis=2),
        frame=jnp.concatenate([pages.frame, others.frame], axis=1),
    )
