"""What makes the branches of a group differ: routed history, initial noise, drawn transitions.

An alternative of EXPLORES says which of these a branch has in the blocks of the exploration window.
The branches share everything else: the rest of the noise, and every block before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections

from kvpo_jax.errors import Registry
from kvpo_jax.types import Array

# (options, shared, own) -> noise float[P, T, S+1, F, Y, X, C] of trajectories that explore, from
# that of their prompt, float[P, 1, S+1, ...], and from their own.
OwnNoise = Callable[[ml_collections.ConfigDict, Array, Array], Array]


class Explore(NamedTuple):
    """How a branch leaves the anchor's way.

    Attributes:
      routes: its history is routed (Causal History Routing).
      noise: makes noise of its own; None: it has the anchor's.
      common_start: the branches begin a block with the same noise.
      draws: it draws its solver steps but the last (`flow.Transition`), which `noise` has to feed.
    """

    routes: bool = False
    noise: OwnNoise | None = None
    common_start: bool = True
    draws: bool = False


# ---------------------------------------------------------------- initial noise


def preserving_mix(shared: Array, own: Array, scale: float) -> Array:
    """sqrt(1 - s^2) shared + s own: again of variance 1 (NeighborGRPO, AR-CoPO)."""
    return (1 - scale**2) ** 0.5 * shared + scale * own


def additive_mix(shared: Array, own: Array, scale: float) -> Array:
    """shared + s own, of variance 1 + s^2 (KVPO, appendix D)."""
    return shared + scale * own


MIXES: Registry[Callable[[Array, Array, float], Array]] = Registry(
    "rollout.noise_mix", {"preserving": preserving_mix, "additive": additive_mix}
)


def initial_noise(options: ml_collections.ConfigDict, shared: Array, own: Array) -> Array:
    """The initial latent is the branch's own; what `renoise` adds later is shared."""
    first = MIXES[options.noise_mix](shared[:, :, :1], own[:, :, :1], options.noise_scale)
    later = jnp.broadcast_to(shared[:, :, 1:], own[:, :, 1:].shape)
    return jnp.concatenate([first, later], axis=2)


def step_noise(options: ml_collections.ConfigDict, shared: Array, own: Array) -> Array:
    """What the drawn transitions add is the branch's own; the first and the last noise, of the
    initial and of the cached latent, is shared.
    """
    first, last = (jnp.broadcast_to(shared[:, :, i], own[:, :, i].shape) for i in (0, -1))
    return own.at[:, :, 0].set(first).at[:, :, -1].set(last)


EXPLORES: Registry[Explore] = Registry(
    "rollout.explore",
    {
        "routing": Explore(routes=True),
        "init_noise": Explore(noise=initial_noise, common_start=False),
        "transition": Explore(noise=step_noise, draws=True),
        "routing+init_noise": Explore(routes=True, noise=initial_noise, common_start=False),
        "none": Explore(),
    },
)


def branch_noise(
    options: ml_collections.ConfigDict, shared: Array, own: Array, explores: Array
) -> Array:
    """Noise float[P, T, S+1, F, Y, X, C]: its own for a trajectory that explores, else the shared.

    Args:
      options: section `rollout` of the config; its `explore` makes noise.
      shared: float[P, S+1, F, Y, X, C].
      own: float[P, T, S+1, F, Y, X, C].
      explores: bool[T], from `routing.explores`.
    """
    make = EXPLORES[options.explore].noise
    assert make is not None
    shared = shared[:, None]
    return jnp.where(explores[:, None, None, None, None, None], make(options, shared, own), shared)
