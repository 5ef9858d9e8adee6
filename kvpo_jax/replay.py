"""Replay and Trajectory Velocity Energy (paper §3.3, Eq. 5; Algorithm 1, step 4).

The cached solver states z of each branch go through the current policy under the *unperturbed* context, and the
energy says how far its velocities are from the ones that the branch followed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
from flax import struct

from kvpo_jax import flow, kv_cache, memory_bank, rollout
from kvpo_jax.types import Array, Context, PyTree, ReplayTuples, TextKV

ENERGIES = ("velocity", "clean")
CONTEXTS = ("anchor", "self_rolled")

# (constants, lora) -> the network of that policy, and the text that it reads, float[L, P, M, K, H, D].
Policy = Callable[[PyTree, PyTree], tuple[rollout.Network, TextKV]]


@struct.dataclass
class Rows:
    """Solver states to replay, with the axes [P, G, W, S] or what is made of them.

    Attributes:
      z: float[..., F, Y, X, C], the state.
      u: float[..., F, Y, X, C], the velocity that the branch followed.
      sigma: float[...], the level.
      start: int32[...], first frame of the block.
      prompt: int32[...].
      segment: int32[...], whose text is read.
      context: int32[...], the row of a Context that is read.
    """

    z: Array
    u: Array
    sigma: Array
    start: Array
    prompt: Array
    segment: Array
    context: Array

    def __getitem__(self, index) -> Rows:
        return jax.tree.map(lambda x: x[index], self)

    def fold(self, *axes: int) -> Rows:
        """The axes that there are, folded into these."""
        lead = self.sigma.ndim
        return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[lead:]), self)


def step_energy(energy: str, velocity: Array, u: Array, sigma: Array, sigma_floor: float) -> Array:
    """The energy of each solver step, float[rows], of velocities float[rows, F, Y, X, C] at levels float[rows].

    "velocity" is the summand of Eq. 5: (1/d) |v - u|^2 with d the elements of the block's latent. "clean" is the
    release's: the mean squared error of the clean latent, sigma (v - u), over 2 max(sigma, sigma_floor)^2.
    """
    error = jnp.mean(jnp.square(velocity - u), axis=(1, 2, 3, 4))
    if energy == "velocity":
        return error
    if energy == "clean":
        return jnp.square(sigma) * error / (2 * jnp.square(jnp.maximum(sigma, sigma_floor)))
    raise ValueError(f"replay.energy is {energy!r}; expected one of {', '.join(ENERGIES)}")


def replay_rows(schedule: flow.Schedule, tuples: ReplayTuples) -> Rows:
    """Every recorded state, [P, G, W, S]; the context of a row is that of its prompt and block, P * W in all."""
    p, g, w, s = tuples.z.shape[:4]
    every = lambda x: jnp.broadcast_to(x, (p, g, w, s))
    prompt, block = jnp.arange(p)[:, None, None, None], jnp.arange(w)[:, None]
    return Rows(
        z=tuples.z, u=tuples.u, sigma=every(schedule.sigma[:s]), start=every(tuples.start_frame[:, None]),
        prompt=every(prompt), segment=every(tuples.segment[:, None]), context=every(prompt * w + block),
    )  # fmt: skip


# ---------------------------------------------------------------- energies of rows


def _velocity(network: rollout.Network, text: TextKV, context: Context, rows: Rows) -> Array:
    """float[R, F, Y, X, C] of rows [R], in one batch."""
    prompt = jax.tree.map(lambda t: t[:, rows.prompt, rows.segment], text)
    return network(rows.z, rows.sigma, prompt, context.take(rows.context), rows.start)[0]


def _at_once(chunk: int, count: int) -> int:
    """The most of `count` rows that `chunk` allows and that divides them; 0 allows all."""
    return max(n for n in range(1, min(chunk or count, count) + 1) if count % n == 0)


def _in_chunks(function: Callable[[Rows], Array], rows: Rows, chunk: int) -> Array:
    """function(rows), [R, ...] of rows [R], so many at a time."""
    count = rows.sigma.size
    some = _at_once(chunk, count)
    if some == count:
        return function(rows)
    out = jax.lax.map(function, rows.fold(-1, some))
    return out.reshape(count, *out.shape[2:])


def _batch_energy(
    policy: Policy, replay: ml_collections.ConfigDict, lora: PyTree, constants: PyTree, context: Context, rows: Rows
) -> Array:
    """float[R] of rows [R], in one batch."""
    velocity = _velocity(*policy(constants, lora), context, rows)
    return step_energy(replay.energy, velocity, rows.u, rows.sigma, replay.sigma_floor)


def _branch_energies(
    policy: Policy, replay: ml_collections.ConfigDict, lora: PyTree, constants: PyTree, context: Context, rows: Rows
) -> Array:
    """Summed energies float[P, G] of rows [P, G, W, S], all in one batch or `replay.chunk` at a time.

    What is made of the energies afterwards weighs their gradients and does nothing else to them. So with chunks the
    gradient of each branch's energy is summed over its chunks in the forward pass already, and none runs twice: memory
    of one chunk, and of one LoRA tree per branch.
    """
    p, g, w, s = rows.sigma.shape
    of_batch = partial(_batch_energy, policy, replay)
    if not replay.chunk or replay.chunk >= p * g * w * s:
        return of_batch(lora, constants, context, rows.fold(-1)).reshape(p, g, -1).sum(axis=-1)
    energy = lambda lora, fixed, chunk: of_batch(lora, *fixed, chunk).sum()

    @jax.custom_vjp
    def total(lora: PyTree, fixed: PyTree, rows: Rows) -> Array:
        return _in_chunks(partial(of_batch, lora, *fixed), rows.fold(-1), replay.chunk).reshape(p * g, -1).sum(axis=-1)

    def with_gradients(lora: PyTree, fixed: PyTree, rows: Rows) -> tuple[Array, PyTree]:
        def of_branch(chunks: Rows) -> tuple[Array, PyTree]:
            add = lambda so_far, chunk: (
                jax.tree.map(jnp.add, so_far, jax.value_and_grad(energy)(lora, fixed, chunk)), None,
            )  # fmt: skip
            nothing = jax.tree.map(jnp.zeros_like, (chunks.z.reshape(-1)[0], lora))
            return jax.lax.scan(add, nothing, chunks)[0]

        return jax.lax.map(of_branch, rows.fold(p * g, -1, _at_once(replay.chunk, w * s)))

    def weigh(gradients: PyTree, weights: Array) -> tuple[PyTree, None, None]:
        return jax.tree.map(lambda x: jnp.tensordot(weights, x, axes=1), gradients), None, None

    total.defvjp(with_gradients, weigh)
    return total(lora, (constants, context), rows).reshape(p, g)


# ---------------------------------------------------------------- Eq. 5


def anchor_energies(
    policy: Policy,
    replay: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    lora: PyTree,
    constants: PyTree,
    tuples: ReplayTuples,
) -> Array:
    """Energies float[P, G], Eq. 5: all blocks and steps at once, under the anchor's own cache.

    Gradients flow to lora from the first `replay.grad_steps` steps, and to the constants only without chunks.

    Args:
      policy: see Policy; it must not close over arrays.
      replay: section `replay` of the config.
      schedule: as in the rollout.
      lora: of the policy.
      constants: what the policy needs besides.
      tuples: what the rollout recorded.
    """
    p = tuples.z.shape[0]
    rows = replay_rows(schedule, tuples)
    learned = min(replay.grad_steps, tuples.z.shape[3])
    frames = jnp.broadcast_to(tuples.rows, (p, *tuples.rows.shape))
    context = memory_bank.attend(kv_cache.read(frames, tuples.history, tuples.page), tuples.bank)
    total = _branch_energies(policy, replay, lora, constants, context, rows[:, :, :, :learned])
    if learned < tuples.z.shape[3]:
        frozen = jax.lax.stop_gradient((lora, constants))
        total += _branch_energies(policy, replay, *frozen, context, rows[:, :, :, learned:])
    return total


def self_rolled_energies(
    policy: Policy,
    replay: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    lora: PyTree,
    constants: PyTree,
    tuples: ReplayTuples,
) -> Array:
    """As `anchor_energies`, but from the second block on each branch reads what the replaying model wrote (release).

    The first block reads the unperturbed cache at the fork. After each block the solver's step from the replaying
    model's own last velocity to the context level, with the rollout's noise, is written into a page of the branch's
    own; nothing flows back through it.
    """
    p, g, w, s = tuples.z.shape[:4]
    learned = min(replay.grad_steps, s)
    rows = replay_rows(schedule, tuples)
    branch = jnp.arange(p * g).reshape(p, g, 1, 1)

    def context_of(block: int, page: kv_cache.KVCache) -> Context:
        """What a block reads, P * G rows."""
        frames = jnp.broadcast_to(tuples.rows[block], (p, g, tuples.rows.shape[1]))
        bank_row = jnp.repeat(jnp.arange(p) * w + block, g)
        return memory_bank.attend(kv_cache.read(frames, tuples.history, page), tuples.bank, bank_row)

    # First all that has no gradient: what is written, which needs the last step, and the energies on the way. Then the
    # steps that have one, all of which find their past in one page, not each block in a page as it was at its time.
    page = kv_cache.repeat(tuples.page.replace(frame=jnp.full_like(tuples.page.frame, -1)), g)
    frozen_lora, frozen_constants = jax.lax.stop_gradient((lora, constants))
    network, text = policy(frozen_constants, frozen_lora)
    total = jnp.zeros((p, g))
    for b in range(w if learned < s else w - 1):
        context = context_of(b, page)
        block = rows[:, :, b : b + 1, min(learned, s - 1) :]
        block = block.replace(context=jnp.broadcast_to(branch, block.context.shape)).fold(-1)
        velocity = _in_chunks(partial(_velocity, network, text, context), block, replay.chunk)
        if learned < s:
            energy = step_energy(replay.energy, velocity, block.u, block.sigma, replay.sigma_floor)
            total += energy.reshape(p, g, -1).sum(axis=-1)
        if b < w - 1:
            x = flow.step(
                schedule.solver, tuples.z[:, :, b, -1], velocity.reshape(p, g, -1, *velocity.shape[1:])[:, :, -1],
                schedule.sigma[-2], schedule.sigma[-1], tuples.noise[:, None, b],
            ).reshape(p * g, *velocity.shape[1:])  # fmt: skip
            start, told = tuples.start_frame[b], schedule.told[-1]
            prompt = jax.tree.map(lambda t, segment=tuples.segment[b]: t[:, :, segment], text)
            prompt = rollout.per_trajectory(prompt, g)
            kv = network(x, jnp.full((p * g,), told), prompt, context, jnp.full((p * g,), start, jnp.int32))[1]
            page = kv_cache.append(page, kv, start)
    context = Context.join([context_of(b, page) for b in range(w)])
    context_row = jnp.arange(w)[:, None] * p * g + branch
    rows = rows.replace(context=jnp.broadcast_to(context_row, rows.context.shape))
    return total + _branch_energies(policy, replay, lora, constants, context, rows[:, :, :, :learned])


def energies_function(replay: ml_collections.ConfigDict) -> Callable[..., Array]:
    """The energies that config.replay.context names."""
    if replay.context not in CONTEXTS:
        raise ValueError(f"replay.context is {replay.context!r}; expected one of {', '.join(CONTEXTS)}")
    return anchor_energies if replay.context == "anchor" else self_rolled_energies
