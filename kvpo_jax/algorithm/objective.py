"""Advantages, Gibbs policy, clipped PPO, KL and anchor gate on the [G] of one group.

Paper §3.3 and §3.4: Eq. 6, Eq. 7, Eq. 8, Eq. 9, Eq. 15 and Eq. 16. Pure maths: callers `vmap` over
prompts. docs/algorithm.md derives the gradient. What the released code does differently is a
function of its own; the registries ADVANTAGES, NORMALIZERS, TAU_UNITS and GATES name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from kvpo_jax.errors import Registry
from kvpo_jax.types import Array, Scores

EPS = 1e-8
# Release. It keeps exp finite, and takes the gradient only of a ratio above 4.8e8 or below 2.1e-9.
LOG_RATIO_BOUND = 20.0


def group_std(values: Array) -> Array:
    """Population std over the branches, float[G, ...] to float[...]; exactly 0 where all are equal.

    The rounded mean of equal values need not be equal to them: at G = 8 the residue would be
    normalised to an advantage of up to 0.9.
    """
    return (values - values[0]).std(axis=0)


def rounding(rewards: Array) -> Array:
    """What float32 may round rewards float[G, ...] by, a sum of a few terms, float[...].

    A spread below it is none: normalised, one last place in one reward is an advantage of 1.7.
    """
    return 4 * jnp.finfo(jnp.float32).eps * jnp.abs(rewards).max(axis=0)


def reward_std(rewards: Array) -> Array:
    """`group_std` of rewards float[G]; 0 where they differ by their rounding alone."""
    deviation = group_std(rewards)
    return jnp.where(deviation > rounding(rewards), deviation, 0.0)


# ---------------------------------------------------------------- the advantages of one group


def group_advantage(rewards: Array, eps: float = EPS) -> Array:
    """Eq. 9: (r - mean) / (population std + eps), float[G]."""
    chex.assert_rank(rewards, 1)
    shifted = rewards - rewards[0]  # as in `group_std`: exactly 0 where all are equal
    deviation = reward_std(rewards)
    return jnp.where(deviation > 0, (shifted - shifted.mean()) / (deviation + eps), 0.0)


def anchor_advantage(rewards: Array, anchor: Array, eps: float = EPS) -> Array:
    """Release: (r - r_anchor) / (unbiased std over branches and anchor + eps), float[G].

    It is not centred.
    """
    chex.assert_rank([rewards, anchor], [1, 0])
    everyone = jnp.append(rewards, anchor)
    advantage = (rewards - anchor) / (jnp.std(everyone, ddof=1) + eps)
    return jnp.where(reward_std(everyone) > 0, advantage, 0.0)


def component_advantage(
    components: Mapping[str, tuple[Array, Array]], weights: Mapping[str, float]
) -> Array:
    """Release: the weighted sum over components of their anchor advantages, float[G].

    `components` are name -> (float[G] of the branches, float[] of the anchor).
    """
    weighted = [w * anchor_advantage(*components[name]) for name, w in weights.items() if w]
    return sum(weighted, start=jnp.zeros(()))


def _scale(advantage: Array) -> Array:
    """The std to divide by; 1 where it is at most EPS."""
    deviation = group_std(advantage)
    return jnp.where(deviation <= EPS, 1.0, deviation)


def keep_advantage(advantage: Array) -> Array:
    """The advantage as it is."""
    return advantage


def std_advantage(advantage: Array) -> Array:
    """The advantage over its std, not centred."""
    return advantage / _scale(advantage)


def zscore_advantage(advantage: Array) -> Array:
    """The centred advantage over its std."""
    return (advantage - advantage.mean()) / _scale(advantage)


# Release: how local and global advantages float[G] are normalised before they are fused.
NORMALIZERS: Registry[Callable[[Array], Array]] = Registry(
    "objective.fusion_normalize",
    {"none": keep_advantage, "std": std_advantage, "zscore": zscore_advantage},
)


def fuse_advantages(
    local: Array, whole: Array, normalize: str, local_weight: float, global_weight: float
) -> Array:
    """Release: the weighted sum of the normalised local and global advantages, float[G]."""
    normalized = NORMALIZERS[normalize]
    return local_weight * normalized(local) + global_weight * normalized(whole)


# ---------------------------------------------------------------- the advantages of P groups

# (options, weights, scores, local) -> float[P, G]; see `compute_advantages`.
Advantages = Callable[
    [ml_collections.ConfigDict, Mapping[str, float], Scores, Scores | None], Array
]


def group_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """Paper: Eq. 9 of the composite rewards."""
    return jax.vmap(group_advantage)(scores.branches)


def anchor_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """Release: relative to the anchor, per component, local and global fused."""

    def of_components(scores: Scores) -> Array:
        return jax.vmap(lambda s: component_advantage(s.components, weights))(scores)

    whole = of_components(scores)
    chunk = jnp.zeros_like(whole) if local is None else of_components(local)
    fuse = partial(
        fuse_advantages,
        normalize=options.fusion_normalize,
        local_weight=options.local_weight,
        global_weight=options.global_weight,
    )
    return jax.vmap(fuse)(chunk, whole)


def centred_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """Astrolabe's paper: r - mean, in units of the reward."""
    return jax.vmap(_centred)(scores.branches)


def _centred(rewards: Array) -> Array:
    """r - mean, float[G]; exactly 0 where the rewards differ by their rounding alone."""
    shifted = rewards - rewards[0]  # as in `group_advantage`
    return jnp.where(reward_std(rewards) > 0, shifted - shifted.mean(), 0.0)


def batch_std_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """DiffusionNFT, Astrolabe: r - mean over the std of all rewards + 1e-4.

    Of the prompts that are taken together (config.train.micro_batch).
    """
    return jax.vmap(_centred)(scores.branches) / (jnp.std(scores.branches) + 1e-4)


def max_group_std_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """GenRL: r - mean over the largest std of a group, of the prompts that are taken together."""
    largest = jax.vmap(reward_std)(scores.branches).max()
    return jax.vmap(_centred)(scores.branches) / (largest + EPS)


def per_reward_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """GDPO, GenRL, RAVEN: the weighted sum over components of the advantage of Eq. 9 of each."""
    of_component = [
        weight * jax.vmap(group_advantage)(jnp.asarray(scores.components[name][0]))
        for name, weight in weights.items()
        if weight
    ]
    return sum(of_component, start=jnp.zeros(scores.branches.shape))


def quasi_norm_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """NeighborGRPO: r - mean over its quasi-norm (sum |r - mean|^p)^(1/p), p = quasi_norm."""
    centred, p = jax.vmap(_centred)(scores.branches), options.quasi_norm
    size = jnp.sum(jnp.abs(centred) ** p, axis=1, keepdims=True) ** (1 / p)
    return jnp.where(size > 0, centred / jnp.where(size > 0, size, 1.0), 0.0)


def softmax_advantages(options, weights, scores: Scores, local: Scores | None) -> Array:
    """Reward-weighted regression: the weights G softmax(r / options.reward_tau), not centred."""
    shares = jax.nn.softmax(scores.branches / options.reward_tau, axis=1)
    return scores.branches.shape[1] * shares


ADVANTAGES: Registry[Advantages] = Registry(
    "objective.advantage",
    {
        "group": group_advantages,
        "anchor": anchor_advantages,
        "centred": centred_advantages,
        "batch_std": batch_std_advantages,
        "max_group_std": max_group_std_advantages,
        "per_reward": per_reward_advantages,
        "quasi_norm": quasi_norm_advantages,
        "softmax": softmax_advantages,
    },
)

# Those that compare all prompts that are taken together (config.train.micro_batch).
OVER_PROMPTS = ("batch_std", "max_group_std")


def compute_advantages(
    options: ml_collections.ConfigDict,
    weights: Mapping[str, float],
    scores: Scores,
    local: Scores | None = None,
) -> Array:
    """Advantages float[P, G] of the kind that options.advantage names.

    Args:
      options: section `objective` of the config.
      weights: component -> weight of the composite reward; "anchor" reads them.
      scores: of the whole videos.
      local: of the chunk that holds the fork; "anchor" reads them (None: they add nothing).
    """
    chex.assert_rank([scores.branches, scores.anchor], [2, 1])
    out = ADVANTAGES[options.advantage](options, weights, scores, local)
    bound = options.advantage_clip
    return jnp.clip(out, -bound, bound) if bound else out


def control_advantages(
    options: ml_collections.ConfigDict,
    advantages: Array,
    key: Array,
    numbers: np.ndarray,
    prompts: int,
) -> Array:
    """The advantages float[P, G] of a control experiment: negated, shuffled, or as they are.

    Args:
      options: section `objective` of the config.
      advantages: of P prompts.
      key: for the permutations.
      numbers: int32[P], the number of each prompt in its iteration.
      prompts: how many the iteration has.
    """
    if options.negate_advantages:
        advantages = -advantages
    if options.shuffle_advantages:
        keys = jax.random.split(key, prompts)[numbers]
        advantages = jax.vmap(jax.random.permutation)(keys, advantages)
    return advantages


def noisy_scores(
    scores: Scores, weights: Mapping[str, float], scale: float, key: Array, numbers: np.ndarray
) -> Scores:
    """The scores of P groups by a judge that errs: noise N(0, scale) for every video.

    The components of a video err alike, and its reward by the sum of their weights.

    Args:
      scores: by the judge that does not.
      weights: component -> its weight in the reward.
      scale: config.reward.noise.
      key: of the stream "reward".
      numbers: int32[P], the number of each prompt in its iteration.
    """

    def draw(number: Array) -> Array:
        own = jax.random.fold_in(key, number)
        return scale * jax.random.normal(own, (scores.branches.shape[1] + 1,))

    drawn = jax.vmap(draw)(jnp.asarray(numbers))
    branches, anchor = drawn[:, 1:], drawn[:, 0]
    total = sum(weights.values())
    return Scores(
        branches=scores.branches + total * branches,
        anchor=scores.anchor + total * anchor,
        components={
            name: (b + branches, a + anchor) if name in weights else (b, a)
            for name, (b, a) in scores.components.items()
        },
    )


# ---------------------------------------------------------------- the Gibbs policy


def absolute_unit(energies_old: Array, energy_unit: Array) -> Array:
    """1: tau is an energy."""
    return jnp.ones((), energies_old.dtype)


def group_std_unit(energies_old: Array, energy_unit: Array) -> Array:
    """The spread of the old energies of the group.

    Where it is small the gradient is large: the prompt whose energies are least distinguishable may
    own the update.
    """
    return group_std(jax.lax.stop_gradient(energies_old))


def running_std_unit(energies_old: Array, energy_unit: Array) -> Array:
    """The mean spread of the groups of the iterations before (`next_unit`), one for all prompts."""
    return energy_unit


# What tau is counted in: (old energies float[G], energy_unit float[]) -> float[].
TAU_UNITS: Registry[Callable[[Array, Array], Array]] = Registry(
    "objective.tau_unit",
    {"running_std": running_std_unit, "group_std": group_std_unit, "absolute": absolute_unit},
)

UNIT_DECAY = 0.9


def mean_spread(energies: Array | np.ndarray) -> Array:
    """The mean of the groups' `group_std`, float[], of old energies float[P, G]."""
    return jax.vmap(group_std)(jnp.asarray(energies)).mean()


def next_unit(energy_unit: Array | np.ndarray, spread: Array) -> Array:
    """The running mean of the spread, float[], after an iteration with `spread`."""
    return UNIT_DECAY * jnp.asarray(energy_unit) + (1 - UNIT_DECAY) * spread


def temperature(
    energies_old: Array, tau: float, unit: str, energy_unit: Array | float = 1.0
) -> Array:
    """tau in units of energy, float[]; no gradient.

    It is `tau` itself where the unit is 0: without spread the policy is uniform at any temperature.
    """
    scale = TAU_UNITS[unit](energies_old, jnp.asarray(energy_unit))
    return tau * jnp.where(scale > 0, scale, 1.0)


def log_policy(energies: Array, tau: Array) -> Array:
    """Eq. 6: log pi(g) = log softmax(-E / tau), float[G]."""
    chex.assert_rank(energies, 1)
    return jax.nn.log_softmax(-energies / tau)


def log_ratio(log_pi: Array, log_pi_old: Array) -> Array:
    """Eq. 7: log rho, float[G], kept within +-20."""
    return jnp.clip(log_pi - log_pi_old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    log_rho: Array, advantages: Array, clip_low: float, clip_high: float
) -> Array:
    """Eq. 8: L_PPO = -mean min(rho A, clip(rho, 1 - low, 1 + high) A), float[]."""
    return -jnp.mean(clipped(jnp.exp(log_rho), advantages, clip_low, clip_high))


def clipped(rho: Array, advantages: Array, clip_low: float, clip_high: float) -> Array:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), of ratios of any shape."""
    return jnp.minimum(rho * advantages, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantages)


def beyond_clip(rho: Array, clip_low: float, clip_high: float) -> Array:
    """Whether ratios of any shape are outside the clip range, bool of that shape."""
    return (rho < 1 - clip_low) | (rho > 1 + clip_high)


def kl_divergence(log_pi: Array, log_pi_ref: Array) -> Array:
    """Eq. 15: sum_g pi (log pi - log pi_ref), float[].

    The release has log(pi + 1e-10), which guards a log that here is never taken; the difference is
    at most G * 1e-10.
    """
    return jnp.sum(jnp.exp(log_pi) * (log_pi - log_pi_ref))


# ---------------------------------------------------------------- the anchor gate


def anchor_gate(rewards: Array, anchor: Array) -> Array:
    """Paper §3.4: whether any branch beats the anchor, bool[]."""
    return jnp.any(rewards > anchor)


def open_gates(scores: Scores, local: Scores | None = None) -> Array:
    """bool[P]: whether a branch beats the anchor, in the whole video or (release) in the chunk."""
    gates = jax.vmap(anchor_gate)
    is_open = gates(scores.branches, scores.anchor)
    return is_open if local is None else is_open | gates(local.branches, local.anchor)


def pi_anchor(log_pi: Array) -> Array:
    """Release, mechanism_2: the share of an anchor with logit 0 among the branches' logits log pi.

    float[]; always 1/2, because the branches' exp(log pi) sum to 1.
    """
    return jax.nn.softmax(jnp.append(log_pi, 0.0))[-1]


def zero_gate(gate_open: Array, log_pi: Array) -> Array:
    """Paper, and the release's mechanism_1: nothing is left where no branch beats the anchor."""
    return jnp.asarray(gate_open, log_pi.dtype)


def no_gate(gate_open: Array, log_pi: Array) -> Array:
    """Every loss counts, as in the methods without an anchor."""
    return jnp.ones((), log_pi.dtype)


def mechanism_2_gate(gate_open: Array, log_pi: Array) -> Array:
    """Release: 1 - pi_anchor is left there."""
    return jnp.where(gate_open, 1.0, 1.0 - jax.lax.stop_gradient(pi_anchor(log_pi)))


# (gate_open bool[], log_pi float[G]) -> float[] that multiplies a prompt's loss; no gradient.
GATES: Registry[Callable[[Array, Array], Array]] = Registry(
    "objective.gate",
    {"zero": zero_gate, "none": no_gate, "mechanism_1": zero_gate, "mechanism_2": mechanism_2_gate},
)


def gate_scale(gate: str, gate_open: Array, log_pi: Array) -> Array:
    """What a prompt's loss is multiplied by, float[] (paper §3.4); no gradient."""
    chex.assert_shape(jnp.asarray(gate_open), ())
    return GATES[gate](gate_open, log_pi)


def effective_kl_strength(energies_old: Array, tau: Array, beta: float) -> Array:
    """beta * std(E_old) / tau, float[]: beta over tau in stds of the group's energies.

    How strongly the KL holds back a shift of the energies by one such std, against a PPO gradient
    of |A| = 1 (docs/algorithm.md). It is beta / config.tau with tau_unit = "group_std", and on the
    average over groups with "running_std".
    """
    return beta * group_std(energies_old) / tau


def prompt_weight(of_energies: Array) -> Array:
    """How much say each prompt has in the update, float[P]: |dL/dE| of dL/dE float[P, G].

    With the unit of a group alone it goes as the inverse of the group's spread.
    """
    return jnp.linalg.norm(of_energies, axis=-1)


# ---------------------------------------------------------------- what the trainer calls


class Policies(struct.PyTreeNode):
    """The Gibbs policies of one group; only `log_pi` and `log_rho` carry gradient.

    Attributes:
      energies_old: float[G], those that the rollout's policy is made of.
      tau: float[], in units of energy.
      log_pi: float[G], Eq. 6 of the policy that is trained.
      log_pi_ref: float[G], of the reference.
      log_rho: float[G], Eq. 7, exactly 0 on policy.
    """

    energies_old: Array
    tau: Array
    log_pi: Array
    log_pi_ref: Array
    log_rho: Array


def policies(
    options: ml_collections.ConfigDict,
    energies: Array,
    energies_old: Array,
    energies_ref: Array,
    energy_unit: Array | float = 1.0,
    on_policy: Array | bool = False,
) -> Policies:
    """Eq. 6 and Eq. 7 of one group; arguments as in `loss`."""
    energies_old = jnp.where(on_policy, jax.lax.stop_gradient(energies), energies_old)
    tau = temperature(energies_old, options.tau, options.tau_unit, energy_unit)
    log_pi = log_policy(energies, tau)
    log_pi_old = jax.lax.stop_gradient(log_policy(energies_old, tau))
    log_pi_ref = jax.lax.stop_gradient(log_policy(energies_ref, tau))
    log_pi_old = jnp.where(on_policy, jax.lax.stop_gradient(log_pi), log_pi_old)
    return Policies(energies_old, tau, log_pi, log_pi_ref, log_ratio(log_pi, log_pi_old))


class Diagnostics(struct.PyTreeNode):
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


def loss(
    options: ml_collections.ConfigDict,
    energies: Array,
    energies_old: Array,
    energies_ref: Array,
    advantages: Array,
    gate_open: Array,
    energy_unit: Array | float = 1.0,
    on_policy: Array | bool = False,
) -> tuple[Array, Diagnostics]:
    """Eq. 16 with the gate: scale * (L_PPO + beta KL(pi || pi_ref)) of one group.

    The release's log-probabilities are -energies at tau = 1, "absolute".

    Args:
      options: section `objective` of the config.
      energies: float[G] under the policy that is trained; only these carry gradient.
      energies_old: float[G] under the policy of the rollout.
      energies_ref: float[G] under the frozen initial policy.
      advantages: float[G].
      gate_open: bool[], whether a branch beats the anchor.
      energy_unit: float[], the spread that is common to all prompts (`running_std_unit`).
      on_policy: bool[], the two policies are one: `energies` are the old ones too, and the ratio is
        exactly 1 however the program is compiled.

    Returns:
      The loss float[], and its diagnostics.
    """
    chex.assert_equal_shape([energies, energies_old, energies_ref, advantages])
    of_group = policies(options, energies, energies_old, energies_ref, energy_unit, on_policy)
    tau, log_pi, log_rho = of_group.tau, of_group.log_pi, of_group.log_rho
    advantages = jax.lax.stop_gradient(advantages)
    surrogate = clipped_surrogate(log_rho, advantages, options.clip_low, options.clip_high)
    kl = kl_divergence(log_pi, of_group.log_pi_ref)
    scale = gate_scale(options.gate, gate_open, log_pi)
    rho = jnp.exp(log_rho)
    diagnostics = Diagnostics(
        ratio_deviation=jnp.max(jnp.abs(rho - 1)),
        log_ratio_std=log_rho.std(),
        clip_fraction=jnp.mean(beyond_clip(rho, options.clip_low, options.clip_high)),
        kl=kl,
        entropy=-jnp.sum(jnp.exp(log_pi) * log_pi),
        surrogate=surrogate,
        gate=scale,
        tau=tau,
        energy=energies.mean(),
        energy_std=group_std(energies),
        effective_kl_strength=effective_kl_strength(of_group.energies_old, tau, options.beta),
    )
    return scale * (surrogate + options.beta * kl), diagnostics
