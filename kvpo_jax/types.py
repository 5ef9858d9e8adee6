"""The axis alphabet, and the frozen structs that travel between the stages of an iteration.

Axes, used in every docstring, einsum and sharding spec:

    P  prompts (one prompt sequence each)     S  solver steps per block
    G  branches                               B  blocks of the video
    W  blocks of the perturbed window         F  latent frames per block
    M  prompt segments per video              N  tokens per latent frame
    L  transformer layers                     A  context frames that a block attends to
    H, D  heads, head dim                     Y, X, C  latent height, width, channels
    T  trajectories: the anchor and the branches of one prompt (see `sharding.trajectories`)
    K  text tokens

Frames and blocks are numbered from 0 (the paper counts from 1). `pivot` is the first perturbed block,
`F * pivot` the fork frame. Latent video is channels-last, `float[..., frames, Y, X, C]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
PyTree = Any


@struct.dataclass
class TextKV:
    """Cross-attention keys and values of one prompt per batch row, made once per prompt by `Wan.encode_text`.

    Attributes:
      k: float[L, batch, K, H, D], after the key norm.
      v: float[L, batch, K, H, D].
    """

    k: Array
    v: Array


@struct.dataclass
class BlockKV:
    """Self-attention keys and values that one forward pass wrote for its own frames.

    Attributes:
      k: float[L, batch, F, N, H, D], after the key norm and RoPE at the absolute frame.
      v: float[L, batch, F, N, H, D].
    """

    k: Array
    v: Array


@struct.dataclass
class Store:
    """Where keys and values lie: a history, the pages of the branches, a bank.

    Attributes:
      k: float[L, R, slots, N, H, D], after the key norm and RoPE.
      v: float[L, R, slots, N, H, D].
    """

    k: Array
    v: Array


@struct.dataclass
class Context:
    """What a block may read of its past, in the order in which it is attended to.

    It points into the stores and copies nothing: each layer gathers its own keys and values when it needs them.

    Attributes:
      stores: in order of precedence, the last first.
      row: of each store, int32[batch]: the R that a batch row reads.
      slot: of each store, int32[batch, A]: the slot of each entry; -1 where the store does not have it.
      frame: int32[batch, A], absolute frame of each entry; -1 is empty and masked.
      chunk: bool[batch, A], entries of the far past (sink and bank), of which sparse memory activation picks some; None
        where a network without it reads the context.
    """

    stores: tuple[Store, ...]
    row: tuple[Array, ...]
    slot: tuple[Array, ...]
    frame: Array
    chunk: Array | None = None

    @classmethod
    def of(cls, k: Array, v: Array, frame: Array, chunk: Array | None = None) -> Context:
        """The context whose entries are k, v float[L, batch, A, N, H, D] themselves."""
        batch, entries = frame.shape
        slot = jnp.broadcast_to(jnp.arange(entries), (batch, entries))
        return cls((Store(k=k, v=v),), (jnp.arange(batch),), (slot,), frame, chunk)

    @staticmethod
    def join(contexts: Sequence[Context]) -> Context:
        """The rows of several contexts that point into the same stores, one after the other."""
        pointers = [context.replace(stores=()) for context in contexts]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *pointers).replace(stores=contexts[0].stores)

    def layer(self, index: Array | int) -> tuple[Array, Array]:
        """Keys and values float[batch, A, N, H, D] of one layer; what stands at empty entries means nothing."""

        def gather(name: str) -> Array:
            out = None
            for store, row, slot in zip(self.stores, self.row, self.slot, strict=True):
                entries = getattr(store, name)[index, row[:, None], jnp.maximum(slot, 0)]
                out = entries if out is None else jnp.where(slot[..., None, None, None] >= 0, entries, out)
            return out

        return gather("k"), gather("v")

    def take(self, rows: Array) -> Context:
        """The context of some batch rows, int32[...]."""
        pick = lambda x: None if x is None else x[rows]
        return self.replace(
            row=tuple(map(pick, self.row)),
            slot=tuple(map(pick, self.slot)),
            frame=pick(self.frame),
            chunk=pick(self.chunk),
        )

    def valid_first(self) -> Context:
        """The same entries, the empty ones behind the others; to attention their order means nothing."""
        order = jnp.argsort(self.frame < 0, axis=1, stable=True)
        sort = lambda x: None if x is None else jnp.take_along_axis(x, order, axis=1)
        return self.replace(slot=tuple(map(sort, self.slot)), frame=sort(self.frame), chunk=sort(self.chunk))

    @property
    def k(self) -> Array:
        """float[L, batch, A, N, H, D]: the keys of all layers, gathered."""
        return jnp.stack([self.layer(i)[0] for i in range(self.stores[0].k.shape[0])])

    @property
    def v(self) -> Array:
        """float[L, batch, A, N, H, D]: the values of all layers, gathered."""
        return jnp.stack([self.layer(i)[1] for i in range(self.stores[0].k.shape[0])])


@struct.dataclass
class MemoryBank:
    """MemFlow's narrative bank (see memory_bank.py); "..." are the axes of a KVCache's `frame` but the last.

    Attributes:
      k: float[L, ..., slots, N, H, D], after the key norm and RoPE.
      v: float[L, ..., slots, N, H, D].
      frame: int32[L, ..., slots], the absolute frame in each slot, -1 empty; layers choose for themselves.
      new_k: float[L, ..., N, H, D], of the frame that was recorded last.
      new_v: float[L, ..., N, H, D].
      new_frame: int32[L, ...].
      recorded: int32[L, ...], frames recorded so far.
      pending: bool[L, ...], whether the last one has still to enter.
    """

    k: Array
    v: Array
    frame: Array
    new_k: Array
    new_v: Array
    new_frame: Array
    recorded: Array
    pending: Array


@struct.dataclass
class KVCache:
    """An immutable ring of past frames. Frame f lives in the slot `kv_cache.slot_of(f)`.

    Attributes:
      k: float[L, ..., slots, N, H, D], with the axes of `frame` between L and N.
      v: float[L, ..., slots, N, H, D].
      frame: int32[..., slots], the absolute frame held by each slot; -1 is empty.
      bank: the far past as MemFlow keeps it, or None.
      sink: number of leading slots that are never evicted (static).
    """

    k: Array
    v: Array
    frame: Array
    bank: MemoryBank | None = None
    sink: int = struct.field(pytree_node=False, default=3)


@struct.dataclass
class BlockRecord:
    """One generated block: the states that the solver visited, and the clean latent.

    Attributes:
      z: float[P, T, S, F, Y, X, C], solver states (network inputs), z_{b,s} of the paper.
      u: float[P, T, S, F, Y, X, C], the velocities predicted there, u_hat_{b,s} of the paper.
      x_clean: float[P, T, F, Y, X, C].
    """

    z: Array
    u: Array
    x_clean: Array


@struct.dataclass
class ReplayTuples:
    """What a rollout leaves for the replay (Algorithm 1, step 2), and the unperturbed context to replay under.

    Attributes:
      z: float[P, G, W, S, F, Y, X, C].
      u: float[P, G, W, S, F, Y, X, C].
      history: KVCache with frame int32[P, slots], as it stood at the fork.
      page: KVCache with frame int32[P, slots], what the anchor wrote in the window.
      rows: int32[W, A], deployment window of each block.
      start_frame: int32[W].
      segment: int32[W], prompt segment of each block.
      noise: float[P, W, F, Y, X, C], noise of the cache-writing pass (read by self-rolled replays only).
      bank: MemoryBank [L, P, W, ...], what the anchor attended to at each block; None without a bank.
    """

    z: Array
    u: Array
    history: KVCache
    page: KVCache
    rows: Array
    start_frame: Array
    segment: Array
    noise: Array
    bank: MemoryBank | None = None


@struct.dataclass
class Rollout:
    """The videos of one iteration.

    Attributes:
      branches: float[P, G, frames, Y, X, C], clean latents.
      anchor: float[P, frames, Y, X, C].
      replay: ReplayTuples.
    """

    branches: Array
    anchor: Array
    replay: ReplayTuples


@struct.dataclass
class Scores:
    """Rewards of a group and of its anchor.

    Attributes:
      branches: float[P, G], the composite reward.
      anchor: float[P].
      components: name -> (float[P, G], float[P]), the raw scores before weighting.
    """

    branches: Array
    anchor: Array
    components: Mapping[str, tuple[Array, Array]]
