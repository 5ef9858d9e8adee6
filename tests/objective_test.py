"""The maths of one group: numbers to check by hand, properties, the release's variants."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.algorithm import objective
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Scores


@pytest.fixture
def section():
    """Section `objective` of the default config, free to change."""
    section = config_lib.load("configs/tiny.py").objective
    section.unlock()
    section.update(tau=0.5, tau_unit="absolute", beta=0.3)
    return section


def group(n=8):
    """energies, old, reference, advantages of one group: float64 under enable_x64."""
    rng = np.random.default_rng(0)
    energies, old, reference = rng.uniform(0.5, 1.5, (3, n)) * 0.1 + rng.uniform(0.5, 1.5, n)
    advantages = objective.group_advantage(jnp.asarray(rng.normal(size=n)))
    return jnp.asarray(energies), jnp.asarray(old), jnp.asarray(reference), advantages


# ---------------------------------------------------------------- advantages


def test_group_advantage_by_hand():
    # mean 2, population variance (1 + 0 + 1) / 3
    np.testing.assert_allclose(
        objective.group_advantage(jnp.array([1.0, 2.0, 3.0])),
        np.array([-1, 0, 1]) * np.sqrt(1.5),
        atol=1e-6,
    )


@pytest.mark.parametrize("branches", [3, 6, 7, 8])
def test_a_group_of_equals_has_no_spread(branches):
    """For any value, jitted and vmapped as in a run: the rounding of a mean must not pass for a
    spread.
    """
    values = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, (500, 1)), jnp.float32)
    equal = jnp.broadcast_to(values, (500, branches))

    def of(function):
        return jax.jit(jax.vmap(function))(equal)

    np.testing.assert_array_equal(of(objective.group_std), 0)
    np.testing.assert_array_equal(of(objective.group_advantage), 0)
    np.testing.assert_array_equal(of(lambda e: objective.temperature(e, 0.5, "group_std")), 0.5)
    np.testing.assert_array_equal(of(lambda a: objective.NORMALIZERS["std"](a)), equal)


def test_anchor_advantage_by_hand():
    # branches 1, 3 and anchor 2: mean 2, unbiased variance (1 + 1 + 0) / 2 = 1
    np.testing.assert_allclose(
        objective.anchor_advantage(jnp.array([1.0, 3.0]), jnp.array(2.0)), [-1.0, 1.0], atol=1e-6
    )
    np.testing.assert_array_equal(objective.anchor_advantage(jnp.full(4, 0.3), jnp.array(0.3)), 0)


def test_component_advantage_by_hand():
    # VQ as above gives (-1, 1); MQ is the same ten times as large and the other way round: (1, -1)
    components = {
        "VQ": (jnp.array([1.0, 3.0]), jnp.array(2.0)),
        "MQ": (jnp.array([30.0, 10.0]), jnp.array(20.0)),
    }
    total = objective.component_advantage(components, {"VQ": 1.0, "MQ": 0.25})
    np.testing.assert_allclose(total, [-0.75, 0.75], atol=1e-6)


@pytest.mark.parametrize(
    ("normalize", "expected"), [("none", [1.0, 5.0]), ("std", [0.5, 2.5]), ("zscore", [-1.0, 1.0])]
)
def test_normalize_advantage_by_hand(normalize, expected):
    # mean 3, population std 2
    np.testing.assert_allclose(
        objective.NORMALIZERS[normalize](jnp.array([1.0, 5.0])), expected, atol=1e-6
    )


def test_fuse_advantages_by_hand():
    fused = objective.fuse_advantages(jnp.array([1.0, 5.0]), jnp.array([4.0, 0.0]), "std", 1.0, 0.5)
    np.testing.assert_allclose(fused, [0.5 + 0.5 * 2, 2.5], atol=1e-6)


def test_advantages_of_a_batch_and_their_bound(section):
    branches = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    anchor = jnp.array([2.0, 9.0])
    scores = Scores(branches, anchor, {"VQ": (branches, anchor)})
    ours = objective.compute_advantages(section, {"VQ": 1.0}, scores)
    np.testing.assert_allclose(ours[1], np.array([-1, -1, 2]) / np.sqrt(2), atol=1e-6)
    # Anchor-relative: (-1, 0, 1) / sqrt(2/3) and (-9, -9, 0) / sqrt(27), halved as the global part
    section.update(advantage="anchor", advantage_clip=0.7, global_weight=0.5)
    ours = objective.compute_advantages(section, {"VQ": 1.0}, scores)
    expected = [[-0.5 * np.sqrt(1.5), 0, 0.5 * np.sqrt(1.5)], [-0.7, -0.7, 0]]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    # And the same again as the local part: 1.5 instead of 0.5 times
    section.advantage_clip = 0.0
    ours = objective.compute_advantages(section, {"VQ": 1.0}, scores, scores)
    np.testing.assert_allclose(ours[0], [-1.5 * np.sqrt(1.5), 0, 1.5 * np.sqrt(1.5)], atol=1e-6)


# ---------------------------------------------------------------- the Gibbs policy


def test_log_policy_by_hand():
    # exp(-E / tau) = 1, 2, 5 -> probabilities 1/8, 2/8, 5/8
    energies = -2.0 * jnp.log(jnp.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(
        jnp.exp(objective.log_policy(energies, 2.0)), [0.125, 0.25, 0.625], atol=1e-6
    )


def test_the_common_unit_is_the_same_for_every_group():
    """Two groups with spreads 0.5 and 2: alone each is divided by its own, together by one."""
    energies = jnp.array([[0.0, 1.0], [0.0, 4.0]])
    assert objective.mean_spread(energies) == 1.25

    def of(unit):
        return [objective.temperature(e, 2.0, unit, 1.25) for e in energies]

    assert of("running_std") == [2.5, 2.5] and of("group_std") == [1.0, 4.0]
    # Before there is a spread the temperature is tau itself.
    assert objective.temperature(energies[0], 2.0, "running_std", 0.0) == 2.0


def test_the_common_unit_runs_after_the_spread():
    assert objective.next_unit(jnp.float32(1.0), jnp.float32(2.0)) == pytest.approx(1.1)


def test_a_spread_below_the_rounding_is_none():
    """One last place in one reward of 10 is not an advantage of 1.7; ten of them are."""
    ulp = np.spacing(np.float32(10))
    for places, advantage in ((1, 0.0), (4, 0.0), (20, 3**0.5)):
        rewards = jnp.array([10, 10 + places * ulp, 10, 10], jnp.float32)
        assert objective.reward_std(rewards) == pytest.approx(
            (advantage > 0) * places * ulp * 3**0.5 / 4, rel=1e-3
        )
        assert objective.group_advantage(rewards)[1] == pytest.approx(advantage, rel=0.01)
        anchored = objective.anchor_advantage(rewards, jnp.float32(10))
        assert bool(anchored[1] > 1) == (advantage > 0)


def test_the_weight_of_a_prompt_goes_as_the_inverse_of_the_unit(section):
    """|dL/dE| of two groups with spreads 1 and 4 and the same advantages: alone they weigh 4 to 1,
    in the common unit 1 to 1.
    """
    energies = jnp.array([[0.0, 2.0], [0.0, 8.0]])
    advantages = jnp.array([1.0, -1.0])

    def weights(unit):
        section.tau_unit = unit

        def loss(e):
            return objective.loss(section, e, e, e, advantages, True, 2.5, True)[0]

        return objective.prompt_weight(jax.vmap(jax.grad(loss))(energies))

    one, other = weights("group_std")
    assert one / other == pytest.approx(4, rel=1e-5)
    one, other = weights("running_std")
    assert one == pytest.approx(2**0.5 / (2 * section.tau * 2.5), rel=1e-5)
    assert one / other == pytest.approx(1, rel=1e-5)


def test_temperature():
    energies = jnp.array([1.0, 3.0])  # population std 1
    assert objective.temperature(energies, 0.5, "absolute") == 0.5
    assert objective.temperature(2 * energies, 0.5, "group_std") == 1.0
    gradient = jax.grad(lambda e: objective.temperature(e, 0.5, "group_std"))(energies)
    np.testing.assert_array_equal(gradient, 0)


def test_log_ratio_by_hand():
    def of(pi, old):
        return objective.log_ratio(jnp.log(jnp.array(pi)), jnp.log(jnp.array(old)))

    np.testing.assert_allclose(of([0.5, 0.5], [0.25, 0.75]), np.log([2, 2 / 3]), atol=1e-6)
    np.testing.assert_array_equal(of([1.0, 1e-30], [1e-30, 1.0]), [20, -20])


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "gradient"),
    [
        (1.05, 2.0, 2.1, True),
        (1.5, 2.0, 2.4, False),  # clipped at 1.2
        (
            0.5,
            2.0,
            1.0,
            True,
        ),  # min keeps the unclipped term: a good branch that lost probability is pulled back
        (0.95, -2.0, -1.9, True),
        (0.5, -2.0, -1.8, False),  # clipped at 0.9
        (1.5, -2.0, -3.0, True),
    ],
)
def test_clip_is_asymmetric(ratio, advantage, surrogate, gradient):
    def loss(log_rho):
        return objective.clipped_surrogate(log_rho[None], jnp.array([advantage]), 0.1, 0.2)

    value, slope = jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose(value, -surrogate, rtol=1e-6)
    np.testing.assert_allclose(slope, -ratio * advantage if gradient else 0.0, rtol=1e-5)


def test_kl_by_hand():
    pi, reference = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(
        objective.kl_divergence(jnp.log(pi), jnp.log(reference)), expected, rtol=1e-6
    )
    assert objective.kl_divergence(jnp.log(pi), jnp.log(pi)) == 0


@pytest.mark.parametrize(("tau", "unit"), [(100.0, "group_std"), (200.0, "absolute")])
def test_effective_kl_strength_is_beta_over_tau_in_group_stds(section, tau, unit):
    energies = jnp.array([1.0, 5.0])  # std 2
    section.update(beta=5.0, tau=tau, tau_unit=unit)
    diagnostics = objective.loss(
        section, energies, energies, energies, jnp.array([1.0, -1.0]), True
    )[1]
    np.testing.assert_allclose(diagnostics.effective_kl_strength, 0.05, rtol=1e-6)


# ---------------------------------------------------------------- the anchor gate


def test_anchor_gate_needs_a_branch_above_the_anchor():
    assert objective.anchor_gate(jnp.array([0.1, 0.6]), jnp.array(0.5))
    assert not objective.anchor_gate(jnp.array([0.1, 0.5]), jnp.array(0.5))


def test_safe_is_the_whole_video_or_the_local_chunk():
    def scores(branches, anchor):
        return Scores(jnp.array(branches), jnp.array(anchor), {})

    whole = scores([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]], [2.0, 4.0, 4.0])
    local = scores([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(objective.open_gates(whole), [True, False, False])
    np.testing.assert_array_equal(objective.open_gates(whole, local), [True, True, False])


@pytest.mark.parametrize(
    ("gate", "closed"), [("zero", 0.0), ("mechanism_1", 0.0), ("mechanism_2", 0.5)]
)
def test_gate_scale(gate, closed):
    log_pi = jax.nn.log_softmax(jnp.array([0.3, -2.0, 1.0]))
    np.testing.assert_allclose(objective.pi_anchor(log_pi), 0.5, atol=1e-6)
    np.testing.assert_allclose(objective.gate_scale(gate, True, log_pi), 1.0)
    np.testing.assert_allclose(objective.gate_scale(gate, False, log_pi), closed, atol=1e-6)


def test_a_closed_gate_silences_its_prompt_only(section):
    """Loss and gradient of that prompt are exactly zero, KL included; the other prompt's are as
    they were.
    """
    energies, old, reference, advantages = (jnp.stack([x, x]) for x in group())
    of = jax.vmap(lambda *args: objective.loss(section, *args)[0])

    def total(energies, safe):
        return jnp.sum(of(energies, old, reference, advantages, safe))

    both, open_first = jnp.array([True, True]), jnp.array([True, False])
    np.testing.assert_array_equal(of(energies, old, reference, advantages, open_first)[1], 0)
    gradient = jax.grad(total)(energies, open_first)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(gradient[0], jax.grad(total)(energies, both)[0])
    assert np.all(gradient[0] != 0)


def test_a_gate_per_branch_is_an_error():
    with pytest.raises(AssertionError, match="shape"):
        objective.gate_scale("zero", jnp.ones(3, bool), jnp.zeros(3))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("tau_unit", lambda: objective.temperature(jnp.ones(2), 1.0, "nats")),
        ("fusion_normalize", lambda: objective.NORMALIZERS["nats"](jnp.ones(2))),
        ("gate", lambda: objective.gate_scale("nats", True, jnp.zeros(2))),
    ],
)
def test_an_unknown_choice_names_its_field(field, call):
    with pytest.raises(ValueError, match=f"objective.{field}='nats' is not one of"):
        call()


def test_an_unknown_advantage_names_its_field(section):
    section.advantage = "nats"
    with pytest.raises(ValueError, match="objective.advantage='nats' is not one of"):
        objective.compute_advantages(section, {}, Scores(jnp.ones((1, 2)), jnp.ones(1), {}))


def test_on_policy_the_old_energies_are_those_of_the_policy(section):
    energies, other = jnp.array([0.1, 0.7, 0.3]), jnp.array([5.0, -2.0, 0.0])
    arguments = (energies - 1, jnp.array([1.0, -2.0, 1.0]), True)
    given, _ = objective.loss(section, energies, energies, *arguments)
    ours, diagnostics = objective.loss(section, energies, other, *arguments, on_policy=True)
    assert ours == given and diagnostics.ratio_deviation == 0


def test_loss_by_hand(section):
    """Two branches, pi = (1/2, 1/2), old = ref = (1/4, 3/4): ratios 2 and 2/3, of which both are
    clipped.
    """
    section.update(tau=1.0, beta=10.0, clip_low=0.1, clip_high=0.2)
    energies, old = jnp.zeros(2), -jnp.log(jnp.array([1.0, 3.0]))
    value, diagnostics = objective.loss(section, energies, old, old, jnp.array([1.0, -1.0]), True)
    surrogate = -(1.2 - 0.9) / 2
    kl = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    expected = {
        "ratio_deviation": 1.0,
        "log_ratio_std": np.log(3) / 2,
        "clip_fraction": 1.0,
        "kl": kl,
        "entropy": np.log(2),
        "surrogate": surrogate,
        "gate": 1.0,
        "tau": 1.0,
        "energy": 0.0,
        "energy_std": 0.0,
        "effective_kl_strength": 10 * np.log(3) / 2,
    }
    np.testing.assert_allclose(value, surrogate + 10 * kl, rtol=1e-6)
    assert vars(diagnostics).keys() == expected.keys()
    for name, number in diagnostics.means().items():
        np.testing.assert_allclose(number, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("unit", ["absolute", "group_std"])
def test_a_constant_added_to_all_energies_changes_nothing(section, unit):
    with jax.enable_x64(True):
        energies, old, reference, advantages = group()
        section.tau_unit = unit

        def shifted(a, b, c):
            return objective.loss(section, energies + a, old + b, reference + c, advantages, True)[
                0
            ]

        np.testing.assert_allclose(shifted(0.0, 0.0, 0.0), shifted(7.0, -2.0, 3.0), rtol=1e-11)
        gradient = jax.grad(
            lambda e: objective.loss(section, e, old, reference, advantages, True)[0]
        )(energies)
        np.testing.assert_allclose(jnp.sum(gradient), 0.0, atol=1e-13)


@pytest.mark.parametrize("unit", ["absolute", "group_std"])
def test_ratio_is_exactly_one_on_policy(section, unit):
    """In float32, jitted and vmapped as in a run, where the old energies are those of theta."""
    section.tau_unit = unit
    energies = jnp.asarray(np.random.default_rng(1).uniform(0.001, 0.1, (100, 8)), jnp.float32)
    old = jax.lax.stop_gradient(energies)
    of = jax.jit(
        jax.vmap(lambda e, o: objective.loss(section, e, o, e[::-1], e - e.mean(), True)[1])
    )
    diagnostics = of(energies, old)
    np.testing.assert_array_equal(diagnostics.ratio_deviation, 0)
    np.testing.assert_array_equal(diagnostics.log_ratio_std, 0)
    np.testing.assert_array_equal(diagnostics.clip_fraction, 0)


@pytest.mark.parametrize("unit", ["absolute", "group_std"])
@pytest.mark.parametrize("gate", ["zero", "mechanism_1", "mechanism_2"])
@pytest.mark.parametrize("safe", [True, False])
def test_gradient_against_finite_differences(section, unit, gate, safe):
    section.update(gate=gate, tau_unit=unit)
    with jax.enable_x64(True):
        energies, old, reference, advantages = group()

        def loss(e):
            return objective.loss(section, e, old, reference, advantages, jnp.asarray(safe))[0]

        gradient = np.asarray(jax.grad(loss)(energies))
        assert gradient.any() == (safe or gate == "mechanism_2")
        step = 1e-6
        for g, direction in enumerate(np.eye(len(energies))):
            difference = (loss(energies + step * direction) - loss(energies - step * direction)) / (
                2 * step
            )
            np.testing.assert_allclose(gradient[g], difference, rtol=1e-6, atol=1e-9)


def test_only_the_trained_energies_carry_gradient(section):
    section.tau_unit = "group_std"
    energies, old, reference, advantages = group()

    def loss(*constants):
        return objective.loss(section, energies, *constants, True)[0]

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(old, reference, advantages):
        np.testing.assert_array_equal(gradient, 0)


def test_descent_raises_the_probability_of_a_better_branch(section):
    section.beta = 0.0
    energies = jnp.array([1.0, 1.1, 0.9, 1.05])
    advantages = objective.group_advantage(jnp.array([0.2, 0.9, 0.1, 0.3]))
    gradient = jax.grad(
        lambda e: objective.loss(section, e, energies, energies, advantages, True)[0]
    )(energies)
    before = objective.log_policy(energies, section.tau)
    after = objective.log_policy(energies - 1e-3 * gradient, section.tau)
    assert after[1] > before[1]
    assert after[2] < before[2]


# ---------------------------------------------------------------- the released code

TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return json.loads((golden_dir / "objective.json").read_text())


def golden_scores(case, part):
    """Scores of one prompt with one reward component, from rewards and anchor of a case."""
    branches, anchor = jnp.array([case[f"reward_{part}"]]), jnp.array([case[f"anchor_{part}"]])
    return Scores(branches, anchor, {"reward": (branches, anchor)})


@pytest.mark.golden
def test_golden_advantage_steps(golden):
    weights = golden["fusion_weights"]
    for case in golden["cases"]:
        signals = {}
        for part in ("local", "global"):
            rewards, anchor = jnp.array(case[f"reward_{part}"]), jnp.array(case[f"anchor_{part}"])
            signals[part] = objective.anchor_advantage(rewards, anchor)
            np.testing.assert_allclose(signals[part], case[f"anchor_advantage_{part}"], **TOLERANCE)
        for mode, expected in case["normalize"].items():
            for part, values in expected.items():
                np.testing.assert_allclose(
                    objective.NORMALIZERS[mode](signals[part]), values, **TOLERANCE
                )
        both = (weights["local"], weights["global_"])
        for mode, expected in case["fused"].items():
            for name, pair in {
                "local+global": both,
                "local": (both[0], 0.0),
                "global": (0.0, both[1]),
            }.items():
                fused = objective.fuse_advantages(signals["local"], signals["global"], mode, *pair)
                np.testing.assert_allclose(fused, expected[name], **TOLERANCE)


@pytest.mark.golden
def test_golden_advantages_and_gate_as_configured(golden, section):
    """The same through what the trainer calls: fused, global alone, clipped; and which groups are
    safe.
    """
    weights = golden["fusion_weights"]
    section.update(
        advantage="anchor", local_weight=weights["local"], global_weight=weights["global_"]
    )
    for case in golden["cases"]:
        local, whole = golden_scores(case, "local"), golden_scores(case, "global")
        for mode, expected in case["fused"].items():
            section.fusion_normalize = mode

            def of(*scores):
                return objective.compute_advantages(section, {"reward": 1.0}, *scores)[0]

            np.testing.assert_allclose(of(whole, local), expected["local+global"], **TOLERANCE)
            np.testing.assert_allclose(of(whole), expected["global"], **TOLERANCE)
        section.update(fusion_normalize="std", advantage_clip=golden["adv_clip_max"])
        np.testing.assert_allclose(of(whole, local), case["fused_std_clipped_2.5"], **TOLERANCE)
        section.advantage_clip = 0.0
        assert objective.open_gates(whole, local).tolist() == [case["rank_is_safe"]]


@pytest.mark.golden
def test_golden_components(golden):
    data = golden["component_aggregation"]
    components = {
        n: (jnp.array(r), jnp.array(data["anchors"][n])) for n, r in data["rewards"].items()
    }
    np.testing.assert_allclose(
        objective.component_advantage(components, data["weights"]), data["total"], **TOLERANCE
    )
    for name, expected in data["per_component"].items():
        np.testing.assert_allclose(
            objective.anchor_advantage(*components[name]), expected, **TOLERANCE
        )


@pytest.mark.golden
def test_golden_ratio(golden):
    for case in golden["cases"]:
        log_pi, log_pi_old = (
            objective.log_policy(-jnp.array(case[name]), 1.0) for name in ("log_theta", "log_old")
        )
        log_rho = objective.log_ratio(log_pi, log_pi_old)
        for entry in case["objective"]:
            np.testing.assert_allclose(log_rho, entry["log_ratio"], **TOLERANCE)
            np.testing.assert_allclose(jnp.exp(log_rho), entry["ratio"], **TOLERANCE)


@pytest.mark.golden
def test_golden_loss(golden, section):
    """Every mechanism, KL coefficient and reference: the loss, its gradient in the
    log-probabilities, its parts.
    """
    section.update(tau=1.0, clip_low=golden["clip_low"], clip_high=golden["clip_high"])
    for case in golden["cases"]:
        old = -jnp.array(case["log_old"])
        references = {"initial": -jnp.array(case["log_initial"]), "old": old}
        advantages = jnp.array(case["fused_std_clipped_2.5"])
        for entry in case["objective"]:
            section.update(beta=entry["kl_coef"], gate=entry["mechanism"])
            rest = (
                old,
                references[entry["kl_reference"]],
                advantages,
                jnp.array(entry["rank_is_safe"]),
            )

            def loss(log_theta, rest=rest):
                return objective.loss(section, -log_theta, *rest)

            (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(
                jnp.array(case["log_theta"])
            )
            np.testing.assert_allclose(value, entry["total_loss"], **TOLERANCE)
            np.testing.assert_allclose(gradient, entry["grad"], **TOLERANCE)
            np.testing.assert_allclose(
                parts.gate * parts.surrogate, entry["loss_grpo_item"], **TOLERANCE
            )
            np.testing.assert_allclose(
                parts.gate * section.beta * parts.kl, entry["loss_kl_contrib"], **TOLERANCE
            )
            unbiased = np.sqrt(len(gradient) / (len(gradient) - 1))
            np.testing.assert_allclose(
                unbiased * parts.log_ratio_std, entry["log_ratio_std"], **TOLERANCE
            )
            if entry["kl_term"] is not None:
                np.testing.assert_allclose(parts.kl, entry["kl_term"], **TOLERANCE)
            if parts.gate:  # the release does not count the clipped where it leaves no loss
                np.testing.assert_allclose(parts.clip_fraction, entry["clip_fraction"], atol=1e-6)
            if entry["mechanism"] == "mechanism_2":
                np.testing.assert_allclose(parts.gate, entry["m2_scale"], **TOLERANCE)
                np.testing.assert_allclose(1 - parts.gate, entry["m2_pi_anchor"], **TOLERANCE)
                # Where unsafe, the release sums -p log p over the branches' p = pi / 2 only.
                entropy = (
                    parts.entropy if entry["rank_is_safe"] else (parts.entropy + np.log(2)) / 2
                )
                np.testing.assert_allclose(entropy, entry["m2_entropy"], **TOLERANCE)


# ---------------------------------------------------------------- the advantages of other methods


def test_advantages_of_other_methods_by_hand(section):
    """Two groups (1, 2, 3) and (0, 0, 9): centred -1, 0, 1 and -3, -3, 6."""
    branches = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    other = jnp.array([[5.0, 5.0, 5.0], [2.0, 0.0, 1.0]])
    components = {"VQ": (branches, branches[:, 0]), "MQ": (other, other[:, 0])}
    scores = Scores(branches, branches[:, 0], components)
    centred = np.array([[-1.0, 0, 1], [-3, -3, 6]])
    section.update(quasi_norm=0.5, reward_tau=2.0)
    shares = np.exp(np.asarray(branches) / 2)
    expected = {
        "centred": centred,
        "batch_std": centred / (np.std(branches) + 1e-4),
        "max_group_std": centred / np.sqrt(18),  # the stds are sqrt(2/3) and sqrt(18)
        # (sum sqrt|x|)^2 = 2^2, and (2 sqrt 3 + sqrt 6)^2
        "quasi_norm": centred / np.array([[4.0], [(2 * 3**0.5 + 6**0.5) ** 2]]),
        # of MQ a group of equals, and (2, 0, 1)
        "per_reward": centred / np.sqrt([[2 / 3], [18]])
        + 0.5 * np.array([[0, 0, 0], [1, -1, 0]]) / np.sqrt(2 / 3),
        "softmax": 3 * shares / shares.sum(axis=1, keepdims=True),
    }
    for name, by_hand in expected.items():
        section.advantage = name
        ours = objective.compute_advantages(section, {"VQ": 1.0, "MQ": 0.5}, scores)
        np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-6, err_msg=name)
    assert {*expected, "group", "anchor"} == set(objective.ADVANTAGES)


@pytest.mark.parametrize("name", ["centred", "batch_std", "max_group_std", "quasi_norm"])
def test_a_group_of_equals_teaches_nothing(section, name):
    """Rewards that differ by their rounding alone have no advantage, whatever divides it."""
    equal = jnp.full((2, 4), 0.3) * (1 + jnp.array([[0, 1e-7, 0, 0], [0, 0, 0, 0]]))
    section.advantage = name
    ours = objective.compute_advantages(section, {}, Scores(equal, equal[:, 0], {}))
    np.testing.assert_array_equal(ours, 0)


def test_without_a_gate_every_loss_counts():
    log_pi = jnp.log(jnp.full(4, 0.25))
    for is_open in (True, False):
        assert float(objective.gate_scale("none", jnp.asarray(is_open), log_pi)) == 1
