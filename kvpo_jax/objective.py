"""Advantages, Gibbs policy, clipped PPO, KL and anchor gate (paper §3.3-3.4, Eqs. 6-9, 15-16) on the [G] of one group.

Pure maths: callers `vmap` over prompts. docs/algorithm.md derives the gradient. What the released code does
differently is a function of its own here; `advantages` and `loss` choose by the config's `objective` section.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_collections
from flax import struct

from kvpo_jax.types import Array, Scores

EPS = 1e-8
LOG_RATIO_BOUND = 20.0  # release; keeps exp finite, and takes the gradient only of a ratio above 4.8e8 or below 2.1e-9


def spread(values: Array) -> Array:
    """Population std over the branches, float[G, ...] to float[...]; exactly 0 where all values are equal.

    Their rounded mean need not be equal to them: at G = 8 the residue would be normalised to an advantage of up to 0.9.
    """
    return (values - values[0]).std(axis=0)


# ---------------------------------------------------------------- advantages


def group_advantage(rewards: Array, eps: float = EPS) -> Array:
    """Eq. 9: (r - mean) / (population std + eps), float[G]."""
    chex.assert_rank(rewards, 1)
    shifted = rewards - rewards[0]  # as in `spread`: exactly 0 where all are equal
    return (shifted - shifted.mean()) / (spread(rewards) + eps)


def anchor_advantage(rewards: Array, anchor: Array, eps: float = EPS) -> Array:
    """Release: (r - r_anchor) / (unbiased std over branches and anchor + eps), float[G]; not centred."""
    chex.assert_rank([rewards, anchor], [1, 0])
    return (rewards - anchor) / (jnp.std(jnp.append(rewards, anchor), ddof=1) + eps)


def component_advantage(components: Mapping[str, tuple[Array, Array]], weights: Mapping[str, float]) -> Array:
    """Release: the weighted sum over components of their anchor advantages; values (float[G], anchor float[])."""
    return sum(weight * anchor_advantage(*components[name]) for name, weight in weights.items() if weight)


def normalize_advantage(advantage: Array, normalize: str) -> Array:
    """Release, before local and global advantages are fused: none | std (scale only) | zscore.

    A spread of at most 1e-8 is not divided by.
    """
    if normalize == "none":
        return advantage
    deviation = spread(advantage)
    scale = jnp.where(deviation <= EPS, 1.0, deviation)
    if normalize == "std":
        return advantage / scale
    if normalize == "zscore":
        return (advantage - advantage.mean()) / scale
    raise ValueError(f"objective.fusion_normalize is {normalize!r}; expected none, std or zscore")


def fuse_advantages(local: Array, whole: Array, normalize: str, local_weight: float, global_weight: float) -> Array:
    """Release: the weighted sum of the normalised local and global advantages, float[G]."""
    return local_weight * normalize_advantage(local, normalize) + global_weight * normalize_advantage(whole, normalize)


# ---------------------------------------------------------------- the Gibbs policy


def temperature(energies_old: Array, tau: float, unit: str) -> Array:
    """tau in units of energy, float[]: as it is ("absolute"), or times the old energies' spread ("group_std").

    Carries no gradient. A group without spread has temperature tau, whatever the unit: its old policy is uniform at
    any temperature.
    """
    if unit == "absolute":
        return jnp.asarray(tau, energies_old.dtype)
    if unit == "group_std":
        deviation = spread(jax.lax.stop_gradient(energies_old))
        return tau * jnp.where(deviation > 0, deviation, 1.0)
    raise ValueError(f"objective.tau_unit is {unit!r}; expected group_std or absolute")


def log_policy(energies: Array, tau: Array) -> Array:
    """Eq. 6: log pi(g) = log softmax(-E / tau), float[G]."""
    chex.assert_rank(energies, 1)
    return jax.nn.log_softmax(-energies / tau)


def log_ratio(log_pi: Array, log_pi_old: Array) -> Array:
    """Eq. 7: log rho, float[G], kept within +-20."""
    return jnp.clip(log_pi - log_pi_old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_deviation(energies: Array, energies_old: Array, tau: float, unit: str) -> Array:
    """The largest |rho - 1| of one group, float[], of energies float[G] that should be the same."""
    temperature_old = temperature(energies_old, tau, unit)
    log_rho = log_ratio(log_policy(energies, temperature_old), log_policy(energies_old, temperature_old))
    return jnp.max(jnp.abs(jnp.exp(log_rho) - 1))


def clipped_surrogate(log_rho: Array, advantages: Array, clip_low: float, clip_high: float) -> Array:
    """Eq. 8: L_PPO = -mean min(rho A, clip(rho, 1 - low, 1 + high) A), float[]."""
    rho = jnp.exp(log_rho)
    return -jnp.mean(jnp.minimum(rho * advantages, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantages))


def kl_divergence(log_pi: Array, log_pi_ref: Array) -> Array:
    """Eq. 15: sum_g pi (log pi - log pi_ref), float[].

    The release has log(pi + 1e-10), which guards a log that here is never taken; the difference is at most G * 1e-10.
    """
    return jnp.sum(jnp.exp(log_pi) * (log_pi - log_pi_ref))


# ---------------------------------------------------------------- the anchor gate


def anchor_gate(rewards: Array, anchor: Array) -> Array:
    """bool[]: whether any branch beats the anchor (paper §3.4)."""
    return jnp.any(rewards > anchor)


def pi_anchor(log_pi: Array) -> Array:
    """Release, mechanism_2: the share of an anchor with logit 0 among the branches' logits log pi, float[].

    Always 1/2, because the branches' exp(log pi) sum to 1.
    """
    return jax.nn.softmax(jnp.append(log_pi, 0.0))[-1]


def gate_scale(gate: str, safe: Array, log_pi: Array) -> Array:
    """What a prompt's loss is multiplied by, float[]; no gradient.

    zero (paper) and mechanism_1 (release): nothing is left where no branch beats the anchor. mechanism_2 (release):
    1 - pi_anchor is left there.
    """
    chex.assert_shape(jnp.asarray(safe), ())
    if gate in ("zero", "mechanism_1"):
        return jnp.asarray(safe, log_pi.dtype)
    if gate == "mechanism_2":
        return jnp.where(safe, 1.0, 1.0 - jax.lax.stop_gradient(pi_anchor(log_pi)))
    raise ValueError(f"objective.gate is {gate!r}; expected zero, mechanism_1 or mechanism_2")


def effective_kl_strength(energies_old: Array, tau: Array, beta: float) -> Array:
    """beta * std(E_old) / tau, float[]: beta over tau in stds of the group's energies.

    How strongly the KL holds back a shift of the energies by one such std, against a PPO gradient of |A| = 1
    (docs/algorithm.md). beta / config.tau with tau_unit = "group_std".
    """
    return beta * spread(energies_old) / tau


# ---------------------------------------------------------------- what the trainer calls


@struct.dataclass
class Diagnostics:
    """Of one group, float[] each; with leading axes after a vmap.

    Attributes:
      ratio_deviation: largest |rho - 1|, exactly 0 on policy.
      log_ratio_std: population std of log rho.
      clip_fraction: share of branches whose ratio is outside the clip range.
      kl: Eq. 15.
      entropy: of pi, at most log G.
      surrogate: Eq. 8, before the gate.
      gate: share of the loss that is kept.
      tau: in units of energy.
      energy: mean of the group's energies.
      energy_std: their population std.
      effective_kl_strength: see the function of that name.
    """

    ratio_deviation: Array
    log_ratio_std: Array
    clip_fraction: Array
    kl: Array
    entropy: Array
    surrogate: Array
    gate: Array
    tau: Array
    energy: Array
    energy_std: Array
    effective_kl_strength: Array

    def means(self) -> dict[str, Array]:
        """name -> mean over all leading axes."""
        return {name: jnp.mean(value) for name, value in vars(self).items()}


def advantages(
    config: ml_collections.ConfigDict, weights: Mapping[str, float], scores: Scores, local: Scores | None = None
) -> Array:
    """Advantages float[P, G] of the kind that config.advantage names.

    Args:
      config: section `objective`.
      weights: component -> weight of the composite reward; read by advantage = "anchor".
      scores: of the whole videos.
      local: of the chunk that holds the fork; read by advantage = "anchor" (None: it adds nothing).
    """
    chex.assert_rank([scores.branches, scores.anchor], [2, 1])
    if config.advantage == "group":
        out = jax.vmap(group_advantage)(scores.branches)
    elif config.advantage == "anchor":
        of = jax.vmap(lambda s: component_advantage(s.components, weights))
        fuse = jax.vmap(
            partial(
                fuse_advantages, normalize=config.fusion_normalize, local_weight=config.local_weight,
                global_weight=config.global_weight,
            )
        )  # fmt: skip
        whole = of(scores)
        out = fuse(jnp.zeros_like(whole) if local is None else of(local), whole)
    else:
        raise ValueError(f"objective.advantage is {config.advantage!r}; expected group or anchor")
    return jnp.clip(out, -config.advantage_clip, config.advantage_clip) if config.advantage_clip else out


def safe(scores: Scores, local: Scores | None = None) -> Array:
    """bool[P]: whether a branch beats the anchor, in the whole video or (release) in the local chunk."""
    gate = jax.vmap(anchor_gate)
    out = gate(scores.branches, scores.anchor)
    return out if local is None else out | gate(local.branches, local.anchor)


def loss(
    config: ml_collections.ConfigDict,
    energies: Array,
    energies_old: Array,
    energies_ref: Array,
    advantages: Array,
    safe: Array,
    on_policy: Array | bool = False,
) -> tuple[Array, Diagnostics]:
    """Eq. 16 with the gate: scale * (L_PPO + beta KL(pi || pi_ref)) of one group, float[], and its diagnostics.

    The release's log-probabilities are -energies at tau = 1, "absolute".

    Args:
      config: section `objective`.
      energies: float[G] under the policy that is trained; the only argument that carries gradient.
      energies_old: float[G] under the policy of the rollout.
      energies_ref: float[G] under the frozen initial policy.
      advantages: float[G].
      safe: bool[], whether a branch beats the anchor.
      on_policy: bool[], the two policies are one: `energies` are the old ones too, and the ratio is exactly 1 however
        the program is compiled.
    """
    chex.assert_equal_shape([energies, energies_old, energies_ref, advantages])
    energies_old = jnp.where(on_policy, jax.lax.stop_gradient(energies), energies_old)
    tau = temperature(energies_old, config.tau, config.tau_unit)
    log_pi = log_policy(energies, tau)
    log_pi_old, log_pi_ref = (jax.lax.stop_gradient(log_policy(e, tau)) for e in (energies_old, energies_ref))
    log_rho = log_ratio(log_pi, jnp.where(on_policy, jax.lax.stop_gradient(log_pi), log_pi_old))
    surrogate = clipped_surrogate(log_rho, jax.lax.stop_gradient(advantages), config.clip_low, config.clip_high)
    kl = kl_divergence(log_pi, log_pi_ref)
    scale = gate_scale(config.gate, safe, log_pi)
    rho = jnp.exp(log_rho)
    diagnostics = Diagnostics(
        ratio_deviation=jnp.max(jnp.abs(rho - 1)),
        log_ratio_std=log_rho.std(),
        clip_fraction=jnp.mean((rho < 1 - config.clip_low) | (rho > 1 + config.clip_high)),
        kl=kl,
        entropy=-jnp.sum(jnp.exp(log_pi) * log_pi),
        surrogate=surrogate,
        gate=scale,
        tau=tau,
        energy=energies.mean(),
        energy_std=spread(energies),
        effective_kl_strength=effective_kl_strength(energies_old, tau, config.beta),
    )
    return scale * (surrogate + config.beta * kl), diagnostics
