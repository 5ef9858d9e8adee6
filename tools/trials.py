"""Runs that a study compares, for study.py and compare.py: configured, made and read."""

from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import process, records
from kvpo_jax.runtime import workdir as workdir_lib

# How long a run is, where a study may be continued with longer ones. A budget of 0 is no limit.
LENGTHS = ("train.iterations", "train.budget_passes")
TRAINING = ("seconds_rollout", "seconds_reward", "seconds_update")
POLL = 0.2  # seconds between two looks at a run

Curve = tuple[list[float], list[float]]  # passes, gain


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a study.

    Attributes:
      name: what it is a run of.
      seed: of the run.
      workdir: its directory.
      flags: of kvpo_jax.main.
      config: that they make.
    """

    name: str
    seed: int
    workdir: Path
    flags: tuple[str, ...]
    config: ConfigDict


# ---------------------------------------------------------------- before a run


def workdir_of(name: str, seed: int, runs: Path) -> Path:
    """The directory of a run below the folder `runs`."""
    return runs / f"{name.replace(' ', '_')}-{seed}"


def configure(
    name: str,
    seed: int,
    spec: str,
    fields: Mapping[str, Any],
    runs: Path,
    arguments: Sequence[str],
    longer: bool = False,
) -> Trial:
    """A run below the folder `runs`.

    Args:
      name: what it is a run of; its directory is called so.
      seed: of the run.
      spec: FILE[:PRESET] of the configuration.
      fields: dotted name -> value, over it and the arguments.
      runs: the folder.
      arguments: --config.FIELD=VALUE, as they were given.
      longer: whether it may be a longer run than the one that is in the directory.

    Raises:
      UsageError: the directory has a run of another configuration.
    """
    workdir, own = workdir_of(name, seed, runs), {"seed": seed, **fields}
    changes = [*arguments, *(f"--config.{field}={value}" for field, value in own.items())]
    config = workdir_lib.resolve(spec, None, changes)
    # Even what a continued run may change changes the numbers of a study.
    if (record := workdir / "config.json").exists():
        before, now = config_lib.flat(config_lib.load_saved(record)), config_lib.flat(config)
        changed = [n for n in sorted(before | now) if before.get(n) != now.get(n)]
        if longer:
            changed = [n for n in changed if n not in LENGTHS or _shorter(before.get(n, 0), now[n])]
        if changed:
            raise UsageError(
                f"{workdir} has a run with another {changed[0]}; choose another directory for"
                " the runs"
            )
    flags = (f"--config={spec}", f"--workdir={workdir}", *changes)
    return Trial(name, seed, workdir, flags, config)


def _shorter(before: int, now: int) -> bool:
    return (now or math.inf) < (before or math.inf)


# ---------------------------------------------------------------- a run


def is_finished(trial: Trial) -> bool:
    """Whether the run has nothing left to do."""
    return workdir_lib.finished(trial.config, trial.workdir) is not None


def carry_out(trial: Trial) -> str:
    """Makes or continues a run in a process of its own, unless it is finished.

    Returns:
      In a line why it has failed; "" if it has not.

    Raises:
      UsageError: it was stopped.
    """
    if is_finished(trial):
        return ""
    print(f"\n=== {trial.name}, seed {trial.seed}", flush=True)
    command = [sys.executable, "-m", "kvpo_jax.main", *trial.flags]
    with tempfile.TemporaryFile("w+") as errors, process.stop_signal() as stop:
        with subprocess.Popen(command, stderr=errors) as run:
            while run.poll() is None:
                if stop.wait(POLL):
                    run.terminate()  # a run that Ctrl-C has reached already does nothing new
                    run.wait()
        errors.seek(0)
        said = errors.read()
    print(said, end="", file=sys.stderr, flush=True)
    if stop.is_set() or run.returncode == process.STOPPED:
        raise UsageError(f"{trial.workdir} is not finished; the same command goes on with it")
    if not run.returncode:
        return ""
    if run.returncode < 0:
        return f"ended by {signal.Signals(-run.returncode).name}"
    lines = said.strip().splitlines() or [f"exit status {run.returncode}"]
    return lines[-1].removeprefix("error: ")


# ---------------------------------------------------------------- after it


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
      trial: the run.
      fault: in a line why it has failed; "" if it has not, and the others are known.
      gain: of the held-out reward over the reference.
      gains: the same of every held-out prompt, float[n]; None if the run has not written them.
      parts: component of the reward, or one that is only watched -> its gain.
      means: metric -> mean over the iterations.
      spent: iterations, passes, scored videos, and seconds of training.
      curve: the gain after so many passes.
      evaluation: the last object of heldout.jsonl.
    """

    trial: Trial
    fault: str = ""
    gain: float = 0.0
    gains: np.ndarray | None = None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    means: Mapping[str, float] = dataclasses.field(default_factory=dict)
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve: Curve = ([], [])
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def result(trial: Trial) -> Result:
    """Makes, continues or finds the run, and reads what it has come to."""
    if fault := carry_out(trial):
        return Result(trial, fault)
    return read(trial)


def read(trial: Trial) -> Result:
    """What a finished run has come to."""
    try:
        found = records.read_run(trial.workdir)
    except UsageError as error:  # a damaged file
        return Result(trial, str(error))
    summary, metrics = found.summary, found.metrics
    if "passes_forward" not in summary:
        return Result(trial, f"{trial.workdir} is of a version that counted no passes")
    reference, online = (summary["components"][name] for name in ("reference", "online"))
    evaluated = [row for row in metrics if row.get("heldout_online") is not None]
    return Result(
        trial=trial,
        gain=summary["heldout"]["gain"],
        gains=_gains(found.heldout[-1]["reward"]) if found.heldout else None,
        parts={name: online[name] - reference[name] for name in online},
        means={
            name: float(np.mean([row[name] for row in metrics if row[name] is not None]))
            for name in ("reward_std_in_group", "pixel_std_in_group")
        },
        spent={
            "iterations": summary["iterations"],
            "passes": summary["passes_forward"] + summary["passes_backward"],
            "scored videos": summary["videos_scored"],
            "seconds": sum(row.get(name) or 0.0 for row in metrics for name in TRAINING),
        },
        curve=(
            [0.0, *(row["passes_forward"] + row["passes_backward"] for row in evaluated)],
            [0.0, *(row["heldout_online"] - row["heldout_reference"] for row in evaluated)],
        ),
        evaluation=found.heldout[-1] if found.heldout else {},
    )


def _gains(rewards: Mapping[str, Sequence[float]]) -> np.ndarray:
    return np.asarray(rewards["online"]) - np.asarray(rewards["reference"])


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows, column -> cell; the first row has all the columns, in their order."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in row)} |" for row in cells)


def draw_gain(
    axes: Any,
    place: int,
    seeds: Sequence[float],
    mean: float,
    interval: Sequence[float] | None,
    colour: str,
) -> None:
    """Draws a line of a picture of gains: dots of the seeds, the mean and its interval."""
    low, high = interval or (mean, mean)
    axes.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.5)
    axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
    axes.plot(mean, place, "D", color=colour)


def name_gains(axes: Any, names: Sequence[str]) -> None:
    """Names the lines of a picture of gains, the first one above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.grid(True, linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
