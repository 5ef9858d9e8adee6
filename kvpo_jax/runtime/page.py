"""The story of a run, or of several, as one HTML page that needs no other file and no network.

Every section is a function of the records of run directories; `assets/report.html.j2` says how it
looks. What a run has not written down is said and left out.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from kvpo_jax.algorithm import routing
from kvpo_jax.data import return_world
from kvpo_jax.errors import UsageError, shortened
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import curves, doctor, films, media, progress, statistics
from kvpo_jax.runtime.atomic import replacing
from kvpo_jax.runtime.curves import Line
from kvpo_jax.runtime.records import Records, read_run

LARGEST = 20_000_000  # bytes of a page
ROOM = 14_000_000  # of these for videos, which take a third more as text
PROMPTS = 6  # held-out ones that play, as in before_after.png
ITERATIONS = 6  # whose branches are shown of a run: the first one's and the newest
POINTS = 1500  # of the scatter
POLICIES = ("reference", "online", "ema")
BY_TASK = ("reward", "SC", "VQ", "wanted", "shown", "other")  # columns of the table of tasks
ANCHOR = "anchor"
# What a branch has besides scores, and how it is written.
NUMBERS = (("advantage", "+.2f"), ("energy", ".3g"), ("probability", ".3f"))

Part = dict[str, Any]  # what the template shows of something


class Table(NamedTuple):
    """A table of the page.

    Attributes:
      columns: their names; the first one names the rows.
      rows: their cells.
      runs: which run a row is of, if there are several; "" for the same one as above.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    runs: Sequence[str] | None = None


class Story(NamedTuple):
    """A run to tell of.

    Attributes:
      label: what it is called, different for each run of a page.
      workdir: its directory.
      records: what it has written down.
      videos: group -> name -> file.
      contents: the groups that the page has room for, group -> name -> mp4.
    """

    label: str
    workdir: Path
    records: Records
    videos: Mapping[Any, Mapping[str, Path]]
    contents: Mapping[Any, Mapping[str, bytes]]

    @property
    def done(self) -> int:
        """How many iterations have been made."""
        return len(self.records.metrics)


def write(workdirs: Sequence[Path], output: Path) -> None:
    """Writes the page of these runs.

    Args:
      workdirs: their directories.
      output: the file; its folder is made.

    Raises:
      UsageError: there is no run in a directory, or a file of it is damaged; the message names it.
      OSError: a file cannot be read or written.
    """
    labels = labelled(workdirs)
    stories = [
        told(label, workdir, ROOM // len(workdirs))
        for label, workdir in zip(labels, workdirs, strict=True)
    ]
    save(render(stories), output)


def written(workdir: Path) -> str:
    """Writes the page of a run that has just ended, and says where it is, or why there is none.

    Whatever goes wrong with its picture, the run itself is not lost.
    """
    output = workdir / "report" / "index.html"
    try:
        write([workdir], output)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        again = f"python -m kvpo_jax.report {shlex.quote(str(workdir))}"
        return f"{output} could not be written ({reason}); {again} tries again"
    return f"{output} shows it"


def write_branches(title: str, groups: Sequence[Part], output: Path) -> None:
    """Writes a page of groups of branches, each made by `gallery`; arguments as those of `write`.

    Raises:
      OSError: the file cannot be written.
    """
    save(template("branches.html.j2").render(title=title, parts=groups), output)


def save(text: str, output: Path) -> None:
    """Writes a page, whole or not at all."""
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def labelled(workdirs: Sequence[Path]) -> list[str]:
    """What the runs are called: the ends of their paths, as long as it takes to tell them apart."""
    paths = [path.resolve() for path in workdirs]
    if len(set(paths)) < len(paths):
        raise UsageError(f"the same run twice: {shortened(workdirs)}")
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def told(label: str, workdir: Path, room: int) -> Story:
    """Reads a run: its records, and as many of its videos as `room` bytes hold."""
    records = read_run(workdir)
    videos = grouped(films.films_in(workdir))
    fitting = media.fitting({key: list(videos[key].values()) for key in by_worth(videos)}, room)
    contents = {
        key: dict(zip(videos[key], content, strict=True)) for key, content in fitting.items()
    }
    return Story(label, workdir, records, videos, contents)


def grouped(found: Mapping[films.Film, Path]) -> dict[tuple[str, int], dict[str, Path]]:
    """The videos that a page may show, group -> name -> file.

    ("iteration", 20) are the anchor and branches of its first prompt; ("heldout", 3) are a held-out
    prompt of the reference, and of the other policies in the newest evaluation.
    """
    newest = max((film.step for film in found if film.kind == "heldout"), default=0)
    out: dict[tuple[str, int], dict[str, Path]] = {}
    for film, path in found.items():
        if film.kind == "heldout" and (film.name == "reference" or film.step == newest):
            out.setdefault((film.kind, film.prompt), {})[film.name] = path
        elif film.kind == "iteration" and film.prompt == 0:
            out.setdefault((film.kind, film.step), {})[film.name] = path
    return out


def by_worth(videos: Mapping[Any, Any]) -> list[Any]:
    """The groups of videos, those first that a page should rather have.

    Held-out prompts, the newest branches, the first ones, and then the newer ones.
    """
    iterations = sorted(key for kind, key in videos if kind == "iteration")
    worth = list(dict.fromkeys([*iterations[-1:], *iterations[:1], *iterations[::-1]]))
    prompts = sorted(key for kind, key in videos if kind == "heldout")
    return [("heldout", i) for i in prompts] + [("iteration", i) for i in worth[:ITERATIONS]]


def render(stories: Sequence[Story]) -> str:
    """The HTML of the page."""
    only = stories[0] if len(stories) == 1 else None
    runs = [
        {
            "label": story.label,
            "colour": colour,
            "facts": facts(story),
            "playing": before_after(story, PROMPTS if only else PROMPTS // 2),
            "health": health(story),
            "recovered": recovered(story),
            "galleries": galleries(story, ITERATIONS if only else 1),
            "commands": commands(story),
            "missing": missing(story),
        }
        for colour, story in enumerate(stories)
    ]
    return template("report.html.j2").render(
        title=only.label if only else f"{len(stories)} runs",
        runs=runs,
        many=not only,
        headline=headline(only) if only else [],
        result=heldout_table(stories),
        tasks=task_table(only) if only else None,
        together=[] if only else side_by_side(stories, PROMPTS),
        prompts=prompt_table(only) if only else None,
        curves=[part for part in (of(stories) for of in CURVES) if part["figures"]],
        scatter=scatter(stories),
        configuration=configuration(stories),
        versions=versions(stories),
    )


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of the package."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(config_lib.PACKAGE / "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def number(value: float | None, form: str = ".4f") -> str:
    """A number for the page; a dash where there is none, or none that is finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}"


# ---------------------------------------------------------------- the head


def facts(story: Story) -> list[str]:
    """A few words on a run: backbone, iterations, prompts, branches, time."""
    fields, summary = config_lib.flat(story.records.config), story.records.summary
    planned = fields.get("train.iterations")
    out = [fields["backbone"]] if "backbone" in fields else []
    out.append(f"{story.done}{f' of {planned}' if planned else ''} iterations made")
    for name, words in (
        ("train.prompts_per_iteration", "prompts each"),
        ("rollout.branches", "branches"),
        ("seed", "seed"),
    ):
        if name in fields:
            out.append(f"seed {fields[name]}" if name == "seed" else f"{fields[name]} {words}")
    if "seconds" in summary:
        out.append(progress.duration(summary["seconds"]["total"]))
    return out


def headline(story: Story) -> list[Part]:
    """The numbers to see first: name, value, what it is."""
    summary, tiles = story.records.summary, []
    if "heldout" in summary:
        heldout = summary["heldout"]
        interval = statistics.show_interval(heldout["gain_ci95"])
        tiles = [
            ("held-out reward", number(heldout["online"]), f"{heldout['reference']:.4f} before"),
            ("gain", number(heldout["gain"], "+.4f"), f"95 % {interval}"),
            (
                "win rate",
                number(heldout["win_rate"], ".0%"),
                f"of {heldout['num_prompts']} prompts",
            ),
        ]
    found = len(health(story))
    tiles.append(("health", f"{found or 'no'} finding{'s' * (found != 1)}", "of the doctor"))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def missing(story: Story) -> list[str]:
    """The records that a run directory lacks, as one of an older version does."""
    names = ("config.json", "metrics.jsonl", "branches.jsonl", "heldout.jsonl", "summary.json")
    out = [name for name in names if not (story.workdir / name).exists()]
    return out + ([] if story.videos else ["videos/"])


# ---------------------------------------------------------------- the result


def heldout_rewards(evaluation: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """policy -> column -> float[n], of a line of heldout.jsonl; what is not finite is NaN."""
    return {
        policy: {
            name: np.asarray(values, float)
            for name, values in {
                "reward": evaluation["reward"][policy],
                **evaluation["components"][policy],
            }.items()
        }
        for policy in POLICIES
    }


def heldout_table(stories: Sequence[Story]) -> Table | None:
    """The table that the runs ended with, of all of them; None if none has an evaluation."""
    tables = []
    for story in stories:
        if story.records.heldout:
            rewards = heldout_rewards(story.records.heldout[-1])
            tables.append((story.label, *statistics.heldout_table(rewards)))
        elif "heldout" in story.records.summary:
            tables.append((story.label, *statistics.summary_table(story.records.summary)))
    if not tables:
        return None
    # Runs may have different components.
    columns = [*dict.fromkeys(name for _, names, _ in tables for name in names)]
    rows = [
        (label if row is table[0] else "", dict(zip(names, row, strict=True)))
        for label, names, table in tables
        for row in table
    ]
    cells = [[row.get(name, "") for name in columns] for _, row in rows]
    return Table(columns, cells, [label for label, _ in rows] if len(stories) > 1 else None)


def task_table(story: Story) -> Table | None:
    """The held-out table of a run in the world "return", task by task; None of other runs."""
    backbone = config_lib.flat(story.records.config).get("backbone")
    if backbone not in return_world.EXPONENTS or not story.records.heldout:
        return None
    evaluation = story.records.heldout[-1]
    columns: list[str] = []
    rows: list[list[str]] = []
    rewards = {
        policy: {name: values[name] for name in BY_TASK if name in values}
        for policy, values in heldout_rewards(evaluation).items()
    }
    for task, of_task in return_world.by_task(evaluation["prompt"], rewards).items():
        columns, table = statistics.heldout_table(of_task)
        stories = len(of_task[POLICIES[0]]["reward"])
        rows += [[task, str(stories), *row] for row in table]
    return Table(["task", "stories", *columns], rows)


def prompt_table(story: Story) -> Table | None:
    """The held-out prompts of the last evaluation, the one that gains least first."""
    if not story.records.heldout:
        return None
    evaluation = story.records.heldout[-1]
    rewards = [evaluation["reward"][policy] for policy in POLICIES]
    rows = [
        (prompt, *values)
        for prompt, *values in zip(evaluation["prompt"], *rewards, strict=True)
        if None not in values
    ]
    rows.sort(key=lambda row: row[2] - row[1])
    cells = [
        [" → ".join(prompt), *map(number, values), number(values[1] - values[0], "+.4f")]
        for prompt, *values in rows
    ]
    return Table(["prompt", *POLICIES, "gain"], cells)


def before_after(story: Story, most: int) -> Part:
    """The first held-out prompts, side by side, or the picture of them, or neither."""
    pairs = [
        {
            "prompt": _heldout_prompt(story, index),
            "videos": [
                _playing(story, index, policy, policy) for policy in POLICIES if policy in content
            ],
        }
        for (kind, index), content in story.contents.items()
        if kind == "heldout"
    ][:most]
    left = [i for kind, i in story.videos if kind == "heldout" and (kind, i) not in story.contents]
    picture = story.workdir / "report" / "before_after.png"
    uri = None
    if not pairs and picture.exists():
        uri = media.uri("image/png", picture.read_bytes())
    return {"pairs": pairs, "left_out": shortened(left, 12), "picture": uri}


def side_by_side(stories: Sequence[Story], most: int) -> list[Part]:
    """The first held-out prompts, before and after every run, if all runs have the same ones."""
    prompts = [story.records.heldout[-1]["prompt"] for story in stories if story.records.heldout]
    if len(prompts) < len(stories) or any(other != prompts[0] for other in prompts):
        return []
    shown = [i for kind, i in stories[0].contents if kind == "heldout"]
    both = {"reference", "online"}
    return [
        {
            "prompt": _heldout_prompt(stories[0], i),
            "videos": [
                _playing(story, i, policy, name)
                for story, policy, name in [
                    (stories[0], "reference", "before"),
                    *((story, "online", story.label) for story in stories),
                ]
            ],
        }
        for i in shown
        if all(both <= story.contents.get(("heldout", i), {}).keys() for story in stories)
    ][:most]


def _playing(story: Story, index: int, policy: str, name: str) -> Part:
    """A held-out video, what it is called, its reward, and its gain over the reference."""
    uri = media.uri("video/mp4", story.contents["heldout", index][policy])
    return {"name": name, "uri": uri} | _heldout_reward(story, index, policy)


def _heldout_prompt(story: Story, index: int) -> list[str]:
    """The sentences of a held-out prompt, if they are known."""
    known = story.records.heldout[-1]["prompt"] if story.records.heldout else []
    return known[index] if index < len(known) else []


def _heldout_reward(story: Story, index: int, policy: str) -> Part:
    """The reward of a held-out video and its gain over the reference, as far as they are known."""
    rewards = story.records.heldout[-1]["reward"] if story.records.heldout else {}
    if index >= len(rewards.get(policy, ())):
        return {"reward": "", "gain": None}
    value, before = rewards[policy][index], rewards["reference"][index]
    known = policy != "reference" and value is not None and before is not None
    return {"reward": number(value, ".3f"), "gain": value - before if known else None}


# ---------------------------------------------------------------- health


def health(story: Story) -> list[doctor.Finding]:
    """What the doctor says of the run now."""
    return doctor.examine(*_examined(story))


def recovered(story: Story) -> list[str]:
    """The troubles that the run was in and is not any more."""
    spans = doctor.over(*_examined(story))
    return [f"{name}, in {doctor.spans_shown(when)}" for name, when in spans.items()]


def _examined(story: Story) -> tuple[Any, ...]:
    """What the doctor examines."""
    records = story.records
    return records.config, records.metrics, records.branches, records.heldout


# ---------------------------------------------------------------- curves

XY = tuple[Sequence[float], Sequence[float]]


class Series(NamedTuple):
    """A line that every run has in a figure.

    Attributes:
      label: for the legend.
      of: its points, from the records of a run.
      style: as in curves.Line.
      alone: whether only the page of a single run has it.
    """

    label: str
    of: Callable[[Records], XY]
    style: str = "solid"
    alone: bool = False


def metric(name: str) -> Callable[[Records], XY]:
    """A metric over iterations; the policy of iteration i has made i updates."""

    def of(records: Records) -> XY:
        return (
            [row["iteration"] for row in records.metrics],
            [_finite(row.get(name)) for row in records.metrics],
        )

    return of


def heldout(policy: str, component: str = "") -> Callable[[Records], XY]:
    """The mean held-out reward of a policy, or one of its components, over the updates made.

    It begins with the reference, which has had none.
    """

    def of(records: Records) -> XY:
        points = {}
        for evaluation in records.heldout:
            columns = heldout_rewards(evaluation)
            for name, done in (("reference", 0), (policy, evaluation["iteration"])):
                points[done] = float(np.mean(columns[name].get(component or "reward", np.nan)))
        if not records.heldout and not component:  # a run of an older version
            for row in records.metrics:
                if f"heldout_{policy}" in row:
                    points[0] = _finite(row["heldout_reference"])
                    points[row["iteration"] + 1] = _finite(row[f"heldout_{policy}"])
        return list(points), list(points.values())

    return of


def best_gain(records: Records) -> XY:
    """What the best branch has over the anchor, on average over the prompts of an iteration."""
    return _means(
        records.branches,
        lambda record: _finite(_gap(max(record["reward"], key=_or_least), record["reward_anchor"])),
    )


def anchors(component: str) -> Callable[[Records], XY]:
    """The mean of a component over the anchors of an iteration."""

    def of(record: Mapping[str, Any]) -> float:
        return _finite(record["components"].get(component, {}).get("anchor"))

    return lambda records: _means(records.branches, of)


def _means(branches: Sequence[Mapping[str, Any]], of: Callable[[Any], float]) -> XY:
    """A number of each prompt, averaged over those of an iteration."""
    values: dict[int, list[float]] = {}
    for record in branches:
        values.setdefault(record["iteration"], []).append(of(record))
    return list(values), [float(np.mean(x)) for x in values.values()]


def _finite(value: float | None) -> float:
    return math.nan if value is None else value


def figure(
    stories: Sequence[Story], title: str, series: Sequence[Series], note: str = ""
) -> Part | None:
    """A figure of these lines; None if no run has any of them.

    Of one run every line has its colour, of several every run has.
    """
    many = len(stories) > 1
    series = [one for one in series if not (many and one.alone)]
    lines = [
        Line(f"{story.label}, {one.label}" if many else one.label, *xy, colour, one.style)
        for run, story in enumerate(stories)
        for i, one in enumerate(series)
        for colour, xy in [(run if many else i, one.of(story.records))]
        if np.any(np.isfinite(xy[1]))
    ]
    if not lines:
        return None
    svg = curves.lines(f"{title} over iterations. {_in_words(lines)}", lines)
    legend = legend_of(lines)
    if many:  # the runs have the colours
        drawn = {line.style for line in lines}
        legend = [
            {"label": one.label, "colour": "muted", "style": one.style}
            for one in series
            if one.style in drawn
        ]
    return {"title": title, "note": note, "legend": legend if len(legend) > 1 else [], "svg": svg}


def legend_of(lines: Sequence[Line]) -> list[Part]:
    """An entry for each line."""
    return [{"label": x.label, "colour": x.colour, "style": x.style} for x in lines]


def _in_words(lines: Sequence[Line]) -> str:
    """What lines show, for those who do not see them: where each begins and ends."""
    ends = [(line.label, np.asarray(line.y)[np.isfinite(line.y)]) for line in lines]
    return "; ".join(f"{label}: from {y[0]:.4g} to {y[-1]:.4g}" for label, y in ends)


def section(title: str, figures: Sequence[Part | None], beside: Part | None = None) -> Part:
    """Figures under a title, and a table beside them."""
    return {"title": title, "figures": [one for one in figures if one], "beside": beside}


def reward_curves(stories: Sequence[Story]) -> Part:
    """Reward of branches, anchors and held-out prompts; then each component."""
    reward = figure(
        stories,
        "Reward",
        [
            Series("branches", metric("reward")),
            Series("anchor", metric("reward_anchor"), "dashed", alone=True),
            Series("held-out", heldout("online"), "points"),
            Series("EMA", heldout("ema"), "points", alone=True),
        ],
    )
    scored = dict.fromkeys(
        name.removeprefix("reward_")
        for story in stories
        for name in next(iter(story.records.metrics), {})
        if name.startswith("reward_") and name not in ("reward_anchor", "reward_std_in_group")
    )
    evaluations = [e for story in stories for e in story.records.heldout[-1:]]
    watched = dict.fromkeys(
        name for e in evaluations for name in e["components"]["online"] if name not in scored
    )
    components = [
        figure(
            stories,
            name,
            [
                Series("branches", metric(f"reward_{name}")),
                Series("anchor", anchors(name), "dashed", alone=True),
                Series("held-out", heldout("online", name), "points"),
                Series("EMA", heldout("ema", name), "points", alone=True),
            ],
            "" if name in scored else "watched, not optimised",
        )
        for name in {**scored, **watched}
    ]
    return section("Reward and its components", [reward, *components])


def policy_curves(stories: Sequence[Story]) -> Part:
    """KL, entropy, spread, gate, gradient norm."""
    figures = [figure(stories, title, [Series(title, of)], note) for title, of, note in POLICY]
    return section("Policy and update", figures)


# title, what is drawn, and what to know about it
POLICY: tuple[tuple[str, Callable[[Records], XY], str], ...] = (
    ("KL", metric("kl"), "from the reference policy"),
    ("Entropy", metric("entropy"), "of the policy over a group, in nats"),
    ("Spread", metric("reward_std_in_group"), "standard deviation of the rewards of a group"),
    ("Best branch", best_gain, "its reward less the anchor's"),
    ("Gate", metric("gate_open"), "share of prompts with a branch above the anchor"),
    ("Gradient norm", metric("grad_norm"), "before clipping"),
    ("Gradient agreement", metric("gradient_agreement"), "of micro-batches; 1 if all are equal"),
    ("Exposure", metric("exposure"), "of the branches, mean over scored pixels"),
    ("Saturation", metric("saturation"), "of the branches, mean over scored pixels"),
    ("Clipped pixels", metric("clipped"), "of the branches, share of scored pixels"),
)


STAGES = ("rollout", "reward", "update", "evaluation", "compile")


def stages(records: Records) -> dict[str, list[float]]:
    """stage -> its seconds in every iteration."""
    found = {
        name.removeprefix("seconds_")
        for row in records.metrics
        for name in row
        if name.startswith("seconds_") and name != "seconds_total"  # which is since the beginning
    }
    ordered = [name for name in STAGES if name in found] + sorted(found - {*STAGES})
    return {
        name: [row.get(f"seconds_{name}") or 0.0 for row in records.metrics] for name in ordered
    }


def seconds_curves(stories: Sequence[Story]) -> Part:
    """Seconds of the iterations: of one run by stage, of several in all."""
    kept = [(story, stages(story.records)) for story in stories]
    kept = [(story, of) for story, of in kept if of]
    totals = [np.sum(list(of.values()), axis=0) for _, of in kept]
    if not totals:
        return section("Time", [])
    # The first iteration compiles, and would flatten all others.
    top = 2.5 * float(np.median(np.concatenate(totals))) or 1.0
    longest = max(float(total.max()) for total in totals)
    x = [[row["iteration"] for row in story.records.metrics] for story, _ in kept]
    title = "Seconds of an iteration"
    if len(stories) == 1:
        parts = [Line(name, x[0], y, i) for i, (name, y) in enumerate(kept[0][1].items())]
        svg = curves.stack(f"{title}, by stage. {_in_words(parts)}", x[0], parts, top)
        legend = [entry | {"style": "area"} for entry in legend_of(parts)]
    else:
        colours = [stories.index(story) for story, _ in kept]
        parts = [
            Line(story.label, i, total, c)
            for (story, _), i, total, c in zip(kept, x, totals, colours, strict=True)
        ]
        svg, legend = curves.lines(f"{title}. {_in_words(parts)}", parts, top), []
    note = f"cut off; the longest took {longest:.0f} s" if longest > top else ""
    drawn = {"title": title, "note": note, "legend": legend, "svg": svg}
    return section("Time", [drawn], seconds_table(stories))


CURVES = (reward_curves, policy_curves, seconds_curves)


def seconds_table(stories: Sequence[Story]) -> Part | None:
    """Seconds by stage of the iterations that are recorded, a column per run."""
    sums = [
        {name: float(np.sum(seconds)) for name, seconds in stages(story.records).items()}
        for story in stories
    ]
    names = dict.fromkeys(name for of in sums for name in of)
    if not names:
        return None
    totals = [sum(of.values()) for of in sums]
    rows = [[name, *(number(of.get(name), ".1f") for of in sums)] for name in names]
    rows.append(["in all", *(number(total, ".1f") for total in totals)])
    many = len(stories) > 1
    columns = ["stage", *([story.label for story in stories] if many else ["seconds"])]
    if not many:
        columns.append("share")
        for row, value in zip(rows, [*sums[0].values(), totals[0]], strict=True):
            row.append(number(value / (totals[0] or 1), ".0%"))
    caption = "Seconds of the recorded iterations, by stage"
    return {"content": Table(columns, rows), "caption": caption}


# ---------------------------------------------------------------- branches


def galleries(story: Story, most: int) -> Part:
    """The pictured iterations, the newest first, and which ones there is no room for."""
    records = story.records
    pictured = sorted(key for kind, key in story.videos if kind == "iteration")
    shown = sorted(key for kind, key in story.contents if kind == "iteration")
    if not shown and records.branches:  # without videos there are maps and numbers
        numbers = pictured or [record["iteration"] for record in records.branches]
        shown = sorted({numbers[0], numbers[-1]})
    first = {record["iteration"]: record for record in reversed(records.branches)}
    shown = [i for i in shown[::-1] if i in first][:most]
    parts = []
    for iteration in shown:
        key = ("iteration", iteration)
        part = gallery(
            records.config, first[iteration], story.videos.get(key, {}), story.contents.get(key, {})
        )
        parts.append({"iteration": iteration, **part})
    left = [i for i in pictured if ("iteration", i) not in story.contents]
    return {"parts": parts, "left_out": shortened(left, 12)}


def gallery(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    paths: Mapping[str, Path],
    contents: Mapping[str, bytes],
) -> Part:
    """A group of branches, ordered by reward: its videos, differences, scores and routed frames.

    Args:
      config: of the run, for the map; a field that is not there leaves something out.
      record: as in branches.jsonl. It may lack what has to do with rewards; the branches are then
        in the order of their numbers.
      paths: ANCHOR, "branch_0", ... -> its video, to compare the videos.
      contents: the same -> the mp4 that the page holds.
    """
    components = record.get("components", {})
    scales = {
        name: max((abs(gap) for gap in _gaps(both) if gap is not None), default=0.0)
        for name, both in components.items()
    }
    rewards = record.get("reward") or [None] * len(record["routed"])
    _, *branches = films.branch_names(len(rewards))
    scored = dict(zip(branches, rewards, strict=True))
    if ANCHOR in contents or "reward_anchor" in record:
        scored = {ANCHOR: record.get("reward_anchor"), **scored}
    order = sorted(scored, key=lambda name: -_or_least(scored[name]))
    strips, levels, most = _differences(paths)
    cards = [
        {
            "name": name.replace("_", " "),
            "anchor": name == ANCHOR,
            "video": media.uri("video/mp4", contents[name]) if name in contents else None,
            "difference": strips.get(name),
            "level": levels.get(name),
            "reward": number(scored[name]),
            "gain": None if name == ANCHOR else _gap(scored[name], record.get("reward_anchor")),
            "bars": [_bar(name, component, components, scales) for component in components],
            "numbers": _numbers(record, name),
        }
        for name in order
    ]
    return {
        "prompt": record["prompt"],
        "pivot": record["pivot"],
        "fork_frame": record["fork_frame"],
        "window": record["window"],
        "gate_open": record.get("gate_open"),
        "cards": cards,
        "most": number(most, ".1f"),
        "differs": bool(strips),
        "map": routed_map(config, record, order),
    }


def _branch(name: str) -> int:
    """The number of a branch."""
    return int(name.removeprefix("branch_"))


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value


def _gap(value: float | None, anchor: float | None) -> float | None:
    return None if value is None or anchor is None else value - anchor


def _gaps(both: Mapping[str, Any]) -> list[float | None]:
    """What the branches have over the anchor in a component."""
    return [_gap(value, both["anchor"]) for value in both["branches"]]


def _bar(
    name: str, component: str, components: Mapping[str, Any], scales: Mapping[str, float]
) -> Part:
    """A component of a branch or the anchor: its score, and a bar of a branch's gap to the anchor.

    The bar is left of the middle where the branch is worse; `left` and `width` are per cent.
    """
    both = components[component]
    gap = None if name == ANCHOR else _gaps(both)[_branch(name)]
    width = round(50 * abs(gap or 0.0) / (scales[component] or 1.0), 1)
    return {
        "name": component,
        "value": number(both["anchor"] if name == ANCHOR else both["branches"][_branch(name)]),
        "gap": gap,
        "left": 50.0 if (gap or 0.0) >= 0 else 50.0 - width,
        "width": width,
    }


def _numbers(record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """What else is known of a branch; the anchor has none of it."""
    known = [] if name == ANCHOR else [(key, form) for key, form in NUMBERS if key in record]
    return [(key, number(record[key][_branch(name)], form)) for key, form in known]


def _differences(paths: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, str], float]:
    """branch -> picture of its difference to the anchor, its mean; the largest of all."""
    branches = [name for name in paths if name != ANCHOR]
    if ANCHOR not in paths or not branches:
        return {}, {}, 0.0
    strips, levels, most = media.difference_strips(paths[ANCHOR], [paths[g] for g in branches])
    return (
        {g: media.uri("image/png", s) for g, s in zip(branches, strips, strict=True)},
        {g: number(level, ".2f") for g, level in zip(branches, levels, strict=True)},
        most,
    )


def routed_map(
    config: Mapping[str, Any], record: Mapping[str, Any], names: Sequence[str]
) -> Part | None:
    """Which frames the first perturbed block of each branch attends to, along the video.

    None if the configuration does not tell.

    Args:
      config: of the run.
      record: of its group.
      names: of the rows, the best first: ANCHOR, "branch_0", ....
    """
    fields = config_lib.flat(config)
    try:
        window = routing.window(config["window"])
        size = fields["video.block_frames"]
        frames = fields["video.blocks"] * size
    except (KeyError, AttributeError):
        return None
    fork, (first, last) = record["fork_frame"], record["window"]

    def row(name: str) -> Part:
        if name == ANCHOR:
            kept = {f: "near" for f in range(max(0, fork - window.past), fork)}
            kept |= {f: "sink" for f in range(min(window.sink, fork))}
        else:
            drawn = record["routed"][_branch(name)]
            kept = {f: "sink" for f in range(window.kept)}
            kept |= {f: "near" for f in range(fork - window.near, fork)}
            kept |= {f: "routed" for f in drawn if f >= 0}
        return {
            "name": name.replace("_", " "),
            "cells": sorted(kept.items()),
            "best": name == names[0],
        }

    return {
        "frames": frames,
        "rows": [row(name) for name in names],
        "window": (first * size, (last + 1 - first) * size),
        "pivot": fork,
        "switches": list(fields.get("video.switch_frames", ())),
    }


# ---------------------------------------------------------------- reward against energy


def scatter(stories: Sequence[Story]) -> Part:
    """Reward against energy of all branches, as they are and within their groups."""
    many = len(stories) > 1
    raw: list[Line] = []
    within: list[Line] = []
    words = []
    for run, story in enumerate(stories):
        reward, energy, late = _reward_energy(story.records)
        if not reward.size:
            continue
        centred = [x - x.mean(axis=1, keepdims=True) for x in (energy, reward)]
        words.append({"label": story.label, "r": number(_correlation(*centred), "+.2f")})
        step = -(-reward.size * len(stories) // POINTS)
        for out, (x, y) in ((raw, (energy, reward)), (within, centred)):
            for label, half, colour in (("first half", ~late, 1), ("second half", late, 0)):
                dots = x[half].ravel()[::step], y[half].ravel()[::step]
                if dots[0].size:
                    out.append(Line(label, *dots, run if many else colour, "dots"))
    figures = [
        {
            "title": title,
            "note": note,
            "legend": [] if many else legend_of(lines),
            "svg": curves.lines(f"Reward against energy. {title}.", lines),
        }
        for title, note, lines in (
            ("Every branch", "reward upwards, energy to the right", raw),
            ("Within groups", "the same, less the mean of the group", within),
        )
        if lines
    ]
    return {"figures": figures, "correlations": words}


def _reward_energy(records: Records) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards and energies float[n, G] of the groups in which all are finite.

    Also bool[n], whether a group is of the second half of the iterations.
    """
    pairs = [(r["reward"], r["energy"], r["iteration"]) for r in records.branches]
    pairs = [p for p in pairs if None not in p[0] and None not in p[1]]
    count = len(pairs[-1][0]) if pairs else 0
    pairs = [p for p in pairs if len(p[0]) == count]
    reward, energy, iteration = (np.asarray([p[i] for p in pairs], float) for i in range(3))
    return reward, energy, 2 * iteration >= len(records.metrics)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """The mean correlation of centred float[n, G] in the groups that have a spread of both."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    some = norms > 0
    return float(np.mean(np.sum(x * y, axis=1)[some] / norms[some])) if some.any() else math.nan


# ---------------------------------------------------------------- configuration, versions, commands


def configuration(stories: Sequence[Story]) -> Part:
    """How a run differs from the preset that it is nearest to, or several from one another."""
    known = [story for story in stories if config_lib.flat(story.records.config)]
    fields = [config_lib.flat(story.records.config) for story in known]
    near = [nearest_preset(of) for of in fields]
    presets = [
        {"label": story.label, "preset": name, "count": len(differing(preset, of))}
        for story, of, (name, preset) in zip(known, fields, near, strict=True)
    ]
    if len(known) == 1 and len(stories) == 1:
        columns, compared = ["field", near[0][0], "this run"], [near[0][1], fields[0]]
    else:
        columns, compared = ["field", *(story.label for story in known)], fields
    names = dict.fromkeys(name for other in compared[1:] for name in differing(compared[0], other))
    rows = [[name, *(shown(of.get(name)) for of in compared)] for name in names]
    return {"presets": presets, "table": Table(columns, rows) if rows else None}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields in which two configurations differ, in their order."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def nearest_preset(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The shipped preset that differs in the fewest fields: its name and fields."""
    presets = {name: config_lib.flat(config) for name, config in config_lib.presets().items()}
    return min(presets.items(), key=lambda item: len(differing(item[1], fields)))


def shown(value: Any) -> str:
    """A value of a field for the page."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "(empty)"


def versions(stories: Sequence[Story]) -> Table | None:
    """Versions and devices, a column per run; None if none is known."""
    known = [story.records.versions for story in stories]
    names = dict.fromkeys(name for of in known for name in of)
    many = len(stories) > 1
    columns = ["", *([story.label for story in stories] if many else ["this run"])]
    rows = [[name.replace("_", " "), *(shown(of.get(name)) for of in known)] for name in names]
    return Table(columns, rows) if rows else None


def commands(story: Story) -> list[tuple[str, str]]:
    """What to do next with a run: what for, and the command."""
    where = shlex.quote(str(story.workdir))
    planned = config_lib.flat(story.records.config).get("train.iterations", 0)
    more = f" --config.train.iterations={2 * planned}" if 0 < planned <= story.done else ""
    return [
        ("continue", f"python -m kvpo_jax.main --workdir={where}{more}"),
        ("evaluate", f"python -m kvpo_jax.evaluate --workdir={where}"),
        ("make videos", f"python -m kvpo_jax.generate --checkpoint={where} --prompt=..."),
        ("make this page again", f"python -m kvpo_jax.report {where}"),
    ]
