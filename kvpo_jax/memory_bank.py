"""MemFlow's narrative bank: a few frames of the far past that every block attends to, chosen by what the prompt says.

The bank is data beside the ring of `kv_cache`, per trajectory. Every third block leaves its first frame
(`record`); before the next block that frame enters (`admit`), and where the bank is full, the frames that the current
prompt looks at most make room for it. Layers choose for themselves. LongLive is the same model with no bank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvpo_jax.types import Array, BlockKV, Context, KVCache, MemoryBank, Store, TextKV


def empty(cache: KVCache, slots: int) -> MemoryBank:
    """A bank of `slots` frames without any, for the trajectories of a cache."""
    batch = (cache.k.shape[0], *cache.frame.shape[:-1])  # [L, ...]
    kv = jnp.zeros((*batch, slots, *cache.k.shape[-3:]), cache.k.dtype)
    one = jnp.zeros((*batch, *cache.k.shape[-3:]), cache.k.dtype)
    count = jnp.zeros(batch, jnp.int32)
    frame = jnp.full((*batch, slots), -1, jnp.int32)
    return MemoryBank(
        k=kv, v=kv, frame=frame, new_k=one, new_v=one, new_frame=count - 1, recorded=count, pending=count > 0
    )


def saliency(bank: MemoryBank, text: TextKV) -> Array:
    """How much the prompt looks at each slot, float32[L, P, ..., slots].

    The mean over text tokens, heads and the slot's tokens of <text key, bank key> / sqrt(D). `text` is of P prompts.
    """
    query = text.k.astype(jnp.float32).mean(axis=2)  # [L, P, H, D]
    key = bank.k.astype(jnp.float32).mean(axis=-3)  # [L, P, ..., slots, H, D]
    query = query.reshape(*query.shape[:2], *[1] * (key.ndim - 4), *query.shape[2:])
    heads, head_dim = key.shape[-2:]
    return jnp.sum(query * key, axis=(-2, -1)) / (heads * head_dim**0.5)


def admit(bank: MemoryBank, text: TextKV, reinsert: bool) -> MemoryBank:
    """The bank as the next block attends to it: the frame that was recorded last is in.

    While there is room it takes the next slot. In a full bank the slots with the highest `saliency` stay, in falling
    order, and the new frame takes the last one.

    Args:
      bank: [L, P, ...].
      text: TextKV of P prompts.
      reinsert: whether the frame enters again before every block until the next one is recorded, as the released code
        does, so that a full bank ends up with copies of it.
    """
    slots = bank.frame.shape[-1]
    keep = jnp.argsort(-saliency(bank, text), axis=-1, stable=True)[..., : slots - 1]
    room = bank.recorded[..., None] <= slots  # [L, ..., 1]
    last = jnp.arange(slots) == jnp.where(room, bank.recorded[..., None] - 1, slots - 1)
    index = jnp.concatenate([keep, jnp.full_like(keep[..., :1], slots - 1)], axis=-1)
    index = jnp.where(room, jnp.arange(slots), index)
    enters = ((bank.recorded > 0) & (bank.pending | reinsert))[..., None]

    def updated(old: Array, new: Array) -> Array:
        over = lambda mask: mask.reshape(*mask.shape, *[1] * (old.ndim - mask.ndim))
        moved = jnp.take_along_axis(old, over(index), axis=index.ndim - 1)
        return jnp.where(over(enters), jnp.where(over(last), jnp.expand_dims(new, index.ndim - 1), moved), old)

    return bank.replace(
        k=updated(bank.k, bank.new_k),
        v=updated(bank.v, bank.new_v),
        frame=updated(bank.frame, bank.new_frame),
        pending=jnp.zeros_like(bank.pending),
    )


def record(bank: MemoryBank, new: BlockKV, start_frame: Array, interval: int) -> MemoryBank:
    """Notes the first frame of a block, if it is one of every `interval` blocks.

    `new` is float[L, batch, F, N, H, D] with the trajectories flattened into `batch`; start_frame is int32[].
    """
    due = start_frame % (interval * new.k.shape[2]) == 0
    first = lambda x, old: jnp.where(due, x[:, :, 0].reshape(old.shape).astype(old.dtype), old)
    return bank.replace(
        new_k=first(new.k, bank.new_k),
        new_v=first(new.v, bank.new_v),
        new_frame=jnp.where(due, start_frame, bank.new_frame),
        recorded=bank.recorded + due,
        pending=bank.pending | due,
    )


def attend(context: Context, bank: MemoryBank | None, row: Array | None = None) -> Context:
    """The context with the bank's frames in front.

    `bank` is [L, ...] over trajectories, of which, flattened, each row of the context reads the one that `row`
    int32[batch] names; None is its own.
    """
    if bank is None:
        return context
    batch, slots = context.frame.shape[0], bank.frame.shape[-1]
    row = jnp.arange(batch) if row is None else row
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-4:])
    # Layers hold different frames but equally many, which is all that a mask needs.
    frame = bank.frame[0].reshape(-1, slots)[row]
    in_front = lambda x, fill: jnp.concatenate([jnp.broadcast_to(fill, (batch, slots)), x], axis=1)
    own = jnp.concatenate([jnp.arange(slots), jnp.full(context.frame.shape[1], -1)])
    return Context(
        stores=(*context.stores, Store(k=flat(bank.k), v=flat(bank.v))),
        row=(*context.row, row),
        slot=(*(in_front(s, -1) for s in context.slot), jnp.broadcast_to(own, (batch, own.size))),
        frame=in_front(context.frame, frame),
        chunk=in_front(context.chunk, frame >= 0),
    )


def repeat(bank: MemoryBank | None, trajectories: int) -> MemoryBank | None:
    """A bank [L, P, ...] as [L, P, T, ...]: every trajectory forks from the same one."""
    return jax.tree.map(lambda x: jnp.repeat(x[:, :, None], trajectories, axis=2), bank)


def trajectory(bank: MemoryBank | None, index: int) -> MemoryBank | None:
    """The bank [L, P, ...] of one trajectory of [L, P, T, ...]."""
    return jax.tree.map(lambda x: x[:, :, index], bank)
