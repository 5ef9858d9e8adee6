"""Held-out statistics, by hand and by printed tables."""

import json
import math

import numpy as np
import pytest

from kvpo_jax.runtime import statistics


@pytest.mark.parametrize(
    "n, quantile",  # of n - 1 degrees of freedom, from printed tables
    [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (31, 2.042), (121, 1.980)],
)
def test_the_interval_is_that_of_student(n, quantile):
    values = np.arange(n) % 2.0
    mean, (low, high) = statistics.mean_interval(values)
    assert mean == np.mean(values) == pytest.approx((low + high) / 2)
    half = quantile * np.std(values, ddof=1) / math.sqrt(n)
    assert (high - low) / 2 == pytest.approx(half, rel=5e-4)


def test_heldout_summary_by_hand():
    reference = np.asarray([0.0, 0.0, 0.0])
    online = np.asarray([1.0, 2.0, 3.0])  # gain 2, half-width 4.303 * 1 / sqrt(3) = 2.484
    summary = statistics.heldout_summary(reference, online, online / 2)
    interval, ema_interval = summary.pop("gain_ci95"), summary.pop("ema_gain_ci95")
    assert summary == {
        "reference": 0.0,
        "online": 2.0,
        "ema": 1.0,
        "gain": 2.0,
        "win_rate": 1.0,
        "ema_gain": 1.0,
        "ema_win_rate": 1.0,
        "num_prompts": 3,
    }
    np.testing.assert_allclose(interval, [2 - 2.484, 2 + 2.484], atol=1e-3)
    np.testing.assert_allclose(ema_interval, [1 - 1.242, 1 + 1.242], atol=1e-3)
    assert statistics.show_interval(interval) == "[-0.4841, +4.4841]"
    assert all(type(x) is float for x in interval)


def test_one_prompt_has_a_gain_and_no_interval():
    one = np.asarray([1.0])
    summary = statistics.heldout_summary(one, 2 * one, one)
    assert summary["gain"] == 1.0 and summary["gain_ci95"] is None and summary["win_rate"] == 1.0
    assert json.loads(json.dumps(summary))["gain_ci95"] is None
    assert statistics.show_interval(None) == "-"


def test_equal_gains_have_an_interval_of_no_width():
    assert statistics.paired_gain(np.zeros(4), np.ones(4)) == (1.0, [1.0, 1.0])


def test_a_tie_is_half_a_win():
    assert statistics.win_rate(np.zeros(4), np.asarray([1.0, 1.0, 0.0, -1.0])) == 0.625


def test_heldout_table():
    def rewards(x):
        return {"reward": np.asarray([x, x + 1]), "VQ": np.asarray([x, x])}

    assert statistics.heldout_table(
        {"reference": rewards(0.0), "online": rewards(1.0), "EMA": rewards(-1.0)}
    ) == (
        ["policy", "reward", "gain over reference", "95 % interval", "win rate", "VQ"],
        [
            ["reference", "0.5000", "", "", "", "0.0000"],
            ["online", "1.5000", "+1.0000", "[+1.0000, +1.0000]", "100%", "1.0000"],
            ["EMA", "-0.5000", "-1.0000", "[-1.0000, -1.0000]", "0%", "-1.0000"],
        ],
    )
    rng = np.random.default_rng(0)
    random = {
        policy: {"reward": rng.normal(size=5), "VQ": rng.normal(size=5)}
        for policy in ("reference", "online", "ema")
    }
    of_reward = statistics.heldout_summary(*(values["reward"] for values in random.values()))
    components = {policy: {"VQ": float(np.mean(values["VQ"]))} for policy, values in random.items()}
    summary = json.loads(json.dumps({"heldout": of_reward, "components": components}))
    assert statistics.summary_table(summary) == statistics.heldout_table(random)
    one = {name: {"reward": np.asarray([x])} for name, x in (("reference", 1.0), ("online", 2.0))}
    assert statistics.heldout_table(one)[1][1] == ["online", "2.0000", "+1.0000", "-", "100%"]


@pytest.mark.parametrize(
    "reference, policy, message",
    [
        (np.zeros(0), np.zeros(0), "one value or more"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "one value or more"),
        (np.zeros(2), np.zeros(3), "rewards of"),
    ],
)
def test_rewards_that_cannot_be_compared(reference, policy, message):
    with pytest.raises(ValueError, match=message):
        statistics.paired_gain(reference, policy)


def test_distances_of_arrays_by_hand():
    """Two frames of one pixel: the differences are 0.3 and 0.4, 0.5 and 0, 0.2 and 0.4."""
    arrays = [np.array(x)[:, None] for x in ((0.0, 0.0), (0.3, 0.4), (0.5, 0.0))]
    found = statistics.pairwise(arrays)
    a, b, c = np.sqrt([0.25 / 2, 0.25 / 2, 0.2 / 2])
    expected = [[0, a, b], [a, 0, c], [b, c, 0]]
    np.testing.assert_allclose(found["matrix"], expected, atol=1e-7)
    np.testing.assert_allclose(found["mean"], c, atol=1e-7)
    np.testing.assert_allclose(found["to_anchor"], (a + b) / 2, atol=1e-7)
    bytes_of = [np.uint8(np.round(255 * x)) for x in arrays]
    np.testing.assert_allclose(statistics.pairwise(bytes_of)["matrix"], expected, atol=2e-3)
    assert statistics.pairwise(arrays[:2])["mean"] is None


def test_a_bootstrap_interval_by_hand():
    # Two values: a mean of 0 and of 1 comes with a chance of a quarter each, so both are ends.
    assert statistics.bootstrap_interval(np.array([0.0, 1.0])) == (0.5, [0.0, 1.0])
    assert statistics.bootstrap_interval(np.array([3.0])) == (3.0, None)
    # The mean of n values has their spread over sqrt(n).
    values = np.random.default_rng(1).normal(size=400)
    mean, (low, high) = statistics.bootstrap_interval(values)
    np.testing.assert_allclose(mean, values.mean())
    np.testing.assert_allclose([mean - low, high - mean], 1.96 * values.std() / 20, rtol=0.1)
