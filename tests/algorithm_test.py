"""The closed forms of docs/algorithm.md against automatic differentiation, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax import config as config_lib
from kvpo_jax import objective

G = 6


@pytest.fixture
def section():
    section = config_lib.load("configs/tiny.py").objective
    section.unlock()
    section.update(tau=0.3, tau_unit="absolute", beta=0.7)
    return section


def ppo_gradient(section, energies, old, advantages):
    """dL_PPO / dE."""
    pi, pi_old = jax.nn.softmax(-energies / section.tau), jax.nn.softmax(-old / section.tau)
    rho = pi / pi_old
    clipped = ((advantages > 0) & (rho > 1 + section.clip_high)) | ((advantages < 0) & (rho < 1 - section.clip_low))
    weight = jnp.where(clipped, 0.0, rho * advantages)
    return (weight - pi * weight.sum()) / (len(energies) * section.tau), clipped


def kl_gradient(section, energies, reference):
    """dKL / dE."""
    log_pi, log_ref = (jax.nn.log_softmax(-e / section.tau) for e in (energies, reference))
    difference = log_pi - log_ref
    pi = jnp.exp(log_pi)
    return -pi / section.tau * (difference - jnp.sum(pi * difference))


def test_gradient_in_the_energies(section):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        energies, old, reference = (jnp.asarray(x) for x in 1 + 0.15 * rng.normal(size=(3, G)))
        advantages = objective.group_advantage(jnp.asarray(rng.normal(size=G)))
        ppo, clipped = ppo_gradient(section, energies, old, advantages)
        assert 0 < clipped.sum() < G  # the indicator is exercised both ways
        loss = lambda e: objective.loss(section, e, old, reference, advantages, True)[0]
        expected = ppo + section.beta * kl_gradient(section, energies, reference)
        np.testing.assert_allclose(jax.grad(loss)(energies), expected, rtol=1e-10, atol=1e-13)


def test_gradient_on_policy(section):
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        energies = jnp.asarray(1 + 0.15 * rng.normal(size=G))
        advantages = objective.group_advantage(jnp.asarray(rng.normal(size=G)), eps=0.0)
        loss = lambda e: objective.loss(section, e, energies, energies, advantages, True)[0]
        np.testing.assert_allclose(jax.grad(loss)(energies), advantages / (G * section.tau), rtol=1e-10, atol=1e-13)


def test_gradient_in_the_parameters(section):
    """The chain to theta for a linear velocity v = z theta: reward-weighted contrastive flow matching."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        states, width = 5, 4  # (block, step) pairs of a window, elements of a latent
        z, u = (jnp.asarray(x) for x in rng.normal(size=(2, G, states, width)))
        theta = jnp.asarray(rng.normal(size=(width, width)))
        energies = lambda theta: jnp.mean(jnp.square(z @ theta - u), axis=-1).sum(axis=-1)
        old = energies(theta)
        advantages = objective.group_advantage(jnp.asarray(rng.normal(size=G)), eps=0.0)
        section.tau = 20.0
        loss = lambda theta: objective.loss(section, energies(theta), old, old, advantages, True)[0]
        residual = z @ theta - u
        per_branch = 2 / width * jnp.einsum("gni,gnj->gij", z, residual)
        expected = jnp.einsum("g,gij->ij", advantages, per_branch) / (G * section.tau)
        np.testing.assert_allclose(jax.grad(loss)(theta), expected, rtol=1e-9, atol=1e-13)


def test_strength_of_the_kl(section):
    """Near the reference the KL's gradient is beta / (G tau^2) (dE - mean dE), up to the policy's non-uniformity."""
    with jax.enable_x64(True):
        section.tau = 1000.0  # a nearly uniform policy
        rng = np.random.default_rng(4)
        reference = jnp.asarray(1 + 0.1 * rng.normal(size=G))
        shift = jnp.asarray(1e-3 * rng.normal(size=G))
        kl = lambda e: (
            section.beta
            * objective.kl_divergence(
                objective.log_policy(e, section.tau), objective.log_policy(reference, section.tau)
            )
        )
        expected = section.beta / (G * section.tau**2) * (shift - shift.mean())
        np.testing.assert_allclose(jax.grad(kl)(reference + shift), expected, rtol=1e-3)
