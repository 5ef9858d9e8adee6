"""The evidence study: the paper's claims put to the test in the small worlds (docs/evidence.md).

    python tools/study.py --output=docs [--tier=2] [--arms=KVPO,none] [--seeds=0,1,2,3,4]
    python tools/study.py --quick [--output=DIR]     # few arms and seeds, short runs
    python tools/study.py --search=tve,noise_l2 [--seeds=100,101]  # settings, on development seeds
    python tools/study.py --render --output=docs     # the pages again, from evidence.json alone

An arm is a configuration, and some fields over it: ARMS. All arms of a world spend the same passes
(train.budget_passes, docs/runs.md). They run tier by tier, and in a tier seed by seed, the most
important first. After each run DIR has evidence.json, evidence.md and evidence.html anew, so the
study can be stopped at any time; the same command goes on with it. Every run's directory, with its
page, is kept below --runs.

All runs of a world are judged on the same held-out prompts, from the same noise. An arm's interval
is over its seeds, each of which counts once. The difference to the arm that it is compared with is
paired: seed by seed, because a seed has the same training prompts and noise in every arm, and
prompt by prompt.

What was chosen by looking at results is in SETTINGS, and nothing else. Development seeds are those
from 100 on; they train on other prompts than the study's, and are judged on held-out prompts that
the study does not have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import branch_diversity
import evidence
import jax
import numpy as np
import trials
import vividness
from absl import flags
from ml_collections import ConfigDict

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.data import return_world
from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.runtime import command, sums
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import write_json

SEEDS = (0, 1, 2, 3, 4)  # of the study
DEVELOPMENT = 100  # the first development seed
ENDLESS = 1_000_000  # iterations of a run that its budget ends
# Passes of a run: 60 iterations of KVPO with W = 2 and P = 16, 47 of it in the drifting world.
BUDGETS = {"return": 355_200, "toy": 115_000}

# ---------------------------------------------------------------- settings that were searched

_SEARCHED = {
    "objective.beta": 0.05,
    "objective.tau": 1.0,
    "objective.tau_unit": "running_std",
    "train.learning_rate": 4e-3,
    "train.prompts_per_iteration": 16,
    "rollout.window_blocks": 2,
}
# Surrogate -> fields of its arms, set on development seeds (docs/worlds.md) before the study's ran.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "tve": _SEARCHED,
    "latent": _SEARCHED,
    "noise_l2": {
        **_SEARCHED,
        "objective.beta": 0.15,
        "rollout.window_blocks": 1,
        "rollout.noise_scale": 0.3,
        "replay.blocks": 2,
    },
    # All its states are shared: what it needs is the KL.
    "chr_l2": {
        **_SEARCHED,
        "objective.beta": 1.5,
        "rollout.window_blocks": 1,
        "train.learning_rate": 2e-3,
    },
    "awm": {**_SEARCHED, "objective.beta": 0.15, "rollout.window_blocks": 1},
    # A rival's beta, clips and advantages are its own (kvpo_jax/methods.py).
    "rival": {
        "train.learning_rate": 4e-3,
        "train.prompts_per_iteration": 16,
        "rollout.window_blocks": 1,
    },
    "toy": {},  # configs/tiny.py as it is
}

# What runs for every arm: nothing that is looked at while it trains.
LEAN = {
    "train.iterations": ENDLESS,
    "train.checkpoint_every": 50,
    "train.keep": 1,
    "train.keep_best": 0,
    "train.video_every": 0,
    "eval.every": 0,
    "eval.prompts": 32,
}
QUICK_BUDGET = 40_000
QUICK_ARMS = ("KVPO", "noise + l2", "no exploration", "shuffled")

# ---------------------------------------------------------------- arms


@dataclasses.dataclass(frozen=True)
class Arm:
    """A configuration whose runs are compared with those of another.

    Attributes:
      name: of the arm.
      section: of the page.
      spec: FILE[:PRESET][:METHOD] of the configuration.
      settings: key of SETTINGS.
      fields: over the settings.
      tier: 1 is run first.
      versus: the arm that it is compared with.
    """

    name: str
    section: str
    spec: str = "configs/return.py"
    settings: str = "tve"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tier: int = 3
    versus: str = "KVPO"


RETURN, WEAK, TOY = "configs/return.py", "configs/return.py:weak", config_lib.TINY
NOISE = {"rollout.explore": "init_noise"}
DRAWN = {"rollout.explore": "transition"}
BOTH = {"rollout.explore": "routing+init_noise", "rollout.noise_scale": 0.3}
L2 = {"replay.states": "anchor", "replay.energy": "latent"}
SHUFFLED = {"objective.shuffle_advantages": True}
NEGATED = {"objective.negate_advantages": True}
NONE = {"rollout.explore": "none"}
OUTVOTED = {"train.tasks": ("outvoted",)}


def _beta(factor: float) -> Mapping[str, Any]:
    """A KL weight in proportion to the searched one, which stands for the paper's 5."""
    return {"objective.beta": factor * SETTINGS["tve"]["objective.beta"]}


def _weak(name: str, settings: str, fields: Mapping[str, Any], tier: int = 2) -> Arm:
    versus = "KVPO (weak vote)"
    return Arm(f"{name} (weak vote)", "weak vote", WEAK, settings, fields, tier, versus)


def _old(name: str, fields: Mapping[str, Any], tier: int = 2) -> Arm:
    versus = "KVPO (old world)"
    return Arm(f"{name} (old world)", "old world", TOY, "toy", fields, tier, versus)


def _rival(method: str, tier: int = 3) -> Arm:
    return Arm(method, "rivals", f"{RETURN}:strong+{method}", "rival", {}, tier)


ARMS = (
    Arm("KVPO", "exploration", tier=1),
    Arm("noise + l2", "exploration", settings="noise_l2", fields={**NOISE, **L2}, tier=1),
    Arm("CHR + l2", "surrogate", settings="chr_l2", fields=L2, tier=1),
    Arm("shuffled", "controls", fields=SHUFFLED, tier=1),
    Arm("no exploration", "exploration", RETURN, "chr_l2", {**NONE, **L2}, 1),
    Arm("CHR and noise + TVE", "exploration", fields=BOTH, tier=1),
    Arm("beta 0", "beta", fields=_beta(0), tier=1),
    Arm("AWM", "surrogate", settings="awm", spec=f"{RETURN}:strong+awm", tier=1),
    Arm("KVPO (reward noise 0.1)", "reward noise", fields={"reward.noise": 0.1}, tier=1),
    _rival("astrolabe", 1),
    _weak("KVPO", "tve", {}),
    _weak("noise + l2", "noise_l2", {**NOISE, **L2}),
    _weak("CHR + l2", "chr_l2", L2),
    _weak("shuffled", "tve", SHUFFLED),
    Arm("KVPO on outvoted", "transfer", fields=OUTVOTED, tier=2),
    Arm("noise + l2 on outvoted", "transfer", RETURN, "noise_l2", {**NOISE, **L2, **OUTVOTED}, 2),
    Arm("negated", "controls", fields=NEGATED, tier=2),
    Arm("CHR + clean latent", "surrogate", RETURN, "latent", {"replay.energy": "latent"}, 2),
    Arm("CHR and noise + l2", "exploration", settings="chr_l2", fields={**BOTH, **L2}, tier=2),
    Arm("transition noise + l2", "exploration", RETURN, "noise_l2", {**DRAWN, **L2}, 2),
    Arm("transition noise + ratio", "exploration", f"{RETURN}:strong+cps_grpo", "rival", {}, 2),
    Arm("KVPO (reward noise 0.01)", "reward noise", fields={"reward.noise": 0.01}, tier=2),
    Arm("noise + l2 (reward noise 0.1)", "reward noise", RETURN, "noise_l2",
        {**NOISE, **L2, "reward.noise": 0.1}, 2),
    _old("KVPO", {}),
    _old("no routing", {"rollout.perturbed_steps": 0}),
    _old("noise + TVE", {**NOISE, "rollout.noise_scale": 1.0}),
    _old("shuffled", SHUFFLED),
    *(Arm(f"{n} steps", "CHR", fields={"rollout.perturbed_steps": n}) for n in (1, 4)),
    Arm("3 of 9 slots", "CHR", f"{RETURN}:strong+slots_3"),
    Arm("9 of 9 slots", "CHR", f"{RETURN}:strong+slots_9"),
    Arm("random window", "CHR", f"{RETURN}:strong+random_window"),
    *(
        Arm(f"{n} blocks", "CHR", fields={"rollout.window_blocks": n})
        for n in (1, 2, 3)
        if n != SETTINGS["tve"]["rollout.window_blocks"]
    ),
    Arm("0.2 beta", "beta", fields=_beta(1 / 5)),
    Arm("2 beta", "beta", fields=_beta(2)),
    *(_rival(name) for name in ("neighbor_grpo", "nft", "flow_grpo", "ar_copo")),
    Arm("3 steps", "CHR", fields={"rollout.perturbed_steps": 3}, tier=4),
    Arm("0.6 beta", "beta", fields=_beta(3 / 5), tier=4),
    Arm("noise + TVE", "exploration", f"{RETURN}:strong+noise_tve", fields={
        "rollout.noise_scale": 1.0, "rollout.window_blocks": 1, "replay.blocks": 2}, tier=4),
    Arm("noise + l2 (reward noise 0.01)", "reward noise", RETURN, "noise_l2",
        {**NOISE, **L2, "reward.noise": 0.01}, 4),
    *(_rival(name, 4) for name in ("dance_grpo", "cm_grpo", "rwr")),
    *(Arm(f"{n} of 16 blocks (old world)", "old world", TOY, "toy",
          {"rollout.window_blocks": n, "video.blocks": 16}, 4, "3 of 16 blocks (old world)")
      for n in (3, 5, 7)),
)  # fmt: skip
BY_NAME = {arm.name: arm for arm in ARMS}


def world_of(arm: Arm) -> str:
    """The key of BUDGETS."""
    return "toy" if arm.spec.startswith(TOY) else "return"


# ---------------------------------------------------------------- the search

# What is tried one at a time around SETTINGS, with the arm that carries the surrogate.
CARRIERS = {"tve": "KVPO", "latent": "CHR + clean latent", "awm": "AWM", "rival": "astrolabe"}
CARRIERS |= {"noise_l2": "noise + l2", "chr_l2": "CHR + l2"}
TRIED: Mapping[str, Sequence[Any]] = {
    "train.learning_rate": (2e-3, 4e-3, 8e-3),
    "objective.beta": (0.05, 0.15, 0.5),
    "objective.tau_unit": ("running_std", "group_std"),
    "rollout.window_blocks": (1, 2, 3),
    "train.prompts_per_iteration": (8, 16),
}
HELD_BACK = 32  # the study's held-out prompts; a search is judged on as many others


def searched(surrogate: str) -> list[Arm]:
    """The arms of a search: the carrier with its settings, and with one of them changed."""
    arm, settings = BY_NAME[CARRIERS[surrogate]], SETTINGS[surrogate]
    points: list[dict[str, Any]] = [{}]
    points += [
        {name: value}
        for name, values in TRIED.items()
        for value in values
        if name in settings and value != settings[name]
    ]
    more = {"eval.prompts": 2 * HELD_BACK}
    return [
        dataclasses.replace(
            arm,
            name=" ".join([surrogate, *(f"{n.split('.')[1]} {v}" for n, v in point.items())]),
            fields={**arm.fields, **point, **more},
        )
        for point in points
    ]


def search_row(arm: Arm, seed: int, result: trials.Result) -> dict[str, Any]:
    """What evidence_search.json has of a run: judged on prompts that the study does not have."""
    changed = {n: v for n, v in arm.fields.items() if n in TRIED or n.startswith("replay.")}
    row = {"arm": arm.name, "surrogate": arm.settings, "seed": seed, "fields": changed}
    if result.fault or result.gains is None:
        return {**row, "fault": result.fault}
    tasks = tasks_of(result.evaluation, slice(HELD_BACK, None))
    gain = float(np.mean(result.gains[HELD_BACK:]))
    return {**row, "gain": gain, "tasks": tasks, "spent": dict(result.spent)}


# ---------------------------------------------------------------- runs


def trial_of(
    arm: Arm, seed: int, runs: Path, arguments: Sequence[str], budget: int
) -> trials.Trial:
    """A run of an arm; UsageError as `trials.configure`."""
    fields = {
        **LEAN,
        "train.budget_passes": budget or BUDGETS[world_of(arm)],
        **SETTINGS[arm.settings],
        **arm.fields,
    }
    return trials.configure(arm.name, seed, arm.spec, fields, runs, arguments)


def tasks_of(evaluation: Mapping[str, Any], which: slice = slice(None)) -> dict[str, Any]:
    """Task -> its number of held-out stories and their mean components before and after.

    Args:
      evaluation: an object of heldout.jsonl; {} where the world has no tasks.
      which: of the prompts.
    """
    stories = evaluation.get("prompt", [])[which]
    if not stories:
        return {}
    values = {
        when: {
            name: np.asarray(found[which], float)
            for name, found in {
                "reward": evaluation["reward"][policy],
                **{part: evaluation["components"][policy][part] for part in PARTS},
            }.items()
        }
        for when, policy in (("before", "reference"), ("after", "online"))
    }
    return {
        task: {
            "stories": len(chosen["before"]["reward"]),
            **{
                when: {name: round(float(x.mean()), 5) for name, x in parts.items()}
                for when, parts in chosen.items()
            },
        }
        for task, chosen in return_world.by_task(stories, values).items()
    }


PARTS = ("SC", "VQ", "wanted", "shown", "other")  # of the world "return", as its held-out records


def run_record(arm: Arm, seed: int, result: trials.Result) -> dict[str, Any]:
    """What evidence.json has of a run."""
    row = {"arm": arm.name, "seed": seed, "run": result.trial.workdir.name}
    if result.fault:
        return {**row, "fault": result.fault}
    gains = None if result.gains is None else [round(float(x), 5) for x in result.gains]
    in_return = world_of(arm) == "return"
    return {
        **row,
        "gain": result.gain,
        "gains": gains,
        "before": float(np.mean(result.evaluation["reward"]["reference"])),
        "parts": {name: round(value, 6) for name, value in result.parts.items()},
        "tasks": tasks_of(result.evaluation) if in_return else {},
        "means": dict(result.means),
        "spent": dict(result.spent),
    }


def ordered(arms: Sequence[Arm], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """The runs of a study: tier by tier, in a tier seed by seed, in the order of `arms`."""
    return [
        (arm, seed)
        for tier in sorted({arm.tier for arm in arms})
        for seed in seeds
        for arm in arms
        if arm.tier == tier
    ]


def carry_out(
    asked: Sequence[tuple[Arm, trials.Trial]],
    row_of: Callable[[Arm, int, trials.Result], dict[str, Any]],
    keep: Callable[[Sequence[dict[str, Any]]], None],
    others: Sequence[tuple[Arm, trials.Trial]] = (),
) -> list[dict[str, Any]]:
    """Makes runs one after the other, and keeps what is known of all that are finished.

    Args:
      asked: arms and their runs, in order.
      row_of: what is kept of a run.
      keep: is given all rows, at the start and after every run that is made.
      others: runs that are not made, but kept if they are finished.
    """
    finished = {t.workdir: (arm, t) for arm, t in [*asked, *others] if trials.is_finished(t)}
    rows = [row_of(arm, trial.seed, trials.read(trial)) for arm, trial in finished.values()]
    keep(rows)
    for arm, trial in asked:
        if trial.workdir not in finished:
            rows.append(row_of(arm, trial.seed, trials.result(trial)))
            keep(rows)
    return rows


# ---------------------------------------------------------------- without training

DIVERSE = {"return": (RETURN, branch_diversity.WAYS), "weak": (WEAK, branch_diversity.WAYS[:2])}


def remembered(path: Path, made_of: Any, make: Callable[[], Any]) -> Any:
    """What a file has, made anew where it was made of something else."""
    made_of = sums.of_json(made_of)
    try:
        kept = json.loads(path.read_text())
        if kept["made_of"] == made_of:
            return kept["found"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or not a whole one
        pass
    found = make()
    write_json({"made_of": made_of, "found": found}, path)
    return found


def diversity(spec: str, ways: Sequence[str], seeds: Sequence[int], groups: int) -> list[Any]:
    """`branch_diversity.measure` of every seed: [{"seed", its three tables}, ...]."""
    runs = branch_diversity.loaded(config_lib.load(spec), ways)
    return [{"seed": seed, **branch_diversity.measure(runs, groups, seed=seed)} for seed in seeds]


def untrained(runs: Path, seeds: Sequence[int], groups: int) -> dict[str, Any]:
    """What the generators show before any training: "diversity" by world, and "vividness"."""
    runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"diversity": {}}
    for world, (spec, ways) in DIVERSE.items():
        config = config_lib.load(spec)
        made_of = [config.to_dict(), weights_sum(config), list(ways), list(seeds), groups]
        print(f"\n=== diversity, {spec}", flush=True)
        found["diversity"][world] = remembered(
            runs / f"diversity_{world}.json", made_of, partial(diversity, spec, ways, seeds, groups)
        )
    toy = config_lib.load(TOY)
    path = runs / "vividness.json"
    made_of = [toy.to_dict(), weights_sum(toy)]
    found["vividness"] = remembered(path, made_of, partial(vividness.measure, toy))
    return found


def weights_sum(config: ConfigDict) -> str:
    """The sum of the generator's file."""
    path = config.weights or backbone_lib.shipped_weights(config)
    assert path is not None
    return sums.of_path(path)


# ---------------------------------------------------------------- the command


def chosen(names: Sequence[str], tier: int = 4) -> list[Arm]:
    """The arms of these names, in the order of ARMS; without names those up to a tier."""
    for name in names:
        if name not in BY_NAME:
            raise UsageError(
                f"--arms: {name!r} is no arm{nearest(name, BY_NAME)}; arms are {', '.join(BY_NAME)}"
            )
    return [arm for arm in ARMS if (arm.name in names if names else arm.tier <= tier)]


def seeds_of(given: Sequence[str], development: bool) -> list[int]:
    """The seeds that are asked for."""
    if not all(seed.strip().isdigit() for seed in given):
        raise UsageError(f"--seeds={','.join(given)}: expected whole numbers with commas between")
    seeds = sorted({int(seed) for seed in given})
    if wrong := [seed for seed in seeds if (seed >= DEVELOPMENT) != development]:
        raise UsageError(
            f"--seeds: {wrong[0]} is {'no' if development else 'a'} development seed; those are"
            f" {DEVELOPMENT} and more, for --search alone"
        )
    return seeds


def search(surrogates: Sequence[str], runs: Path, output: Path, arguments: Sequence[str]) -> None:
    """Runs the search, and writes its table to evidence_search.json."""
    given = flags.FLAGS
    for name in surrogates:
        if name not in CARRIERS:
            raise UsageError(f"--search={name}: surrogates are {', '.join(CARRIERS)}")
    seeds = seeds_of(given.seeds or [str(DEVELOPMENT)], development=True)
    arms = [arm for name in surrogates for arm in searched(name)]
    asked = [
        (arm, trial_of(arm, seed, runs / "search", arguments, given.budget))
        for seed in seeds
        for arm in arms
    ]

    def keep(rows: Sequence[dict[str, Any]]) -> None:
        write_json({"runs": list(rows)}, output / "evidence_search.json")

    rows = carry_out(asked, search_row, keep)
    print(f"\n{trials.markdown(evidence.search_rows(rows))}\n", flush=True)
    print(f"wrote {output / 'evidence_search.json'}", flush=True)


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    runs = Path(given.runs or ("runs/study_quick" if given.quick else "runs/study"))
    output = Path(given.output) if given.output else runs
    if given.render:
        path = output / "evidence.json"
        if not path.exists():
            raise UsageError(f"{path} is not there; run the study first, or name its folder")
        evidence.write(json.loads(path.read_text()), output)
        return
    if given.search:
        search(given.search, runs, output, arguments[1:])
        return
    by_default = SEEDS[:2] if given.quick else SEEDS
    seeds = seeds_of(given.seeds or [*map(str, by_default)], development=False)
    arms = chosen(given.arms or (QUICK_ARMS if given.quick else ()), given.tier)
    budget = given.budget or (QUICK_BUDGET if given.quick else 0)
    wanted = ordered(arms, seeds)
    there = [
        (arm, seed)
        for arm, seed in ordered(ARMS, SEEDS)
        if (arm, seed) not in wanted and trials.workdir_of(arm.name, seed, runs).exists()
    ]
    asked, others = (
        [(arm, trial_of(arm, seed, runs, arguments[1:], budget)) for arm, seed in some]
        for some in (wanted, there)
    )
    command.use_compilation_cache()
    known: dict[str, Any] = {
        **(untrained(runs, seeds, given.groups) if given.groups else {}),
        "command": " ".join(["python tools/study.py", *_given(given), *arguments[1:]]),
        "made_with": f"jax {jax.__version__}, {os.cpu_count()} CPU cores ({platform.machine()})",
        "budget": budget or BUDGETS,
        "search": found_by_search(output),
        "settings": {name: dict(fields) for name, fields in SETTINGS.items()},
        "seeds": seeds,
        "described": {arm.name: described(arm) for arm in ARMS},
    }

    def keep(rows: Sequence[dict[str, Any]]) -> None:
        evidence.write(evidence.summed_up({**known, "runs": list(rows)}), output)

    rows = carry_out(asked, run_record, keep, others)
    print(f"wrote evidence.json, .md and .html in {output}", flush=True)
    if failed := [row for row in rows if row.get("fault")]:
        raise UsageError(f"{len(failed)} of {len(rows)} runs failed; the page says why")


def found_by_search(output: Path) -> list[dict[str, Any]]:
    """The runs of the last search, if there was one."""
    path = output / "evidence_search.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def described(arm: Arm) -> dict[str, Any]:
    """What the page says of an arm besides its figures."""
    changes = {name: str(value) for name, value in arm.fields.items()}
    facts = dataclasses.asdict(arm)
    return {name: facts[name] for name in ("section", "spec", "settings", "versus")} | {
        "fields": changes
    }


def _given(given: Any) -> list[str]:
    """The flags that decide which runs are made."""
    lists = [f"--{n}={','.join(given[n].value)}" for n in ("arms", "seeds") if given[n].value]
    tier = [f"--tier={given.tier}"] if given["tier"].present and not given.arms else []
    return [*lists, *tier, *(["--quick"] if given.quick else [])]


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_list("arms", [], "names of arms, with commas between; default: all")
    flags.DEFINE_integer("tier", 4, "without --arms: the arms of the tiers up to this", 1, 4)
    flags.DEFINE_list("seeds", [], "with commas between; default: 0,1,2,3,4, of a search 100")
    flags.DEFINE_list("search", [], "surrogates whose settings are tried on development seeds")
    flags.DEFINE_bool("quick", False, f"arms {', '.join(QUICK_ARMS)}, two seeds, short runs")
    flags.DEFINE_bool("render", False, "write the pages again from evidence.json, and run nothing")
    flags.DEFINE_integer(
        "groups", 16, "groups of each task and seed that are compared untrained; 0: none", 0
    )
    flags.DEFINE_integer("budget", 0, "passes of each run; 0: those of the study", lower_bound=0)
    command.define_path(
        "runs", None, "directory of the runs; default: runs/study, or runs/study_quick with --quick"
    )
    command.define_path("output", None, "directory of what is written; default: that of the runs")


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
