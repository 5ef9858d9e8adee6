"""Which past frames a block attends to: the deployment window, and Causal History Routing (paper §3.2, Eqs. 3-4).

Routing is data. A row is int32[A] of absolute frame indices, ascending, -1 (empty) at the end, with
A = sink + past; the network is handed the keys and values of a row and never learns whether it was routed.

    row        = [ sink | routed (past - near) | near ]      in a perturbed pass of a branch (see Window.keep_sink)
    deployment = [ sink |        the last `past` frames ]    everywhere else
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import ml_collections

from kvpo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Window:
    """The slots of a context.

    Attributes:
      sink: the earliest frames, always attended to.
      past: local slots for past frames; the current block comes on top.
      near: how many of these the most recent frames keep; the other past - near are routed.
      excluded: how many of the youngest past frames cannot be drawn (near in the paper; near plus the block in the
        release, which leaves a gap between the pool and the near frames).
      cache_frames: frames that the history holds, sink included; older ones cannot be drawn.
      keep_sink: whether a routed row keeps the sink; if not, its slots are routed too and its frames may be drawn
        (MemFlow's release).
      shared_ring: whether only frames are drawn that a ring to which the perturbed blocks are written would still hold
        at the last of them (release). Here a fork freezes the history, and every frame in it stays.
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
        """Sink frames of a routed row, and the first frame that can be drawn."""
        return self.sink if self.keep_sink else 0

    @property
    def routed(self) -> int:
        return self.slots - self.kept - self.near

    @property
    def slots(self) -> int:
        """A."""
        return self.sink + self.past


def window(config: ml_collections.ConfigDict) -> Window:
    """The Window of a run's config (section `window`)."""
    w = config.window
    if not 0 <= w.near < w.past or w.excluded < w.near or w.cache_frames < w.sink + w.past:
        raise ValueError(
            f"config.window: near={w.near}, past={w.past}, excluded={w.excluded}, cache_frames={w.cache_frames}; "
            "expected 0 <= near < past, excluded >= near and cache_frames >= sink + past"
        )
    return Window(w.sink, w.past, w.near, w.excluded, w.cache_frames, w.keep_sink, w.shared_ring)


def _ascending(frames: Array, valid: Array) -> Array:
    """`frames` where valid, ascending, with -1 for the others at the end."""
    last = jnp.iinfo(jnp.int32).max
    frames = jnp.sort(jnp.where(valid, frames, last).astype(jnp.int32), axis=-1)
    return jnp.where(frames == last, -1, frames)


def deployment_row(window: Window, start_frame: Array) -> Array:
    """int32[A]: what the block that begins at start_frame (int32[]) attends to when nothing is perturbed."""
    sink = jnp.arange(window.sink)
    local = start_frame - window.past + jnp.arange(window.past)
    return _ascending(jnp.concatenate([sink, local]), jnp.concatenate([sink < start_frame, local >= window.sink]))


def routed_rows(window: Window, selected: Array, start_frame: Array) -> Array:
    """int32[..., A] from CHR draws int32[..., routed]: the sink if kept, the draws, the `near` last frames."""
    chex.assert_axis_dimension(selected, -1, window.routed)
    shared = jnp.concatenate([jnp.arange(window.kept), start_frame - window.near + jnp.arange(window.near)])
    shared = jnp.broadcast_to(shared, (*selected.shape[:-1], shared.size))
    rows = jnp.concatenate([shared, selected], axis=-1)
    return _ascending(rows, rows >= 0)


def routable(window: Window, fork: Array | int, last_start: Array | int) -> tuple[Array, Array]:
    """The routable set Omega = [start, stop) at a fork with `fork` past frames, before routed blocks up to last_start.

    Paper: {4, ..., L - 3} counted from 1, i.e. [sink, fork - near). Frames that the history has evicted are left out.
    """
    resident = (last_start if window.shared_ring else fork) - (window.cache_frames - window.sink)
    # While the ring has not evicted anything everything is resident; afterwards the sink's own slots are set apart.
    return jnp.where(resident <= window.sink, window.kept, resident), jnp.asarray(fork - window.excluded)


def _permutation(key: Array, frames: int, start: Array, stop: Array) -> Array:
    """int32[frames]: the frames of [start, stop) in random order, the others behind them."""
    index = jnp.arange(frames)
    rank = jnp.where((index >= start) & (index < stop), jax.random.uniform(key, (frames,)), 2.0)
    return jnp.argsort(rank).astype(jnp.int32)


def draw_independent(key: Array, window: Window, branches: int, frames: int, start: Array, stop: Array) -> Array:
    """CHR draws int32[G, routed]: for each branch, distinct frames of [start, stop), uniform. `frames` bounds stop."""
    draw = lambda k: jnp.sort(_permutation(k, frames, start, stop)[: window.routed])
    return jax.vmap(draw)(jax.random.split(key, branches))


def disperse(permutation: Array, pool: Array, routed: int, branches: int) -> Array:
    """Release's draws int32[G, routed]: branch g takes consecutive entries of one permutation of `pool` frames.

    It begins at g * max(1, pool // G) and goes round; sorted.
    """
    start = jnp.arange(branches)[:, None] * jnp.maximum(1, pool // branches)
    return jnp.sort(permutation[(start + jnp.arange(routed)) % pool], axis=-1)


def draw_dispersed(key: Array, window: Window, branches: int, frames: int, start: Array, stop: Array) -> Array:
    """As `draw_independent`, with the branches spread over one permutation (release)."""
    return disperse(_permutation(key, frames, start, stop), stop - start, window.routed, branches)


DRAWS = {"independent": draw_independent, "dispersed": draw_dispersed}


def eligible_pivots(
    window: Window, blocks: int, block_frames: int, window_blocks: int, switch_frames: Sequence[int]
) -> list[int]:
    """Blocks at which a perturbed window may begin.

    The deployment window must be full, the routable set larger than the draw (with exactly as many frames every
    branch would be the same), the perturbed window inside the video, and no prompt may switch strictly inside it.
    """
    out = []
    for pivot in range(blocks - window_blocks + 1):
        fork, end = pivot * block_frames, (pivot + window_blocks) * block_frames
        start, stop = routable(window, fork, end - block_frames)
        if (
            fork >= window.sink + window.past
            and int(stop) - int(start) > window.routed
            and not any(fork < frame < end for frame in switch_frames)
        ):
            out.append(pivot)
    if not out:
        raise ValueError(
            f"no block can be a pivot: {blocks} blocks of {block_frames} frames, prompt switches at "
            f"{tuple(switch_frames)}, {window_blocks} perturbed blocks, {window}. Lengthen video.blocks, shorten "
            "rollout.window_blocks or move video.switch_frames"
        )
    return out
