"""Runs that a study compares, for toy_study.py and compare.py: configured and made."""

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

from ml_collections import ConfigDict

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import process
from kvpo_jax.runtime import workdir as workdir_lib

# How long a run is, where a study may be continued with longer ones. A budget of 0 is no limit.
LENGTHS = ("train.iterations", "train.budget_passes")
POLL = 0.2  # seconds between two looks at a run


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
    workdir, own = runs / f"{name.replace(' ', '_')}-{seed}", {"seed": seed, **fields}
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


def carry_out(trial: Trial) -> str:
    """Makes or continues a run in a process of its own, unless it is finished.

    Returns:
      In a line why it has failed; "" if it has not.

    Raises:
      UsageError: it was stopped.
    """
    if workdir_lib.finished(trial.config, trial.workdir) is not None:
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


# ---------------------------------------------------------------- after them


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows, column -> cell; the first row has all the columns, in their order."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in row)} |" for row in cells)
