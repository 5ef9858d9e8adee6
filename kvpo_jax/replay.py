"""Replay and Trajectory Velocity Energy (paper §3.3, Eq. 5; Algorithm 1, step 4).

The cached solver states z of each branch go through the current policy under the *unperturbed* context, and the
energy says how far its velocities are from the ones that the branch followed.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from kvpo_jax import flow, kv_cache, memory_bank, rollout
from kvpo_jax.types import Array, Context, ReplayTuples, TextKV

ENERGIES = ("velocity", "clean")
CONTEXTS = ("anchor", "self_rolled")


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


def _replay_rows(
    network: rollout.Network, text: TextKV, context: Context, x: Array, sigma: Array, start: Array, row: Array,
    chunk: int,
) -> Array:  # fmt: skip
    """Velocities of rows float[R, F, Y, X, C]; row int32[R] says which of the contexts and texts each one reads.

    With chunk > 0, so many rows at a time, recomputed in the backward pass: memory of one chunk.
    """

    def forward(xs):
        x, sigma, start, row = xs
        prompt = jax.tree.map(lambda t: t[:, row], text)
        return network(x, sigma, prompt, context.take(row), start)[0]

    rows = (x, sigma, start, row)
    count = x.shape[0]
    if not chunk or chunk >= count:
        return forward(rows)
    padded = -(-count // chunk) * chunk
    fill = lambda t: jnp.concatenate([t, jnp.repeat(t[:1], padded - count, axis=0)])
    chunks = jax.tree.map(lambda t: fill(t).reshape(-1, chunk, *t.shape[1:]), rows)
    out = jax.lax.map(jax.checkpoint(forward), chunks)
    return out.reshape(padded, *out.shape[2:])[:count]


def _energies(
    network: rollout.Network,
    replay: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    text: TextKV,
    context: Context,
    context_of: Array,
    z: Array,
    u: Array,
    start_frame: Array,
    steps: range,
) -> tuple[Array, Array]:
    """Summed energies float[P, G] of some solver steps, and the velocities float[P, G, W, ...] of the last of them.

    z and u are float[P, G, W, S, ...]; rows (P, G, W, step) are folded into one batch. context_of int32[P, G, W] is the
    row of `context` and `text` that each block reads.
    """
    p, g, w = z.shape[:3]
    flat = lambda x: x[:, :, :, steps.start : steps.stop].reshape(-1, *x.shape[4:])
    per_row = lambda x: jnp.broadcast_to(x, (p, g, w, len(steps))).reshape(-1)
    sigma = per_row(schedule.sigma[steps.start : steps.stop])
    velocity = _replay_rows(
        network, text, context, flat(z), sigma, per_row(start_frame[:, None]), per_row(context_of[..., None]),
        replay.chunk,
    )  # fmt: skip
    energy = step_energy(replay.energy, velocity, flat(u), sigma, replay.sigma_floor).reshape(p, g, -1).sum(axis=-1)
    return energy, velocity.reshape(p, g, w, len(steps), *velocity.shape[1:])[:, :, :, -1]


def anchor_energies(
    network: rollout.Network,
    frozen: rollout.Network,
    replay: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    text: TextKV,
    tuples: ReplayTuples,
) -> Array:
    """Energies float[P, G], Eq. 5: all blocks and steps at once, under the anchor's own cache.

    Args:
      network: the policy.
      frozen: the policy without gradient, for the steps from `replay.grad_steps` on.
      replay: section `replay` of the config.
      schedule: as in the rollout.
      text: float[L, P, M, K, H, D].
      tuples: what the rollout recorded.
    """
    p, g, w, s = tuples.z.shape[:4]
    # One context and one prompt per (prompt, block): row p * W + w, shared by its G * S replayed states.
    rows = jnp.broadcast_to(tuples.rows, (p, *tuples.rows.shape))
    context = memory_bank.attend(kv_cache.read(rows, tuples.history, tuples.page), tuples.bank)
    text = jax.tree.map(lambda x: x[:, :, tuples.segment].reshape(x.shape[0], p * w, *x.shape[3:]), text)
    context_of = jnp.broadcast_to(jnp.arange(p * w).reshape(p, 1, w), (p, g, w))
    learned = min(replay.grad_steps, s)
    total = jnp.zeros((p, g))
    for net, prompt, steps in (
        (network, text, range(learned)),
        (frozen, jax.lax.stop_gradient(text), range(learned, s)),
    ):
        if steps:
            total += _energies(
                net, replay, schedule, prompt, context, context_of, tuples.z, tuples.u, tuples.start_frame, steps
            )[0]
    return total


def self_rolled_energies(
    network: rollout.Network,
    frozen: rollout.Network,
    replay: ml_collections.ConfigDict,
    schedule: flow.Schedule,
    text: TextKV,
    tuples: ReplayTuples,
) -> Array:
    """As `anchor_energies`, but from the second block on each branch reads what the replaying model wrote (release).

    The first block reads the unperturbed cache at the fork. After each block the solver's step from the replaying
    model's own last velocity to the context level, with the rollout's noise, is written into a page of the branch's
    own; nothing flows back through it.
    """
    p, g, w, s = tuples.z.shape[:4]
    learned = min(replay.grad_steps, s)
    text = jax.tree.map(lambda x: x[:, :, tuples.segment], text)  # [L, P, W, ...]

    def of_block(net, text, page, b, steps):
        rows = jnp.broadcast_to(tuples.rows[b], (p, g, tuples.rows.shape[1]))
        bank = jax.tree.map(lambda x: x[:, :, b], tuples.bank)
        context = memory_bank.attend(kv_cache.read(rows, tuples.history, page), memory_bank.repeat(bank, g))
        prompt = rollout.per_trajectory(jax.tree.map(lambda x: x[:, :, b], text), g)
        energy, velocity = _energies(
            net, replay, schedule, prompt, context, jnp.arange(p * g).reshape(p, g, 1),
            tuples.z[:, :, b : b + 1], tuples.u[:, :, b : b + 1], tuples.start_frame[b : b + 1], steps,
        )  # fmt: skip
        return prompt, context, energy, velocity[:, :, 0]

    # First all that has no gradient: what is written, which needs the last step, and the energies on the way. Then the
    # steps that have one, all of which find their past in one page, not each block in a page as it was at its time.
    page = kv_cache.repeat(tuples.page.replace(frame=jnp.full_like(tuples.page.frame, -1)), g)
    constant = range(min(learned, s - 1), s)
    total = jnp.zeros((p, g))
    for b in range(w if learned < s else w - 1):
        prompt, context, energy, velocity = of_block(frozen, jax.lax.stop_gradient(text), page, b, constant)
        if learned < s:
            total += energy
        if b < w - 1:
            x = flow.step(
                schedule.solver, tuples.z[:, :, b, -1], velocity, schedule.sigma[-2], schedule.sigma[-1],
                tuples.noise[:, None, b],
            ).reshape(p * g, *velocity.shape[2:])  # fmt: skip
            start, told = tuples.start_frame[b], schedule.told[-1]
            kv = frozen(x, jnp.full((p * g,), told), prompt, context, jnp.full((p * g,), start, jnp.int32))[1]
            page = kv_cache.append(page, kv, start)
    for b in range(w):
        total += of_block(network, text, page, b, range(learned))[2]
    return total


def energies_function(replay: ml_collections.ConfigDict) -> Callable[..., Array]:
    """The energies that config.replay.context names."""
    if replay.context not in CONTEXTS:
        raise ValueError(f"replay.context is {replay.context!r}; expected one of {', '.join(CONTEXTS)}")
    return anchor_energies if replay.context == "anchor" else self_rolled_energies
