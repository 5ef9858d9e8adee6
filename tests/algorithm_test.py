"""The lettered formulas of docs/algorithm.md against automatic differentiation, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.algorithm import objective, replay
from kvpo_jax.algorithm.kv_cache import Context
from kvpo_jax.runtime import config as config_lib

G = 6
TIGHT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture
def section():
    section = config_lib.load("configs/tiny.py").objective
    section.unlock()
    section.update(tau=0.3, tau_unit="absolute", beta=0.7)
    return section


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def centred_advantages(seed):
    return objective.group_advantage(normal(seed, G), eps=0.0)


def ppo_gradient(section, energies, old, advantages):
    """(A): dL_PPO / dE, and c of each branch."""
    pi, pi_old = jax.nn.softmax(-energies / section.tau), jax.nn.softmax(-old / section.tau)
    rho = pi / pi_old
    clipped = ((advantages > 0) & (rho > 1 + section.clip_high)) | (
        (advantages < 0) & (rho < 1 - section.clip_low)
    )
    weight = jnp.where(clipped, 0.0, rho * advantages)
    return (weight - pi * weight.sum()) / (len(energies) * section.tau), ~clipped


def kl_gradient(section, energies, reference):
    """(C): dKL / dE."""
    log_pi, log_ref = (jax.nn.log_softmax(-e / section.tau) for e in (energies, reference))
    difference = log_pi - log_ref
    pi = jnp.exp(log_pi)
    return -pi / section.tau * (difference - jnp.sum(pi * difference))


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_gradient_in_the_energies(section, beta, shift):
    """(A) and (C), off policy, for group advantages and for some that, like the release's, are not
    centred.
    """
    section.beta = beta
    energies, old, reference, rewards = normal(1, 4, 50, G)
    energies, old, reference = 1 + 0.15 * energies, 1 + 0.15 * old, 1 + 0.15 * reference
    advantages = jax.vmap(objective.group_advantage)(rewards) + shift
    ppo, passed = jax.vmap(lambda *group: ppo_gradient(section, *group))(energies, old, advantages)
    assert 0.2 < passed.mean() < 0.8  # the indicator is exercised both ways
    expected = ppo + beta * jax.vmap(lambda *group: kl_gradient(section, *group))(
        energies, reference
    )

    def loss(*group):
        return objective.loss(section, *group, True)[0]

    gradient = jax.vmap(jax.grad(loss))(energies, old, reference, advantages)
    np.testing.assert_allclose(gradient, expected, **TIGHT)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-13)


def test_gradient_on_policy(section):
    """(B); the KL is silent where theta is the reference."""
    energies, advantages = 1 + 0.15 * normal(2, G), centred_advantages(3)
    gradient = jax.grad(
        lambda e: objective.loss(section, e, energies, energies, advantages, True)[0]
    )(energies)
    np.testing.assert_allclose(gradient, advantages / (G * section.tau), **TIGHT)


class Linear:
    """Branches of 5 (block, step) pairs; a linear velocity v = z theta of latents of 4 elements."""

    def __init__(self, seed):
        self.z, self.u = normal(seed, 2, G, 5, 4)
        self.theta, self.old, self.reference = 0.5 * normal(seed + 1, 3, 4, 4)

    def energies(self, theta):
        """Eq. 5."""
        return jnp.mean(jnp.square(self.z @ theta - self.u), axis=-1).sum(axis=-1)

    def energies_gradient(self, theta):
        """(D), left: float[G, 4, 4]."""
        return 2 / 4 * jnp.einsum("gni,gnj->gij", self.z, self.z @ theta - self.u)


def test_gradient_in_the_parameters(section):
    """(D), off policy, some branches clipped, with the KL; and nothing where the gate is closed."""
    model, advantages = Linear(3), centred_advantages(4)
    section.tau = 5.0
    old, reference = model.energies(model.old), model.energies(model.reference)

    def loss(theta, safe):
        return objective.loss(section, model.energies(theta), old, reference, advantages, safe)[0]

    energies = model.energies(model.theta)
    ppo, passed = ppo_gradient(section, energies, old, advantages)
    assert 0 < passed.sum() < G
    of_energies = ppo + section.beta * kl_gradient(section, energies, reference)
    expected = jnp.einsum("g,gij->ij", of_energies, model.energies_gradient(model.theta))
    np.testing.assert_allclose(jax.grad(loss)(model.theta, True), expected, **TIGHT)
    np.testing.assert_array_equal(jax.grad(loss)(model.theta, False), 0)


def test_gradient_in_the_parameters_on_policy(section):
    """(E): reward-weighted contrastive flow matching."""
    model, advantages = Linear(5), centred_advantages(6)
    old = model.energies(model.theta)

    def loss(theta):
        return objective.loss(section, model.energies(theta), old, old, advantages, True)[0]

    def weighted(theta):
        return jnp.sum(advantages * model.energies(theta)) / (G * section.tau)

    np.testing.assert_allclose(
        jax.grad(loss)(model.theta), jax.grad(weighted)(model.theta), **TIGHT
    )


def test_curvature_of_the_kl(section):
    """(F): the Hessian at the reference is (diag(pi) - pi pi^T) / tau^2, the gradient is zero."""
    reference = 1 + 0.3 * normal(7, G)
    log_pi_ref = objective.log_policy(reference, section.tau)

    def kl(e):
        return objective.kl_divergence(objective.log_policy(e, section.tau), log_pi_ref)

    pi = jnp.exp(log_pi_ref)
    np.testing.assert_allclose(jax.grad(kl)(reference), 0, atol=1e-13)
    expected = (jnp.diag(pi) - jnp.outer(pi, pi)) / section.tau**2
    np.testing.assert_allclose(jax.hessian(kl)(reference), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.3, 30.0])
def test_where_ppo_and_kl_balance(section, tau):
    """(G): the loss of a group that began uniform is stationary at a shift of -tau / beta * A."""
    section.update(tau=tau, clip_low=1.0, clip_high=1e6)
    advantages, uniform = centred_advantages(8), jnp.zeros(G)

    def loss(e):
        return objective.loss(section, e, uniform, uniform, advantages, True)[0]

    balance = -tau / section.beta * advantages
    np.testing.assert_allclose(tau * jax.grad(loss)(balance), 0, atol=1e-13)
    assert np.abs(tau * jax.grad(loss)(0.9 * balance)).max() > 1e-3
    assert loss(balance) < loss(0.9 * balance)
    assert loss(balance) < loss(1.1 * balance)


class Shared:
    """Eight branches at one state of level 0.8; the velocity v there, float[2], is the parameter.

    Attributes:
      u: float[8, 2], the velocities that the branches followed.
      advantages: float[8], as many good ones as bad ones.
      reference: float[2], v of the reference.
    """

    def __init__(self, seed, energy="velocity"):
        side = jnp.repeat(jnp.array([1.0, -1.0]), 4)[:, None] * jnp.array([1.0, 0.5])
        self.u = side + 0.1 * normal(seed, 8, 2)
        self.advantages = objective.group_advantage(jnp.repeat(jnp.array([1.0, 0.0]), 4), eps=0.0)
        self.reference = jnp.array([0.1, -0.2])
        self.options = config_lib.load("configs/tiny.py").replay.copy_and_resolve_references()
        self.options.energy = energy

    @property
    def push(self):
        """p of (H)."""
        return jnp.mean(self.advantages[:, None] * self.u, axis=0)

    def energies(self, v):
        """Those of the replay, of a network that says v whatever it reads."""
        u = self.u.reshape(1, 8, 1, 1, 1, 1, 2)
        number = jnp.zeros((1, 8, 1), jnp.int32)
        states = replay.States(
            jnp.zeros_like(u), u, jnp.full((1, 8, 1), 0.8), number, number, number, number
        )

        def policy(frozen, lora):
            return lambda z, *_: (jnp.broadcast_to(lora, z.shape), None), ()

        nothing = jnp.zeros((1, 1, 1, 1, 1, 1))
        context = Context.of(nothing, nothing, jnp.zeros((1, 1), jnp.int32))
        return replay.shared_energies(policy, self.options, v, (), context, states)[0]

    def gradient(self, section, v, old=None):
        """Of the loss in v, under an energy unit of 1; on policy, unless it was `old` that drew."""

        def loss(v):
            energies = self.energies(v)
            drew = energies if old is None else self.energies(old)
            others = drew, self.energies(self.reference), self.advantages, True
            return objective.loss(section, energies, *others, on_policy=old is None)[0]

        return jax.jit(jax.grad(loss))(v)

    def descend(self, section, rate, steps, old=None):
        """v after every 100 of `steps`, float[steps / 100, 2], from the reference on."""

        def hundred(v, _):
            after = jax.lax.fori_loop(
                0, 100, lambda i, v: v - rate * self.gradient(section, v, old), v
            )
            return after, after

        return jax.jit(lambda v: jax.lax.scan(hundred, v, length=steps // 100)[1])(self.reference)


COUNTS = {"velocity": 1.0, "latent": 0.8**2, "clean": 0.8**2 / 2}  # c of (H), at sigma_floor = 1


@pytest.mark.parametrize(
    "energy, unit", [*((e, "absolute") for e in COUNTS), ("clean", "group_std")]
)
def test_a_shared_state_is_pushed_along_good_minus_bad(section, energy, unit):
    """(H): wherever v is, and past the good branches."""
    section.update(beta=0.0, tau_unit=unit)
    branches = Shared(1, energy)
    for far in (0.0, 1.0, 10.0, -3.0):
        v = branches.reference + far * branches.push
        tau = objective.temperature(branches.energies(v), section.tau, unit)
        expected = -2 * COUNTS[energy] / (2 * tau) * branches.push
        np.testing.assert_allclose(branches.gradient(section, v), expected, **TIGHT)


def test_the_pull_of_the_kl_at_a_shared_state(section):
    """(I)."""
    branches = Shared(2, "latent")
    factor = 2 * COUNTS["latent"] / (2 * section.tau)
    for v in normal(3, 4, 2):
        tilt = factor * (v - branches.reference)
        log_pi, log_ref = (
            objective.log_policy(branches.energies(x), section.tau) for x in (v, branches.reference)
        )
        tilted = log_pi - log_ref - branches.u @ tilt
        np.testing.assert_allclose(tilted, tilted[0], rtol=1e-9)
        covariance = jnp.cov(branches.u.T, aweights=jnp.exp(log_pi), ddof=0)
        expected = -factor * (branches.push - section.beta * covariance @ tilt)
        np.testing.assert_allclose(branches.gradient(section, v), expected, rtol=1e-9)


def test_only_a_kl_that_is_strong_enough_stops_the_push(section):
    """Without it v moves on at a constant rate, and below beta* it gets away as well."""
    branches = Shared(5)
    section.beta = 0.0
    away = branches.descend(section, 0.02, 400)
    rate = 100 * 0.02 / section.tau * branches.push
    np.testing.assert_allclose(away, branches.reference + np.outer(range(1, 5), rate), rtol=1e-9)
    section.beta = 1.0
    slowed = branches.descend(section, 0.02, 4000)
    assert np.linalg.norm(slowed[-1] - slowed[-2]) > 0.9 * np.linalg.norm(rate)
    section.beta = 3.0
    held = branches.descend(section, 0.02, 4000)[-1]
    assert np.abs(branches.gradient(section, held)).max() < 1e-6
    assert np.linalg.norm(held - branches.reference) < np.linalg.norm(branches.push)


def test_the_least_beta_that_can_hold(section):
    """beta* of 1 to 7 good branches of 8: below it the loss never pushes back."""
    least = np.array([0.563, 1.049, 1.588, 2.233, 3.078, 4.351, 6.938])
    section.update(tau=1.0, tau_unit="absolute")

    def of_good(number, odds):
        """dL/dE of a good branch, where the policy has moved the log odds of good over bad."""
        good = (jnp.arange(8) < number).astype(odds.dtype)
        advantages = objective.group_advantage(good, eps=0.0)

        def loss(energies):
            others = energies, jnp.zeros(8), advantages, True
            return objective.loss(section, energies, *others, on_policy=True)[0]

        return jax.grad(loss)(-odds * good)[0]

    def slopes(beta):
        section.beta = beta
        along = jax.vmap(jax.vmap(of_good, in_axes=(None, 0)), in_axes=(0, None))
        return np.asarray(jax.jit(along)(jnp.arange(1, 8), jnp.linspace(0, 8, 200)))

    push, pull = slopes(0.0), slopes(1.0) - slopes(0.0)  # the loss is linear in beta
    assert (push > 0).all() and (push + 0.99 * least[:, None] * pull > 0).all()
    assert ((push + 1.01 * least[:, None] * pull).min(axis=1) < 0).all()


def test_the_clip_bounds_what_one_rollout_moves(section):
    """From the second update on; the next rollout begins at a ratio of 1."""
    section.beta = 0.0
    branches = Shared(5)
    first = branches.descend(section, 1e-3, 1000, old=branches.reference)
    np.testing.assert_array_equal(first[-1], first[-2])
    log_pi, log_old = (
        objective.log_policy(branches.energies(v), section.tau)
        for v in (first[-1], branches.reference)
    )
    rho = jnp.exp(log_pi - log_old)
    assert (rho[:4] > 1.2).all() and (rho[4:] < 0.9).all() and rho.max() < 1.4
    assert (branches.gradient(section, first[-1], old=branches.reference) == 0).all()
    again = branches.gradient(section, first[-1], old=first[-1])
    np.testing.assert_allclose(again, branches.gradient(section, branches.reference), rtol=1e-9)
