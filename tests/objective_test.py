"""The maths of one group: numbers to check by hand, properties, and the released code's variants."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax import config as config_lib
from kvpo_jax import objective
from kvpo_jax.types import Scores

RNG = np.random.default_rng(0)


@pytest.fixture
def section():
    """Section `objective` of the default config, free to change."""
    section = config_lib.load("configs/tiny.py").objective
    section.unlock()
    section.update(tau=0.5, tau_unit="absolute", beta=0.3)
    return section


def group(n=8):
    """energies, old, reference, advantages of one group, float64."""
    energies, old, reference = RNG.uniform(0.5, 1.5, (3, n)) * 0.1 + RNG.uniform(0.5, 1.5, n)
    advantages = objective.group_advantage(jnp.asarray(RNG.normal(size=n)))
    return jnp.asarray(energies), jnp.asarray(old), jnp.asarray(reference), advantages


# ---------------------------------------------------------------- numbers


def test_group_advantage_by_hand():
    # mean 2, population variance (1 + 0 + 1) / 3
    np.testing.assert_allclose(
        objective.group_advantage(jnp.array([1.0, 2.0, 3.0])), np.array([-1, 0, 1]) * np.sqrt(1.5), atol=1e-6
    )
    assert not np.any(objective.group_advantage(jnp.full(4, 0.3)))


def test_anchor_advantage_by_hand():
    # branches 1, 3 and anchor 2: mean 2, unbiased variance (1 + 1 + 0) / 2 = 1
    np.testing.assert_allclose(
        objective.anchor_advantage(jnp.array([1.0, 3.0]), jnp.array(2.0)), [-1.0, 1.0], atol=1e-6
    )


def test_log_policy_by_hand():
    # exp(-E / tau) = 1, 2, 5 -> probabilities 1/8, 2/8, 5/8
    energies = -2.0 * jnp.log(jnp.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(jnp.exp(objective.log_policy(energies, 2.0)), [0.125, 0.25, 0.625], atol=1e-6)


def test_temperature():
    energies = jnp.array([1.0, 3.0])  # population std 1
    assert objective.temperature(energies, 0.5, "absolute") == 0.5
    assert objective.temperature(2 * energies, 0.5, "group_std") == 1.0
    assert objective.temperature(jnp.ones(3), 0.5, "group_std") == 0.5
    with pytest.raises(ValueError, match="tau_unit is 'nats'"):
        objective.temperature(energies, 1.0, "nats")


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "gradient"),
    [
        (1.05, 2.0, 2.1, True),
        (1.5, 2.0, 2.4, False),  # clipped at 1.2
        (0.5, 2.0, 1.0, True),  # min keeps the unclipped term: a good branch that lost probability is pulled back
        (0.5, -2.0, -1.8, False),  # clipped at 0.9
        (1.5, -2.0, -3.0, True),
    ],
)
def test_clip_is_asymmetric(ratio, advantage, surrogate, gradient):
    loss = lambda log_rho: objective.clipped_surrogate(log_rho[None], jnp.array([advantage]), 0.1, 0.2)
    value, slope = jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose(value, -surrogate, rtol=1e-6)
    np.testing.assert_allclose(slope, -ratio * advantage if gradient else 0.0, rtol=1e-5)


def test_kl_by_hand():
    pi, reference = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(objective.kl_divergence(jnp.log(pi), jnp.log(reference)), expected, rtol=1e-6)
    assert objective.kl_divergence(jnp.log(pi), jnp.log(pi)) == 0


def test_anchor_gate():
    assert objective.anchor_gate(jnp.array([0.1, 0.6]), jnp.array(0.5))
    assert not objective.anchor_gate(jnp.array([0.1, 0.5]), jnp.array(0.5))


def test_pi_anchor_is_one_half():
    np.testing.assert_allclose(objective.pi_anchor(jax.nn.log_softmax(jnp.array([0.3, -2.0, 1.0]))), 0.5, atol=1e-6)


# ---------------------------------------------------------------- properties


def test_a_constant_added_to_all_energies_changes_nothing(section):
    with jax.enable_x64(True):
        energies, old, reference, advantages = group()
        for unit in ("absolute", "group_std"):
            section.tau_unit = unit
            loss = lambda shift: objective.loss(section, energies + shift, old + shift, reference, advantages, True)[0]
            gradient = jax.grad(lambda e: objective.loss(section, e, old, reference, advantages, True)[0])(energies)
            np.testing.assert_allclose(loss(0.0), loss(7.0), rtol=1e-11)
            np.testing.assert_allclose(jnp.sum(gradient), 0.0, atol=1e-13)


def test_ratio_is_exactly_one_on_policy(section):
    energies, _, reference, advantages = group()
    energies = energies.astype(jnp.float32)
    diagnostics = objective.loss(section, energies, energies, reference, advantages, True)[1]
    assert diagnostics.ratio_deviation == 0
    assert diagnostics.log_ratio_std == 0
    assert diagnostics.clip_fraction == 0


@pytest.mark.parametrize("gate", ["zero", "mechanism_1", "mechanism_2"])
@pytest.mark.parametrize("safe", [True, False])
def test_gradient_against_finite_differences(section, gate, safe):
    section.gate = gate
    with jax.enable_x64(True):
        energies, old, reference, advantages = group()
        loss = lambda e: objective.loss(section, e, old, reference, advantages, jnp.asarray(safe))[0]
        gradient = np.asarray(jax.grad(loss)(energies))
        if gate != "mechanism_2" and not safe:
            assert loss(energies) == 0
            assert not gradient.any()
            return
        step = 1e-6
        for g, direction in enumerate(np.eye(len(energies))):
            difference = (loss(energies + step * direction) - loss(energies - step * direction)) / (2 * step)
            np.testing.assert_allclose(gradient[g], difference, rtol=1e-6, atol=1e-9)


def test_descent_raises_the_probability_of_a_better_branch(section):
    section.beta = 0.0
    energies = jnp.array([1.0, 1.1, 0.9, 1.05])
    advantages = objective.group_advantage(jnp.array([0.2, 0.9, 0.1, 0.3]))
    gradient = jax.grad(lambda e: objective.loss(section, e, energies, energies, advantages, True)[0])(energies)
    before = objective.log_policy(energies, section.tau)
    after = objective.log_policy(energies - 1e-3 * gradient, section.tau)
    assert after[1] > before[1]
    assert after[2] < before[2]


def test_kl_strength_is_beta_over_tau_in_group_stds(section):
    energies = jnp.array([1.0, 3.0])  # std 1
    section.update(beta=5.0, tau=100.0, tau_unit="group_std")
    of = lambda: objective.loss(section, energies, energies, energies, jnp.array([1.0, -1.0]), True)[1].kl_strength
    np.testing.assert_allclose(of(), 0.05, rtol=1e-6)
    section.update(beta=5.0, tau=100.0, tau_unit="absolute")
    np.testing.assert_allclose(of(), 0.05, rtol=1e-6)


def test_advantages_of_a_batch_and_their_bound(section):
    branches = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    anchor = jnp.array([2.0, 9.0])
    scores = Scores(branches, anchor, {"VQ": (branches, anchor)})
    ours = objective.advantages(section, {"VQ": 1.0}, scores)
    np.testing.assert_allclose(ours[1], objective.group_advantage(branches[1]), atol=1e-6)
    section.update(advantage="anchor", advantage_clip=1.0)
    ours = objective.advantages(section, {"VQ": 1.0}, scores)
    expected = jnp.clip(jax.vmap(objective.anchor_advantage)(branches, anchor), -1, 1)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_array_equal(objective.safe(scores), [True, False])
    local = scores.replace(branches=branches + jnp.array([[0.0], [1.0]]))
    np.testing.assert_array_equal(objective.safe(scores, local), [True, True])


# ---------------------------------------------------------------- the released code

pytest_golden = pytest.mark.golden
TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return json.loads((golden_dir / "objective.json").read_text())


@pytest_golden
def test_golden_advantages(golden):
    weights = golden["fusion_weights"]
    for case in golden["cases"]:
        signals = {}
        for name in ("local", "global"):
            signals[name] = objective.anchor_advantage(
                jnp.array(case[f"reward_{name}"]), jnp.array(case[f"anchor_{name}"])
            )
            np.testing.assert_allclose(signals[name], case[f"anchor_advantage_{name}"], **TOLERANCE)
        for mode, expected in case["normalize"].items():
            for name, values in expected.items():
                np.testing.assert_allclose(objective.normalize_advantage(signals[name], mode), values, **TOLERANCE)
        both = (weights["local"], weights["global_"])
        for mode, expected in case["fused"].items():
            for name, pair in {"local+global": both, "local": (both[0], 0.0), "global": (0.0, both[1])}.items():
                fused = objective.fuse_advantages(signals["local"], signals["global"], mode, *pair)
                np.testing.assert_allclose(fused, expected[name], **TOLERANCE)
        fused = objective.fuse_advantages(signals["local"], signals["global"], "std", *both)
        bound = golden["adv_clip_max"]
        np.testing.assert_allclose(jnp.clip(fused, -bound, bound), case["fused_std_clipped_2.5"], **TOLERANCE)
        safe = objective.anchor_gate(jnp.array(case["reward_local"]), jnp.array(case["anchor_local"]))
        safe |= objective.anchor_gate(jnp.array(case["reward_global"]), jnp.array(case["anchor_global"]))
        assert bool(safe) == case["rank_is_safe"]


@pytest_golden
def test_golden_components(golden):
    data = golden["component_aggregation"]
    components = {n: (jnp.array(r), jnp.array(data["anchors"][n])) for n, r in data["rewards"].items()}
    np.testing.assert_allclose(objective.component_advantage(components, data["weights"]), data["total"], **TOLERANCE)
    for name, expected in data["per_component"].items():
        np.testing.assert_allclose(objective.anchor_advantage(*components[name]), expected, **TOLERANCE)


@pytest_golden
def test_golden_objective(golden, section):
    """Every mechanism, KL coefficient and reference: the loss, its gradient in the log-probabilities, its parts."""
    for case in golden["cases"]:
        advantages = jnp.array(case["fused_std_clipped_2.5"])
        for entry in case["objective"]:
            section.update(
                tau=1.0, beta=entry["kl_coef"], gate=entry["mechanism"],
                clip_low=golden["clip_low"], clip_high=golden["clip_high"],
            )  # fmt: skip
            reference = -jnp.array(case["log_initial" if entry["kl_reference"] == "initial" else "log_old"])
            loss = lambda log_theta, case=case, entry=entry, reference=reference, advantages=advantages: objective.loss(
                section, -log_theta, -jnp.array(case["log_old"]), reference, advantages,
                jnp.array(entry["rank_is_safe"]),
            )  # fmt: skip
            (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array(case["log_theta"]))
            np.testing.assert_allclose(value, entry["total_loss"], **TOLERANCE)
            np.testing.assert_allclose(gradient, entry["grad"], **TOLERANCE)
            unbiased = np.sqrt(len(gradient) / (len(gradient) - 1))
            np.testing.assert_allclose(unbiased * parts.log_ratio_std, entry["log_ratio_std"], **TOLERANCE)
            if entry["rank_is_safe"] or entry["mechanism"] == "mechanism_2":
                np.testing.assert_allclose(parts.clip_fraction, entry["clip_fraction"], atol=1e-6)
            if entry["m2_scale"] is not None:
                np.testing.assert_allclose(parts.gate, entry["m2_scale"], **TOLERANCE)
            if entry["kl_term"] is not None and entry["rank_is_safe"]:
                np.testing.assert_allclose(parts.kl, entry["kl_term"], **TOLERANCE)
