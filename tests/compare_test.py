"""The comparison of methods: its numbers on finished runs, and what becomes of runs."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare as tool
import numpy as np
import pytest
import trials
from equipment import ROOT, SMALL, configure, fresh_variables, run_command
from PIL import Image

from kvpo_jax import budget
from kvpo_jax import run as run_lib
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint, workdir
from kvpo_jax.runtime.statistics import heldout_summary, mean_interval

TOOL = str(ROOT / "tools" / "compare.py")
BUDGET = 1000
BETA = "--config.objective.beta=0.2"
# Method and seed -> gain on each of three held-out prompts.
GAINS = {
    ("paper", 0): [0.1, 0.2, 0.3],
    ("paper", 1): [0.3, 0.2, 0.7],
    ("release", 0): [0.0, 0.1, 0.2],
    ("release", 1): [0.2, 0.1, 0.4],
}


def write(path: Path, *records: dict) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def finish(folder: Path, method: str, seed: int, gains: list[float]) -> Path:
    """A finished run with BETA and BUDGET, whose numbers are out of thin air."""
    run = folder / f"{method}-{seed}"
    fields = {"train.budget_passes": BUDGET, "train.iterations": 1_000_000, "seed": seed}
    arguments = [BETA, *(f"--config.{name}={value}" for name, value in fields.items())]
    config = workdir.resolve(f"configs/tiny.py:{method}", None, arguments)
    workdir.start_run(config, run)
    (run / "checkpoints" / "2").mkdir(parents=True)
    gain, reference = float(np.mean(gains)), [0.4] * len(gains)
    online = [0.4 + x for x in gains]
    heldout = heldout_summary(*map(np.asarray, (reference, online, online)))
    spent = {"passes_forward": 500 + seed, "passes_backward": 400, "videos_scored": 18}
    summary = {"iterations": 2, "eval": config.eval.to_dict(), "heldout": heldout, **spent}
    after = {"VQ": 0.3 + gain}
    summary["components"] = {"reference": {"VQ": 0.3}, "online": after, "ema": after}
    summary["passes_with_another_iteration"] = BUDGET + 1
    write(run / "summary.json", summary)
    policies = {"reference": reference, "online": online, "ema": online}
    no_parts = {"components": dict.fromkeys(policies, {}), "optimised": [], "blocks": {}}
    evaluation = {"iteration": 2, "prompt": [["a"]] * len(gains), "first_pivot": 5, **no_parts}
    write(run / "heldout.jsonl", {**evaluation, "reward": policies})
    row = {"reward_std_in_group": 0.01, "pixel_std_in_group": 0.02 + seed / 100, **spent}
    row |= {"seconds_rollout": 3.0, "seconds_reward": 2.0, "seconds_evaluation": 50.0}
    evaluated = {"heldout_online": 0.4 + gain, "heldout_reference": 0.4}
    write(run / "metrics.jsonl", {"iteration": 0, **row}, {"iteration": 1, **row, **evaluated})
    return run


@pytest.fixture
def runs(tmp_path) -> Path:
    for (method, seed), gains in GAINS.items():
        finish(tmp_path, method, seed, gains)
    return tmp_path


def command(folder: Path, methods: str, *arguments: str) -> list[str]:
    return [TOOL, f"--methods={methods}", f"--output={folder}", *arguments]


def compare(
    folder: Path, methods: str, *arguments: str, seeds: int = 2, budget: int = BUDGET
) -> subprocess.CompletedProcess:
    numbers = (f"--seeds={seeds}", f"--budget={budget}")
    return run_command(*command(folder, methods, *numbers, *arguments))


def table(folder: Path) -> list[dict[str, str]]:
    """Of each method what the tables of comparison.md say, column -> cell."""
    found: dict[str, dict[str, str]] = {}
    for part in (folder / "comparison.md").read_text().split("\n\n"):
        if part.startswith("|"):
            lines = part.splitlines()
            columns, _, *rows = ([cell.strip() for cell in x.split("|")[1:-1]] for x in lines)
            assert len(columns) <= 8  # they fit on a page
            for row in rows:
                cells = dict(zip(columns, row, strict=True))
                found.setdefault(cells["method"], {}).update(cells)
    return list(found.values())


def test_the_table_of_finished_runs_by_hand(runs):
    """Two seeds make 0.2, 0.2, 0.5 and 0.1, 0.1, 0.3 of the three prompts, which are 0.1, 0.1 and
    0.2 apart. The gains of the runs are 0.2 and 0.4, and 0.1 and 0.2333.
    """
    done = compare(runs, "paper,release", BETA)
    assert done.returncode == 0, done.stderr
    paper, release = table(runs)
    assert (paper["method"], paper["seeds"], paper["gain"]) == ("paper", "2", "+0.3000")
    # Three prompts: std 0.173205, so 0.1 of standard error, times t of two degrees of freedom.
    assert paper["95 % over prompts"] == f"[{0.3 - 0.430265:+.4f}, {0.3 + 0.430265:+.4f}]"
    # Two seeds: 0.1 of standard error, times t of one degree.
    assert paper["95 % over seeds"] == f"[{0.3 - 1.270620:+.4f}, {0.3 + 1.270620:+.4f}]"
    assert paper["over the first"] == "-"
    # Differences of std 0.057735: 0.033333 of standard error.
    assert (release["gain"], release["over the first"]) == ("+0.1667", "-0.1333")
    half = 0.143422
    assert release["95 % of that"] == f"[{-0.133333 - half:+.4f}, {-0.133333 + half:+.4f}]"
    columns = ("reward std in group", "pixel std in group", "gain in VQ", "iterations", "passes")
    assert [paper[c] for c in columns] == ["0.0100", "0.0250", "+0.3000", "2", "900"]
    assert (paper["scored videos"], paper["seconds"]) == ("18", "10")
    kept = json.loads((runs / "comparison.json").read_text())
    assert (kept["budget"], kept["arguments"]) == (BUDGET, [BETA])
    assert kept["methods"][0]["gains"] == pytest.approx([0.2, 0.4])
    assert kept["methods"][1]["over_first"] == pytest.approx(-2 / 15)
    with Image.open(runs / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    page = (runs / "report.html").read_text()
    assert all(name in page for name in ("paper-0", "paper-1", "release-0", "release-1"))
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last one has a path


def test_prompts_that_are_not_known_give_no_interval_over_them(runs):
    (runs / "release-1" / "heldout.jsonl").unlink()
    assert compare(runs, "paper,release", BETA).returncode == 0
    _, release = table(runs)
    assert (release["95 % over prompts"], release["over the first"]) == ("-", "-")
    over_seeds = mean_interval(np.array([0.1, 0.7 / 3]))[1]
    assert release["95 % over seeds"] == f"[{over_seeds[0]:+.4f}, {over_seeds[1]:+.4f}]"


def test_a_run_that_fails_is_a_row_that_says_so(tmp_path):
    """The budget allows no iteration of the release; of the other method one run is damaged."""
    for seed in 0, 1:
        run = finish(tmp_path, "paper", seed, [0.1, 0.2])
    (run / "metrics.jsonl").write_text("damaged\n")
    done = compare(tmp_path, "release,paper", BETA)
    assert done.returncode == 1
    fault = f"config.train.budget_passes={BUDGET}: the first iteration takes"
    assert done.stderr.splitlines()[-1] == "error: 3 of 4 runs failed; comparison.md says why"
    assert "Traceback" not in done.stderr
    release, paper = table(tmp_path)
    assert (release["seeds"], release["gain"], release["passes"]) == ("0 of 2", "failed", "")
    assert (paper["seeds"], paper["gain"], paper["over the first"]) == ("1 of 2", "+0.1500", "-")
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    failed = [line for line in lines if line.startswith("* ")]
    for line, begin in zip(
        failed, ("release, seed 0", "release, seed 1", "paper, seed 1"), strict=True
    ):
        assert line.startswith(f"* {begin} failed: ")
    assert fault in failed[0] and f"{run / 'metrics.jsonl'}:1 is damaged" in failed[2]
    assert f"release, seed 0 failed: {fault}" in done.stdout


@pytest.mark.parametrize(
    "methods, file, arguments, message",
    [
        (["papers"], "tiny.py", [], "has the presets paper, release"),
        (["paper", "paper"], "tiny.py", [], "--methods names 'paper' twice"),
        (["paper", ""], "tiny.py", [], "--methods=paper,: expected presets"),
        (["paper"], "tiny.py:release", [], "name the file alone; its presets go into --methods"),
        (["paper"], "tiny.py", ["--config.train.iteration=3"], "no field config.train.iteration"),
        (["paper"], "tiny.py", [], "paper-0 has a run with another objective.beta; choose another"),
    ],
)
def test_what_cannot_be_compared_is_an_error(tmp_path, methods, file, arguments, message):
    finish(tmp_path, "paper", 0, [0.1, 0.2])
    with pytest.raises(UsageError, match=re.escape(message)):
        tool.configure(methods, 1, BUDGET, f"configs/{file}", tmp_path, arguments)


def test_a_comparison_that_cannot_begin_is_one_line_and_writes_nothing(tmp_path):
    for asked, message in (
        (command(tmp_path, "paper,,"), "--methods=paper,,: expected presets"),
        (command(tmp_path, "paper", "--seeds=0"), "--seeds"),
    ):
        done = run_command(*asked)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_a_longer_run_goes_on_in_a_directory(tmp_path):
    finish(tmp_path, "paper", 0, [0.1, 0.2])
    endless = [BETA, "--config.train.iterations=1000000"]

    def asked(longer: bool, **budget: int) -> trials.Trial:
        fields = {"train.budget_passes": budget["passes"]}
        spec = "configs/tiny.py:paper"
        return trials.configure("paper", 0, spec, fields, tmp_path, endless, longer)

    for passes in BUDGET, BUDGET + 1, 0:
        assert asked(True, passes=passes).config.train.budget_passes == passes
    assert asked(False, passes=BUDGET).workdir == tmp_path / "paper-0"
    for longer, passes in (True, BUDGET - 1), (False, BUDGET + 1), (False, 0):
        with pytest.raises(UsageError, match="has a run with another train.budget_passes"):
            asked(longer, passes=passes)


@pytest.mark.slow
def test_a_comparison_that_is_stopped_goes_on(tmp_path):
    """A real run of one method, to a budget of four iterations, stopped after the first."""
    fields = {**SMALL, "train.prompts_per_iteration": 1, "rollout.branches": 2}
    fields |= {"video.blocks": 8, "video.switch_frames": "(12,)", "rollout.window_blocks": 2}
    fields |= {"eval.prompts": 2, "eval.every": 1, "mesh.data": 1, "mesh.branch": 1}
    fields["weights"] = tmp_path / "generator.safetensors"
    config = configure("configs/tiny.py", fields)
    params = fresh_variables(config)["params"]
    checkpoint.save_weights(fields["weights"], params, {})
    passes = budget.of_first(run_lib.load(config), 4).passes
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    output = tmp_path / "out"
    asked = command(output, "paper", "--seeds=1", f"--budget={passes}", *arguments)
    metrics = output / "paper-0" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate()
    assert run.returncode == 1
    assert said == (f"error: {metrics.parent} is not finished; the same command goes on with it\n")
    assert metrics.read_text().count("\n") < 4
    done = run_command(*asked)
    assert done.returncode == 0, done.stderr
    (row,) = table(output)
    assert (row["iterations"], row["passes"]) == ("4", f"{passes:,}")
    assert row["scored videos"] == "12" and row["seeds"] == "1"
    again = run_command(*asked)
    assert again.returncode == 0 and "=== paper" not in again.stdout
