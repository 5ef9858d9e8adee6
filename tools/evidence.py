"""What the runs of the evidence study say: figures of the arms, claims of the paper, the pages.

A claim of the paper is a sentence about a difference: of an arm over another one, or of an arm over
the policy that training starts from. The rule of the verdict (`verdict`):

* The difference is taken seed by seed. Its mean is "ours", with a 95 % Student-t interval over the
  seeds, each of which counts once.
* "reproduced": the whole interval lies on the paper's side of 0. A claim that something makes no
  difference is reproduced if the whole interval lies within NEGLIGIBLE of 0.
* "not reproduced": any other interval. It may lie on the other side, or be too wide to say.
* "not testable here": the world does not have what the claim is about, or there are fewer than two
  seeds of both arms; "why" says which.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import trials

from kvpo_jax.runtime import media, page
from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.statistics import mean_interval

VERDICTS = REPRODUCED, NOT, UNTESTABLE = "reproduced", "not reproduced", "not testable here"
NEGLIGIBLE = 0.03  # of a gain, whose scale is 0 to 1

Run = Mapping[str, Any]  # of a run, as study.run_record makes it

# ---------------------------------------------------------------- claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and the figures that decide it.

    Attributes:
      claim: the sentence.
      paper: where it stands, with the paper's figures.
      arm: whose runs it is about; "" if no run can say anything.
      over: the arm that it is compared with; "" is the policy that training starts from.
      measure: "gain", a component of the reward, or "TASK: COMPONENT".
      table: "runs", or "return" and "weak" of what branches differ in before training; there the
        arms are values of rollout.explore and the measure is "TASK: COLUMN".
      sign: of the difference that the paper claims; 0 is none.
      why: it cannot be tested.
    """

    claim: str
    paper: str
    arm: str = ""
    over: str = ""
    measure: str = "gain"
    sign: int = 1
    why: str = ""
    table: str = "runs"


def _diverse(claim: str, column: str, sign: int = 1, table: str = "return") -> Claim:
    """Routing against noise, in the stories whose first object is outvoted."""
    measure = f"outvoted: {column}"
    where = "Fig. 1, Appendix B"
    return Claim(claim, where, "routing", "init_noise", measure, sign, table=table)


TABLE_1 = "Table 1: LongLive VQ +28 %, MQ +6 %, TA +26 % on long videos"
CLAIMS = (
    _diverse("routed history changes what is shown, noise how it looks", "between objects"),
    _diverse("branches of routed histories differ more in semantics", "SC std"),
    _diverse("and less in appearance", "VQ std", -1),
    _diverse("the best branch of a routed group is further above the anchor", "best - anchor"),
    _diverse(
        "branches of routed histories differ more in semantics (weak vote)", "SC std", 1, "weak"
    ),
    Claim("KVPO raises the reward that it optimises", TABLE_1, "KVPO"),
    Claim("and its semantic part", TABLE_1, "KVPO", measure="SC"),
    Claim("and its appearance", TABLE_1, "KVPO", measure="VQ"),
    Claim(
        "what is gained is the reward's doing: shuffled advantages gain less",
        "a control, not in the paper",
        "KVPO",
        "shuffled",
    ),
    Claim(
        "routed history explores better than noise, each with the surrogate that suits it",
        "Section 1, Appendix D.1",
        "KVPO",
        "noise + l2",
    ),
    Claim(
        "routed history explores better than noise, with the same surrogate (l2)",
        "Section 1, Appendix D.1",
        "CHR + l2",
        "noise + l2",
    ),
    Claim(
        "routed history gains more in semantics than noise",
        "Section 4.2",
        "KVPO",
        "noise + l2",
        "SC",
    ),
    Claim(
        "routed history is better than drawn transitions (SDE)",
        "Section 1",
        "KVPO",
        "transition noise + ratio",
    ),
    Claim("TVE is a better surrogate than latent l2", "Table 2", "KVPO", "CHR + l2"),
    Claim("KVPO is better than Astrolabe", "Table 1", "KVPO", "astrolabe"),
    Claim("without a KL training collapses below the base", "Table 3", "beta 0", sign=-1),
    Claim("some KL is better than none", "Table 3", "KVPO", "beta 0"),
    Claim("twice the KL is too conservative", "Table 3", "KVPO", "2 beta"),
    Claim("two perturbed steps are better than one", "Table 2", "KVPO", "1 steps"),
    Claim("two perturbed steps are better than four", "Table 2", "KVPO", "4 steps"),
    Claim("four perturbed steps cost visual quality", "Table 2", "KVPO", "4 steps", "VQ"),
    Claim("6 of 9 routed slots are better than 3", "Table 2", "KVPO", "3 of 9 slots"),
    Claim("6 of 9 routed slots are better than 9", "Table 2", "KVPO", "9 of 9 slots"),
    Claim(
        "a window of random length makes no difference", "Table 2", "random window", "KVPO", sign=0
    ),
    Claim(
        "five perturbed blocks are better than three (old world)",
        "Table 2",
        "5 of 16 blocks (old world)",
        "3 of 16 blocks (old world)",
    ),
    Claim(
        "seven perturbed blocks are no better and no worse than five (old world)",
        "Table 2",
        "7 of 16 blocks (old world)",
        "5 of 16 blocks (old world)",
        sign=0,
    ),
    *(
        Claim(sentence, where, why=why)
        for sentence, where, why in (
            (
                "routed histories stay on the manifold of the generator",
                "Section 3.2, Appendix C",
                "routed windows are contexts that this generator was trained on; LongLive's were"
                " not",
            ),
            (
                "people prefer the videos of KVPO",
                "Fig. 5: 32 participants",
                "the worlds have no people",
            ),
            (
                "quality and semantics of VBench rise, too",
                "Table 1",
                "VBench knows nothing of coloured spots",
            ),
            (
                "the margin over Astrolabe is wider on long videos with several prompts",
                "Section 4.2",
                "the stories have one length",
            ),
            (
                "the replay costs little memory",
                "Appendix F, Fig. 8",
                "memory of a small generator says nothing of a large one",
            ),
        )
    ),
)


def verdict(interval: Sequence[float] | None, sign: int) -> str:
    """The verdict on a difference; the rule is that of the module.

    Args:
      interval: of the difference over seeds, [low, high]; None where it is not known.
      sign: 1 if the paper says that the difference is positive, -1 negative, 0 none.
    """
    if interval is None:
        return UNTESTABLE
    low, high = interval
    if sign == 0:
        return REPRODUCED if -NEGLIGIBLE <= low and high <= NEGLIGIBLE else NOT
    return REPRODUCED if min(sign * low, sign * high) > 0 else NOT


def value(run: Run, measure: str) -> float:
    """The gain of a run in a measure; see `Claim`."""
    if measure == "gain":
        return run["gain"]
    task, _, part = measure.rpartition(": ")
    if not task:
        return run["parts"][part]
    return run["tasks"][task]["after"][part] - run["tasks"][task]["before"][part]


def by_seed(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """Seed -> the finished run of an arm."""
    return {run["seed"]: run for run in runs if run["arm"] == arm and not run.get("fault")}


def measured(found: Mapping[str, Any], claim: Claim, arm: str) -> dict[int, float]:
    """Seed -> the measure of a claim for one of its arms."""
    if claim.table == "runs":
        return {s: value(r, claim.measure) for s, r in by_seed(found["runs"], arm).items()}
    task, _, column = claim.measure.rpartition(": ")
    return {
        seed["seed"]: row[column]
        for seed in found.get("diversity", {}).get(claim.table, ())
        for row in seed["diversity"]
        if (row["task"], row["explore"]) == (task, arm)
    }


def judged(found: Mapping[str, Any], claim: Claim) -> dict[str, Any]:
    """What evidence.json has of a claim."""
    own, other = measured(found, claim, claim.arm), measured(found, claim, claim.over)
    seeds = sorted(own.keys() & other.keys() if claim.over else own)
    values = [own[s] - other.get(s, 0.0) for s in seeds]
    ours, interval = mean_interval(np.array(values)) if values else (None, None)
    why = claim.why
    if not why and interval is None:
        arms = " and ".join(repr(name) for name in (claim.arm, claim.over) if name)
        why = f"there are not two seeds of {arms}"
    return {
        "claim": claim.claim,
        "paper": claim.paper,
        "ours": ours,
        "ci95": interval,
        "n_seeds": len(seeds),
        "verdict": verdict(interval, claim.sign),
        "measure": claim.measure,
        "arms": [name for name in (claim.arm, claim.over) if name],
        "claimed": claim.sign,
        "table": claim.table,
        "why": why,
    }


# ---------------------------------------------------------------- arms


def of_arm(runs: Sequence[Run], name: str, versus: str) -> dict[str, Any]:
    """The figures of an arm: means over its seeds with their intervals.

    Args:
      runs: of all arms.
      name: the arm.
      versus: the arm that it is compared with.
    """
    own, other = by_seed(runs, name), by_seed(runs, versus)
    failed = {str(r["seed"]): r["fault"] for r in runs if r["arm"] == name and r.get("fault")}
    out: dict[str, Any] = {"arm": name, "seeds": sorted(own), "failed": failed}
    if not own:
        return out

    def over_seeds(values: Sequence[float]) -> dict[str, Any]:
        mean, interval = mean_interval(np.array(values))
        return {"mean": mean, "ci95": interval, "seeds": list(values)}

    first = next(iter(own.values()))
    out["gain"] = over_seeds([run["gain"] for run in own.values()])
    out["before"] = first["before"]
    out["parts"] = {
        part: over_seeds([run["parts"][part] for run in own.values()]) for part in first["parts"]
    }
    out["tasks"] = {
        task: {
            part: over_seeds([value(run, f"{task}: {part}") for run in own.values()])
            for part in found["after"]
        }
        | {"before": found["before"]}
        for task, found in first["tasks"].items()
    }
    for group in ("means", "spent"):
        out[group] = {
            key: float(np.mean([run[group][key] for run in own.values()])) for key in first[group]
        }
    common = sorted(own.keys() & other.keys())
    if name != versus and common:
        pairs = [(own[s], other[s]) for s in common]
        out["over"] = versus
        out["difference"] = over_seeds([a["gain"] - b["gain"] for a, b in pairs])
        if all(run["gains"] is not None for pair in pairs for run in pair):
            per_prompt = np.mean([np.subtract(a["gains"], b["gains"]) for a, b in pairs], axis=0)
            out["difference"]["ci95_prompts"] = mean_interval(per_prompt)[1]
    return out


def summed_up(kept: Mapping[str, Any]) -> dict[str, Any]:
    """evidence.json: what was kept of the runs, with the figures of the arms and the claims."""
    runs, described = kept["runs"], kept["described"]
    made = {run["arm"] for run in runs}
    arms = [of_arm(runs, n, about["versus"]) for n, about in described.items() if n in made]
    return {"claims": [judged(kept, claim) for claim in CLAIMS], "arms": arms, **kept}


# ---------------------------------------------------------------- pages

PARTS = ("SC", "VQ", "other", "MQ", "TA")  # of the worlds, as far as each has them
DIVERSITY = (
    "reward std",
    "SC std",
    "VQ std",
    "semantic share of var R",
    "between objects",
    "wanted",
    "best - anchor",
)
RULE = (
    "The rule: a claim is a difference of two arms, or of an arm and the policy that it starts"
    " from. It is taken seed by seed, and its 95 % Student-t interval is over the seeds. The claim"
    " is reproduced if the whole interval lies on the paper's side of 0; where the paper says that"
    f" there is no difference, if it lies within {NEGLIGIBLE} of 0. It is not reproduced with any"
    " other interval, be it on the other side or too wide to say. It is not testable here if the"
    " worlds do not have what it is about, or if there are not two seeds of both arms.",
    "All arms of a world spend the same passes; their settings were chosen on development seeds and"
    " on other held-out prompts, and nothing was changed after the study's seeds were seen.",
)
ARRANGED = (
    "Routed windows are contexts that the generators of the world return were trained on. LongLive"
    " and MemFlow were not trained so.",
    "The strength of the vote and the pattern of the stories decide how deterministic the generator"
    " is given its history, and with it what routing can change that noise cannot. The weak vote is"
    " the other end.",
    "The reward wants what history decides (SC). The other half of it, VQ, is what noise decides.",
    "A frame is one token, and three blocks return: windows of 5 and 7 blocks are tried in the old"
    " world, in videos of 16 blocks, since no window of 5 lies in one sentence of its 12.",
    "The wanted rule exists in the generator, under an ending of the story that no run has.",
)
SECTIONS = {
    "exploration": (
        "Exploration",
        "What makes the branches differ, each with a surrogate that suits it, and l2 as a bridge."
        " Noise with TVE in one block has an energy of exactly 0: it learns nothing by"
        " construction, and is no test of exploration.",
    ),
    "surrogate": (
        "Surrogate policy",
        "The energy that stands for a branch's probability, under routed history and, for AWM,"
        " noise.",
    ),
    "controls": ("Controls", "What the reward's direction is worth."),
    "beta": ("KL penalty", "In proportion to the searched weight, which stands for the paper's 5."),
    "reward noise": (
        "Reward noise",
        "Noise of this standard deviation in the rewards of training; held-out rewards have none.",
    ),
    "CHR": ("Routing", "The paper's Table 2, one change at a time."),
    "rivals": ("Rivals", "Methods of others, at the same passes; docs/methods.md describes them."),
    "weak vote": (
        "A weak vote",
        "The generator follows the majority of the attended frames only weakly: here noise finds"
        " other objects, too.",
    ),
    "transfer": (
        "Transfer",
        "Trained on stories alone in which the first object is outvoted; judged on all tasks.",
    ),
    "old world": (
        "The old world",
        "configs/tiny.py, a drifting shape. Its gain is no evidence for routed history: nothing in"
        " it is known to the past alone. These arms ran after all others, with the generator that"
        " ships now; with the one before it, see the end of this page.",
    ),
}
TASKS_TEXT = (
    "SC is semantic, VQ appearance; other is the share of frames that show an object which nobody"
    " showed, an unclear one, or none."
)
DIVERSITY_TEXT = (
    "No training: groups of eight branches of the reference policy, means with 95 % intervals over"
    " seeds. Between objects: the share of the variance of the pixels that lies between the objects"
    " that return. Wanted: the share of branches in which the first object returns."
)
VOTES_TEXT = "Where the first object is outvoted, over all seeds."
SETTINGS_TEXT = (
    "Chosen on development seeds, one set for a surrogate, and then not changed; docs/worlds.md has"
    " what was tried."
)
SEARCH_TEXT = (
    "Development seeds, judged on held-out prompts that the study does not have; one setting is"
    " changed at a time."
)
BEFORE_TEXT = (
    "Earlier studies, with other generators and mostly 1 to 3 seeds an arm, which the settings"
    " above began with. Their figures are not comparable with those of this page."
)
BEFORE = (
    "A window of three blocks, four prompts, a learning rate of 1e-3 and beta 0.05 lost where the"
    " first object is outvoted: -0.057 (one seed).",
    "There, with one block, 16 prompts and 60 iterations: CHR + TVE +0.149, with beta 0.15 +0.170,"
    " CHR + l2 +0.182, noise + l2 +0.208, shuffled +0.006 (3 seeds each); with 160 iterations"
    " +0.233, +0.290 (CHR + l2), +0.357 (noise + l2), -0.009 (1 or 2 seeds).",
    "Windows of three blocks gained less than of one in every comparison (+0.101, +0.028 with"
    " self-rolled replay).",
    "One routed step +0.234 (and a collapse in a longer run), four +0.216, two +0.149; 3 of 9 slots"
    " +0.124, 9 of 9 +0.184; beta 0 +0.102, 0.5 +0.085 (1 to 3 seeds).",
    "On all three tasks mixed, CHR + TVE and noise + l2 gained 0.05 to 0.06, all of it appearance.",
    "The drifting shape, 40 iterations: KVPO +0.358 [+0.355, +0.361] over 3 seeds, shuffled +0.018,"
    " -0.015, +0.014, negated -0.457 (one seed). The best shuffled run gains a twentieth of the"
    " worst KVPO seed.",
    "The drifting shape, 20 iterations: noise + TVE +0.361, CHR + TVE +0.330, no routing exactly 0;"
    " with reward noise of 0.01 CHR + TVE +0.05, noise + TVE +0.348 (1 or 2 seeds).",
    "The arms of the old world with the generator before, 5 seeds each: KVPO +0.357 [+0.353,"
    " +0.360], noise + TVE +0.356, no routing 0, shuffled -0.002; in videos of 16 blocks three"
    " perturbed blocks +0.348, five +0.289, seven +0.170; colour alone +0.087."
    " tools/pretrain_toy.py could not make that generator any more. No verdict changed with it.",
)


def search_rows(rows: Sequence[Run]) -> list[dict[str, str]]:
    """The table of a search, a point each, the means over its seeds."""
    out = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        here = [row for row in rows if row["arm"] == name]
        done = [row for row in here if "gain" in row]
        row = {"settings": name, "seeds": f"{len(done)} of {len(here)}"}
        if done:
            row["gain"] = f"{np.mean([r['gain'] for r in done]):+.4f}"
            for task in done[0]["tasks"]:
                for part in ("SC", "VQ", "other"):
                    gained = [value(r, f"{task}: {part}") for r in done]
                    row[f"{task}: {part}"] = f"{np.mean(gained):+.3f}"
            row["iterations"] = f"{np.mean([r['spent']['iterations'] for r in done]):.0f}"
        out.append(row)
    return even(out)


def write(found: Mapping[str, Any], output: Path) -> None:
    """Writes evidence.json, .md, .html and .png into a folder."""
    write_json(found, output / "evidence.json")
    parts = story(found)
    drawn = picture(found)
    with replacing(output / PICTURE) as temporary:
        temporary.write_bytes(drawn)
    with replacing(output / "evidence.md") as temporary:
        temporary.write_text(in_markdown(found, parts), encoding="utf-8")
    shown = [{**part._asdict(), "table": in_table(part.table)} for part in parts]
    for part in shown:
        part["picture"] = media.uri("image/png", drawn) if part["picture"] else ""
    told = facts(found).replace("`", "")
    html = page.template("evidence.html.j2").render(title=TITLE, facts=told, parts=shown)
    page.save(html, output / "evidence.html")


TITLE, PICTURE = "Evidence", "evidence.png"


class Section(NamedTuple):
    """A section of the pages.

    Attributes:
      title: of it.
      text: paragraphs.
      points: a list below them.
      table: rows with the same columns.
      picture: the file of a picture, or "".
      alt: what the picture shows.
      claims: `drawn_claims`, which the HTML page shows in the place of the table.
    """

    title: str
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    table: Sequence[Mapping[str, str]] = ()
    picture: str = ""
    alt: str = ""
    claims: Sequence[Mapping[str, Any]] = ()


def facts(found: Mapping[str, Any]) -> str:
    """How it was made, in a line."""
    seeds = ", ".join(map(str, found["seeds"]))
    finished = [run for run in found["runs"] if not run.get("fault")]
    hours = sum(run["spent"]["seconds"] for run in finished) / 3600
    return (
        f"Written by `{found['command']}` with {found['made_with']}: {len(finished)} runs of seeds"
        f" {seeds}, {hours:.1f} hours of training in all, each of {_budgets(found['budget'])}."
    )


def _budgets(budget: Any) -> str:
    """The passes of a run in words."""
    if not isinstance(budget, Mapping):
        return f"{budget:,} passes"
    return " or ".join(f"{passes:,} passes ({world})" for world, passes in budget.items())


def story(found: Mapping[str, Any]) -> list[Section]:
    """The sections of the pages."""
    counts = [sum(c["verdict"] == v for c in found["claims"]) for v in VERDICTS]
    sections = [
        Section(
            "Claims",
            (
                f"{counts[0]} reproduced, {counts[1]} not reproduced, {counts[2]} not testable"
                " here. A verdict is of these worlds and this compute, and not of LongLive or"
                " MemFlow.",
                *RULE,
            ),
            table=[claim_row(claim) for claim in found["claims"]],
            claims=drawn_claims(found["claims"]),
        ),
        Section("What is arranged", points=ARRANGED),
        Section(
            "All arms",
            ("Gains of the held-out reward over the policy that training starts from.",),
            picture=PICTURE,
            alt="the gain of every arm, its seeds and its 95 % interval",
        ),
    ]
    for name, (title, text) in SECTIONS.items():
        about = found["described"]
        arms = [a for a in found["arms"] if about[a["arm"]]["section"] == name]
        if arms:
            sections.append(Section(title, (text,), table=rows_of(arms)))
    if "vividness" in found:
        sections.append(Section("The oracle of vividness", (vividness_text(found),)))
    tasks = [row for arm in found["arms"] for row in task_rows(arm)]
    if tasks:
        sections.append(Section("Task by task", (TASKS_TEXT,), table=tasks))
    for world, seeds in found.get("diversity", {}).items():
        sections += diversity_sections(world, seeds)
    settings = [
        {"surrogate": name, "settings": _fields(fields) or "those of the configuration"}
        for name, fields in found["settings"].items()
    ]
    sections.append(Section("Settings", (SETTINGS_TEXT,), table=settings))
    if found.get("search"):
        rows = search_rows(found["search"])
        sections.append(Section("The search for them", (SEARCH_TEXT,), table=rows))
    sections.append(Section("What was tried before", (BEFORE_TEXT,), BEFORE))
    return sections


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def signed(value: float | None) -> str:
    """A difference for a table."""
    return "-" if value is None else f"{value:+.3f}"


def between(interval: Sequence[float] | None) -> str:
    """An interval for a table."""
    return "-" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def claim_row(claim: Mapping[str, Any]) -> dict[str, str]:
    """The row of a claim."""
    tested = claim["ci95"] is not None
    arms = ",".join(claim["arms"])
    again = f'--arms="{arms}"' if claim["table"] == "runs" else "--groups=16"
    return {
        "claim": claim["claim"],
        "paper": claim["paper"],
        "measure": claim["measure"] if claim["arms"] else "",
        "ours": signed(claim["ours"]),
        "95 %": between(claim["ci95"]),
        "seeds": str(claim["n_seeds"]),
        "verdict": claim["verdict"],
        "by": f"`python tools/study.py {again}`" if tested else claim["why"],
    }


def drawn_claims(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the HTML page shows of the claims: their rows, with where a bar from `left` to `left` +
    `width`, in percent of one axis for all with 0 in its middle, is the interval, and a mark at
    `mean` the difference.
    """
    most = max((abs(x) for c in claims for x in c["ci95"] or ()), default=1.0)
    out = []
    for claim in claims:
        row: dict[str, Any] = claim_row(claim)
        row["by"] = row["by"].replace("`", "")
        if claim["ci95"] is not None:
            left, right, mean = (
                round(50 + 50 * x / most, 2) for x in (*claim["ci95"], claim["ours"])
            )
            row |= {"left": left, "width": round(right - left, 2), "mean": mean}
        out.append(row)
    return out


def rows_of(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of arms."""
    rows = []
    for arm in arms:
        failed = "".join(f"; seed {s} failed: {why}" for s, why in arm["failed"].items())
        row = {"arm": arm["arm"], "seeds": f"{len(arm['seeds'])}{failed}"}
        if arm["seeds"]:
            over, parts = arm.get("difference", {}), arm["parts"]
            row |= {
                "gain": signed(arm["gain"]["mean"]),
                "95 %": between(arm["gain"]["ci95"]),
                "compared with": arm.get("over", "-"),
                "difference": signed(over.get("mean")),
                "95 % over seeds": between(over.get("ci95")),
                "95 % over prompts": between(over.get("ci95_prompts")),
                **{name: signed(parts[name]["mean"]) for name in PARTS if name in parts},
                "reward std in group": f"{arm['means']['reward_std_in_group']:.4f}",
                "iterations": f"{arm['spent']['iterations']:.0f}",
                "seconds": f"{arm['spent']['seconds']:.0f}",
            }
        rows.append(row)
    return even(rows)


def even(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that all have the columns of each."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in columns} for row in rows]


def task_rows(arm: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of an arm, a task each; none where the world has no tasks."""
    return [
        {
            "arm": arm["arm"],
            "task": task,
            "SC before": f"{parts['before']['SC']:.3f}",
            **{
                f"gain in {name}": f"{signed(parts[name]['mean'])} {between(parts[name]['ci95'])}"
                for name in ("SC", "VQ", "other")
            },
        }
        for task, parts in arm.get("tasks", {}).items()
    ]


def diversity_sections(world: str, seeds: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What branches differ in, before any training."""
    strength = {"return": "a strong vote", "weak": "a weak vote"}[world]
    rows = []
    for place, first in enumerate(seeds[0]["diversity"]):
        here = [seed["diversity"][place] for seed in seeds]
        row = {"task": first["task"], "explored": first["explore"]}
        for name in DIVERSITY:
            mean, interval = mean_interval(np.array([r[name] for r in here]))
            row[name] = f"{mean:.3f} {between(interval)}".replace("+", "").removesuffix(" -")
        rows.append(row)
    votes: dict[int, list[Mapping[str, Any]]] = {}
    for seed in seeds:
        for row in seed["votes"]:
            votes.setdefault(row["frames"], []).append(row)
    vote_rows = []
    for frames, found in sorted(votes.items()):
        count = sum(r["n"] for r in found)
        share = sum(r["n"] * r["share"] for r in found) / count
        vote_rows.append(
            {
                "routed frames that show the first object": str(frames),
                "it returns": f"{share:.0%}",
                "the rule of the data": f"{found[0]['rule']:.1%}",
                "branches": str(count),
            }
        )
    return [
        Section(f"Branches of a group, {strength}", (DIVERSITY_TEXT,), table=rows),
        Section(f"Routed frames decide, {strength}", (VOTES_TEXT,), table=vote_rows),
    ]


def vividness_text(found: Mapping[str, Any]) -> str:
    """What colour alone would bring in the old world."""
    before, vivid = (found["vividness"][name]["reward"] for name in ("before", "vivid"))
    text = (
        "The old world's held-out videos of the reference policy, the colour of every frame"
        f" scaled to that of its best clean object, score {vivid:.3f} instead of {before:.3f}"
        f" ({vivid - before:+.3f})"
    )
    arm = of_arm(found["runs"], "KVPO (old world)", "")
    if arm["seeds"] and arm["gain"]["mean"] > 0:
        text += f", {(vivid - before) / arm['gain']['mean']:.0%} of what KVPO gains"
    return f"{text}."


def in_table(rows: Sequence[Mapping[str, str]]) -> page.Table | None:
    """Rows as the page's templates take them."""
    cells = [[cell.replace("`", "") for cell in row.values()] for row in rows]
    return page.Table(list(rows[0]), cells) if rows else None


def in_markdown(found: Mapping[str, Any], parts: Sequence[Section]) -> str:
    """evidence.md."""
    blocks = [f"# {TITLE}", facts(found)]
    for part in parts:
        blocks += [f"## {part.title}", *part.text]
        blocks += ["\n".join(f"* {line}" for line in part.points)] if part.points else []
        blocks += [f"![{part.alt}]({part.picture})"] if part.picture else []
        blocks += [trials.markdown(part.table)] if part.table else []
    return "\n\n".join(blocks) + "\n"


def picture(found: Mapping[str, Any]) -> bytes:
    """A PNG: the gain of every arm, its mean and interval over the dots of its seeds.

    Section by section, each below its title and with the colour of its world.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes most of a second
    from matplotlib.figure import Figure

    lines: list[tuple[str, Mapping[str, Any] | None, str]] = []  # name, arm, section
    for section, (title, _) in SECTIONS.items():
        about = found["described"]
        arms = [a for a in found["arms"] if about[a["arm"]]["section"] == section and a["seeds"]]
        if arms:
            lines += [(title, None, section), *((arm["arm"], arm, section) for arm in arms)]
    figure = Figure((8, 1 + 0.22 * len(lines)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, arm, section) in enumerate(lines):
        if arm is not None:
            colour = {"weak vote": "C1", "old world": "C7"}.get(section, "C0")
            gain = arm["gain"]
            trials.draw_gain(axes, place, gain["seeds"], gain["mean"], gain["ci95"], colour)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="gain of the held-out reward, with 95 % intervals over seeds")
    trials.name_gains(axes, [name for name, *_ in lines])
    for label, (_, arm, _) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if arm is None else "normal")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
