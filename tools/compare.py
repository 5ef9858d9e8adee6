"""Compares methods: every one with several seeds, at the same budget of passes.

    python tools/compare.py --methods=paper,release --seeds=3 --budget=400000 \\
        [--config=configs/tiny.py] [--output=DIR] [--config.FIELD=VALUE ...]

A method is a preset of the configuration file, one of docs/methods.md, or PRESET+METHOD. --budget
is train.budget_passes of every run: a method whose iterations cost less makes more of them
(docs/runs.md). Without a budget every run makes train.iterations. The same command continues a
comparison: finished runs are not made again, an interrupted one goes on, a failed one is tried
again; with a larger budget all go on.

DIR has the runs, comparison.md, comparison.json, comparison.png and report.html, the page of all
runs (`python -m kvpo_jax.report`). All policies are judged on the same held-out prompts, from the
same noise. The gain of a method on a prompt is the mean over its seeds, which count as repetitions;
its interval is over the prompts, and so is that of the difference to the first method. The interval
over seeds is of the gains of whole runs, and says whether another seed would do as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trials
from absl import flags

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import command, page
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.progress import table
from kvpo_jax.runtime.statistics import mean_interval, paired_gain, show_interval

ENDLESS = 1_000_000  # iterations of a run that its budget ends
# Columns of the first table, and how those of the second begin.
GAINS = ("seeds", "gain", "95 % over prompts", "95 % over seeds", "over the first", "95 % of that")
PART = "gain in "
WIDTH = 7  # columns of a table beside that of the methods

# ---------------------------------------------------------------- runs


def configure(
    methods: Sequence[str],
    seeds: int,
    budget: int,
    file: str,
    output: Path,
    arguments: Sequence[str],
) -> list[trials.Trial]:
    """The runs of a comparison, by method and seed.

    Raises:
      UsageError: a method is no preset of the file or is named twice, or a directory has another
        run.
    """
    if ":" in file:
        raise UsageError(f"--config={file}: name the file alone; its presets go into --methods")
    if not all(methods):
        raise UsageError(f"--methods={','.join(methods)}: expected presets with commas between")
    if twice := [name for name in methods if methods.count(name) > 1]:
        raise UsageError(f"--methods names {twice[0]!r} twice")
    limits = {"train.budget_passes": budget} if budget else {}
    endless = [f"--config.train.iterations={ENDLESS}"] if budget else []
    return [
        trials.configure(
            name, seed, f"{file}:{name}", limits, output, [*endless, *arguments], longer=True
        )
        for name, seed in itertools.product(methods, range(seeds))
    ]


# ---------------------------------------------------------------- methods


def of_method(results: Sequence[trials.Result], first: Sequence[trials.Result]) -> dict[str, Any]:
    """What comparison.json has of a method.

    Args:
      results: of its runs, by seed.
      first: of the runs of the method that it is compared with.
    """
    done = [r for r in results if not r.fault]
    out: dict[str, Any] = {
        "method": results[0].trial.name,
        "seeds": len(done),
        "failed": {str(r.trial.seed): r.fault for r in results if r.fault},
        "runs": [str(r.trial.workdir) for r in results],
    }
    if not done:
        return out
    gain, over_seeds = mean_interval(np.array([r.gain for r in done]))
    out |= {"gain": gain, "gain_ci95_seeds": over_seeds, "gains": [r.gain for r in done]}
    own, others = _per_prompt(results), _per_prompt(first)
    if own is not None:
        out["gain_ci95_prompts"] = mean_interval(own)[1]
        if others is not None and results is not first:
            out["over_first"], out["over_first_ci95_prompts"] = paired_gain(others, own)
    for name in ("parts", "means", "spent"):
        found = [getattr(r, name) for r in done]
        out[name] = {key: float(np.mean([x[key] for x in found])) for key in found[0]}
    return out


def _per_prompt(results: Sequence[trials.Result]) -> np.ndarray | None:
    """The gain on every held-out prompt, the mean over seeds, float[n]; None if it is not known."""
    gains = [r.gains for r in results if not r.fault]
    known = [g for g in gains if g is not None]
    return np.mean(known, axis=0) if known and len(known) == len(gains) else None


def rows(methods: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of the table, a method each."""
    out, parts = [], list(dict.fromkeys(p for m in methods for p in m.get("parts", ())))
    for m in methods:
        tried = m["seeds"] + len(m["failed"])
        row = {"method": m["method"], "seeds": str(m["seeds"])}
        if m["failed"]:
            row["seeds"] += f" of {tried}"
        out.append(row | (_cells(m, parts) if m["seeds"] else {"gain": "failed"}))
    columns = dict.fromkeys(name for row in out for name in row)
    return [{name: row.get(name, "") for name in columns} for row in out]


def failures(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each run that has failed: why."""
    return [
        f"{m['method']}, seed {seed} failed: {fault}"
        for m in methods
        for seed, fault in m["failed"].items()
    ]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Tables that fit beside one another on a page: the gains, their parts, and what they took."""

    def kind(column: str) -> int:
        return 0 if column in GAINS else 1 if column.startswith(PART) else 2

    own = [column for column in rows[0] if column != "method"]
    kinds = [[c for c in own if kind(c) == number] for number in range(3)]
    parts = [some[i : i + WIDTH] for some in kinds for i in range(0, len(some), WIDTH)]
    tables = [[{c: row[c] for c in ("method", *columns)} for row in rows] for columns in parts]
    return "\n\n".join(map(trials.markdown, tables))


def _cells(m: Mapping[str, Any], parts: Sequence[str]) -> dict[str, str]:
    """Column -> what the table has there for a method."""
    return {
        "gain": f"{m['gain']:+.4f}",
        "95 % over prompts": show_interval(m.get("gain_ci95_prompts")),
        "95 % over seeds": show_interval(m["gain_ci95_seeds"]),
        "over the first": _signed(m.get("over_first")),
        "95 % of that": show_interval(m.get("over_first_ci95_prompts")),
        "reward std in group": f"{m['means']['reward_std_in_group']:.4f}",
        "pixel std in group": f"{m['means']['pixel_std_in_group']:.4f}",
        **{f"{PART}{name}": _signed(m["parts"].get(name)) for name in parts},
        **{name: f"{value:,.0f}" for name, value in m["spent"].items()},
    }


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


# ---------------------------------------------------------------- the picture


def picture(
    results: Mapping[str, Sequence[trials.Result]], methods: Sequence[Any], path: Path
) -> None:
    """A PNG: the gain of every run over its passes, and beside it those of the methods."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes most of a second
    from matplotlib.figure import Figure

    figure = Figure((10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    curves, gains = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, m in enumerate(methods):
        colour = f"C{place % 10}"
        runs = results[m["method"]]
        for r in runs:
            curves.plot(*r.curve, color=colour, marker=".", linewidth=1.2)
        if m["seeds"]:
            interval = m.get("gain_ci95_prompts") or m["gain_ci95_seeds"]
            seeds = [r.gain for r in runs if not r.fault]
            trials.draw_gain(gains, place, seeds, m["gain"], interval, colour)
    curves.set(xlabel="passes", ylabel="gain of the held-out reward", title="every run")
    gains.set(xlabel="gain of the held-out reward", title="methods, with 95 % intervals")
    trials.name_gains(gains, [m["method"] for m in methods])
    curves.grid(True, linewidth=0.5, alpha=0.5)
    curves.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format="png")


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    output = Path(given.output)
    names = [name.strip() for name in given.methods]
    asked = configure(names, given.seeds, given.budget, given.config, output, arguments[1:])
    found: dict[str, list[trials.Result]] = {name: [] for name in names}
    for trial in asked:
        found[trial.name].append(trials.result(trial))
    first = found[names[0]]
    methods = [of_method(found[name], first) for name in names]
    compared, failed = rows(methods), failures(methods)
    called = {"config": given.config, "seeds": given.seeds, "budget": given.budget}
    write_json(
        {**called, "arguments": arguments[1:], "methods": methods}, output / "comparison.json"
    )
    budget = f"{given.budget:,} passes for each run" if given.budget else "train.iterations each"
    changed = f"; `{' '.join(arguments[1:])}`" if arguments[1:] else ""
    text = (
        f"### {given.config}\n\n{budget}; seeds 0 to {given.seeds - 1}{changed}. Gains are of the"
        " held-out reward over the reference, on the same prompts and noise; seconds are those of"
        f" training.\n\n{markdown(compared)}\n\n"
    )
    text += "".join(f"* {line}\n" for line in failed) + "\n![gains](comparison.png)\n"
    with replacing(output / "comparison.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    picture(found, methods, output / "comparison.png")
    finished = [r.trial.workdir for name in names for r in found[name] if not r.fault]
    if finished:
        page.write(finished, output / "report.html")
    print()
    table("", list(compared[0]), [list(row.values()) for row in compared])
    print("".join(f"\n{line}" for line in failed))
    pages = " and report.html" if finished else ""
    print(f"wrote {output}/comparison.md, .json, .png{pages}", flush=True)
    if failed:
        raise UsageError(f"{len(failed)} of {len(asked)} runs failed; comparison.md says why")


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_list(
        "methods",
        None,
        "presets or methods, separated by commas; others are compared with the first",
        required=True,
    )
    flags.DEFINE_integer("seeds", 3, "seeds of each", lower_bound=1)
    flags.DEFINE_integer("budget", 0, "passes of each run; 0: train.iterations each", lower_bound=0)
    flags.DEFINE_string(
        "config",
        config_lib.TINY,
        "file of the presets; --config.FIELD=VALUE changes a field of all",
    )
    command.define_path("output", "runs/compare", "directory of the runs and of what is written")


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
