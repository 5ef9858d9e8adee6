"""Does KVPO raise the toy's reward, and is it the reward that does it? Makes the table in docs/toy_study.md.

    python tools/toy_study.py --output=docs/toy_study.md

Trains the default config with several seeds, with shuffled advantages (the control: same machinery, no information) and
with negated advantages (must go down), and writes gains on the held-out prompts with diversity, KL, gate and time.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from kvpo_jax import config as config_lib
from kvpo_jax import report, train

_OUTPUT = flags.DEFINE_string("output", "docs/toy_study.md", "markdown file to write")
_RUNS = flags.DEFINE_string("runs", "runs/toy_study", "directory of the runs; finished ones are not run again")
_SEEDS = flags.DEFINE_integer("seeds", 3, "seeds of the trained and of the shuffled runs")

KINDS = {
    "KVPO": {},
    "shuffled advantages": {"objective.shuffle_advantages": True},
    "negated advantages": {"objective.negate_advantages": True},
}


def configured(kind: str, seed: int, arguments: Sequence[str]) -> tuple[Path, ConfigDict]:
    """The directory and the configuration of one run; ValueError if the directory has a run of another one."""
    workdir, fields = Path(_RUNS.value) / f"{kind.replace(' ', '_')}-{seed}", {"seed": seed, **KINDS[kind]}
    config = config_lib.resolve(
        config_lib.TINY, workdir, [*arguments, *(f"--config.{k}={v}" for k, v in fields.items())]
    )
    # What a continued run may change, its length say, changes the numbers of a study too.
    if (record := workdir / "config.json").exists():
        before, now = config_lib.flat(config_lib.load_saved(record)), config_lib.flat(config)
        if changed := [name for name in sorted(before | now) if before.get(name) != now.get(name)]:
            raise ValueError(f"{workdir} has a run with another {changed[0]}; choose another directory with --runs")
    return workdir, config


def run(kind: str, seed: int, workdir: Path, config: ConfigDict) -> dict:
    """The summary of one run, with the means of its metrics over the iterations."""
    if not (workdir / "summary.json").exists():
        config_lib.start_run(config, workdir)
        print(f"\n=== {kind}, seed {seed}", flush=True)
        train.train_and_evaluate(config, workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    mean = lambda name: float(np.mean([m[name] for m in metrics]))
    return {
        "kind": kind,
        "seed": seed,
        **summary["heldout"],
        "components": summary["components"],
        "diversity": mean("reward_std_in_group"),
        "pixels": mean("pixel_std_in_group"),
        "kl": metrics[-1]["kl"],
        "gate": mean("gate_open"),
        "energy_std": (metrics[0]["energy_std"], metrics[-1]["energy_std"]),
        "seconds": summary["seconds"]["total"],
    }


def table(rows: Sequence[dict]) -> str:
    """The markdown of all runs."""
    head = (
        "run", "seed", "before", "after", "EMA", "gain", "95 % over prompts", "win rate", "reward std in group",
        "pixel std in group", "energy std, first to last", "KL at the end", "gate open", "seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in rows:
        low, high = r["gain_ci95"]
        cells = (
            r["kind"], r["seed"], f"{r['reference']:.4f}", f"{r['online']:.4f}", f"{r['ema']:.4f}", f"{r['gain']:+.4f}",
            f"[{low:+.4f}, {high:+.4f}]", f"{r['win_rate']:.0%}", f"{r['diversity']:.4f}", f"{r['pixels']:.4f}",
            f"{r['energy_std'][0]:.1e} to {r['energy_std'][1]:.1e}", f"{r['kl']:.2e}", f"{r['gate']:.0%}",
            f"{r['seconds']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def conclusion(rows: Sequence[dict]) -> str:
    """What the numbers say, in words that follow from them."""
    gains = {kind: [r["gain"] for r in rows if r["kind"] == kind] for kind in KINDS}
    trained, shuffled, negated = (gains[kind] for kind in KINDS)
    mean = float(np.mean(trained))
    half = report.t_quantile_975(len(trained) - 1) * float(np.std(trained, ddof=1)) / len(trained) ** 0.5
    above = min(trained) > max(shuffled)
    return (
        f"Mean gain of KVPO over {len(trained)} seeds: **{mean:+.4f}**, 95 % Student-t interval over seeds "
        f"[{mean - half:+.4f}, {mean + half:+.4f}]. Worst seed {min(trained):+.4f}, best shuffled run "
        f"{max(shuffled):+.4f}: every seed is {'above' if above else '**not** above'} every shuffled run. "
        f"Negated advantages: {', '.join(f'{g:+.4f}' for g in negated)}."
    )


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config_lib.use_compilation_cache()
    plan = [("KVPO", s) for s in range(_SEEDS.value)] + [("shuffled advantages", s) for s in range(_SEEDS.value)]
    plan.append(("negated advantages", 0))
    try:
        runs = [(kind, seed, *configured(kind, seed, arguments[1:])) for kind, seed in plan]
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = [run(*each) for each in runs]
    text = "\n".join(
        [
            "# The toy study",
            "",
            f"Written by `{' '.join(['python tools/toy_study.py', *arguments[1:]])}` with jax {jax.__version__} "
            f"on {os.cpu_count()} CPU cores ({platform.machine()}). All runs start from the shipped generator and are "
            f"judged on the same {rows[0]['num_prompts']} held-out prompt sequences, from the same noise.",
            "",
            conclusion(rows),
            "",
            table(rows),
            "",
        ]
    )
    Path(_OUTPUT.value).write_text(text)
    print(f"\n{text}\nwrote {_OUTPUT.value}", flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
