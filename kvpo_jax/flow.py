"""Flow matching: the noise schedule, the algebra between latent, velocity and clean latent, one solver step.

The convention, stated here once: x_sigma = (1 - sigma) x_clean + sigma noise, and the network predicts
velocity = noise - x_clean, so x_clean = x_sigma - sigma velocity. In the paper's letters (Eq. 1) t = 1 - sigma and
u = -velocity; the Trajectory Velocity Energy does not see the sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct

from kvpo_jax.types import Array

SOLVERS = ("euler", "renoise")


@struct.dataclass
class Schedule:
    """Noise levels of one block: S solver steps, then the pass that writes the cache.

    Attributes:
      sigma: float32[S+1], noise level of the latent that goes in; the last is that of the cached latent.
      told: float32[S+1], noise level that the network is told; the last is 0.
      solver: "euler" (Eq. 2) or "renoise" (static).
    """

    sigma: Array
    told: Array
    solver: str = struct.field(pytree_node=False, default="euler")


def warp(s: Array | np.ndarray, shift: float) -> Array | np.ndarray:
    """shift s / (1 + (shift - 1) s): the timestep shift of Wan; 0 and 1 stay where they are."""
    return shift * s / (1 + (shift - 1) * s)


def schedule(steps: Sequence[float], shift: float, solver: str, context_step: float) -> Schedule:
    """The schedule of a sampler.

    `steps` are the unshifted levels, first to last, e.g. (1, .75, .5, .25), and `context_step` the unshifted level of
    the latent that is cached (0: the clean one). The network is told 0 for it whatever it is.
    """
    if solver not in SOLVERS:
        raise ValueError(f"sampler.solver is {solver!r}; expected one of {', '.join(SOLVERS)}")
    levels = np.asarray(steps, np.float64)
    if levels.size == 0 or np.any(np.diff(levels) >= 0) or levels[0] > 1 or levels[-1] <= 0:
        raise ValueError(f"sampler.steps is {tuple(steps)}; expected falling levels in (0, 1]")
    sigma = warp(levels, shift)
    return Schedule(
        sigma=jnp.asarray(np.append(sigma, warp(context_step, shift)), jnp.float32),
        told=jnp.asarray(np.append(sigma, 0.0), jnp.float32),
        solver=solver,
    )


def add_noise(x_clean: Array, noise: Array, sigma: Array) -> Array:
    """x_sigma of the convention above."""
    return (1 - sigma) * x_clean + sigma * noise


def to_clean(x: Array, velocity: Array, sigma: Array) -> Array:
    """The clean latent that a velocity points to."""
    return x - sigma * velocity


def step(solver: str, x: Array, velocity: Array, sigma: Array, sigma_next: Array, noise: Array) -> Array:
    """One solver step from sigma to sigma_next.

    euler integrates the ODE (Eq. 2) and does not read `noise`. renoise jumps to the clean latent and adds `noise`
    (shared by all branches) at the next level: the native sampler of the distilled backbones.
    """
    if solver == "euler":
        return x + (sigma_next - sigma) * velocity
    return add_noise(to_clean(x, velocity, sigma), noise, sigma_next)
