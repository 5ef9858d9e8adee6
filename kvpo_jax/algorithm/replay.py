"""Replay and Trajectory Velocity Energy (paper §3.3, Eq. 5; Algorithm 1, step 4).

The cached solver states z of each branch go through the current policy under the *unperturbed*
context, and the energy says how far its velocities are from the ones that the branch followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from kvpo_jax.algorithm import chunked, flow, kv_cache, routing
from kvpo_jax.algorithm.block import Network, per_trajectory
from kvpo_jax.algorithm.kv_cache import Context
from kvpo_jax.errors import Registry
from kvpo_jax.types import Array, BlockRecord, KVCache, MemoryBank, PyTree, ReplayTuples, TextKV

# (frozen, lora) -> the network of that policy, and the text that it reads, float[L, P, M, K, H, D].
Policy = Callable[[PyTree, PyTree], tuple[Network, TextKV]]
# (policy, options, schedule, lora, frozen, tuples, wanted, settled_from, own_starts) -> (energies,
# floor); see `anchor_energies`.
Energies = Callable[..., tuple[Array, Array | None]]


# ---------------------------------------------------------------- what is replayed


def record_tuples(
    window: routing.Window,
    records: Sequence[BlockRecord],
    history: KVCache,
    page: KVCache,
    start_frames: Sequence[int],
    segments: Sequence[int],
    noise: Sequence[Array] | None,
) -> ReplayTuples:
    """ReplayTuples of the W blocks of a window (Algorithm 1, step 2).

    Args:
      window: the deployment window.
      records: of the branches, [P, G, ...] each.
      history: at the fork.
      page: what the anchor wrote, with the banks of the W blocks.
      start_frames: first frame of each block.
      segments: prompt segment of each block.
      noise: float[P, F, Y, X, C] each, of the cache-writing pass; None if it is not read
        (`READS_NOISE`).
    """
    return ReplayTuples(
        z=jnp.stack([record.z for record in records], axis=2),
        u=jnp.stack([record.u for record in records], axis=2),
        history=history.replace(bank=None),
        page=page,
        frames=jnp.stack([routing.deployment_frames(window, start) for start in start_frames]),
        start_frame=jnp.asarray(start_frames, jnp.int32),
        segment=jnp.asarray(segments, jnp.int32),
        noise=None if noise is None else jnp.stack(noise, axis=1),
    )


def stack_banks(banks: Sequence[MemoryBank | None]) -> MemoryBank | None:
    """The anchor's banks [L, P, ...] at the W blocks, as [L, P, W, ...]; None without banks."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *banks)


class States(struct.PyTreeNode):
    """Solver states to replay, with the axes [P, G, W, S] or what is made of them.

    Attributes:
      z: float[..., F, Y, X, C], the state.
      u: float[..., F, Y, X, C], the velocity that the branch followed.
      sigma: float[...], the level.
      start_frame: int32[...], first frame of the block.
      prompt: int32[...].
      segment: int32[...], whose text is read.
      context: int32[...], the batch row of a Context that is read.
    """

    z: Array
    u: Array
    sigma: Array
    start_frame: Array
    prompt: Array
    segment: Array
    context: Array

    def __getitem__(self, index) -> States:
        return jax.tree.map(lambda x: x[index], self)

    def flat(self) -> States:
        """All axes folded into one."""
        return chunked.fold(self, self.sigma.ndim, -1)


def replay_states(schedule: flow.Schedule, tuples: ReplayTuples) -> States:
    """Every recorded state, [P, G, W, S]. Its context is that of its prompt and block, of P * W."""
    p, g, w, s = tuples.z.shape[:4]
    chex.assert_equal_shape([tuples.z, tuples.u])
    chex.assert_shape([tuples.start_frame, tuples.segment], (w,))
    chex.assert_shape(schedule.sigma, (s + 1,))
    prompt, block = jnp.arange(p)[:, None, None, None], jnp.arange(w)[:, None]

    def every(x: Array) -> Array:
        return jnp.broadcast_to(x, (p, g, w, s))

    return States(
        z=tuples.z,
        u=tuples.u,
        sigma=every(schedule.sigma[:s]),
        start_frame=every(tuples.start_frame[:, None]),
        prompt=every(prompt),
        segment=every(tuples.segment[:, None]),
        context=every(prompt * w + block),
    )


def replayed_velocity(network: Network, text: TextKV, context: Context, states: States) -> Array:
    """v_theta(z, sigma, K_<b), float[R, F, Y, X, C] of states [R], in one batch."""
    prompt = jax.tree.map(lambda t: t[:, states.prompt, states.segment], text)
    context = context.take(states.context)
    return network(states.z, states.sigma, prompt, context, states.start_frame)[0]


# ---------------------------------------------------------------- the energy of a step

# (velocity, u, sigma, options) -> float[R], of velocities float[R, F, Y, X, C] at levels float[R].
StepEnergy = Callable[[Array, Array, Array, ml_collections.ConfigDict], Array]


def velocity_energy(velocity: Array, u: Array, sigma: Array, options) -> Array:
    """Paper, the summand of Eq. 5: (1/d) |v - u|^2, with d the elements of the block's latent."""
    return jnp.mean(jnp.square(velocity - u), axis=(1, 2, 3, 4))


def clean_energy(velocity: Array, u: Array, sigma: Array, options) -> Array:
    """Release: mean squared error of the clean latent over 2 max(sigma, options.sigma_floor)^2.

    The error of the clean latent is sigma (v - u).
    """
    error = jnp.mean(jnp.square(velocity - u), axis=(1, 2, 3, 4))
    floor = jnp.square(jnp.maximum(sigma, options.sigma_floor))
    return jnp.square(sigma) * error / (2 * floor)


ENERGIES: Registry[StepEnergy] = Registry(
    "replay.energy", {"velocity": velocity_energy, "clean": clean_energy}
)


# ---------------------------------------------------------------- Eq. 5


def branch_energies(
    policy: Policy,
    options: ml_collections.ConfigDict,
    lora: PyTree,
    frozen: PyTree,
    context: Context,
    states: States,
    wanted: Array | bool,
) -> Array:
    """Eq. 5: E_g = sum over b in B and s of (1/d) |v_theta(z_bs, sigma_s, K_<b) - u_bs|^2.

    float[P, G] of states [P, G, N], some or all of a branch's W * S; `wanted` as in
    `chunked.sum_over_steps`.
    """
    step_energy = ENERGIES[options.energy]

    def per_step(lora: PyTree, frozen_and_context: PyTree, states: States) -> Array:
        frozen, context = frozen_and_context
        velocity = replayed_velocity(*policy(frozen, lora), context, states)
        return step_energy(velocity, states.u, states.sigma, options)

    return chunked.sum_over_steps(per_step, lora, (frozen, context), states, options.chunk, wanted)


def first_step_energies(
    policy: Policy,
    options: ml_collections.ConfigDict,
    lora: PyTree,
    frozen: PyTree,
    context: Context,
    states: States,
) -> Array:
    """The summands of Eq. 5 of the first step of some blocks; float[P, G] of states [P, G, W].

    Here the branches of a prompt begin a block with the same noise, and under the anchor's context
    they read the same past. So one velocity serves all of them, and one gradient, once the weight
    of each branch is known. A chunk then runs forward again: that is little, as it is one for all
    branches.
    """
    p, g, w = states.sigma.shape
    step_energy = ENERGIES[options.energy]
    followed = chunked.fold(jnp.moveaxis(states.u, 1, 2), 2, p * w)  # [P * W, G, F, Y, X, C]

    def of_chunk(rows: tuple[States, Array]) -> Array:
        shared, followed = rows
        velocity = replayed_velocity(*policy(frozen, lora), context, shared)
        of_branch = jax.vmap(
            lambda u: step_energy(velocity, u, shared.sigma, options), in_axes=1, out_axes=1
        )
        return of_branch(followed)

    energy = chunked.map_chunks(
        jax.checkpoint(of_chunk) if options.chunk else of_chunk,
        (states[:, 0].flat(), followed),
        p * w,
        options.chunk,
    )
    return energy.reshape(p, w, g).sum(axis=1)


# ---------------------------------------------------------------- the context of the replay


class Later(NamedTuple):
    """The steps of a branch that the others do not share, as masks bool[W * S].

    Attributes:
      learned: with gradient.
      plain: without.
      settled: whose residual and gradient are 0.
    """

    learned: np.ndarray
    plain: np.ndarray
    settled: np.ndarray


def later_steps(
    options: ml_collections.ConfigDict,
    blocks: int,
    steps: int,
    settled_from: int | None,
    own_starts: int = 0,
) -> Later:
    """How `anchor_energies` treats the steps of a branch, with its arguments."""
    block, step = np.divmod(np.arange(blocks * steps), steps)
    settled = (block == 0) & (step >= (steps if settled_from is None else settled_from))
    learned = (step < options.grad_steps) & ~settled
    later = (step > 0) | (block < own_starts)
    return Later(later & learned, later & ~learned & ~settled, later & settled)


def anchor_energies(
    policy: Policy,
    options: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool = True,
    settled_from: int | None = None,
    own_starts: int = 0,
) -> tuple[Array, Array | None]:
    """Paper: Eq. 5 under the anchor's own cache, all blocks and steps at once.

    Gradients flow to lora from the first `options.grad_steps` steps, and to `frozen` only without
    chunks.

    Args:
      policy: see Policy; it must not close over arrays.
      options: section `replay` of the config.
      schedule: as in the rollout.
      lora: of the policy.
      frozen: what else the policy needs.
      tuples: what the rollout recorded.
      wanted: bool[], whether the gradient will be read.
      settled_from: the first solver step that is not routed, where theta equals old in every
        gradient. From it on the branches read in the first block what the replay reads, so that
        their residual and its gradient are 0, and none is computed. None: every step has one.
      own_starts: in the first so many blocks each branch begins with noise of its own; in the
        others one velocity serves the first step of all (`first_step_energies`).

    Returns:
      Energies float[P, G], and what rounding makes of the zeros, float[P, G], or None.
    """
    p, g, w, s = tuples.z.shape[:4]
    states = replay_states(schedule, tuples)
    frames = jnp.broadcast_to(tuples.frames, (p, *tuples.frames.shape))
    context = kv_cache.read(frames, tuples.history, tuples.page)
    steps = later_steps(options, w, s, settled_from, own_starts)
    constant = jax.lax.stop_gradient((lora, frozen))
    flat = chunked.fold(states, 4, p, g, w * s)

    def energies_of(which: np.ndarray, lora: PyTree, frozen: PyTree, wanted: Array | bool) -> Array:
        chosen = flat[:, :, np.flatnonzero(which)]
        return branch_energies(policy, options, lora, frozen, context, chosen, wanted)

    total = jnp.zeros((p, g), tuples.z.dtype)
    if own_starts < w:
        first = states[:, :, own_starts:, 0]
        total = first_step_energies(policy, options, lora, frozen, context, first)
    if steps.learned.any():
        total += energies_of(steps.learned, lora, frozen, wanted)
    if steps.plain.any():
        total += energies_of(steps.plain, *constant, False)
    if not steps.settled.any():
        return total, None
    floor = energies_of(steps.settled, *constant, False)
    return total + floor, floor


def self_rolled_energies(
    policy: Policy,
    options: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool = True,
    settled_from: int | None = None,
    own_starts: int = 0,
) -> tuple[Array, None]:
    """Release: from the second block on, each branch reads what the replaying model wrote.

    Arguments and result as in `anchor_energies`, but no step is settled or shared. The first block
    reads the unperturbed cache at the fork. After each block the solver's step from the replaying
    model's own last velocity to the context level, with the rollout's noise, is written into a page
    of the branch's own; nothing flows back through it.

    Pass 1, without gradient, rolls every branch forward to fill its page, and sums the energies of
    the steps that carry no gradient. Pass 2 is of the steps that do, for all blocks at once: they
    read the finished page instead of one snapshot per block.
    """
    p, g, w, s = tuples.z.shape[:4]
    learned = min(options.grad_steps, s)
    states = replay_states(schedule, tuples)
    page, energies = _roll_pages(policy, options, schedule, lora, frozen, tuples)
    context = Context.join([_branch_context(tuples, page, b) for b in range(w)])
    row = jnp.arange(w)[:, None] * p * g + jnp.arange(p * g).reshape(p, g, 1, 1)
    states = states.replace(context=jnp.broadcast_to(row, states.context.shape))
    learned_states = chunked.fold(states[:, :, :, :learned], 4, p, g, w * learned)
    energies += branch_energies(policy, options, lora, frozen, context, learned_states, wanted)
    return energies, None


def _branch_context(tuples: ReplayTuples, page: KVCache, block: int) -> Context:
    """What a block of each branch reads, P * G batch rows."""
    p, g, w = tuples.z.shape[:3]
    frames = jnp.broadcast_to(tuples.frames[block], (p, g, tuples.frames.shape[1]))
    bank_row = jnp.repeat(jnp.arange(p) * w + block, g)
    page = page.replace(bank=tuples.page.bank)
    return kv_cache.read(frames, tuples.history, page, bank_row)


def _roll_pages(
    policy: Policy,
    options: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
) -> tuple[KVCache, Array]:
    """Pass 1 of `self_rolled_energies`: what the branches write, and float[P, G], the energies of
    the steps without gradient.
    """
    assert tuples.noise is not None
    p, g, w, s = tuples.z.shape[:4]
    learned = min(options.grad_steps, s)
    states = replay_states(schedule, tuples)
    branch = jnp.arange(p * g).reshape(p, g, 1, 1)
    lora, frozen = jax.lax.stop_gradient((lora, frozen))
    network, text = policy(frozen, lora)
    unwritten = jnp.full_like(tuples.page.frame, -1)
    page = kv_cache.repeat(tuples.page.replace(frame=unwritten, bank=None), g)
    energies = jnp.zeros((p, g))
    for b in range(w if learned < s else w - 1):
        context = _branch_context(tuples, page, b)
        # The last step is needed for what is written, the others for their energy.
        block = states[:, :, b : b + 1, min(learned, s - 1) :]
        block = block.replace(context=jnp.broadcast_to(branch, block.context.shape)).flat()
        replayed = partial(replayed_velocity, network, text, context)
        velocity = chunked.map_chunks(replayed, block, block.sigma.size, options.chunk)
        if learned < s:
            energy = ENERGIES[options.energy](velocity, block.u, block.sigma, options)
            energies += energy.reshape(p, g, -1).sum(axis=-1)
        if b < w - 1:
            last = velocity.reshape(p, g, -1, *velocity.shape[1:])[:, :, -1]
            x = flow.step(
                schedule.solver,
                tuples.z[:, :, b, -1],
                last,
                schedule.sigma[-2],
                schedule.sigma[-1],
                tuples.noise[:, None, b],
            ).reshape(p * g, *velocity.shape[1:])
            segment = tuples.segment[b]
            prompt = jax.tree.map(lambda t, segment=segment: t[:, :, segment], text)
            start = jnp.full((p * g,), tuples.start_frame[b], jnp.int32)
            sigma_cond = jnp.full((p * g,), schedule.sigma_cond[-1])
            kv = network(x, sigma_cond, per_trajectory(prompt, g), context, start)[1]
            page = kv_cache.append(page, kv, tuples.start_frame[b])
    return page, energies


CONTEXTS: Registry[Energies] = Registry(
    "replay.context", {"anchor": anchor_energies, "self_rolled": self_rolled_energies}
)
READS_NOISE = ("self_rolled",)  # the contexts that read `ReplayTuples.noise`


# ---------------------------------------------------------------- the text of the replay

# (encode, text of the rollout) -> the text that is replayed; `encode` makes it with the policy.
ReplayText = Callable[[Callable[[], TextKV], TextKV], TextKV]


def policy_text(encode: Callable[[], TextKV], text: TextKV) -> TextKV:
    """Paper: made anew by the replaying policy; LoRA on text keys and values is trained."""
    return encode()


def rollout_text(encode: Callable[[], TextKV], text: TextKV) -> TextKV:
    """Release: as the rollout cached it; it carries no gradient."""
    return text


TEXTS: Registry[ReplayText] = Registry(
    "replay.text", {"policy": policy_text, "rollout": rollout_text}
)


# ---------------------------------------------------------------- what a replay costs


class Rows(NamedTuple):
    """How many blocks a replay passes through the network for one prompt.

    Attributes:
      learned: with gradient, where one is wanted.
      plain: forward alone.
    """

    learned: int
    plain: int


class Extent(NamedTuple):
    """What is replayed for one prompt; the last two as in `anchor_energies`."""

    branches: int
    blocks: int
    steps: int
    settled_from: int | None
    own_starts: int = 0


CountRows = Callable[[ml_collections.ConfigDict, Extent], Rows]  # of section `replay`


def anchor_rows(options: ml_collections.ConfigDict, extent: Extent) -> Rows:
    """Of `anchor_energies`: the branches share the first step of a block."""
    branches, blocks, _, _, own_starts = extent
    later = later_steps(options, *extent[1:])
    learned, plain = later.learned.sum(), (later.plain | later.settled).sum()
    return Rows(blocks - own_starts + branches * int(learned), branches * int(plain))


def self_rolled_rows(options: ml_collections.ConfigDict, extent: Extent) -> Rows:
    """Of `self_rolled_energies`.

    Pass 1 replays the steps without gradient of every block, or the last step that its page needs,
    and writes the page of every block but the last.
    """
    branches, blocks, steps, *_ = extent
    learned = min(options.grad_steps, steps)
    rolled = (steps - learned) * blocks or blocks - 1
    return Rows(branches * blocks * learned, branches * (rolled + blocks - 1))


# Of an alternative that is not here, every state is taken to be replayed once with its gradient.
ROWS: dict[str, CountRows] = {"anchor": anchor_rows, "self_rolled": self_rolled_rows}
