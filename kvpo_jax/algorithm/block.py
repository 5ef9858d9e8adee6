"""One block of a video: denoise it under a context, cache it, and cache it anew at a prompt switch.

Pure functions of arrays (paper §3.1 and §3.2). `programs` compiles them for a mesh; `rollout` calls
the programs, block after block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
from flax import struct

from kvpo_jax.algorithm import chunked, flow, kv_cache
from kvpo_jax.types import Array, BlockKV, BlockRecord, KVCache, TextKV


class Network(Protocol):
    """The generator with its weights bound: `functools.partial(Wan.apply, variables)`."""

    def __call__(
        self,
        x: Array,
        sigma: Array,
        text: TextKV,
        context: kv_cache.Context,
        start_frame: Array,
        own_keys: Array | None = None,
    ) -> tuple[Array, BlockKV]:
        """Velocity float[batch, F, Y, X, C] and the block's keys and values, see `Wan`."""
        ...


class Drawn(struct.PyTreeNode):
    """Solver steps that some trajectories draw.

    Attributes:
      transition: of every step but the last, which stays the solver's.
      draws: bool[T], which trajectories.
    """

    transition: flow.Transition
    draws: Array

    def of_passes(self, passes: int) -> Drawn:
        """The same with an axis of passes in front, for a loop over them."""
        steps = len(self.transition.kept)
        index = jnp.arange(passes)
        chosen = jnp.minimum(index, steps - 1)
        return Drawn(
            transition=jax.tree.map(lambda x: x[chosen], self.transition),
            draws=(index < steps)[:, None] & self.draws,
        )


def per_trajectory(text: TextKV, trajectories: int) -> TextKV:
    """TextKV of P prompts, repeated for each of their T trajectories."""
    return jax.tree.map(lambda x: jnp.repeat(x, trajectories, axis=1), text)


def generate_block(
    network: Network,
    schedule: flow.Schedule,
    text: TextKV,
    history: KVCache,
    page: KVCache | None,
    frames: Array,
    noise: Array,
    start_frame: Array,
    drawn: Drawn | None = None,
) -> tuple[BlockRecord, KVCache]:
    """One block of T trajectories of P prompts, and the cache that it was appended to.

    That cache is the page, or without a page the history. Arguments as in `denoise_block`.
    """
    if page is None:
        history = cache = kv_cache.admit(history, text)
    else:
        page = cache = kv_cache.admit(page, text)
    record, kv = denoise_block(
        network, schedule, text, history, page, frames, noise, start_frame, drawn
    )
    return record, kv_cache.append(cache, kv, start_frame)


def denoise_block(
    network: Network,
    schedule: flow.Schedule,
    text: TextKV,
    history: KVCache,
    page: KVCache | None,
    frames: Array,
    noise: Array,
    start_frame: Array,
    drawn: Drawn | None = None,
) -> tuple[BlockRecord, BlockKV]:
    """Integrates Eq. 2 for one block of T trajectories of P prompts; then the pass for the cache.

    Args:
      network: see Network.
      schedule: noise levels of the S solver steps and of the cache-writing pass.
      text: TextKV of P prompts.
      history: frames that the trajectories of a prompt share, frame int32[P, slots].
      page: frames that each trajectory wrote itself, frame int32[P, T, slots], or None.
      frames: int32[P, T, S+1, A], what each pass attends to (`routing.context_frames`).
      noise: float[P, S+1, F, Y, X, C]: the initial latent, then what `renoise` adds before each
        later pass. The trajectories share it: they differ in their frames alone. With noise of
        their own it is float[P, T, S+1, F, Y, X, C].
      start_frame: int32[], first frame of the block.
      drawn: the steps that are drawn; None: every step is the solver's.
    """
    p, t, passes, _ = frames.shape
    if noise.ndim == 6:
        noise = jnp.repeat(noise[:, None], t, axis=1)
    chex.assert_shape(noise, (p, t, passes, ...))
    text = per_trajectory(text, t)
    noise = chunked.fold(jnp.moveaxis(noise, 2, 0), 3, passes, p * t)  # [S+1, P*T, F, Y, X, C]
    start = jnp.full((p * t,), start_frame, jnp.int32)

    def one_pass(carry, xs):
        x, _ = carry
        frames, sigma, sigma_cond, sigma_next, noise_next, drawn = xs
        context = kv_cache.read(frames, history, page)
        velocity, kv = network(x, jnp.full((p * t,), sigma_cond), text, context, start)
        step = schedule.solver, x, velocity, sigma, sigma_next, noise_next
        if drawn is None:
            x_next = flow.step(*step)
        else:
            draws = jnp.tile(drawn.draws, p)[:, None, None, None, None]
            x_next = flow.draw_or_step(drawn.transition, draws, *step)
        return (x_next, kv), (x, velocity)

    def of_next_pass(x: Array) -> Array:
        """What the next pass has; the last pass has none, and its x_next is dropped."""
        return jnp.concatenate([x[1:], x[-1:]])

    per_pass = (
        jnp.moveaxis(frames, 2, 0),
        schedule.sigma,
        schedule.sigma_cond,
        of_next_pass(schedule.sigma),
        of_next_pass(noise),
        None if drawn is None else drawn.of_passes(passes),
    )
    blank = jax.tree.map(jnp.zeros_like, _block_kv_like(history, page, p * t, noise.shape[2]))
    (_, kv), (z, u) = jax.lax.scan(one_pass, (noise[0], blank), per_pass)

    def unfold(x: Array) -> Array:
        """[S+1, P*T, ...] as [P, T, S, ...]: without the cache-writing pass."""
        x = jnp.moveaxis(x[: passes - 1], 0, 1)
        return x.reshape(p, t, *x.shape[1:])

    z, u = unfold(z), unfold(u)
    x_clean = flow.to_clean(z[:, :, -1], u[:, :, -1], schedule.sigma[passes - 2])
    return BlockRecord(z=z, u=u, x_clean=x_clean), kv


def _block_kv_like(history: KVCache, page: KVCache | None, batch: int, frames: int) -> BlockKV:
    """Some BlockKV of the right shape, type and sharding, to start a loop from."""
    if page is None:
        first = history.k[:, :, :1]
        first = jnp.repeat(first, batch // first.shape[1], axis=1)
    else:
        first = page.k.reshape(page.k.shape[0], batch, *page.k.shape[3:])[:, :, :1]
    kv = jnp.repeat(first, frames, axis=2)
    return BlockKV(k=kv, v=kv)


# ---------------------------------------------------------------- prompt switches


def recache(
    network: Network,
    text: TextKV,
    history: KVCache,
    page: KVCache | None,
    latents: Array,
    start_frame: Array,
) -> BlockKV:
    """Keys and values of the last frames under a new prompt, from one forward pass (LongLive).

    The clean latents float[P, T, R, Y, X, C] of frames start_frame ... start_frame + R - 1 attend
    to the sink and to the youngest R - sink of themselves; the oldest are queries only. What of the
    sink lies within the R frames (all of it in a switch at frame R) is made anew as well.
    """
    p, t, frames = latents.shape[:3]
    sink = jnp.arange(history.sink)
    sink = jnp.where(sink < start_frame, sink, -1)
    context = kv_cache.read(jnp.broadcast_to(sink, (p, t, history.sink)), history, page)
    index = jnp.arange(frames)
    own_keys = (index >= history.sink) | (start_frame + index < history.sink)
    flat = latents.reshape(p * t, *latents.shape[2:])
    start = jnp.full((p * t,), start_frame, jnp.int32)
    return network(flat, jnp.zeros(p * t), per_trajectory(text, t), context, start, own_keys)[1]


def switch_prompt(
    network: Network,
    text: TextKV,
    changed: Array,
    history: KVCache,
    page: KVCache | None,
    latents: Array,
    start_frame: Array,
    *,
    global_sink: bool,
) -> KVCache:
    """The page, or without one the history, after a prompt switch.

    Args:
      network: see Network.
      text: TextKV of P prompts, of the new segment.
      changed: bool[P], the prompts whose sentence really changes; the others stay as they are.
      history: see `denoise_block`.
      page: see `denoise_block`.
      latents: float[P, T, R, Y, X, C], the clean latents of the last R frames.
      start_frame: int32[], the first of these.
      global_sink: whether the sink outlives the switch; if not, it is attended to as zeros.
    """
    if page is None:
        if not global_sink:
            history = kv_cache.forget(changed, history)
    elif not global_sink:
        page = kv_cache.forget(changed, _with_own_sink(history, page), history.sink)
    new = recache(network, text, history, page, latents, start_frame)
    new = _where_changed(changed, new, history, page, start_frame)
    return kv_cache.rewrite(history if page is None else page, new, start_frame)


def _with_own_sink(history: KVCache, page: KVCache) -> KVCache:
    """The page with a copy of the sink, which hides the history's.

    The replay still needs the shared history, so it must not be changed.
    """
    sink = jnp.broadcast_to(jnp.arange(page.sink), (*page.frame.shape[:2], page.sink))
    context = kv_cache.look_up(sink, history, page)
    return kv_cache.rewrite(page, BlockKV(k=context.k, v=context.v), 0)


def _where_changed(
    changed: Array, new: BlockKV, history: KVCache, page: KVCache | None, start_frame: Array
) -> BlockKV:
    """`new` for the prompts bool[P] that changed, and what the caches hold for the others."""
    frames = new.k.shape[2]
    p, t = (*history.frame.shape[:1], 1) if page is None else page.frame.shape[:2]
    index = jnp.broadcast_to(start_frame + jnp.arange(frames, dtype=jnp.int32), (p, t, frames))
    old = kv_cache.look_up(index, history, page)
    select = jnp.repeat(changed, t)[None, :, None, None, None, None]
    return BlockKV(k=jnp.where(select, new.k, old.k), v=jnp.where(select, new.v, old.v))


# ---------------------------------------------------------------- videos


def join_blocks(blocks: Sequence[Array], axis: int, count: int = 0) -> Array:
    """The frames of blocks, one after another, along `axis`; see `filled`."""
    return jnp.concatenate(filled(blocks, count), axis=axis)


def filled(blocks: Sequence[Array], count: int) -> Sequence[Array]:
    """The blocks, and zeros up to `count` of them.

    So a video that is not generated to its end has the shape of a whole one.
    """
    missing = count - len(blocks)
    return [*blocks, *[jnp.zeros_like(blocks[0])] * missing] if missing > 0 else blocks


def repeat_trajectories(x: Array, trajectories: int) -> Array:
    """[P, ...] as [P, T, ...], the same for every trajectory."""
    return jnp.stack([x] * trajectories, axis=1)
