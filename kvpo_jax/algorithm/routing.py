"""Causal History Routing: which past frames each pass of a block attends to (paper §3.2, Eq. 3).

Routing is data: int32[A] of absolute frame indices, ascending, -1 (empty) at the end, with
A = sink + past. The network is handed the keys and values of these frames and never learns whether
they were routed.

    routed      [ sink | routed (past - near) | near ]   in a perturbed pass of a branch
    deployment  [ sink |     the last `past` frames  ]   everywhere else
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kvpo_jax.errors import Registry, UsageError
from kvpo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Window:
    """The slots of a context.

    Attributes:
      sink: the earliest frames, always attended to.
      past: local slots for past frames; the current block comes on top.
      near: how many of these the most recent frames keep; the other past - near are routed.
      excluded: how many of the youngest past frames cannot be drawn: `near` in the paper; `near`
        plus the block in the release, which leaves a gap between the pool and the near frames.
      cache_frames: how far back frames can be drawn: the sink and the last frames are so many.
      keep_sink: whether a routed context keeps the sink. If not, its slots are routed too and its
        frames may be drawn (MemFlow's release).
      shared_ring: whether a frame can be drawn only if a ring that the perturbed blocks are written
        to would still hold it at the last of them (release). Here a fork freezes the history, and
        every frame in it stays.
    """

    sink: int
    past: int
    near: int
    excluded: int
    cache_frames: int
    keep_sink: bool = True
    shared_ring: bool = False

    @property
    def kept(self) -> int:
        """Sink frames of a routed context, and the first frame that can be drawn."""
        return self.sink if self.keep_sink else 0

    @property
    def routed(self) -> int:
        """Slots that CHR fills."""
        return self.slots - self.kept - self.near

    @property
    def slots(self) -> int:
        """A."""
        return self.sink + self.past


def window(section: ml_collections.ConfigDict) -> Window:
    """The Window of a config's `window` section."""
    w = section
    if not 0 <= w.near < w.past or w.excluded < w.near or w.cache_frames < w.sink + w.past:
        raise UsageError(
            f"config.window: near={w.near}, past={w.past}, excluded={w.excluded}, "
            f"cache_frames={w.cache_frames}; expected 0 <= near < past, excluded >= near and "
            "cache_frames >= sink + past"
        )
    return Window(w.sink, w.past, w.near, w.excluded, w.cache_frames, w.keep_sink, w.shared_ring)


# ---------------------------------------------------------------- contexts


def _ascending(frames: Array, valid: Array) -> Array:
    """`frames` where valid, ascending, with -1 for the others at the end."""
    last = jnp.iinfo(jnp.int32).max
    frames = jnp.sort(jnp.where(valid, frames, last).astype(jnp.int32), axis=-1)
    return jnp.where(frames == last, -1, frames)


def deployment_frames(window: Window, start_frame: Array | int) -> Array:
    """The unperturbed context int32[A] of the block that begins at start_frame, int32[]."""
    sink = jnp.arange(window.sink)
    local = start_frame - window.past + jnp.arange(window.past)
    valid = jnp.concatenate([sink < start_frame, local >= window.sink])
    return _ascending(jnp.concatenate([sink, local]), valid)


def routed_context(window: Window, routed_frames: Array, start_frame: Array) -> Array:
    """Eq. 3: [sink; the six routed frames; the three nearest], int32[..., A].

    Args:
      window: how many there are of each.
      routed_frames: int32[..., routed], what CHR drew for each branch.
      start_frame: int32[], first frame of the block.
    """
    chex.assert_axis_dimension(routed_frames, -1, window.routed)
    sink = jnp.arange(window.kept)
    near = start_frame - window.near + jnp.arange(window.near)
    shared = jnp.concatenate([sink, near])
    shared = jnp.broadcast_to(shared, (*routed_frames.shape[:-1], shared.size))
    frames = jnp.concatenate([shared, routed_frames], axis=-1)
    return _ascending(frames, frames >= 0)


def context_frames(
    window: Window, routed_frames: Array, start_frame: Array, perturbed: Array
) -> Array:
    """What each pass of a block attends to, int32[P, T, S+1, A].

    It is Eq. 3 (`routed_context`) where `perturbed`, and the deployment window elsewhere.

    Args:
      window: the slots.
      routed_frames: int32[P, T, routed], what CHR drew for each trajectory.
      start_frame: int32[], first frame of the block.
      perturbed: bool[T, S+1], from `perturbed_passes`.
    """
    routed = routed_context(window, routed_frames, start_frame)[:, :, None, :]
    return jnp.where(perturbed[:, :, None], routed, deployment_frames(window, start_frame))


def perturbed_passes(
    rollout: ml_collections.ConfigDict,
    steps: int,
    is_branch: np.ndarray,
    block: Array,
    window_blocks: tuple[Array, Array],
) -> Array:
    """Which passes of a block CHR routes, bool[T, S+1] (paper §3.2, "Rollout and Replay").

    Those of a branch (the anchor is never perturbed), in the exploration window
    B = [b*, b* + W), and in the first half of the ODE steps.

    Args:
      rollout: section `rollout` of the config: perturbed_steps is the first half, and perturb_write
        says whether the pass that writes the cache is routed too (release).
      steps: S.
      is_branch: bool[T], False for an anchor.
      block: int32[], which block.
      window_blocks: int32[] each, b* and b* + W.
    """
    is_routed_pass = np.append(np.arange(steps) < rollout.perturbed_steps, rollout.perturb_write)
    return explores(is_branch, block, window_blocks)[:, None] & jnp.asarray(is_routed_pass)


def explores(is_branch: np.ndarray, block: Array, window_blocks: tuple[Array, Array]) -> Array:
    """Which trajectories leave the anchor's way in a block, bool[T]; see `perturbed_passes`."""
    first, stop = window_blocks
    return (block >= first) & (block < stop) & jnp.asarray(is_branch)


# ---------------------------------------------------------------- the routable set and the draws


def routable(
    window: Window, frames: int, fork: Array | int, last_start: Array | int
) -> Array | np.ndarray:
    """The routable set Omega of Eq. 3 at a fork with `fork` past frames, bool[frames].

    Paper: {4, ..., L - 3} counted from 1, which is [sink, fork - near) from 0. Frames that the
    history has evicted are left out; the sink's own are in it unless a routed context keeps them.

    Args:
      window: the slots.
      frames: of the video, or any bound on fork.
      fork: int32[], past frames.
      last_start: int32[], first frame of the last perturbed block; read by a shared ring only.
    """
    frame = np.arange(frames)  # on the host, where fork and last_start are known there
    held = window.cache_frames - window.sink
    oldest = (last_start if window.shared_ring else fork) - held
    in_sink = (frame >= window.kept) & (frame < window.sink)
    in_history = (frame >= window.sink) & (frame >= oldest)
    return (in_sink | in_history) & (frame < fork - window.excluded)


def _permutation(key: Array, pool: Array) -> Array:
    """int32[frames]: the frames of the pool in random order, the others behind them."""
    rank = jnp.where(pool, jax.random.uniform(key, pool.shape), 2.0)
    return jnp.argsort(rank).astype(jnp.int32)


def draw_subset(key: Array, window: Window, pool: Array) -> Array:
    """Distinct frames of the pool bool[frames] for the routed slots, uniform; int32[routed]."""
    return jnp.sort(_permutation(key, pool)[: window.routed])


def deployed_subset(window: Window, fork: Array | int) -> Array:
    """The draw that leaves the deployment window at the fork as it is, int32[routed]."""
    sink = jnp.arange(window.kept, window.sink)
    return jnp.concatenate([sink, fork - window.past + jnp.arange(window.past - window.near)])


# A draw: (key, window, branches, pool bool[frames], fork) -> int32[G, routed], frames of the pool;
# -1 leaves a slot empty.
Draw = Callable[[Array, Window, int, Array, Array], Array]

# Redraws of a branch, of which a pool with more subsets than branches hardly ever needs ten.
ATTEMPTS = 1000


def draw_independent(key: Array, window: Window, branches: int, pool: Array, fork: Array) -> Array:
    """Paper §3.2, "G distinct CHR refill decisions": G different subsets, none the deployment one.

    Uniform over such sequences: a branch is drawn again while it is one of those before it. Only
    where the pool has too few subsets, which is no eligible pivot, do some come twice.
    """
    taken = jnp.full((branches + 1, window.routed), -1).at[0].set(deployed_subset(window, fork))

    def draw_branch(taken: Array, branch: Array) -> tuple[Array, Array]:
        own = jax.random.fold_in(key, branch)

        def attempt(count: Array | int) -> tuple[Array, Array]:
            return jnp.asarray(count + 1), draw_subset(jax.random.fold_in(own, count), window, pool)

        def is_taken(state: tuple[Array, Array]) -> Array:
            count, drawn = state
            return (count < ATTEMPTS) & jnp.any(jnp.all(taken == drawn, axis=-1))

        _, drawn = jax.lax.while_loop(is_taken, lambda state: attempt(state[0]), attempt(0))
        return taken.at[branch + 1].set(drawn), drawn

    return jax.lax.scan(draw_branch, taken, jnp.arange(branches))[1]


def disperse(permutation: Array, pool_size: Array, routed: int, branches: int) -> Array:
    """Release: branch g takes consecutive entries of one permutation of `pool_size` frames.

    It begins at g * max(1, pool_size // G) and goes round. int32[G, routed], sorted.
    """
    start = jnp.arange(branches)[:, None] * jnp.maximum(1, pool_size // branches)
    return jnp.sort(permutation[(start + jnp.arange(routed)) % pool_size], axis=-1)


def draw_dispersed(key: Array, window: Window, branches: int, pool: Array, fork: Array) -> Array:
    """Release: the branches are spread over one permutation (`disperse`)."""
    return disperse(_permutation(key, pool), jnp.sum(pool), window.routed, branches)


def draw_random_length(
    key: Array, window: Window, branches: int, pool: Array, fork: Array
) -> Array:
    """Table 2, a local window of random length: of a branch's frames 1 to all are kept, as likely.

    The others are -1: their slots stay empty.
    """
    drawn = draw_independent(key, window, branches, pool, fork)
    length_key, order_key = jax.random.split(jax.random.fold_in(key, branches))
    lengths = jax.random.randint(length_key, (branches, 1), 1, window.routed + 1)
    kept = jax.random.permutation(order_key, drawn, axis=1, independent=True)
    return jnp.sort(jnp.where(jnp.arange(window.routed) < lengths, kept, -1), axis=1)


DRAWS: Registry[Draw] = Registry(
    "rollout.draw",
    {
        "independent": draw_independent,
        "dispersed": draw_dispersed,
        "random_length": draw_random_length,
    },
)


# ---------------------------------------------------------------- pivots


def eligible_pivots(
    window: Window,
    blocks: int,
    block_frames: int,
    switch_frames: Sequence[int],
    branches: int,
    window_blocks: int,
    recorded_blocks: int,
) -> list[int]:
    """Blocks at which a perturbed window may begin; there may be none.

    The deployment window must be full, the routable set have a subset of its own for every branch
    besides the deployment window's, the replayed blocks be inside the video, and no prompt may
    switch strictly inside them.

    Args:
      window: the slots.
      blocks: B.
      block_frames: F.
      switch_frames: latent frames at which the next prompt begins.
      branches: G.
      window_blocks: W.
      recorded_blocks: how many are replayed, at least W.
    """
    pivots = []
    for pivot in range(blocks - recorded_blocks + 1):
        fork, end = pivot * block_frames, (pivot + recorded_blocks) * block_frames
        last_start = fork + (window_blocks - 1) * block_frames
        pool = int(routable(window, fork, fork, last_start).sum())
        if (
            fork >= window.sink + window.past
            and math.comb(pool, window.routed) > branches
            and not any(fork < frame < end for frame in switch_frames)
        ):
            pivots.append(pivot)
    return pivots


def draw_pivot(key: Array, pivots: Sequence[int]) -> int:
    """The first perturbed block of an iteration, uniform over the eligible ones."""
    return pivots[int(jax.random.randint(key, (), 0, len(pivots)))]
