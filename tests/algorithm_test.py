"""The lettered formulas of docs/algorithm.md against automatic differentiation, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.algorithm import objective
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
