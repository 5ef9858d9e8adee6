"""MemFlow's narrative bank: a few far frames that every block attends to, chosen by the prompt.

The bank is a part of `kv_cache`'s caches and only that module uses it. Every third block leaves its
first frame (`record`). Before the next block that frame enters (`admit`); in a full bank it takes
the place of the frame that the current prompt looks at least. Each layer chooses for itself.
LongLive is the same model without a bank.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from kvpo_jax.types import Array, BlockKV, KVCache, MemoryBank, TextKV


def empty(
    cache: KVCache, slots: int, interval: int, reinsert: bool, heads_axis: str | None = None
) -> MemoryBank:
    """A bank of `slots` empty slots for the trajectories of a cache.

    `interval`, `reinsert` and `heads_axis` are those of MemoryBank.
    """
    batch = (cache.k.shape[0], *cache.frame.shape[:-1])  # [L, ...]
    kv = jnp.zeros((*batch, slots, *cache.k.shape[-3:]), cache.k.dtype)
    one = jnp.zeros((*batch, *cache.k.shape[-3:]), cache.k.dtype)
    count = jnp.zeros(batch, jnp.int32)
    frame = jnp.full((*batch, slots), -1, jnp.int32)
    return MemoryBank(
        k=kv,
        v=kv,
        frame=frame,
        new_k=one,
        new_v=one,
        new_frame=count - 1,
        recorded=count,
        pending=count > 0,
        interval=interval,
        reinsert=reinsert,
        heads_axis=heads_axis,
    )


def saliency(bank: MemoryBank, text: TextKV) -> Array:
    """How much the prompt looks at each slot, float32[L, P, ..., slots].

    The mean over text tokens, heads and the slot's tokens of <text key, bank key> / sqrt(D). `text`
    is of P prompts.
    """
    query = text.k.astype(jnp.float32).mean(axis=2)  # [L, P, H, D]
    key = bank.k.astype(jnp.float32).mean(axis=-3)  # [L, P, ..., slots, H, D]
    heads, head_dim = query.shape[-2:]
    if bank.heads_axis is not None:
        own = key.shape[-2]
        first = own * jax.lax.axis_index(bank.heads_axis)
        query = jax.lax.dynamic_slice_in_dim(query, first, own, axis=2)
    query = query.reshape(*query.shape[:2], *[1] * (key.ndim - 4), *query.shape[2:])
    total = jnp.sum(query * key, axis=(-2, -1))
    if bank.heads_axis is not None:
        total = jax.lax.psum(total, bank.heads_axis)
    return total / (heads * head_dim**0.5)


def admit(bank: MemoryBank, text: TextKV) -> MemoryBank:
    """The bank as the next block attends to it: the frame that was recorded last is in.

    While there is room it takes the next slot. In a full bank the slots with the highest `saliency`
    stay, in falling order, and the new frame takes the last one.

    Args:
      bank: [L, P, ...].
      text: TextKV of P prompts.
    """
    chex.assert_axis_dimension(text.k, 1, bank.frame.shape[1])
    slots = bank.frame.shape[-1]
    keep = jnp.argsort(-saliency(bank, text), axis=-1, stable=True)[..., : slots - 1]
    room = bank.recorded[..., None] <= slots  # [L, ..., 1]
    last = jnp.arange(slots) == jnp.where(room, bank.recorded[..., None] - 1, slots - 1)
    index = jnp.concatenate([keep, jnp.full_like(keep[..., :1], slots - 1)], axis=-1)
    index = jnp.where(room, jnp.arange(slots), index)
    enters = ((bank.recorded > 0) & (bank.pending | bank.reinsert))[..., None]

    def updated(old: Array, new: Array) -> Array:
        def over(mask: Array) -> Array:
            return mask.reshape(*mask.shape, *[1] * (old.ndim - mask.ndim))

        moved = jnp.take_along_axis(old, over(index), axis=index.ndim - 1)
        admitted = jnp.where(over(last), jnp.expand_dims(new, index.ndim - 1), moved)
        return jnp.where(over(enters), admitted, old)

    return bank.replace(
        k=updated(bank.k, bank.new_k),
        v=updated(bank.v, bank.new_v),
        frame=updated(bank.frame, bank.new_frame),
        pending=jnp.zeros_like(bank.pending),
    )


def record(bank: MemoryBank, new: BlockKV, start_frame: Array | int) -> MemoryBank:
    """Notes the first frame of a block, if it is one of every `bank.interval` blocks.

    `new` is float[L, batch, F, N, H, D] with the trajectories flattened into `batch`; start_frame
    is int32[].
    """
    chex.assert_rank([new.k, new.v], 6)
    due = start_frame % (bank.interval * new.k.shape[2]) == 0

    def first(x: Array, old: Array) -> Array:
        return jnp.where(due, x[:, :, 0].reshape(old.shape).astype(old.dtype), old)

    return bank.replace(
        new_k=first(new.k, bank.new_k),
        new_v=first(new.v, bank.new_v),
        new_frame=jnp.where(due, start_frame, bank.new_frame),
        recorded=bank.recorded + due,
        pending=bank.pending | due,
    )


def repeat(bank: MemoryBank | None, trajectories: int) -> MemoryBank | None:
    """A bank [L, P, ...] as [L, P, T, ...]: every trajectory forks from the same one."""
    return jax.tree.map(lambda x: jnp.repeat(x[:, :, None], trajectories, axis=2), bank)


def trajectory(bank: MemoryBank | None, index: int) -> MemoryBank | None:
    """The bank [L, P, ...] of one trajectory of [L, P, T, ...]."""
    return jax.tree.map(lambda x: x[:, :, index], bank)
