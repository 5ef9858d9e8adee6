"""Shows whether KVPO raises the toy's reward, and whether the reward does it: docs/toy_study.md.

    python tools/toy_study.py --output=docs/toy_study.md [--seeds=3] [--config.FIELD=VALUE ...]

It trains the default config with several seeds, with shuffled advantages (the control: the same
machinery without information) and with negated advantages (the reward must fall). The table has the
gains on the held-out prompts, and diversity, KL, gate and time.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import study
from absl import flags

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import command, records
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import replacing
from kvpo_jax.runtime.statistics import mean_interval, show_interval

KINDS = {
    "KVPO": {},
    "shuffled advantages": {"objective.shuffle_advantages": True},
    "negated advantages": {"objective.negate_advantages": True},
}


def read(trial: study.Trial) -> dict[str, Any]:
    """The summary of a finished run, with the means of its metrics over the iterations."""
    found = records.read_run(trial.workdir)
    summary, metrics = found.summary, found.metrics

    def mean(name: str) -> float:
        return float(np.mean([m[name] for m in metrics]))

    return {
        "kind": trial.name,
        "seed": trial.seed,
        **summary["heldout"],
        "components": summary["components"],
        "diversity": mean("reward_std_in_group"),
        "pixels": mean("pixel_std_in_group"),
        "kl": metrics[-1]["kl"],
        "gate": mean("gate_open"),
        "energy_std": (metrics[0]["energy_std"], metrics[-1]["energy_std"]),
        "seconds": summary["seconds"]["total"],
    }


def _cells(summary: dict[str, Any]) -> dict[str, str]:
    """Column -> what the table has there for a run."""
    first, last = summary["energy_std"]
    return {
        "run": summary["kind"],
        "seed": str(summary["seed"]),
        "before": f"{summary['reference']:.4f}",
        "after": f"{summary['online']:.4f}",
        "EMA": f"{summary['ema']:.4f}",
        "gain": f"{summary['gain']:+.4f}",
        "95 % over prompts": show_interval(summary["gain_ci95"]),
        "win rate": f"{summary['win_rate']:.0%}",
        "reward std in group": f"{summary['diversity']:.4f}",
        "pixel std in group": f"{summary['pixels']:.4f}",
        "energy std, first to last": f"{first:.1e} to {last:.1e}",
        "KL at the end": f"{summary['kl']:.2e}",
        "gate open": f"{summary['gate']:.0%}",
        "seconds": f"{summary['seconds']:.0f}",
    }


def conclusion(runs: Sequence[dict[str, Any]]) -> str:
    """What the numbers say, in words that follow from them."""
    gains = {kind: [r["gain"] for r in runs if r["kind"] == kind] for kind in KINDS}
    trained, shuffled, negated = (gains[kind] for kind in KINDS)
    mean, interval = mean_interval(np.asarray(trained))
    above = min(trained) > max(shuffled)
    return (
        f"Mean gain of KVPO over {len(trained)} seed{'s' * (len(trained) > 1)}: **{mean:+.4f}**,"
        f" 95 % Student-t interval over seeds {show_interval(interval)}. Worst seed"
        f" {min(trained):+.4f}, best shuffled run {max(shuffled):+.4f}: every seed is"
        f" {'above' if above else '**not** above'} every shuffled run. Negated advantages:"
        f" {', '.join(f'{gain:+.4f}' for gain in negated)}."
    )


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    seeds = range(given.seeds)
    asked = [(kind, seed) for kind in ("KVPO", "shuffled advantages") for seed in seeds]
    asked.append(("negated advantages", 0))
    runs = Path(given.runs)
    trials = [
        study.configure(kind, seed, config_lib.TINY, KINDS[kind], runs, arguments[1:])
        for kind, seed in asked
    ]
    for trial in trials:
        if fault := study.carry_out(trial):
            raise UsageError(f"{trial.workdir} has failed: {fault}")
    summaries = [read(trial) for trial in trials]
    called = " ".join(["python tools/toy_study.py", *arguments[1:]])
    table = study.markdown([_cells(summary) for summary in summaries])
    text = (
        "# The toy study\n\n"
        f"Written by `{called}` with jax {jax.__version__} on {os.cpu_count()} CPU cores"
        f" ({platform.machine()}). All runs start from the shipped generator and are judged on"
        f" the same {summaries[0]['num_prompts']} held-out prompt sequences, from the same"
        f" noise.\n\n{conclusion(summaries)}\n\n{table}\n"
    )
    output = Path(given.output or Path(given.runs) / "study.md")
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {output}", flush=True)


def define_flags() -> None:
    """The flags of the command."""
    command.define_path("output", None, "markdown file to write; default: study.md beside the runs")
    command.define_path(
        "runs", "runs/toy_study", "directory of the runs; finished ones are not run again"
    )
    flags.DEFINE_integer("seeds", 3, "seeds of the trained and of the shuffled runs", lower_bound=1)


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
