"""The evidence study: its arms, its rule of verdicts by hand, its pages, and how it goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study
import trials
import vividness
from equipment import ROOT, run_command

from kvpo_jax.data import toy_world
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.runtime.statistics import heldout_summary

TOOL = str(ROOT / "tools" / "study.py")
BUDGET = 16_000  # two iterations of KVPO
TASKS = {"outvoted": (0.2, 0.5), "sink wins": (1.0, 0.9)}  # SC before and after
STORIES = [
    ["a red bar", "a blue dot", "a blue dot", "nothing", "it returns"],
    ["a red bar", "a red bar", "a blue dot", "nothing", "it returns"],
]


def run_of(arm: str, seed: int, gain: float, semantic: float = 0.0) -> dict:
    """What is kept of a run, with numbers out of thin air."""
    tasks = {
        task: {"stories": 16, "before": {"SC": before}, "after": {"SC": after}}
        for task, (before, after) in TASKS.items()
    }
    for task in tasks.values():
        for when in ("before", "after"):
            task[when] |= {"reward": 0.5, "VQ": 0.5, "wanted": 0.5, "shown": 0.5, "other": 0.0}
    return {
        "arm": arm,
        "seed": seed,
        "run": f"{arm}-{seed}",
        "gain": gain,
        "gains": [gain - 0.1, gain + 0.1],
        "before": 0.5,
        "parts": {"SC": semantic, "VQ": gain},
        "tasks": tasks,
        "means": {"reward_std_in_group": 0.04, "pixel_std_in_group": 0.01},
        "spent": {"iterations": 60, "passes": 235_200, "scored videos": 8640, "seconds": 40.0},
    }


RUNS = [
    *(run_of("KVPO", s, gain) for s, gain in enumerate((0.1, 0.2, 0.3))),
    *(run_of("shuffled", s, gain) for s, gain in enumerate((0.0, 0.1, 0.1))),
    {"arm": "shuffled", "seed": 3, "run": "shuffled-3", "fault": "ended by SIGKILL"},
    *(run_of("random window", s, gain) for s, gain in enumerate((0.11, 0.21))),
]
KEPT = {
    "runs": RUNS,
    "described": {arm.name: study.described(arm) for arm in study.ARMS},
    "settings": {name: dict(fields) for name, fields in study.SETTINGS.items()},
    "seeds": [0, 1, 2],
    "budget": BUDGET,
    "command": "python tools/study.py",
    "made_with": "jax 1.2.3",
    "vividness": {"before": {"reward": 0.48}, "vivid": {"reward": 0.57}},
    "diversity": {
        "return": [
            {
                "seed": seed,
                "diversity": [
                    {"task": "outvoted", "explore": way, **dict.fromkeys(evidence.DIVERSITY, x)}
                    for way, x in (("routing", 0.9), ("init_noise", 0.2 + seed / 100))
                ],
                "votes": [{"frames": 1, "n": 10 + 20 * seed, "share": seed * 0.4, "rule": 0.21}],
            }
            for seed in (0, 1)
        ]
    },
}


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "interval, sign, expected",
    [
        ([0.01, 0.2], 1, "reproduced"),
        ([0.01, 0.2], -1, "not reproduced"),
        ([-0.2, -0.01], -1, "reproduced"),
        ([-0.2, -0.01], 1, "not reproduced"),
        ([-0.01, 0.2], 1, "not reproduced"),  # too wide to say
        ([0.0, 0.2], 1, "not reproduced"),
        ([-0.02, 0.03], 0, "reproduced"),
        ([-0.02, 0.04], 0, "not reproduced"),  # a difference is not excluded
        (None, 1, "not testable here"),
        (None, 0, "not testable here"),
    ],
)
def test_the_verdict_follows_from_the_interval(interval, sign, expected):
    assert evidence.verdict(interval, sign) == expected


def claims() -> dict[str, dict]:
    return {claim["claim"]: claim for claim in evidence.summed_up(KEPT)["claims"]}


def test_a_difference_is_taken_seed_by_seed():
    """0.1, 0.1, 0.2: mean 0.1333, std 0.057735, t of two degrees 4.30265: 0.143422 to each side."""
    claim = claims()["what is gained is the reward's doing: shuffled advantages gain less"]
    assert claim["ours"] == pytest.approx(0.4 / 3) and claim["n_seeds"] == 3
    assert claim["ci95"] == pytest.approx([0.4 / 3 - 0.143422, 0.4 / 3 + 0.143422], abs=1e-5)
    assert claim["verdict"] == "not reproduced"
    # Of the arm alone: std 0.1, standard error 0.057735, 0.248414 to each side of 0.2.
    alone = claims()["KVPO raises the reward that it optimises"]
    assert alone["ci95"] == pytest.approx([0.2 - 0.248414, 0.2 + 0.248414], abs=1e-5)


def test_two_common_seeds_are_enough_and_one_is_not():
    same = claims()["a window of random length makes no difference"]
    assert same["n_seeds"] == 2 and same["ours"] == pytest.approx(0.01)
    assert same["verdict"] == "reproduced"  # both differ by 0.01
    missing = claims()["TVE is a better surrogate than latent l2"]
    assert (missing["ours"], missing["ci95"], missing["n_seeds"]) == (None, None, 0)
    assert missing["verdict"] == "not testable here"
    assert missing["why"] == "there are not two seeds of 'KVPO' and 'CHR + l2'"


def test_branches_are_compared_seed_by_seed_too():
    """0.70 and 0.69: half a hundredth of standard error, times t of one degree, 12.7062."""
    claim = claims()["routed history changes what is shown, noise how it looks"]
    assert claim["ours"] == pytest.approx(0.695)
    assert claim["ci95"] == pytest.approx([0.695 - 0.063531, 0.695 + 0.063531], abs=1e-5)
    assert claim["verdict"] == "reproduced"
    appearance = claims()["and less in appearance"]
    assert appearance["ours"] == pytest.approx(0.695) and appearance["claimed"] == -1
    assert appearance["verdict"] == "not reproduced"


def test_every_claim_has_its_keys_and_one_of_three_verdicts():
    for claim in claims().values():
        assert {"claim", "paper", "ours", "ci95", "n_seeds", "verdict"} <= set(claim)
        assert claim["verdict"] in ("reproduced", "not reproduced", "not testable here")
        assert claim["ci95"] is not None or claim["why"]


def test_an_arm_has_its_paired_difference_over_seeds_and_over_prompts():
    arms = {arm["arm"]: arm for arm in evidence.summed_up(KEPT)["arms"]}
    shuffled = arms["shuffled"]
    assert shuffled["seeds"] == [0, 1, 2] and shuffled["failed"] == {"3": "ended by SIGKILL"}
    assert shuffled["over"] == "KVPO"
    assert shuffled["difference"]["mean"] == pytest.approx(-0.4 / 3)
    # Both prompts differ alike: the interval over prompts has no width, that over seeds has.
    assert np.ptp(shuffled["difference"]["ci95_prompts"]) == pytest.approx(0, abs=1e-9)
    assert np.ptp(shuffled["difference"]["ci95"]) == pytest.approx(2 * 0.143422, abs=1e-5)
    assert arms["KVPO"]["tasks"]["outvoted"]["SC"]["mean"] == pytest.approx(0.3)
    assert "over" not in arms["KVPO"] and "CHR + l2" not in arms


# ---------------------------------------------------------------- the pages


def test_the_pages_follow_from_the_figures_alone(tmp_path):
    evidence.write(evidence.summed_up(KEPT), tmp_path)
    text, html = ((tmp_path / f"evidence.{x}").read_text() for x in ("md", "html"))
    row = next(line for line in text.splitlines() if "shuffled advantages gain less" in line)
    assert "+0.133 | [-0.010, +0.277] | 3 | not reproduced" in row
    assert '--arms="KVPO,shuffled"' in row
    assert "seed 3 failed: ended by SIGKILL" in text and "seed 3 failed" in html
    assert "| 1 | 30% | 21.0% | 40 |" in text  # 0 of 10 and 12 of 30 branches
    assert "score 0.570 instead of 0.480 (+0.090)." in text
    assert "| KVPO | outvoted | 0.200 | +0.300 [+0.300, +0.300] |" in text
    # Of an axis to 0.7585, the furthest end of an interval: 0.1333 and 0.1434 to both sides of it.
    bar = re.search(r'left:([\d.]+)%;width:([\d.]+)%"></i><i class="mean" style="left:([\d.]+)%',
                    html[html.index("shuffled advantages gain less"):])  # fmt: skip
    assert [float(x) for x in bar.groups()] == pytest.approx([49.33, 18.91, 58.79], abs=0.011)
    assert html.count('class="mean"') == sum(c["ci95"] is not None for c in claims().values())
    assert html.count("<section>") == text.count("\n## ") and "data:image/png" in html
    assert "/tmp" not in text + html and (tmp_path / "evidence.png").stat().st_size > 5000
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in before.keys() - {"evidence.json"}:
        (tmp_path / name).unlink()
    evidence.write(json.loads(before["evidence.json"]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_search_is_a_row_for_each_setting():
    runs = [
        {"arm": "tve", "surrogate": "tve", "seed": 100, **rest}
        for rest in (
            {"fault": "it diverged"},
            {"gain": 0.2, "tasks": {}, "spent": {"iterations": 7}},
        )
    ]
    (row,) = evidence.search_rows(runs)
    assert row == {"settings": "tve", "seeds": "1 of 2", "gain": "+0.2000", "iterations": "7"}


# ---------------------------------------------------------------- arms


def test_every_arm_is_a_valid_run(tmp_path):
    arms = [*study.ARMS, *(arm for name in study.CARRIERS for arm in study.searched(name))]
    for arm in arms:
        trial = study.trial_of(arm, 0, tmp_path, [], 0)
        assert trial.config.train.budget_passes == study.BUDGETS[study.world_of(arm)]
        assert arm.versus in study.BY_NAME
        config = config_lib.flat(trial.config)
        assert {name: config[name] for name in arm.fields} == dict(arm.fields)
    assert len({arm.name for arm in arms}) == len(arms) and len(arms) > len(study.ARMS) + 10
    for name, beta in {"beta 0": 0.0, "KVPO": 0.05, "2 beta": 0.1, "CHR + l2": 1.5}.items():
        trial = study.trial_of(study.BY_NAME[name], 0, tmp_path, [], 0)
        assert trial.config.objective.beta == pytest.approx(beta)


def test_every_claim_is_about_arms_that_are_run():
    for claim in evidence.CLAIMS:
        if claim.table == "runs":
            assert {claim.arm, claim.over} - {""} <= study.BY_NAME.keys()
        assert bool(claim.arm) != bool(claim.why)
    assert {arm.section for arm in study.ARMS} <= evidence.SECTIONS.keys()


def test_every_arm_can_be_named_and_has_a_folder():
    """--arms takes names with commas between."""
    assert not [name for name in study.BY_NAME if "," in name or "/" in name]
    assert study.chosen("KVPO (weak vote),0.2 beta".split(",")) == [
        study.BY_NAME["KVPO (weak vote)"],
        study.BY_NAME["0.2 beta"],
    ]


def test_the_most_important_arms_run_first_and_seed_by_seed():
    arms = [study.BY_NAME[name] for name in ("1 steps", "KVPO", "no exploration", "shuffled")]
    order = [(arm.name, seed) for arm, seed in study.ordered(arms, [0, 2])]
    assert order == [
        ("KVPO", 0),
        ("no exploration", 0),
        ("shuffled", 0),
        ("KVPO", 2),
        ("no exploration", 2),
        ("shuffled", 2),
        ("1 steps", 0),
        ("1 steps", 2),
    ]


def test_a_search_changes_one_setting_and_is_judged_on_other_prompts():
    points = [arm.fields for arm in study.searched("noise_l2")]
    assert all(fields["eval.prompts"] == 64 for fields in points)
    own = {"eval.prompts", *study.BY_NAME["noise + l2"].fields}
    assert [len(fields.keys() - own) for fields in points] == [0, *[1] * (len(points) - 1)]
    assert {"objective.beta", "train.learning_rate"} <= set().union(*points)


def test_a_search_is_judged_on_prompts_that_the_study_does_not_have():
    """The study has the first 32: they gain 0.1 here, and the others 0.3."""
    arm = study.searched("tve")[1]
    outvoted, sink_wins = STORIES
    values = [0.5] * 64
    components = {policy: dict.fromkeys(study.PARTS, values) for policy in ("reference", "online")}
    evaluation = {
        "prompt": 32 * [sink_wins] + 32 * [outvoted],
        "reward": {"reference": values, "online": values},
        "components": components,
    }
    trial = study.trial_of(arm, 100, Path("runs"), [], 0)
    gains = np.repeat([0.1, 0.3], 32)
    row = study.search_row(arm, 100, trials.Result(trial, gains=gains, evaluation=evaluation))
    assert row["gain"] == pytest.approx(0.3) and list(row["tasks"]) == ["outvoted"]
    assert row["tasks"]["outvoted"]["stories"] == 32


def test_tasks_are_those_of_the_held_out_stories():
    parts = {name: [0.25, 0.5] for name in study.PARTS}
    evaluation = {
        "prompt": STORIES,
        "reward": {"reference": [0.1, 0.2], "online": [0.3, 0.6]},
        "components": {"reference": parts, "online": {**parts, "SC": [1.0, 0.0]}},
    }
    tasks = study.tasks_of(evaluation)
    assert set(tasks) == set(TASKS) and tasks["outvoted"]["stories"] == 1
    assert tasks["outvoted"]["before"] == {"reward": 0.1, **{n: 0.25 for n in study.PARTS}}
    assert (tasks["outvoted"]["after"]["SC"], tasks["sink wins"]["after"]["SC"]) == (1.0, 0.0)
    assert set(study.tasks_of(evaluation, slice(1, None))) == {"sink wins"}


# ---------------------------------------------------------------- the oracle of vividness


def test_a_faded_object_gets_its_colour_back_and_nothing_else():
    center = np.array([[3.0, 4.0], [5.0, 2.0]])
    clean = toy_world.render(center, np.array([0, 2]), np.array([1, 0]))
    faded = toy_world.BACKGROUND + 0.4 * (clean - toy_world.BACKGROUND)
    vivid = jax.jit(vividness.vivid)(jnp.stack([faded, clean]))
    np.testing.assert_allclose(vivid, jnp.stack([clean, clean]), atol=0.01)


# ---------------------------------------------------------------- the command


def finish(runs: Path, name: str, seed: int, gain: float) -> None:
    """A finished run of an arm, whose numbers are out of thin air."""
    trial = study.trial_of(study.BY_NAME[name], seed, runs, [], BUDGET)
    workdir_lib.start_run(trial.config, trial.workdir)
    (trial.workdir / "checkpoints" / "2").mkdir(parents=True)
    before, after = np.array([0.4, 0.6]), np.array([0.4, 0.6]) + gain
    spent = {"passes_forward": 5000, "passes_backward": 2000, "videos_scored": 288}
    summary = {
        "iterations": 2,
        "eval": trial.config.eval.to_dict(),
        "heldout": heldout_summary(before, after, after),
        "components": dict.fromkeys(("reference", "online", "ema"), {"SC": 0.5, "VQ": 0.5}),
        "passes_with_another_iteration": BUDGET + 1,
        **spent,
    }
    parts = {name: [0.5, 0.5] for name in study.PARTS}
    evaluation = {
        "iteration": 2,
        "prompt": STORIES,
        "reward": {p: list(x) for p, x in zip(
            ("reference", "online", "ema"), (before, after, after), strict=True)},
        "components": dict.fromkeys(("reference", "online", "ema"), parts),
        "optimised": ["SC", "VQ"],
        "first_pivot": 5,
        "blocks": {},
    }  # fmt: skip
    metrics = {"iteration": 0, "reward_std_in_group": 0.1, "pixel_std_in_group": 0.1, **spent}
    for file, value in (
        ("summary.json", summary), ("heldout.jsonl", evaluation), ("metrics.jsonl", metrics)
    ):  # fmt: skip
        (trial.workdir / file).write_text(json.dumps(value) + "\n")


def test_finished_runs_are_not_made_again_and_all_of_them_are_told(tmp_path):
    for seed, gain in enumerate((0.1, 0.3)):
        finish(tmp_path, "KVPO", seed, gain)
        finish(tmp_path, "shuffled", seed, 0.0)
    arguments = (f"--runs={tmp_path}", f"--budget={BUDGET}", "--groups=0")
    done = run_command(TOOL, *arguments, "--arms=KVPO", "--seeds=0,1")
    assert done.returncode == 0 and "===" not in done.stdout, done.stderr
    found = json.loads((tmp_path / "evidence.json").read_text())
    told = {(run["arm"], run["seed"]): run["gain"] for run in found["runs"]}
    expected = {("KVPO", 0): 0.1, ("KVPO", 1): 0.3, ("shuffled", 0): 0.0, ("shuffled", 1): 0.0}
    assert told == pytest.approx(expected)
    with pytest.raises(UsageError, match="another rollout.branches; choose another directory"):
        study.trial_of(study.BY_NAME["KVPO"], 0, tmp_path, ["--config.rollout.branches=4"], BUDGET)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: study.chosen(["KVP"]), "'KVP' is no arm; did you mean 'KVPO'"),
        (lambda: study.seeds_of(["a"], False), "--seeds=a: expected whole numbers"),
        (lambda: study.seeds_of(["1", "100"], False), "100 is a development seed; .* for --search"),
        (lambda: study.seeds_of(["3"], True), "3 is no development seed"),
    ],
)
def test_what_makes_no_sense_is_an_error(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_an_error_is_a_line_and_leaves_nothing(tmp_path):
    done = run_command(TOOL, "--search=tv", f"--runs={tmp_path}")
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: --search=tv: surrogates are tve, latent, awm, rival")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_quick_study_that_is_stopped_goes_on(tmp_path):
    """Two arms of one seed and two iterations, stopped in the first run."""
    arguments = ["--quick", f"--runs={tmp_path}", f"--budget={BUDGET}", "--groups=0", "--seeds=0"]
    command = [TOOL, *arguments, "--arms=KVPO,no exploration"]
    metrics = tmp_path / "KVPO-0" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate()
    assert said == f"error: {metrics.parent} is not finished; the same command goes on with it\n"
    assert json.loads((tmp_path / "evidence.json").read_text())["runs"] == []
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evidence.json").read_text())
    gains = {run["arm"]: run["gain"] for run in found["runs"]}
    assert gains.keys() == {"KVPO", "no exploration"}
    assert gains["no exploration"] == 0 != gains["KVPO"]  # exactly: all branches are the same
    assert all((tmp_path / f"{name}-0" / "report" / "index.html").exists()
               for name in ("KVPO", "no_exploration"))  # fmt: skip
