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


def to_noise(x: Array, velocity: Array, sigma: Array) -> Array:
    """The noise that a velocity comes from."""
    return x + (1 - sigma) * velocity


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


# ---------------------------------------------------------------- drawn transitions


class Transition(struct.PyTreeNode):
    """A Gaussian step of every level but the last, to x' = (1 - sigma') x_clean + sigma' noise'.

    Here noise' = kept noise + drawn eps, of the predicted noise and eps ~ N(0, I). All published
    kernels have this form. The step leaves the marginal as it is where kept^2 + drawn^2 = 1.

    Attributes:
      kept: float[S-1], in units of sigma'.
      drawn: float[S-1], in units of sigma'; the std of x' is sigma' drawn.
    """

    kept: Array
    drawn: Array


# (levels float64[S], strength) -> (kept, drawn) float64[S-1], in units of sigma'.
Kernel = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def cps(sigma: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficient-preserving sampling: a share sin^2(eta pi/2) of the noise is new.

    It keeps every marginal. eta = 0 is `euler`; eta = 1 is `renoise`, and the kernel of CM-GRPO.
    """
    drawn = np.full(len(sigma) - 1, np.sin(eta * np.pi / 2))
    return np.sqrt(1 - drawn**2), drawn


def _euler_maruyama(sigma: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x' = x + (sigma' - sigma) v + std^2/2 score + std eps, with score = -noise / sigma.

    It keeps the marginals only in the limit of small steps.
    """
    return 1 - std**2 / (2 * sigma[:-1] * sigma[1:]), std / sigma[1:]


def flow_sde(sigma: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Flow-GRPO: std^2 = a^2 (sigma - sigma') sigma / (1 - sigma).

    At sigma = 1 the denominator has the second level instead.
    """
    clean = 1 - np.where(sigma[:-1] == 1, sigma[1], sigma[:-1])
    return _euler_maruyama(sigma, a * np.sqrt(-np.diff(sigma) * sigma[:-1] / clean))


def flow_sde_wan(sigma: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Flow-GRPO and Flash-GRPO for Wan: std^2 = (a sigma_1 sigma)^2 (sigma - sigma'), a = 1."""
    return _euler_maruyama(sigma, a * sigma[1] * sigma[:-1] * np.sqrt(-np.diff(sigma)))


def longcat_sde(sigma: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    """LongCat in GenRL: Flow-GRPO's with a std of at most 0.45."""
    _, drawn = flow_sde(sigma, a)
    return _euler_maruyama(sigma, np.minimum(drawn * sigma[1:], 0.45))


def dance_sde(sigma: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """DanceGRPO: std^2 = eta^2 (sigma - sigma')."""
    return _euler_maruyama(sigma, eta * np.sqrt(-np.diff(sigma)))


def sage_sde(sigma: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """SAGE-GRPO with its score term: std^2 = eta^2 (sigma' - sigma + log of (1 - sigma') over
    (1 - sigma)), sigma at most 0.997 in the logarithm.
    """
    gained = np.log((1 - sigma[1:]) / (1 - np.minimum(sigma[:-1], 0.997)))
    return _euler_maruyama(sigma, eta * np.sqrt(np.diff(sigma) + gained))


KERNELS: Registry[Kernel] = Registry(
    "rollout.kernel",
    {
        "cps": cps,
        "flow_sde": flow_sde,
        "flow_sde_wan": flow_sde_wan,
        "longcat_sde": longcat_sde,
        "dance_sde": dance_sde,
        "sage_sde": sage_sde,
    },
)


def transition_coefficients(
    sampler: ml_collections.ConfigDict, rollout: ml_collections.ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """`kept` and `drawn` of a Transition, float64[S-1].

    Raises:
      UsageError: there is one level only, or the kernel has no finite std at one of them.
    """
    sigma = warp(levels(sampler), sampler.shift)
    if len(sigma) < 2:
        raise UsageError(
            f"config.sampler.steps={tuple(sampler.steps)}: the last step is never drawn, so there"
            " is nothing to draw"
        )
    with np.errstate(all="ignore"):
        kept, drawn = KERNELS[rollout.kernel](sigma, rollout.stochasticity)
    if not np.all(np.isfinite([kept, drawn])):
        raise UsageError(
            f"config.rollout.kernel={rollout.kernel!r}, config.rollout.stochasticity="
            f"{rollout.stochasticity}: no std at the levels {tuple(sigma)}"
        )
    return kept, drawn


def transition(
    sampler: ml_collections.ConfigDict, rollout: ml_collections.ConfigDict
) -> Transition:
    """The Transition of a config's sections `sampler` and `rollout`, worked out in float64."""
    kept, drawn = transition_coefficients(sampler, rollout)
    return Transition(jnp.asarray(kept, jnp.float32), jnp.asarray(drawn, jnp.float32))


def draw_or_step(
    transition: Transition,
    draws: Array,
    solver: str,
    x: Array,
    velocity: Array,
    sigma: Array,
    sigma_next: Array,
    noise: Array,
) -> Array:
    """A step from sigma to sigma_next: drawn where `draws`, else the named solver's.

    `transition` has the numbers of this step, and `noise` is its eps. A drawn step is `renoise`
    with another noise, chosen before any arithmetic on it: where both are the same, so are the
    results, bit for bit.
    """
    mixed = transition.kept * to_noise(x, velocity, sigma) + transition.drawn * noise
    levels = sigma, sigma_next, jnp.where(draws, mixed, noise)
    drawn = step("renoise", x, velocity, *levels)
    return jnp.where(draws, drawn, step(solver, x, velocity, *levels))
