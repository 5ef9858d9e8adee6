"""Every trouble is named when it is there, and a healthy run has none."""

import json

import numpy as np
import pytest

from kvpo_jax import train
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import doctor
from kvpo_jax.runtime.metrics import Group, group_metrics
from kvpo_jax.types import Judged, Replayed, Scores

HEALTHY = {
    "prompts_with_weight": 4,
    "prompt_weight_max": 0.4,
    "pixel_std_in_group": 0.01,
    "reward_std_in_group": 0.01,
    "gate_open": 0.5,
    "entropy": 2.0,
    "clip_fraction": 0.1,
    "reward_anchor": 0.0,
}


@pytest.fixture
def config():
    return config_lib.load("configs/tiny.py")


def rows(count, rising=True, **fields):
    return [
        {**HEALTHY, "reward_anchor": 0.01 * i * rising + 0.1 * (i % 2), **fields}
        for i in range(count)
    ]


def diagnose(config, *records):
    """name -> what is said."""
    return {found.name: found.text for found in doctor.examine(config, *records)}


def test_a_healthy_run_has_no_trouble(config):
    assert diagnose(config, rows(100)) == {}


@pytest.mark.parametrize(
    "name, fields, count, advice",
    [
        ("one prompt", {"prompt_weight_max": 0.6}, 1, "train.prompts_per_iteration"),
        (
            "identical branches",
            {"pixel_std_in_group": 0.0, "reward_std_in_group": 0.0},
            1,
            "rollout.perturbed_steps",
        ),
        ("no spread", {"reward_std_in_group": 0.0}, 1, "saturated"),
        ("gate", {"gate_open": 0.0}, doctor.PATIENCE, "milder routing"),
        ("entropy", {"entropy": 0.1}, doctor.PATIENCE, "objective.tau"),
        ("clip", {"clip_fraction": 0.95}, doctor.PATIENCE, "train.learning_rate"),
        ("flat", {"rising": False}, 2 * doctor.FLAT, "shuffle_advantages"),
    ],
)
def test_each_trouble_has_a_name_and_advice(config, name, fields, count, advice):
    found = diagnose(config, rows(count, **fields))
    assert list(found) == [name]
    assert advice in found[name]
    if count > 1:
        assert diagnose(config, rows(count - 1, **fields)) == {}


@pytest.mark.parametrize("prompts, share, named", [(2, 0.99, 0), (3, 0.6, 0), (3, 0.7, 1)])
def test_of_few_prompts_one_may_have_most_of_the_gradient(config, prompts, share, named):
    row = rows(1, prompts_with_weight=prompts, prompt_weight_max=share)
    assert len(diagnose(config, row)) == named


def test_the_unit_of_a_group_is_named_as_the_cause(config):
    config = config_lib.override(config, ["--config.objective.tau_unit=group_std"])
    found = diagnose(config, rows(1, prompt_weight_max=0.78))
    assert "78% of the weight" in found["one prompt"] and "running_std" in found["one prompt"]


def test_a_closed_gate_of_the_release_still_lets_half_through(config):
    config = config_lib.override(config, ["--config.objective.gate=mechanism_2"])
    assert "so little is learned" in diagnose(config, rows(doctor.PATIENCE, gate_open=0.0))["gate"]


def test_a_trouble_is_told_when_it_begins_and_when_it_ends(config):
    one = doctor.Doctor(config)
    sick = {**HEALTHY, "pixel_std_in_group": 0.0}
    said = [one.visit(metrics) for metrics in (HEALTHY, sick, sick, HEALTHY)]
    assert [len(lines) for lines in said] == [0, 1, 0, 1]
    assert "identical" in said[1][0] and said[3] == ["  doctor: over: identical branches"]


def test_a_real_run_with_identical_branches_is_found_out(config, tmp_path, capsys):
    """No routed step: every branch is its anchor."""
    fields = {
        "model.num_layers": 3,
        "rollout.perturbed_steps": 0,
        "train.iterations": 1,
        "eval.prompts": 2,
        "eval.batch": 2,
        "train.prompts_per_iteration": 1,
        "rollout.branches": 3,
    }
    config = config_lib.override(
        config, [f"--config.{name}={value}" for name, value in fields.items()]
    )
    train.train_and_evaluate(config, tmp_path)
    assert "doctor: the branches of every group are identical" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    # Exactly, though the mean of three or eight equal numbers need not be equal to them.
    assert metrics["pixel_std_in_group"] == metrics["reward_std_in_group"] == 0


@pytest.mark.parametrize("reward", [0.1, 0.5, 9.3])
def test_equal_rewards_have_no_spread(config, reward):
    scores = Scores(np.full((2, 8), reward, np.float32), np.zeros(2), {})
    judged = Judged(scores, np.zeros((2, 8)), np.ones(2, bool), pixel_std=np.float32(0.1))
    zeros = np.zeros((2, 8))
    replayed = Replayed(zeros, None, zeros + 1 / 8, zeros + 1, weight=np.ones(2))
    group = Group(judged, np.zeros((2, 8, 6), int), zeros, zeros, replayed, sentences=())
    metrics = {**HEALTHY, **group_metrics([group])}
    assert list(diagnose(config, [metrics])) == ["no spread"]
