"""The toy study, on finished runs: what it concludes, and that a directory belongs to one study."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvpo_jax.runtime import workdir

TOOL = Path(__file__).resolve().parent.parent / "tools" / "toy_study.py"
KINDS = {
    "KVPO": "",
    "shuffled_advantages": "shuffle_advantages",
    "negated_advantages": "negate_advantages",
}
BETA = "--config.objective.beta=0.2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs of a study with BETA, with numbers out of thin air."""
    folder = tmp_path_factory.mktemp("runs")
    heldout = {
        "reference": 0.4,
        "online": 0.6,
        "ema": 0.6,
        "gain_ci95": [0.1, 0.3],
        "win_rate": 1,
        "num_prompts": 32,
    }
    metrics = dict.fromkeys(
        ("reward_std_in_group", "pixel_std_in_group", "kl", "gate_open", "energy_std"), 0.5
    )
    for kind, flag in KINDS.items():
        for seed in (0,) if kind == "negated_advantages" else (0, 1):
            run = folder / f"{kind}-{seed}"
            arguments = [
                BETA,
                f"--config.seed={seed}",
                *([f"--config.objective.{flag}"] if flag else []),
            ]
            config = workdir.resolve(None, None, arguments)
            workdir.start_run(config, run)
            (run / "checkpoints" / f"{config.train.iterations}").mkdir(parents=True)
            summary = {
                "iterations": config.train.iterations,
                "eval": config.eval.to_dict(),
                "heldout": heldout | {"gain": 0.2 + seed},
                "components": {},
                "seconds": {"total": 30},
            }
            (run / "summary.json").write_text(json.dumps(summary))
            (run / "metrics.jsonl").write_text(json.dumps({"iteration": 0, **metrics}) + "\n")
    return folder


def study(runs: Path, *arguments: str, seeds: int = 2) -> subprocess.CompletedProcess:
    options = [f"--runs={runs}", f"--seeds={seeds}"]
    command = [sys.executable, str(TOOL), *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_finished_runs_are_not_run_again(runs):
    done = study(runs, BETA)
    assert done.returncode == 0, done.stderr
    text = (runs / "study.md").read_text()  # beside the runs, not over the document
    # Gains of 0.2 and 1.2: their standard error is 0.5, t of one degree of freedom 12.706.
    assert (
        "Mean gain of KVPO over 2 seeds: **+0.7000**, 95 % Student-t interval over seeds"
        " [-5.6531, +7.0531]." in text
    )
    assert "every seed is **not** above every shuffled run" in text
    rows = [line for line in text.splitlines() if line.startswith("| KVPO")]
    assert [row.split(" | ")[1:7] for row in rows] == [
        ["0", "0.4000", "0.6000", "0.6000", "+0.2000", "[+0.1000, +0.3000]"],
        ["1", "0.4000", "0.6000", "0.6000", "+1.2000", "[+0.1000, +0.3000]"],
    ]


def test_one_seed_has_no_interval(runs):
    done = study(runs, BETA, seeds=1)
    assert done.returncode == 0, done.stderr
    assert (
        "Mean gain of KVPO over 1 seed: **+0.2000**, 95 % Student-t interval over seeds -."
        in (runs / "study.md").read_text()
    )


def test_no_seed_is_an_error(runs):
    done = study(runs, BETA, seeds=0)
    assert done.returncode == 1 and "--seeds" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "KVPO-0 has a run with another objective.beta; choose another directory"),
        (
            [BETA, "--config.train.iterations=80"],
            "KVPO-0 has a run with another train.iterations; choose",
        ),
        ([BETA, "--config.train.iteration=80"], "no field config.train.iteration; did you mean"),
    ],
)
def test_those_of_another_study_are_an_error(runs, arguments, message):
    done = study(runs, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
