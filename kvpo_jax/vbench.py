"""VBench, which runs in an environment of its own: what it needs, and what it found.

    python -m kvpo_jax.evaluate --export=vbench --prompts=all_dimension.txt \\
        --extended=all_dimension_extended.txt --workdir=RUN --output=DIR
    bash DIR/generate.sh && VBENCH=CHECKOUT bash DIR/run_vbench.sh
    python -m kvpo_jax.evaluate --import=DIR

docs/evaluation.md describes the files. Names, modes and constants are those of Vchitect/VBench at
45e79ec: scripts/constant.py, scripts/cal_final_score.py, vbench/ and vbench2_beta_long/.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvpo_jax.data import prompts as prompts_lib
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.data.vbench import FILTERED, FLICKERING, LONGEST
from kvpo_jax.errors import UsageError, listed, shortened
from kvpo_jax.generate import name_of
from kvpo_jax.runtime import progress, statistics, sums, workdir
from kvpo_jax.runtime.atomic import replacing, write_json, write_lines
from kvpo_jax.runtime.statistics import RESAMPLES

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"  # of Vchitect/VBench


class Dimension(NamedTuple):
    """A dimension of VBench.

    Attributes:
      low: the value that counts as 0 in the aggregates.
      high: the value that counts as 1.
      prompts: how many prompts of the standard list it has.
      quality: whether it counts in Quality; in Semantic if not.
      weight: how much it counts there.
      custom: whether it is documented for videos of other prompts.
      scale: of the values of single videos, the number that is 1.
    """

    low: float
    high: float
    prompts: int
    quality: bool = False
    weight: float = 1.0
    custom: bool = False
    scale: float = 1.0


DIMENSIONS = {
    "subject_consistency": Dimension(0.1462, 1.0, 72, quality=True, custom=True),
    "background_consistency": Dimension(0.2615, 1.0, 86, quality=True, custom=True),
    "temporal_flickering": Dimension(0.6293, 1.0, 75, quality=True),
    "motion_smoothness": Dimension(0.706, 0.9975, 72, quality=True, custom=True),
    "dynamic_degree": Dimension(0.0, 1.0, 72, quality=True, weight=0.5, custom=True),
    "aesthetic_quality": Dimension(0.0, 1.0, 93, quality=True, custom=True),
    "imaging_quality": Dimension(0.0, 1.0, 93, quality=True, custom=True, scale=100.0),
    "object_class": Dimension(0.0, 1.0, 79),
    "multiple_objects": Dimension(0.0, 1.0, 82),
    "human_action": Dimension(0.0, 1.0, 100),
    "color": Dimension(0.0, 1.0, 85),
    "spatial_relationship": Dimension(0.0, 1.0, 84),
    "scene": Dimension(0.0, 0.8222, 86),
    "appearance_style": Dimension(0.0009, 0.2855, 90),
    "temporal_style": Dimension(0.0, 0.364, 100),
    "overall_consistency": Dimension(0.0, 0.364, 93),
}
CUSTOM = [name for name, dimension in DIMENSIONS.items() if dimension.custom]
# What is exported -> the dimensions that it has.
MODES = {"vbench": list(DIMENSIONS), "vbench_long": list(DIMENSIONS), "custom": CUSTOM}


# ---------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Planned:
    """A video that VBench will look for.

    Attributes:
      file: its name in the folder "videos".
      prompt: the original prompt, by which it is judged.
      text: what it is generated from, a sentence per segment.
      durations: latent frames of each segment; empty if its prompts do not say.
      sample: its number among the videos of its prompt.
      seed: of the command that generates it.
      index: the number of its text in the prompt file of that command; seed and index make its
        noise.
      made: the file that is generated.
    """

    file: str
    prompt: str
    text: Sequence[str]
    durations: Sequence[int]
    sample: int
    seed: int
    index: int
    made: str


class Task(NamedTuple):
    """Videos that one command generates: the texts of a prompt file, with one seed.

    Attributes:
      texts: the prompt file.
      seed: of the command.
      folder: where its videos are.
    """

    texts: str
    seed: int
    folder: str


@dataclasses.dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
      mode: a key of MODES.
      originals: the prompt sequences that the videos are judged by, each once.
      texts: of each, what is generated.
      samples: videos of each.
      seed: of the first samples; that of the others follow.
      filtered: the prompts of which FILTERED samples are made (temporal flickering).
    """

    mode: str
    originals: Sequence[Sequence[str]]
    texts: Sequence[PromptSequence]
    samples: int
    seed: int
    filtered: Sequence[str] = ()

    def tasks(self) -> list[Task]:
        """The commands that generate the videos, in order."""
        every = range(self.samples)
        tasks = [Task("generation.jsonl", self.seed + i, f"generated/{i}") for i in every]
        if self.filtered:
            tasks += [
                Task("flickering.jsonl", self.seed + i, f"generated/flickering_{i}")
                for i in range(self.samples, FILTERED)
            ]
        return tasks

    def rows(self, texts: str) -> list[int]:
        """Which prompts a prompt file has."""
        every = range(len(self.originals))
        if texts == "generation.jsonl":
            return list(every)
        chosen = set(self.filtered)
        return [row for row in every if self.originals[row][0] in chosen]


def planned(export: Export) -> list[Planned]:
    """Every video of an export, sample by sample.

    Raises:
      UsageError: a prompt cannot be the name of a file, or VBench would read it as another one.
    """
    out = []
    for task in export.tasks():
        rows = export.rows(task.texts)
        sample = task.seed - export.seed
        for index, row in enumerate(rows):
            prompt, text = " ".join(export.originals[row]), export.texts[row]
            said = text.sentences
            made = f"{task.folder}/{name_of(index, len(rows), said[0])}"
            name = _file_name(export, row, prompt, sample)
            video = Planned(name, prompt, said, text.durations, sample, task.seed, index, made)
            out.append(video)
    return out


def _file_name(export: Export, row: int, prompt: str, sample: int) -> str:
    """The name that VBench reads prompt and sample from, never shortened."""
    if export.mode == "custom":  # the prompt stands in a file, so a number will do
        return numbered(row, len(export.originals), sample)
    name = f"{prompt}-{sample}.mp4"
    # VBench-Long takes what stands before an underscore, or before -Scene, for the prompt.
    forbidden = ["/", "\0"] + (["_", "-Scene"] if export.mode == "vbench_long" else [])
    if found := [x for x in forbidden if x in prompt]:
        why = f"has {found[0]!r}, so it cannot be the name of a video of {export.mode}"
    elif len(name.encode()) > LONGEST:
        why = f"makes a name of {len(name.encode())} bytes, and a file system takes {LONGEST}"
    else:
        return name
    raise UsageError(f"the prompt {prompt!r} {why}; --export=custom numbers the videos")


def numbered(row: int, prompts: int, sample: int, segment: int | None = None) -> str:
    """The name of a video whose prompt stands in a file, or of one of its prompt segments."""
    part = "" if segment is None else f"_seg{segment}"
    return f"{row:0{max(4, len(str(prompts - 1)))}d}{part}-{sample}.mp4"


def read_prompts(
    mode: str, prompts: Path, extended: Path | None, flickering: Path | None
) -> tuple[list[tuple[str, ...]], list[PromptSequence], list[str]]:
    """The originals, each once, what is generated for them, and those with FILTERED samples.

    VBench's list has two prompts twice: their videos are the same.

    Args:
      mode: a key of MODES.
      prompts: file of the originals.
      extended: file whose line i extends line i of `prompts`; None generates the originals.
      flickering: file of the prompts whose videos are filtered.

    Raises:
      UsageError: the files do not belong together; it names both and their lengths.
    """
    pairs = prompts_lib.load_extended(prompts, extended)
    originals = [original.sentences for original, _ in pairs]
    if mode != "custom" and (long := [s for s in originals if len(s) > 1]):
        raise UsageError(
            f"{prompts} has sequences of several prompts ({listed([long[0][0]])}, ...), which"
            f" --export={mode} has no names for; --export=custom has"
        )
    text_of = {original.sentences: text for original, text in reversed(pairs)}  # the first stays
    unique = list(dict.fromkeys(originals))
    filtered = [s.sentences[0] for s in prompts_lib.load(flickering)] if flickering else []
    if strangers := [prompt for prompt in filtered if (prompt,) not in text_of]:
        raise UsageError(f"{flickering}: {listed(strangers)} is not in {prompts}")
    return unique, [text_of[s] for s in unique], filtered


# ---------------------------------------------------------------- what is written


def write(
    export: Export,
    folder: Path,
    generate: Sequence[str],
    again: Sequence[str],
    files: Sequence[Path],
) -> None:
    """Writes an export, and links the videos that have been generated to the names of VBench.

    Args:
      export: what is exported.
      folder: where to; it may have been written before with the same arguments.
      generate: arguments of kvpo_jax.generate for every video.
      again: arguments of kvpo_jax.evaluate that repeat this export.
      files: prompt files, whose sums the manifest has.

    Raises:
      UsageError: the folder has something else in it.
    """
    plan = planned(export)
    manifest = {
        "mode": export.mode,
        "dimensions": MODES[export.mode],
        "prompts": len(export.originals),
        "videos": len(plan),
        "samples": export.samples,
        "seed": export.seed,
        "generate": list(generate),
        "files": {path.name: sums.of_bytes(path.read_bytes()) for path in files},
        "vbench": COMMIT,
    }
    workdir.check_manifest(folder, manifest)
    _check_videos(folder, plan)
    write_lines(map(dataclasses.asdict, plan), folder / "plan.jsonl")
    for name in dict.fromkeys(task.texts for task in export.tasks()):
        prompts_lib.write(folder / name, [export.texts[row] for row in export.rows(name)])
    scripts = {"generate.sh": _generation(export, folder, generate, again), **_evaluations(export)}
    _write_scripts(folder, scripts)
    if export.mode == "custom":
        write_json({video.file: video.prompt for video in plan}, folder / "prompts.json")
    there = _link(folder, plan)
    write_json(manifest | {"versions": workdir.versions()}, folder / workdir.MANIFEST)
    progress.say(
        f"{folder}: {len(plan):,} videos of {len(export.originals):,} prompts, {there:,} are there"
    )
    missing = there < len(plan)
    following = [name for name in scripts if missing == (name == "generate.sh")]
    print(f"next: {', '.join(f'bash {folder / name}' for name in following)}", flush=True)


def _check_videos(folder: Path, plan: Sequence[Planned]) -> None:
    """UsageError if the folder has videos that VBench would misread."""
    names = {video.file for video in plan}
    videos = folder / "videos"
    strangers = sorted({p.name for p in videos.iterdir()} - names) if videos.is_dir() else []
    # VBench-Long puts its clips there.
    if strangers := [name for name in strangers if not (videos / name).is_dir()]:
        raise UsageError(
            f"{videos} has {shortened(strangers, 3)}, which the plan has not; VBench would score"
            " it: move it away"
        )


def _link(folder: Path, plan: Sequence[Planned]) -> int:
    """Links what is generated to its name in the folder "videos"; how many are there."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    for video in plan:
        name = videos / video.file
        if (folder / video.made).exists() and not name.exists():
            name.unlink(missing_ok=True)  # a link to what is no more
            name.symlink_to(os.path.relpath(folder / video.made, videos))
    return sum((videos / video.file).exists() for video in plan)


def _generation(export: Export, folder: Path, generate: Sequence[str], again: Sequence[str]) -> str:
    """The script that generates the videos, and links them.

    A command whose last video is there is not run again.
    """
    folder, lines = folder.resolve(), []
    for task in export.tasks():
        of_task = [video for video in planned(export) if video.seed == task.seed]
        command = [
            *("python", "-m", "kvpo_jax.generate", *generate),
            f"--prompts={folder / task.texts}",
            f"--seed={task.seed}",
            f"--output={folder / task.folder}",
        ]
        last = shlex.quote(str(folder / of_task[-1].made))
        lines.append(f"[ -e {last} ] || {shlex.join(command)}")
    link = shlex.join(["python", "-m", "kvpo_jax.evaluate", *again])
    what = "Generates the videos; the lines may run on several machines. The last one links them."
    return _script(what, [shlex.join(["cd", str(Path.cwd())]), *lines, link])


def _write_scripts(folder: Path, scripts: Mapping[str, str]) -> None:
    for name, text in scripts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_custom(folder: Path, prompts: Mapping[str, str]) -> None:
    """Writes what VBench needs to evaluate the videos of `folder`/videos by prompts of their own.

    Args:
      folder: where prompts.json and the scripts go, and the results will.
      prompts: file name -> prompt.
    """
    write_json(prompts, folder / "prompts.json")
    _write_scripts(folder, _evaluations(Export("custom", (), (), 1, 0)))


def _evaluations(export: Export) -> dict[str, str]:
    """The scripts that evaluate the videos, name -> text."""
    start = [
        ': "${VBENCH:?set it to a checkout of github.com/Vchitect/VBench}"',
        'here="$(cd "$(dirname "$0")" && pwd)"',
        'cd "$VBENCH"',
    ]
    long = ["python", "vbench2_beta_long/eval_long.py"]
    short = ["python", "evaluate.py"]

    def scored(
        command: Sequence[str], mode: str, *more: str, results: str = "results"
    ) -> list[str]:
        """A line per dimension, so that one that fails loses no other."""
        return [
            " ".join(
                [
                    *command,
                    f"--mode={mode} --dimension {name}",
                    '--videos_path "$here/videos"',
                    '--output_path "$here/results"',
                    *more,
                ]
            )
            for name in MODES[export.mode]
        ]

    if export.mode == "custom":
        prompts = '--prompt_file "$here/prompts.json"'
        seconds = "Evaluates videos of 5 seconds and more, in clips of 2 seconds."
        return {
            "run_vbench.sh": _script(
                "Evaluates videos of less than 5 seconds.",
                [*start, *scored(short, "custom_input", prompts)],
            ),
            "run_vbench_long.sh": _script(
                seconds, [*start, *scored(long, "long_custom_input", "--dev_flag")]
            ),
        }
    if export.mode == "vbench_long":
        samples = f"--num_of_samples_per_prompt={export.samples}"
        lines = scored(long, "long_vbench_standard", "--dev_flag", samples)
        lines = [x + " --static_filter_flag" * (f" {FLICKERING} " in x) for x in lines]
    else:
        lines = scored(short, "vbench_standard")
        if export.filtered:
            static = '"$here/static"'
            at = next(i for i, line in enumerate(lines) if f" {FLICKERING} " in line)
            filtered = lines[at].replace('"$here/videos"', '"$here/static/filtered_videos"')
            lines[at : at + 1] = [
                f'python static_filter.py --videos_path "$here/videos" --result_path {static}',
                filtered,
            ]
    return {"run_vbench.sh": _script("Evaluates the videos.", [*start, *lines])}


def _script(what: str, lines: Sequence[str]) -> str:
    return "\n".join(["#!/usr/bin/env bash", f"# {what}", "set -euo pipefail", *lines, ""])


# ---------------------------------------------------------------- results


class Result(NamedTuple):
    """What VBench found in a dimension.

    Attributes:
      value: its own mean.
      videos: prompt -> the values of its videos, on the same scale.
      path: the file that it is from.
    """

    value: float
    videos: Mapping[str, Sequence[float]]
    path: Path


def read_results(folder: Path, dimensions: Sequence[str]) -> dict[str, Result]:
    """The results of all `*_eval_results.json` in a folder and below.

    Args:
      folder: where VBench was told to write to, or above.
      dimensions: those that there must be.

    Raises:
      UsageError: a dimension is missing or there twice, or a file is not of VBench's form.
    """
    found: dict[str, Result] = {}
    for path in sorted(folder.rglob("*_eval_results.json")):
        for name, made in _read_json(path).items():
            if name not in DIMENSIONS:
                raise UsageError(f"{path}: {name!r} is no dimension of VBench")
            result = _result(path, name, made)
            if name in found and result[:2] != found[name][:2]:
                raise UsageError(
                    f"{name} is in {found[name].path} and, with other values, in {path}; move one"
                    " away"
                )
            found[name] = result
    if missing := [name for name in dimensions if name not in found]:
        raise UsageError(
            f"{folder} has no results of {', '.join(missing)}. They do not count as 0: evaluate"
            " them, or name the folder of --export=custom, whose manifest.json says that it has"
            " six dimensions"
        )
    return {name: found[name] for name in dimensions}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); is it whole?") from error
    if not isinstance(made, dict):
        raise UsageError(f"{path}: expected an object, got a {type(made).__name__}")
    return made


def _result(path: Path, name: str, made: Any) -> Result:
    """What a file has of a dimension: [mean, videos], and in VBench-Long means besides."""
    if not (isinstance(made, list) and len(made) >= 2 and isinstance(made[1], list) and made[1]):
        raise UsageError(f"{path}: {name} should be [mean, [results of videos]]")
    videos: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in made[1]:
        if not isinstance(entry, dict) or not isinstance(entry.get("video_path"), str):
            raise UsageError(f"{path}: {name} has a result without a video_path: {entry!r}")
        value = entry.get("video_results")
        where = f"{path}: {name} of {entry['video_path']}"
        prompt, sample = _video_of(entry["video_path"])
        videos[prompt][sample].append(_number(where, value) / DIMENSIONS[name].scale)
    means = {
        prompt: tuple(float(np.mean(clips)) for clips in samples.values())
        for prompt, samples in videos.items()
    }
    return Result(_number(f"{path}: {name}", made[0]), means, path)


def _number(what: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{what} is {value!r}, expected a number")
    return float(value)


def _video_of(path: str) -> tuple[str, str]:
    """The prompt and the sample of a video, or of a clip that VBench-Long has cut of it."""
    stem = re.sub(r"\.[^.]+$", "", re.split(r"[/\\]", path)[-1])
    stem = re.sub(r"(-Scene-\d+)?(_(\d{3,}|full))?$", "", stem)
    prompt, sample = re.fullmatch(r"(.*?)(?:-(\d+))?", stem, re.DOTALL).groups()  # type: ignore[union-attr]
    return prompt, sample or ""


def aggregates(values: Mapping[str, Any]) -> dict[str, Any]:
    """Quality, Semantic and Total of VBench, as far as their dimensions are there.

    Quality is the weighted mean of normalised dimensions, Semantic the mean of nine, Total
    (4 Quality + Semantic) / 5. Of custom videos, Quality has six dimensions (VBench-Long's total in
    the recipe of Forcing-KV), and Consistency is the mean of subject and background (MemFlow).

    Args:
      values: dimension -> VBench's mean, floats or arrays of one shape.
    """
    normalised = {
        name: (values[name] - DIMENSIONS[name].low) / (DIMENSIONS[name].high - DIMENSIONS[name].low)
        for name in values
    }

    def mean(names: Sequence[str]) -> Any:
        weights = [DIMENSIONS[name].weight for name in names]
        terms = zip(weights, names, strict=True)
        return sum(weight * normalised[name] for weight, name in terms) / sum(weights)

    quality = mean([name for name in values if DIMENSIONS[name].quality])
    out = {"Quality": quality}
    if semantic := [name for name in values if not DIMENSIONS[name].quality]:
        out["Semantic"] = mean(semantic)
        out["Total"] = (4 * quality + out["Semantic"]) / 5
    out["Consistency"] = (values["subject_consistency"] + values["background_consistency"]) / 2
    return out


def resampled(results: Mapping[str, Result]) -> dict[str, np.ndarray]:
    """The value of each dimension for prompts that are drawn anew, float[RESAMPLES].

    Prompts are drawn with all their videos and dimensions, for videos of one prompt are alike. A
    prompt takes the place of one that has the same dimensions. The mean over prompts is moved to
    VBench's own mean, which counts frames in some dimensions.
    """
    means = {
        name: {prompt: float(np.mean(values)) for prompt, values in result.videos.items()}
        for name, result in results.items()
    }
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for prompt in sorted({prompt for of in means.values() for prompt in of}):
        groups[tuple(name for name in means if prompt in means[name])].append(prompt)
    random = np.random.default_rng(0)
    total = {name: np.zeros(RESAMPLES) for name in means}
    for names, prompts in groups.items():
        drawn = random.integers(0, len(prompts), (RESAMPLES, len(prompts)))
        for name in names:
            total[name] += np.array([means[name][prompt] for prompt in prompts])[drawn].sum(axis=1)
    return {
        name: total[name] / len(means[name]) - np.mean(list(means[name].values())) + result.value
        for name, result in results.items()
    }


def summary(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Name -> "value" and "ci95", of aggregates and dimensions; of the latter also counts.

    The interval holds 95 % of the values of resampled prompts; it is None for a single prompt.
    """
    values = {name: result.value for name, result in results.items()}
    draws = resampled(results)
    alone = any(len(result.videos) < 2 for result in results.values())
    out: dict[str, dict[str, Any]] = {}
    for name, value in (aggregates(values) | values).items():
        drawn = draws[name] if name in draws else aggregates(draws)[name]
        few = len(results[name].videos) < 2 if name in results else alone
        interval = None if few else np.quantile(drawn, (0.025, 0.975)).tolist()
        out[name] = {"value": value, "ci95": interval}
        if name in results:
            videos = results[name].videos
            counts = {"prompts": len(videos), "videos": sum(map(len, videos.values()))}
            out[name] |= counts
    return out


def read(folder: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Reads the results below a folder, prints a table and writes it as JSON.

    Args:
      folder: of an export, or any other with VBench's results; without a manifest.json all 16
        dimensions are asked for.
      output: the JSON file.

    Raises:
      UsageError: see `read_results`.
    """
    if not folder.is_dir():
        raise UsageError(f"--import={folder} is no folder")
    manifest = folder / workdir.MANIFEST
    mode = _read_json(manifest).get("mode") if manifest.exists() else "vbench"
    if mode not in MODES:
        raise UsageError(f"{manifest}: the mode {mode!r} is none of {', '.join(MODES)}")
    made = summary(read_results(folder, MODES[mode]))
    write_json(made, output)
    rows = [
        [
            name,
            f"{row['value']:.4f}",
            statistics.show_interval(row["ci95"]),
            *(str(row.get(count, "")) for count in ("prompts", "videos")),
        ]
        for name, row in made.items()
    ]
    progress.table(f"VBench ({mode})", ["", "value", "95 % interval", "prompts", "videos"], rows)
    for line in _incomplete(made, mode):
        progress.warn(line)
    print(f"wrote {output}", flush=True)
    return made


def _incomplete(made: Mapping[str, Mapping[str, Any]], mode: str) -> Iterator[str]:
    """A line for every dimension that has fewer prompts than VBench's list."""
    for name in () if mode == "custom" else MODES[mode]:
        expected, found = DIMENSIONS[name].prompts, made[name]["prompts"]
        if found < expected:
            yield f"{name} has results of {found} prompts, VBench's list {expected}"
