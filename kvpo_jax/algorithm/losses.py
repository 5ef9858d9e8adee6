"""How replayed velocities become a loss.

Most losses are taken state by state: a function of the velocities that the policies predict there
and of the branch's advantage, whose mean over states, branches and prompts is descended. Their only
measure is `distance`, the energy of config.replay.energy between two velocities, with the weight of
the state; in the mean a loss counts the state's share. KVPO's policy is over the branches of a
group: it needs the energies of all states first (`objective.loss`), and `gibbs` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from kvpo_jax.algorithm import flow, objective
from kvpo_jax.algorithm.chunked import Seen
from kvpo_jax.algorithm.replay import Replica, state_energy
from kvpo_jax.errors import Registry
from kvpo_jax.types import Array

# (velocity, velocity) -> float[R].
Distance = Callable[[Array, Array], Array]
# (options, distance, Replica) -> loss of each state float[R], and what is seen; options is section
# `objective` of the config.
Loss = Callable[[ml_collections.ConfigDict, Distance, Replica], tuple[Array, Seen]]

SEEN = ("ratio_deviation", "clip_fraction", "kl")


class Kind(NamedTuple):
    """A way from velocities to a loss.

    Attributes:
      of_state: the loss of each state; None: one of the group's energies, `objective.loss`.
      peers: a state is compared with all branches, so that few branches have to be replayed.
      reads_old: the velocities of the policy of the rollout are read.
    """

    of_state: Loss | None
    peers: bool = False
    reads_old: bool = True


def bind(
    kind: Kind, replay: ml_collections.ConfigDict, options: ml_collections.ConfigDict
) -> Callable[[Replica], tuple[Array, Seen]]:
    """`kind.of_state` with the sections `replay` and `objective` of a config."""
    assert kind.of_state is not None
    of_state = kind.of_state

    def loss(at: Replica) -> tuple[Array, Seen]:
        def distance(velocity: Array, other: Array) -> Array:
            return state_energy(replay, velocity, other, at.states)

        value, seen = of_state(options, distance, at)
        if at.states.share is not None:
            value = at.states.share * value
        return value, {name: jax.lax.stop_gradient(seen[name]) for name in SEEN}

    return loss


def _kl(options: ml_collections.ConfigDict, distance: Distance, at: Replica) -> Array:
    """The distance to the reference, float[R]; 0 if it is not read. Of drawn steps it is the KL."""
    if at.reference is None:
        return jnp.zeros(len(at.theta))
    return distance(at.theta, at.reference)


def _seen(kl: Array, rho: Array | None = None, low: float = 0.0, high: float = 0.0) -> Seen:
    """SEEN, of losses with a ratio and without one."""
    rho = jnp.ones_like(kl) if rho is None else rho
    outside = objective.beyond_clip(rho, low, high)
    values = jnp.abs(rho - 1), outside.astype(kl.dtype), kl
    return dict(zip(SEEN, values, strict=True))


def ratio_loss(
    options: ml_collections.ConfigDict, distance: Distance, at: Replica
) -> tuple[Array, Seen]:
    """Flow-GRPO, DanceGRPO: clipped PPO of each drawn step, with its own ratio.

    rho = exp(log p - log p_old) of the state that was drawn, and log p = -distance to it, a mean
    over elements (replay.states = "transitions"): ratios stay near 1 and clips are 1e-5 to 1e-3.
    The KL of two Gaussians of one std is their distance.
    """
    log_p, old = (-distance(velocity, at.states.u) for velocity in (at.theta, at.old))
    old = jax.lax.stop_gradient(jnp.where(at.on_policy, log_p, old))
    rho = jnp.exp(objective.log_ratio(log_p, old))
    low, high = options.clip_low, options.clip_high
    kl = _kl(options, distance, at)
    advantage = _advantage(at)
    loss = -objective.clipped(rho, advantage, low, high) + options.beta * kl
    return loss, _seen(kl, rho, low, high)


def regression_loss(
    options: ml_collections.ConfigDict, distance: Distance, at: Replica
) -> tuple[Array, Seen]:
    """A distance(v, u): towards what a good branch did, away from what a bad one did.

    Of drawn steps it is -A log p, REINFORCE, which is the gradient of CM-GRPO's regression to
    sg(x_clean + (A/2) (1 - sigma') (z' - m) / sigma'^2) up to its factor of 100. Of end points with
    A = G softmax(r) it is reward-weighted regression.
    """
    kl = _kl(options, distance, at)
    return _advantage(at) * distance(at.theta, at.states.u) + options.beta * kl, _seen(kl)


def nft_loss(
    options: ml_collections.ConfigDict, distance: Distance, at: Replica
) -> tuple[Array, Seen]:
    """DiffusionNFT, Astrolabe: r L+ + (1 - r) L-, of end points (replay.states = "ends").

    v+ = b v + (1 - b) v_old, v- = (1 + b) v_old - b v, and L+- their distances to noise - clean;
    r = clip(A, +-5) / 10 + 1/2 and b = options.mix. With options.adaptive each L is over its mean
    absolute error of the clean latent, at least 1e-5, and the loss times 5 / b (DiffusionNFT); else
    it is as it stands (Astrolabe).
    """
    b, sigma, u = options.mix, at.states.sigma, at.states.u
    share = jnp.clip(_advantage(at), -5, 5) / 10 + 0.5

    def of(velocity: Array) -> Array:
        loss = distance(velocity, u)
        if not options.adaptive:
            return loss
        size = sigma * jnp.mean(jnp.abs(velocity - u), axis=(1, 2, 3, 4))
        return 5 / b * loss / jax.lax.stop_gradient(jnp.maximum(size, 1e-5))

    positive = of(b * at.theta + (1 - b) * at.old)
    negative = of((1 + b) * at.old - b * at.theta)
    kl = _kl(options, distance, at)
    return share * positive + (1 - share) * negative + options.beta * kl, _seen(kl)


def neighbours_loss(
    options: ml_collections.ConfigDict, distance: Distance, at: Replica
) -> tuple[Array, Seen]:
    """NeighborGRPO, AR-CoPO: `objective.loss` of each state k, with E[k, i] as energies.

    E[k, i] is the mean squared distance of branch i's clean latent at this block and step to the
    one that theta predicts at branch k's state; E[k, k] = 0 on policy. tau is in units of the
    spread of the old E[k, :], or absolute.
    """
    sigma = at.states.sigma[:, None, None, None, None]
    assert at.peers is not None
    peers = at.peers

    def energies(velocity: Array) -> Array:
        clean = flow.to_clean(at.states.z, velocity, sigma)[:, None]
        return jnp.mean(jnp.square(clean - peers), axis=(2, 3, 4, 5))

    theta, old = energies(at.theta), jax.lax.stop_gradient(energies(at.old))
    reference = old if at.reference is None else energies(at.reference)

    def of_state(
        theta: Array, old: Array, reference: Array, advantages: Array
    ) -> tuple[Array, objective.Diagnostics]:
        is_open, policy = jnp.asarray(True), at.on_policy
        return objective.loss(options, theta, old, reference, advantages, is_open, on_policy=policy)

    loss, seen = jax.vmap(of_state)(theta, old, reference, _advantage(at))
    return loss, {name: getattr(seen, name) for name in SEEN}


def _advantage(at: Replica) -> Array:
    """Of the branch of each state, float[R]; of all branches, float[R, G]."""
    assert at.states.advantage is not None
    return at.states.advantage


KINDS: Registry[Kind] = Registry(
    "objective.kind",
    {
        "gibbs": Kind(None),
        "neighbours": Kind(neighbours_loss, peers=True),
        "ratio": Kind(ratio_loss),
        "regression": Kind(regression_loss, reads_old=False),
        "nft": Kind(nft_loss),
    },
)
