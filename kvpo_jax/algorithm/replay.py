"""Replay and Trajectory Velocity Energy (paper §3.3, Eq. 5; Algorithm 1, step 4).

The cached solver states z of each branch go through the current policy under the *unperturbed*
context, and the energy says how far its velocities are from the ones that the branch followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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


class Setting(NamedTuple):
    """What all replays of a run have in common.

    Attributes:
      options: section `replay` of the config.
      schedule: as in the rollout.
      transition: of drawn steps, where these are replayed.
      settled_from: the first solver step that is not routed, where theta equals old in every
        gradient. From it on the branches read in the first block what the replay reads, so that
        their residual and its gradient are 0, and none is computed. None: every step has one.
      own_starts: in the first so many blocks each branch begins with noise of its own; in the
        others one velocity serves the first step of all (`shared_energies`).
    """

    options: ml_collections.ConfigDict
    schedule: flow.Schedule
    transition: flow.Transition | None = None
    settled_from: int | None = None
    own_starts: int = 0


# (policy, setting, lora, frozen, tuples, wanted) -> (energies, floor); see `anchor_energies`.
Energies = Callable[..., tuple[Array, Array | None]]


# ---------------------------------------------------------------- what is replayed


def record_tuples(
    window: routing.Window,
    records: Sequence[BlockRecord],
    start_frames: Array,
    segments: Array,
    noise: Sequence[Array] | None,
    anchor: Sequence[Array] | None = None,
    fresh: Sequence[Array] | None = None,
    steps: Array | None = None,
) -> ReplayTuples:
    """ReplayTuples of the W blocks of a window (Algorithm 1, step 2), still without their caches.

    Args:
      window: the deployment window.
      records: of the branches, [P, G, ...] each.
      start_frames: int32[W], first frame of each block.
      segments: int32[W], prompt segment of each block.
      noise: float[P, F, Y, X, C] each, of the cache-writing pass; None if it is not read
        (`READS_NOISE`).
      anchor: float[P, S, F, Y, X, C] each, states of the anchor; None if they are not replayed.
      fresh: float[P, N, F, Y, X, C] each, noise for end points; None if they are not replayed.
      steps: int32[P, n], from `keys.drawn_steps`; None if all steps are replayed.
    """

    def stacked(blocks: Sequence[Array] | None) -> Array | None:
        return None if blocks is None else jnp.stack(blocks, axis=1)

    later: Any = None  # a program that took the caches would copy them
    return ReplayTuples(
        z=jnp.stack([record.z for record in records], axis=2),
        u=jnp.stack([record.u for record in records], axis=2),
        history=later,
        page=later,
        frames=jax.vmap(partial(routing.deployment_frames, window))(start_frames),
        start_frame=start_frames,
        segment=segments,
        noise=stacked(noise),
        anchor=stacked(anchor),
        fresh=stacked(fresh),
        steps=steps,
    )


def stack_banks(banks: Sequence[MemoryBank | None]) -> MemoryBank | None:
    """The anchor's banks [L, P, ...] at the W blocks, as [L, P, W, ...]; None without banks."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *banks)


class States(struct.PyTreeNode):
    """Solver states to replay, with the axes [P, G, W, S] or what is made of them.

    Attributes:
      z: float[..., F, Y, X, C], the state.
      u: float[..., F, Y, X, C], the velocity that the policy's is compared with; that which the
        branch followed, or what STATES says.
      sigma: float[...], the level.
      start_frame: int32[...], first frame of the block.
      prompt: int32[...].
      segment: int32[...], whose text is read.
      context: int32[...], the batch row of a Context that is read.
      weight: float[...], what the energy of a state counts; None: 1.
      share: float[...], what the loss of a state counts; None: 1.
      advantage: float[...], of the branch; where a state is compared with all branches float[...,
        G], of each; None where the loss is not taken state by state.
      peers: int32[...], where it is compared with all branches: the row of their latents.
    """

    z: Array
    u: Array
    sigma: Array
    start_frame: Array
    prompt: Array
    segment: Array
    context: Array
    weight: Array | None = None
    share: Array | None = None
    advantage: Array | None = None
    peers: Array | None = None

    def __getitem__(self, index) -> States:
        return jax.tree.map(lambda x: x[index], self)

    def flat(self) -> States:
        """All axes folded into one."""
        return chunked.fold(self, self.sigma.ndim, -1)


def replay_states(schedule: flow.Schedule, tuples: ReplayTuples) -> States:
    """Every recorded state, [P, G, W, S]. Its context is that of its prompt and block, of P * W."""
    s = tuples.z.shape[3]
    chex.assert_equal_shape([tuples.z, tuples.u])
    chex.assert_shape(schedule.sigma, (s + 1,))
    return _states(tuples, tuples.z, tuples.u, schedule.sigma[:s])


def _states(
    tuples: ReplayTuples,
    z: Array,
    u: Array,
    sigma: Array,
    weight: Array | None = None,
    share: Array | None = None,
) -> States:
    """States [P, G, W, N] of z and u float[P, G, W, N, ...], with levels and weights float[N]."""
    p, g, w, n = z.shape[:4]
    chex.assert_shape([tuples.start_frame, tuples.segment], (w,))
    prompt, block = jnp.arange(p)[:, None, None, None], jnp.arange(w)[:, None]

    def every(x: Array) -> Array:
        return jnp.broadcast_to(x, (p, g, w, n))

    return States(
        z=z,
        u=u,
        sigma=every(sigma),
        start_frame=every(tuples.start_frame[:, None]),
        prompt=every(prompt),
        segment=every(tuples.segment[:, None]),
        context=every(prompt * w + block),
        weight=None if weight is None else every(weight),
        share=None if share is None else every(share),
    )


def clean_latents(schedule: flow.Schedule, tuples: ReplayTuples) -> Array:
    """The branches' blocks, float[P, G, W, F, Y, X, C]: where the last solver step ends."""
    return flow.to_clean(tuples.z[:, :, :, -1], tuples.u[:, :, :, -1], schedule.sigma[-2])


# ---------------------------------------------------------------- which states are replayed


class Source(NamedTuple):
    """Where the states of a replay come from.

    Attributes:
      make: (setting, tuples) -> States [P, G, W, N].
      followed: u is the velocity that the branch followed there, and z where it was.
      of_anchor: z is the same for all branches of a prompt, made of `ReplayTuples.anchor`.
      of_ends: z is made of the branches' end points and of `ReplayTuples.fresh`.
      size: (options, solver steps) -> N.
    """

    make: Callable[[Setting, ReplayTuples], States]
    followed: bool = False
    of_anchor: bool = False
    of_ends: bool = False
    size: Callable[[ml_collections.ConfigDict, int], int] = lambda options, steps: steps


def branch_states(setting: Setting, tuples: ReplayTuples) -> States:
    """KVPO: the states of the branches, and the velocities that they followed."""
    return replay_states(setting.schedule, tuples)


def anchor_states(setting: Setting, tuples: ReplayTuples) -> States:
    """Eq. 21: the states of the anchor, and the velocities from them to the branch's clean latent.

    sigma^2 |v - u|^2 is then the distance of clean latents (energy = "latent").
    """
    assert tuples.anchor is not None
    p, g, w, s = tuples.z.shape[:4]
    sigma = setting.schedule.sigma[:s]
    z = jnp.broadcast_to(tuples.anchor[:, None], tuples.z.shape)
    clean = clean_latents(setting.schedule, tuples)[:, :, :, None]
    return _states(tuples, z, (z - clean) / sigma[:, None, None, None, None], sigma)


def times(setting: Setting) -> Array:
    """The levels float[N] at which end points are replayed: options.times, or the solver's."""
    given, sigma = setting.options.times, setting.schedule.sigma
    return jnp.asarray(given, sigma.dtype) if given else sigma[:-1]


def end_states(setting: Setting, tuples: ReplayTuples) -> States:
    """Forward process: the branches' clean latents, noised anew; the velocities noise - clean."""
    assert tuples.fresh is not None
    clean = clean_latents(setting.schedule, tuples)[:, :, :, None]
    sigma, noise = times(setting), tuples.fresh[:, None]
    z = flow.add_noise(clean, noise, sigma[:, None, None, None, None])
    return _states(tuples, z, noise - clean, sigma)


def even_weight(drop: Array, std: Array, of_velocity: Array) -> Array:
    """Every step counts 1."""
    return jnp.ones_like(std)


def flow_grpo_weight(drop: Array, std: Array, of_velocity: Array) -> Array:
    """Flow-GRPO for Wan: q / sqrt(sigma - sigma') with std = q sqrt(sigma - sigma')."""
    return std / drop


def rectified_weight(drop: Array, std: Array, of_velocity: Array) -> Array:
    """Flash-GRPO: 1 / |d log p / dv| over its mean, so that no step dominates the gradient.

    With the noise eps that was drawn, d log p / dv = |dm/dv| eps / std.
    """
    weight = std / jnp.abs(of_velocity)
    return weight / weight.mean()


# What the loss of a drawn step counts: (sigma - sigma', std, dm/dv) float[S-1] each -> float[S-1].
STEP_WEIGHTS: Registry[Callable[[Array, Array, Array], Array]] = Registry(
    "replay.step_weight",
    {"even": even_weight, "flow_grpo": flow_grpo_weight, "rectified": rectified_weight},
)


def transition_states(setting: Setting, tuples: ReplayTuples) -> States:
    """The states before each drawn step, and the velocities whose mean is the state after it.

    A drawn step is z' = m(z, v) + std eps, with m linear in v: m = a z + b v. So z' - m(z, v) is
    b (u - v), and the log-probability of z' is -b^2 / (2 std^2) |u - v|^2 and a constant, which is
    the weight here. As in all published code it is of the mean over elements, not of the sum.
    replay.step_weight says what the loss of a step counts.
    """
    transition, levels = setting.transition, setting.schedule.sigma
    assert transition is not None
    s = tuples.z.shape[3]
    sigma, after = levels[: s - 1], levels[1:s]
    kept, std = transition.kept * after, transition.drawn * after
    of_state, of_velocity = 1 - after + kept, kept * (1 - sigma) - (1 - after) * sigma

    def spread(x: Array) -> Array:
        return x[:, None, None, None, None]

    z, reached = tuples.z[:, :, :, :-1], tuples.z[:, :, :, 1:]
    u = (reached - spread(of_state) * z) / spread(of_velocity)
    share = STEP_WEIGHTS[setting.options.step_weight](sigma - after, std, of_velocity)
    return _states(tuples, z, u, sigma, jnp.square(of_velocity) / (2 * jnp.square(std)), share)


STATES: Registry[Source] = Registry(
    "replay.states",
    {
        "branch": Source(branch_states, followed=True),
        "anchor": Source(anchor_states, of_anchor=True),
        "ends": Source(
            end_states, of_ends=True, size=lambda options, steps: len(options.times) or steps
        ),
        "transitions": Source(transition_states, size=lambda options, steps: steps - 1),
    },
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
    floor = jnp.square(jnp.maximum(sigma, options.sigma_floor))
    return jnp.square(sigma) * velocity_energy(velocity, u, sigma, options) / (2 * floor)


def latent_energy(velocity: Array, u: Array, sigma: Array, options) -> Array:
    """Eq. 21: mean squared error of the clean latent, sigma^2 (1/d) |v - u|^2."""
    return jnp.square(sigma) * velocity_energy(velocity, u, sigma, options)


ENERGIES: Registry[StepEnergy] = Registry(
    "replay.energy", {"velocity": velocity_energy, "clean": clean_energy, "latent": latent_energy}
)


# ---------------------------------------------------------------- Eq. 5


def state_energy(
    options: ml_collections.ConfigDict, velocity: Array, u: Array, states: States
) -> Array:
    """What a state adds to the energy of velocities u, float[R] of states [R]."""
    energy = ENERGIES[options.energy](velocity, u, states.sigma, options)
    return energy if states.weight is None else states.weight * energy


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

    def per_step(lora: PyTree, frozen_and_context: PyTree, states: States) -> tuple[Array, dict]:
        frozen, context = frozen_and_context
        velocity = replayed_velocity(*policy(frozen, lora), context, states)
        return state_energy(options, velocity, states.u, states), {}

    constants = frozen, context
    return chunked.sum_over_steps(per_step, lora, constants, states, options.chunk, wanted)[0]


def shared_energies(
    policy: Policy,
    options: ml_collections.ConfigDict,
    lora: PyTree,
    frozen: PyTree,
    context: Context,
    states: States,
) -> Array:
    """The summands of Eq. 5 of states that the branches share; float[P, G] of states [P, G, W].

    Such are the first steps of blocks that the branches begin with the same noise, and all states
    of the anchor. Under the anchor's context they read the same past too. So one velocity serves
    all of them, and one gradient, once the weight of each branch is known. A chunk then runs
    forward again: that is little, as it is one for all branches.
    """
    p, g, w = states.sigma.shape
    followed = chunked.fold(jnp.moveaxis(states.u, 1, 2), 2, p * w)  # [P * W, G, F, Y, X, C]

    def of_chunk(rows: tuple[States, Array]) -> Array:
        shared, followed = rows
        velocity = replayed_velocity(*policy(frozen, lora), context, shared)
        of_branch = jax.vmap(
            lambda u: state_energy(options, velocity, u, shared), in_axes=1, out_axes=1
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


class Steps(NamedTuple):
    """The states of a branch as masks bool[W * N]; those that the branches share apart.

    Attributes:
      shared: one for all branches, with gradient.
      shared_plain: one for all branches, without.
      learned: with gradient.
      plain: without.
      settled: whose residual and gradient are 0.
    """

    shared: np.ndarray
    shared_plain: np.ndarray
    learned: np.ndarray
    plain: np.ndarray
    settled: np.ndarray


def split_steps(
    options: ml_collections.ConfigDict,
    blocks: int,
    count: int,
    settled_from: int | None,
    own_starts: int = 0,
) -> Steps:
    """How `anchor_energies` treats the `count` states of each block, with its arguments."""
    source = STATES[options.states]
    block, step = np.divmod(np.arange(blocks * count), count)
    shared = (step == 0) & (block >= own_starts) & source.followed | source.of_anchor
    settled = (block == 0) & (step >= (count if settled_from is None else settled_from))
    settled = settled & ~shared & source.followed
    learned, rest = step < options.grad_steps, ~shared & ~settled
    return Steps(shared & learned, shared & ~learned, rest & learned, rest & ~learned, settled)


def anchor_energies(
    policy: Policy,
    setting: Setting,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool = True,
) -> tuple[Array, Array | None]:
    """Paper: Eq. 5 under the anchor's own cache, all blocks and steps at once.

    Gradients flow to lora from the first `replay.grad_steps` steps, and to `frozen` only without
    chunks.

    Args:
      policy: see Policy; it must not close over arrays.
      setting: of the run.
      lora: of the policy.
      frozen: what else the policy needs.
      tuples: what the rollout recorded.
      wanted: bool[], whether the gradient will be read.

    Returns:
      Energies float[P, G], and what rounding makes of the zeros, float[P, G], or None.
    """
    options = setting.options
    states = STATES[options.states].make(setting, tuples)
    context = _anchor_context(tuples)
    p, g, w, n = states.sigma.shape
    steps = split_steps(options, w, n, setting.settled_from, setting.own_starts)
    constant = jax.lax.stop_gradient((lora, frozen))
    flat = chunked.fold(states, 4, p, g, w * n)

    def energies_of(which: np.ndarray, lora: PyTree, frozen: PyTree, wanted: Array | bool) -> Array:
        chosen = flat[:, :, np.flatnonzero(which)]
        return branch_energies(policy, options, lora, frozen, context, chosen, wanted)

    total = jnp.zeros((p, g), tuples.z.dtype)
    for which, of in ((steps.shared, (lora, frozen)), (steps.shared_plain, constant)):
        if which.any():
            # A slice of the steps of every block, which XLA reads in place of a gathered copy.
            own = which.reshape(w, n)
            of_blocks, of_steps = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
            chosen = states[:, :, of_blocks[0] :, of_steps[0] : of_steps[-1] + 1]
            total += shared_energies(
                policy, options, *of, context, chunked.fold(chosen, 4, p, g, -1)
            )
    if steps.learned.any():
        total += energies_of(steps.learned, lora, frozen, wanted)
    if steps.plain.any():
        total += energies_of(steps.plain, *constant, False)
    if not steps.settled.any():
        return total, None
    floor = energies_of(steps.settled, *constant, False)
    return total + floor, floor


def _anchor_context(tuples: ReplayTuples) -> Context:
    """What the anchor read at each block, P * W batch rows."""
    frames = jnp.broadcast_to(tuples.frames, (tuples.z.shape[0], *tuples.frames.shape))
    return kv_cache.read(frames, tuples.history, tuples.page)


def _own_context(tuples: ReplayTuples, page: KVCache, states: States) -> tuple[Context, States]:
    """What each branch reads of its own page, W * P * G batch rows, and states that point there."""
    p, g, w = states.sigma.shape[:3]
    context = Context.join([_branch_context(tuples, page, b) for b in range(w)])
    row = jnp.arange(w)[:, None] * p * g + jnp.arange(p * g).reshape(p, g, 1, 1)
    return context, states.replace(context=jnp.broadcast_to(row, states.context.shape))


def own_energies(
    policy: Policy,
    setting: Setting,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool = True,
) -> tuple[Array, None]:
    """Energies under what each branch itself had written when it was rolled out.

    Arguments and result as in `anchor_energies`, but no step is settled or shared. Under it a state
    that a branch followed has no energy, so it is of use for other states (STATES) alone.
    """
    options = setting.options
    states = STATES[options.states].make(setting, tuples)
    context, states = _own_context(tuples, tuples.page, states)
    p, g, w, n = states.sigma.shape
    flat, learned = chunked.fold(states, 4, p, g, w * n), np.arange(w * n) % n < options.grad_steps
    total = jnp.zeros((p, g), tuples.z.dtype)
    constant = (*jax.lax.stop_gradient((lora, frozen)), False)
    for steps, (of, still, read) in ((learned, (lora, frozen, wanted)), (~learned, constant)):
        if steps.any():
            chosen = flat[:, :, np.flatnonzero(steps)]
            total += branch_energies(policy, options, of, still, context, chosen, read)
    return total, None


def self_rolled_energies(
    policy: Policy,
    setting: Setting,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool = True,
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
    options = setting.options
    p, g, w, s = tuples.z.shape[:4]
    learned = min(options.grad_steps, s)
    states = replay_states(setting.schedule, tuples)
    page, energies = _roll_pages(policy, setting, lora, frozen, tuples)
    context, states = _own_context(tuples, page, states)
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
    policy: Policy, setting: Setting, lora: PyTree, frozen: PyTree, tuples: ReplayTuples
) -> tuple[KVCache, Array]:
    """Pass 1 of `self_rolled_energies`: what the branches write, and float[P, G], the energies of
    the steps without gradient.
    """
    assert tuples.noise is not None
    options, schedule = setting.options, setting.schedule
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
    "replay.context",
    {"anchor": anchor_energies, "own": own_energies, "self_rolled": self_rolled_energies},
)
READS_NOISE = ("self_rolled",)  # the contexts that read `ReplayTuples.noise`


# ---------------------------------------------------------------- state by state


class Replica(NamedTuple):
    """States [R] with what the policies predict there; only `theta` carries gradient.

    Attributes:
      states: [R].
      theta: float[R, F, Y, X, C], the velocities of the policy that is trained.
      old: of the policy of the rollout; on policy exactly those of theta.
      on_policy: bool[], theta equals old.
      reference: of the frozen initial policy; None where nobody asks.
      peers: float[R, G, F, Y, X, C], clean latents of all branches; None where nobody asks.
    """

    states: States
    theta: Array
    old: Array
    on_policy: Array
    reference: Array | None
    peers: Array | None


class Others(struct.PyTreeNode):
    """What a loss that is taken state by state reads besides the states.

    Attributes:
      advantages: float[P, G].
      on_policy: bool[], theta equals old.
      old: LoRA tree of pi_old; None if it is always that of theta.
      reference: LoRA tree of pi_ref; None where it is not read.
    """

    advantages: Array
    on_policy: Array
    old: PyTree | None
    reference: PyTree | None


# (Replica) -> float[R], the loss of each state; and what is seen, name -> float[R].
StateLoss = Callable[[Replica], tuple[Array, chunked.Seen]]


def with_peers(schedule: flow.Schedule, tuples: ReplayTuples, anchors: int) -> ReplayTuples:
    """The tuples of the first `anchors` branches, with the clean latents of all at every state."""
    s, page = tuples.z.shape[3], tuples.page
    sigma = schedule.sigma[:s, None, None, None, None]
    clean = flow.to_clean(tuples.z, tuples.u, sigma)
    if page.frame.ndim == 3:  # a branch's own
        first = kv_cache.map_trajectories(lambda x: x[:, :anchors], page.replace(bank=None))
        page = first.replace(bank=page.bank)
    return tuples.replace(
        z=tuples.z[:, :anchors], u=tuples.u[:, :anchors], page=page, peers=jnp.moveaxis(clean, 1, 3)
    )


def state_losses(
    policy: Policy,
    setting: Setting,
    lora: PyTree,
    frozen: PyTree,
    tuples: ReplayTuples,
    wanted: Array | bool,
    loss: StateLoss,
    others: Others,
    seen: Sequence[str],
) -> tuple[Array, chunked.Seen]:
    """The mean loss of a branch's states, float[P, G], and the means of what is seen.

    Arguments as in `anchor_energies`; `loss` of states, what it reads, and the names of `seen`. No
    state stands for several branches. Those without gradient are left out, and those that were not
    drawn (tuples.steps).
    """
    options = setting.options
    states = STATES[options.states].make(setting, tuples)
    if options.context == "own":
        context, states = _own_context(tuples, tuples.page, states)
    else:
        context = _anchor_context(tuples)
    p, g, w, n = states.sigma.shape
    advantage = others.advantages[:, :, None, None]
    peers = None
    if tuples.peers is not None:
        advantage = jnp.moveaxis(advantage, 1, -1)[:, None]
        peers = chunked.fold(tuples.peers, 3, p * w * n)
        row = (jnp.arange(p)[:, None, None] * w + jnp.arange(w)[:, None]) * n + jnp.arange(n)
        states = states.replace(peers=jnp.broadcast_to(row[:, None], (p, g, w, n)))
    states = states.replace(
        advantage=jnp.broadcast_to(advantage, (p, g, w, n, *advantage.shape[4:]))
    )

    def per_state(lora: PyTree, constants: PyTree, states: States) -> tuple[Array, chunked.Seen]:
        frozen, context, peers, others = constants

        def velocity(lora: PyTree) -> Array:
            return replayed_velocity(*policy(frozen, lora), context, states)

        def of(lora: PyTree) -> Array:
            return jax.lax.stop_gradient(velocity(lora))

        theta = velocity(lora)
        old = jax.lax.stop_gradient(theta)
        if others.old is not None:
            old = jnp.where(others.on_policy, old, of(others.old))
        reference = None if others.reference is None else of(others.reference)
        around = None if peers is None else peers[states.peers]
        return loss(Replica(states, theta, old, others.on_policy, reference, around))

    chosen = states[:, :, :, : options.grad_steps]
    if tuples.steps is not None:
        chosen = jax.vmap(lambda own, steps: own[:, :, steps])(chosen, tuples.steps)
    count = w * chosen.sigma.shape[3]
    chosen = chunked.fold(chosen, 4, p, g, count)
    constants = frozen, context, peers, others
    sums = chunked.sum_over_steps(per_state, lora, constants, chosen, options.chunk, wanted, seen)
    return jax.tree.map(lambda x: x / count, sums)


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
    """What is replayed for one prompt; the last two as in `Setting`."""

    branches: int
    blocks: int
    steps: int
    settled_from: int | None
    own_starts: int = 0


CountRows = Callable[[ml_collections.ConfigDict, Extent], Rows]  # of section `replay`


def anchor_rows(options: ml_collections.ConfigDict, extent: Extent) -> Rows:
    """Of `anchor_energies`: the branches share the first step of a block."""
    count = STATES[options.states].size(options, extent.steps)
    steps = split_steps(options, extent.blocks, count, extent.settled_from, extent.own_starts)
    learned, plain = steps.learned.sum(), (steps.plain | steps.settled).sum()
    shared, shared_plain = steps.shared.sum(), steps.shared_plain.sum()
    return Rows(
        int(shared + extent.branches * learned), int(shared_plain + extent.branches * plain)
    )


def own_rows(options: ml_collections.ConfigDict, extent: Extent) -> Rows:
    """Of `own_energies`: every state of every branch. `state_losses` leaves the plain ones out."""
    count = STATES[options.states].size(options, extent.steps)
    learned = options.steps_drawn or min(options.grad_steps, count)
    states = extent.branches * extent.blocks
    return Rows(states * learned, states * (count - learned))


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
ROWS: dict[str, CountRows] = {
    "anchor": anchor_rows,
    "own": own_rows,
    "self_rolled": self_rolled_rows,
}
