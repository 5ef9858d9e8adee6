"""Flow matching (Eq. 1 and Eq. 2): noise levels, latent, velocity and clean latent, solver steps.

The convention, stated here once: x_sigma = (1 - sigma) x_clean + sigma noise, and the network
predicts velocity = noise - x_clean, so x_clean = x_sigma - sigma velocity. In the paper's letters
t = 1 - sigma and u = -velocity; the Trajectory Velocity Energy does not see the sign.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from kvpo_jax.errors import Registry, UsageError
from kvpo_jax.types import Array


class Schedule(struct.PyTreeNode):
    """Noise levels of one block: S solver steps, then the pass that writes the cache.

    Attributes:
      sigma: float32[S+1], noise level of the latent that goes in; the last is that of the cached
        latent.
      sigma_cond: float32[S+1], noise level that the network is conditioned on; the last is 0.
      solver: a name in SOLVERS (static).
    """

    sigma: Array
    sigma_cond: Array
    solver: str = struct.field(pytree_node=False, default="euler")


def warp(s: Array | np.ndarray | float, shift: float):
    """shift s / (1 + (shift - 1) s): the timestep shift of Wan; 0 and 1 stay where they are."""
    return shift * s / (1 + (shift - 1) * s)


def levels(sampler: ml_collections.ConfigDict) -> np.ndarray:
    """float64[S], the unshifted levels of a config's `sampler` section, e.g. (1, .75, .5, .25).

    Raises:
      UsageError: they do not fall, down to sampler.context_step, the unshifted level of the latent
        that is cached (0: the clean one).
    """
    levels = np.asarray(sampler.steps, np.float64)
    falls = levels.size and np.all(np.diff(levels) < 0)
    if not falls or levels[0] > 1 or levels[-1] <= sampler.context_step:
        raise UsageError(
            f"config.sampler.steps={tuple(sampler.steps)}, config.sampler.context_step="
            f"{sampler.context_step}: expected levels that fall, from 1 at most"
        )
    return levels


def schedule(sampler: ml_collections.ConfigDict) -> Schedule:
    """The schedule of a config's `sampler` section.

    The network is conditioned on 0 for the latent that is cached, whatever its level.
    """
    SOLVERS[sampler.solver]  # a name that is not there is an error here, not in a traced program
    sigma = warp(levels(sampler), sampler.shift)
    cached = warp(sampler.context_step, sampler.shift)
    return Schedule(
        sigma=jnp.asarray(np.append(sigma, cached), jnp.float32),
        sigma_cond=jnp.asarray(np.append(sigma, 0.0), jnp.float32),
        solver=sampler.solver,
    )


def add_noise(x_clean: Array, noise: Array, sigma: Array) -> Array:
    """Eq. 1: x_sigma = (1 - sigma) x_clean + sigma noise."""
    return (1 - sigma) * x_clean + sigma * noise


def to_clean(x: Array, velocity: Array, sigma: Array) -> Array:
    """The clean latent that a velocity points to."""
    return x - sigma * velocity


# A solver: (x, velocity, sigma, sigma_next, noise) -> x at sigma_next.
Solver = Callable[[Array, Array, Array, Array, Array], Array]


def euler(x: Array, velocity: Array, sigma: Array, sigma_next: Array, noise: Array) -> Array:
    """Eq. 2: one Euler step of the probability-flow ODE; the noise is not read."""
    return x + (sigma_next - sigma) * velocity


def renoise(x: Array, velocity: Array, sigma: Array, sigma_next: Array, noise: Array) -> Array:
    """The sampler of the distilled backbones: to the clean latent, then noise at the next level.

    All branches share the noise.
    """
    return add_noise(to_clean(x, velocity, sigma), noise, sigma_next)


SOLVERS: Registry[Solver] = Registry("sampler.solver", {"euler": euler, "renoise": renoise})


def step(
    solver: str, x: Array, velocity: Array, sigma: Array, sigma_next: Array, noise: Array
) -> Array:
    """One step of the named solver from sigma to sigma_next (Eq. 2 for "euler")."""
    return SOLVERS[solver](x, velocity, sigma, sigma_next, noise)
