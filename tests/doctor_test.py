"""Every trouble is named when it is there, and a healthy run has none."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax import programs, train
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
    "reward": 0.0,
    "reward_anchor": 0.0,
    "energy": 1.2,
    "energy_floor": 0.001,
    "pivot": 5,
    "exposure": 0.5,
    "saturation": 0.2,
    "clipped": 0.0,
}


@pytest.fixture
def config():
    return config_lib.load("configs/tiny.py")


def rows(count, rising=True, **fields):
    return [
        {**HEALTHY, "iteration": i, "reward_anchor": 0.01 * i * rising + 0.1 * (i % 2), **fields}
        for i in range(count)
    ]


def numbered(values, name="reward"):
    """An iteration with each of these values of a metric."""
    return [{**HEALTHY, "iteration": i, name: value} for i, value in enumerate(values)]


def diagnose(config, *records):
    """name -> what is said."""
    return {found.name: found.text for found in doctor.examine(config, *records)}


def test_a_healthy_run_has_no_trouble(config):
    assert diagnose(config, rows(100)) == {}
    assert diagnose(config, []) == {}


def test_of_what_is_not_recorded_no_rule_complains():
    """A run of an older version, or of one whose numbers were not finite."""
    assert diagnose({}, [{"iteration": i} for i in range(100)]) == {}
    assert diagnose({}, rows(100, **dict.fromkeys(HEALTHY))) == {}
    assert diagnose({}, rows(100, **dict.fromkeys(HEALTHY, math.inf))) == {}
    assert diagnose({"objective": 3, "rollout": {"branches": "x"}}, rows(20)) == {}


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
    assert advice in found[name] and name in doctor.RULES
    if count > 1:
        assert diagnose(config, rows(count - 1, **fields)) == {}


@pytest.mark.parametrize(
    "name, metric, well, sick",
    [
        ("identical branches", "pixel_std_in_group", 1e-9, 0.0),
        ("no spread", "reward_std_in_group", 1e-9, 0.0),
        ("one prompt", "prompt_weight_max", 0.5, 0.51),
        ("gate", "gate_open", 0.01, 0.0),
        ("entropy", "entropy", 0.21, 0.20),  # a tenth of log 8 is 0.208
        ("clip", "clip_fraction", 0.9, 0.91),
    ],
)
def test_both_sides_of_a_threshold(config, name, metric, well, sick):
    assert diagnose(config, rows(20, **{metric: well})) == {}
    assert list(diagnose(config, rows(20, **{metric: sick}))) == [name]


@pytest.mark.parametrize("rise, named", [(0.11, 0), (0.09, 1)])
def test_a_rise_of_a_tenth_of_the_spread_is_one(config, rise, named):
    """Of rewards that go up and down by 1."""
    anchors = [1.0, -1.0] * doctor.FLAT
    raised = [x + rise * (i >= doctor.FLAT) for i, x in enumerate(anchors)]
    found = doctor.examine(config, numbered(raised, "reward_anchor"))
    assert [x[::2] for x in found] == [("flat", 2 * doctor.FLAT - 1)] * named


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


def test_a_rule_from_outside_is_told(config, monkeypatch):
    def dark(history):
        return history["exposure"] < 0.1

    rule = doctor.Rule(dark, lambda history, first: f"dark: {history['exposure'][-1]}", least=2)
    monkeypatch.setitem(doctor.RULES, "mine", rule)
    assert doctor.examine(config, rows(3, exposure=0.05)) == [("mine", "dark: 0.05", 0)]
    assert doctor.examine(config, rows(1, exposure=0.05)) == []


def test_every_rule_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    assert re.findall(r"^### (.*)$", text, re.M) == list(doctor.RULES)
    assert re.findall(r"^\| \[(.*?)\]\(#", text, re.M) == list(doctor.RULES)


# ---------------------------------------------------------------- the group and the update


def test_a_trouble_has_the_iteration_since_when_it_lasts(config):
    entropy = [2.0] * 5 + [0.1] * 3 + [2.0] + [0.1] * 12
    sick = numbered(entropy, "entropy")[4:]  # rows know their numbers
    (found,) = doctor.examine(config, sick)
    assert (found.name, found.since) == ("entropy", 9)
    assert "for 12 iterations" in found.text
    assert doctor.over(config, sick) == {}


def test_what_is_over_is_listed(config):
    history = numbered([0, 1, 1, 0, 1, 0, 0], "pixel_std_in_group")[:-1] + rows(7)[-1:]
    found = doctor.over(config, history)
    assert found == {"identical branches": [(0, 0), (3, 3), (5, 5)]}
    assert doctor.examine(config, history) == []


@pytest.mark.parametrize("pivots, name", [((6, 7, 7), "out of reach"), ((7, 6, 6), None)])
def test_scored_frames_before_the_fork_are_told_from_identical_branches(config, pivots, name):
    """Where the branches of an earlier pivot differ, it is the pivot that is too late."""
    spreads = 0.01, 0.0, 0.0
    late = [
        {**HEALTHY, "iteration": i, "pivot": pivot, "pixel_std_in_group": spread}
        for i, (pivot, spread) in enumerate(zip(pivots, spreads, strict=True))
    ]
    found = diagnose(config, late)
    assert list(found) == [name or "identical branches"]
    if name:
        assert "in 2 of the last 3" in found[name] and "fork of pivot 7" in found[name]
        assert "reward.min_behind" in found[name]
        well = numbered([5] * doctor.PATIENCE, "pivot")
        assert list(diagnose(config, late + well[:-1])) == [name]
        assert diagnose(config, late + well) == {}


@pytest.mark.parametrize("equal, named", [(1, False), (2, True)])
def test_groups_whose_rewards_are_equal_are_counted(config, equal, named):
    records = [
        {"iteration": 0, "reward": [0.5, 0.5] if i < equal else [0.5, 0.6]} for i in range(4)
    ]
    found = diagnose(config, rows(1), records)
    assert list(found) == ["no spread"] * named
    assert not named or "in 50% of the groups" in found["no spread"]


def test_the_prompt_that_owns_the_gradient_is_named(config):
    def record(iteration, sentence, weight):
        return {"iteration": iteration, "prompt": [sentence, "it stops"], "weight": weight} | {
            "reward": [0.1, 0.2]
        }

    records = [record(0, "an old one", 9.0)]
    records += [record(1, "a dog", 0.1), record(1, "a cat's nap", 0.8), record(1, "rain", None)]
    found = diagnose(config, rows(2, prompt_weight_max=0.8), records)
    assert found["one prompt"].startswith('one of 4 prompts, "a cat\'s nap" and 1 more, has 80%')
    assert (
        "one of 4 prompts has 80%" in diagnose(config, rows(2, prompt_weight_max=0.8))["one prompt"]
    )


@pytest.mark.parametrize("energy, named", [(0.61, 0), (0.59, 1)])
def test_rounding_as_large_as_the_signal_is_a_floor(config, energy, named):
    """The toy replays 3 blocks of 4 steps, 2 of which routing does not reach.

    Of these 2, the energy is 0.1; of the other 10, it is 2 * 0.1 / 2 each at the threshold.
    """
    sick = rows(doctor.PATIENCE, energy_floor=0.05, energy=energy - 0.1 + 0.05)
    found = diagnose(config, sick)
    assert list(found) == ["floor"] * named
    assert diagnose(config, sick[1:]) == {}
    assert not named or "model.dtype=float32" in found["floor"]


# ---------------------------------------------------------------- the reward


def heldout(done, gain=0.0, spread=0.0, prompts=8, optimised=("VQ",), **components):
    """An evaluation: the online policy gains so much on every prompt, give or take `spread`."""

    def scores(gain):
        signs = [1 if i % 2 else -1 for i in range(prompts)]
        return {
            "reference": [0.5] * prompts,
            "online": [0.5 + gain + spread * sign for sign in signs],
            "ema": [0.5] * prompts,
        }

    of = {name: scores(change) for name, change in {"VQ": gain, **components}.items()}
    return {
        "iteration": done,
        "reward": scores(gain),
        "components": {
            policy: {name: values[policy] for name, values in of.items()}
            for policy in ("reference", "online", "ema")
        },
        "optimised": list(optimised),
        "first_pivot": 2,
        "blocks": {},
    }


# The standard error of 8 changes x +- 0.1 is 0.1 sqrt(8 / 7) / sqrt(8) = 0.0378.
@pytest.mark.parametrize("gain, named", [(-0.077, True), (-0.074, False), (0.1, False)])
def test_a_policy_below_the_reference_is_found(config, gain, named):
    found = doctor.examine(config, rows(30), (), [heldout(10, 0.0), heldout(20, gain, 0.1)])
    assert [x[::2] for x in found] == [("worse", 19)] * named
    assert not named or "+0.4230 instead of +0.5000" in found[0].text


def test_a_policy_below_the_reference_is_found_in_the_metrics_of_an_older_run(config):
    older = rows(30)
    older[9] |= {"heldout_reference": 0.5, "heldout_online": 0.6}
    older[19] |= {"heldout_reference": 0.5, "heldout_online": 0.4}
    (found,) = doctor.examine(config, older)
    assert (found.name, found.since) == ("worse", 19) and "+0.4000 instead of +0.5000" in found.text
    assert diagnose(config, older[:19]) == {}


@pytest.mark.parametrize(
    "gain, change, prompts, named",
    [
        (0.077, -0.077, 8, True),
        (0.074, -0.077, 8, False),  # the reward may not have risen
        (0.077, -0.074, 8, False),  # it may not have fallen
        (0.077, 0.1, 8, False),
        (0.5, -0.5, 7, False),  # too few prompts to tell
    ],
)
def test_a_reward_that_rises_while_a_watched_one_falls_is_found(
    config, gain, change, prompts, named
):
    records = [heldout(20, gain, 0.1, prompts, motion=change)]
    found = doctor.examine(config, rows(30), (), records)
    assert [x[::2] for x in found] == [("watched", 19)] * named
    assert not named or "motion (-0.0770 on held-out prompts)" in found[0].text
    records = [heldout(20, gain, 0.1, prompts, ("VQ", "motion"), motion=change)]
    assert diagnose(config, rows(30), (), records) == {}
    for name in doctor.MAY_FALL:
        records = [heldout(20, gain, 0.1, prompts, **{name: change})]
        assert diagnose(config, rows(30), (), records) == {}


@pytest.mark.parametrize("change, named", [(-0.026, True), (-0.024, False)])
def test_a_watched_score_may_lose_a_twentieth_of_its_level(config, change, named):
    """Of 0.5, with the same change on every prompt: its standard error is 0."""
    records = [heldout(20, 0.1, motion=change)]
    assert list(diagnose(config, rows(30), (), records)) == ["watched"] * named


# 10 values x +- 0.1: the error of a difference of two such means is 0.1 sqrt(2 / 9) = 0.0471.
@pytest.mark.parametrize(
    "rise, fall, weight, named",
    [
        (0.145, -0.145, 0.0, True),
        (0.138, -0.145, 0.0, False),
        (0.145, -0.138, 0.0, False),
        (0.145, -0.145, 0.5, False),  # it counts in the reward
    ],
)
def test_a_component_without_weight_that_falls_in_training_is_found(rise, fall, weight, named):
    config = {"reward": {"weights": {"VQ": 1, "MQ": weight}}}
    signs = [0.1, -0.1] * doctor.PATIENCE
    steps = [0.0] * doctor.PATIENCE + [1.0] * doctor.PATIENCE
    trained = [
        {"iteration": i, "reward": sign + rise * step, "reward_MQ": sign + fall * step}
        | {"reward_VQ": 0.0}
        for i, (sign, step) in enumerate(zip(signs, steps, strict=True))
    ]
    branches = [{"iteration": 19, "reward": [0, 1], "components": {"VQ": {}, "MQ": {}}}]
    found = doctor.examine(config, trained, branches)
    assert [x[::2] for x in found] == [("watched", 2 * doctor.PATIENCE - 1)] * named
    assert not named or "MQ (-0.1450 in training)" in found[0].text
    assert doctor.examine(config, trained[:-1], branches) == []
    assert doctor.examine({}, trained, branches) == []  # nobody knows what counts
    intended = [{**row, "reward_shown": row.pop("reward_MQ")} for row in trained]
    branches[0]["components"] = {"VQ": {}, "shown": {}}
    assert doctor.examine(config, intended, branches) == []


# ---------------------------------------------------------------- the videos


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("exposure", 0.11, True),
        ("exposure", 0.09, False),
        ("exposure", -0.11, True),
        ("saturation", 0.11, True),
        ("saturation", 0.09, False),
        ("clipped", 0.06, True),
        ("clipped", 0.04, False),
        ("clipped", -0.06, False),  # detail that comes back
    ],
)
def test_videos_that_drift_from_the_reference_are_found(config, name, change, named):
    seen = rows(30)
    policies = {"reference": 0.5, "online": 0.5 + change, "ema": 0.5}
    seen[19] |= {f"heldout_{name}_{policy}": value for policy, value in policies.items()}
    found = doctor.examine(config, seen)
    assert [x[::2] for x in found] == [("drift", 19)] * named
    assert not named or f"{name} {change:+.2f}" in found[0].text
    # Without an evaluation: the last branches and the first ones.
    branches = numbered([0.5] * doctor.PATIENCE + [0.5 + change] * doctor.PATIENCE, name)
    assert list(diagnose(config, branches)) == ["drift"] * named
    assert diagnose(config, branches[1:]) == {}


@pytest.mark.parametrize(
    "online, named",
    [
        ([0.4, 0.5, 0.9, 0.9], True),  # a loss of 0.1 is more than a tenth of 0.4
        ([0.47, 0.5, 0.9, 0.9], False),
        ([0.4, 0.5, 0.35, 0.35], False),  # everything gets worse
    ],
)
def test_first_blocks_that_get_worse_are_found(config, online, named):
    record = heldout(20) | {"blocks": {"reference": [0.5] * 4, "online": online}}
    found = doctor.examine(config, rows(30), (), [heldout(10), record])
    assert [x[::2] for x in found] == [("first blocks", 19)] * named
    assert not named or "block 0 by up to 0.1000" in found[0].text
    # The standard error of the gain, 0.0605, twice.
    noisy = heldout(20, spread=0.16) | {"blocks": record["blocks"]}
    assert diagnose(config, rows(30), (), [noisy]) == {}

    older, gains = rows(30), np.subtract(online, 0.5)
    older[19] |= {
        "heldout_gain_before_pivots": gains[:2].mean(),
        "heldout_gain_from_pivots": gains[2:].mean(),
    }
    assert list(diagnose(config, older)) == ["first blocks"] * named


def test_the_look_of_videos_by_hand():
    """Of white, black, a red and 254 of 255, in bytes and in floats; one frame of two counts."""
    frame = np.array([[[255, 255, 255], [0, 0, 0]], [[255, 0, 51], [254, 254, 254]]], np.uint8)
    video = np.stack([frame, 0 * frame + 100])
    videos = np.stack([video, 0 * video])[None]  # [1, 2, 2, 2, 2, 3]
    expected = {
        "exposure": [(1 + 0 + 0.2126 + 0.2 * 0.0722 + 254 / 255) / 4, 0],
        "saturation": [1 / 4, 0],
        "clipped": [2 / 4, 0],
    }
    for pixels in (jnp.asarray(videos), jnp.asarray(videos / 255, jnp.float32)):
        found = programs.appearance(pixels, 1)
        assert list(found) == list(programs.APPEARANCE) == list(doctor.DRIFT)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], [values], atol=1e-6)


# ---------------------------------------------------------------- the loop and the command


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
    looks = ("", "heldout_{}_reference", "heldout_{}_online", "heldout_{}_ema")
    for name in programs.APPEARANCE:
        assert all(0 <= metrics[(form or "{}").format(name)] < 1 for form in looks)
    assert 0.3 < metrics["exposure"] < 0.7  # the toy's background is grey
    done = command(tmp_path)
    assert done.returncode == 0 and not done.stderr
    first, found = done.stdout.splitlines()
    assert first == f"{tmp_path}: iterations 0 to 0"
    assert found.startswith("  identical branches, since iteration 0: the branches of every group")


@pytest.mark.parametrize("reward", [0.1, 0.5, 9.3])
def test_equal_rewards_have_no_spread(config, reward):
    scores = Scores(np.full((2, 8), reward, np.float32), np.zeros(2), {})
    judged = Judged(scores, np.zeros((2, 8)), np.ones(2, bool), pixel_std=np.float32(0.1))
    zeros = np.zeros((2, 8))
    replayed = Replayed(zeros, None, zeros + 1 / 8, zeros + 1, weight=np.ones(2))
    group = Group(judged, np.zeros((2, 8, 6), int), zeros, zeros, replayed, sentences=())
    metrics = {**HEALTHY, **group_metrics([group], programs.group_means)}
    assert list(diagnose(config, [metrics])) == ["no spread"]


def command(*arguments):
    program = [sys.executable, "-m", "kvpo_jax.doctor", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120)


def record_run(workdir, metrics, **config):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return workdir


def test_the_command_says_how_every_run_is(tmp_path):
    """Also if one cannot be read; a scorer that a configuration names is not imported."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    scorer = {"scorer": f"{tmp_path}/trap.py:score"}
    well = record_run(tmp_path / "well", rows(12), reward=scorer, eval=scorer)
    sick = record_run(tmp_path / "sick", rows(12, gate_open=0.0), objective={"gate": "zero"})
    cured = record_run(tmp_path / "cured", rows(12, gate_open=0.0) + rows(20)[12:])
    empty = record_run(tmp_path / "empty", [])
    broken = record_run(tmp_path / "broken", [3])
    done = command(well, broken, sick, cured, empty, tmp_path / "none")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{well}: iterations 0 to 11: all is well", f"{sick}: iterations 0 to 11"]
    assert lines[2].startswith("  gate, since iteration 0: no branch has beaten its anchor in 12")
    assert lines[3:] == [
        f"{cured}: iterations 0 to 19",
        "  over: gate, in iterations 0 to 11",
        f"{empty}: no iteration is recorded yet",
    ]
    (error,) = done.stderr.splitlines()
    assert done.returncode == 1 and error.startswith(f"error: {broken}/metrics.jsonl:1 is damaged")
    assert f"{tmp_path}/none is not the directory of a run" in error


@pytest.mark.parametrize("arguments, says", [((), "name a run"), (("--hepl",), "'help'")])
def test_a_wrong_command_is_one_line(arguments, says):
    done = command(*arguments)
    (error,) = done.stderr.splitlines()
    assert done.returncode == 1 and error.startswith("error: ") and says in error


def test_the_command_does_without_jax():
    program = "import sys, kvpo_jax.doctor; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_a_long_run_is_examined_at_once(config):
    """The loop does it after every iteration."""
    history = rows(2000)
    begin = time.process_time()
    doctor.examine(config, history)
    assert time.process_time() - begin < 1
