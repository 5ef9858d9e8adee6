"""Evaluation suites: videos of a list of prompts, their scores, and what these say of a policy.

    python -m kvpo_jax.evaluate --suite=short --prompts=FILE --checkpoint=RUN --output=DIR
    python -m kvpo_jax.evaluate --suite=long --prompts=FILE --checkpoint=RUN --output=DIR2 \\
        [--policy=reference|online|ema] [--lora=A:1.0,B:0.5] [--against=DIR]

A folder is of one policy. It has manifest.json (what it is made of), plan.jsonl, videos/,
scores.jsonl, results.json and results.md, and what VBench needs to judge the same videos;
docs/evaluation.md describes them.

A video depends on the policy, its prompt, and (seed, number of the prompt, sample), and its scores
on its file alone. So whatever was interrupted is continued by the same command, and it does not
matter how many devices and processes share the work: each process takes every n-th prompt, and they
do not talk to one another.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import jax
import ml_collections
import numpy as np
from absl import flags

from kvpo_jax import adapters as adapters_lib
from kvpo_jax import backbone as backbone_lib
from kvpo_jax import generate, vbench
from kvpo_jax.algorithm import keys
from kvpo_jax.backbone import Backbone
from kvpo_jax.data import prompts
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import DivergedError, UsageError
from kvpo_jax.rewards import composite, scorers, video_files
from kvpo_jax.rollout import stream
from kvpo_jax.run import Run
from kvpo_jax.runtime import checkpoint as checkpoint_lib
from kvpo_jax.runtime import command, progress, records, statistics, sums, video, workdir
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import appending, replacing, write_json, write_lines
from kvpo_jax.runtime.sharding import Share, prompt_shards
from kvpo_jax.state import policy_sum
from kvpo_jax.types import Array, PyTree


class Suite(NamedTuple):
    """What is generated.

    Attributes:
      seconds: of a video, if its prompts do not say; it is the nearest number of blocks.
      samples: videos of a prompt.
      switches: whether prompts may switch.
    """

    seconds: float
    samples: int
    switches: bool


# 5 s and 5 samples are VBench's; 60 s, switching evenly, are those of LongLive's and MemFlow's long
# tables.
SUITES = {"short": Suite(5, 5, False), "long": Suite(60, 1, True)}

# What two evaluations must have in common to be compared prompt by prompt.
PAIRED = ("suite", "prompts", "seed", "samples", "video", "scoring")
SECTIONS = ("model", "lora", "decoder", "sampler", "window")  # of a config, in a manifest

# ---------------------------------------------------------------- what is asked for


@dataclasses.dataclass(frozen=True)
class Task:
    """A video.

    Attributes:
      prompt: the number of its prompt sequence.
      sample: its number among the videos of the sequence.
      file: its name.
      judged: what it is scored by, with the durations that the video has.
      text: what it is generated from.
      blocks: how long it is.
      switch_frames: latent frames at which the sentences after the first begin.
    """

    prompt: int
    sample: int
    file: str
    judged: PromptSequence
    text: PromptSequence
    blocks: int
    switch_frames: tuple[int, ...]

    def record(self, seed: int) -> dict[str, Any]:
        """What plan.jsonl has of it."""
        return {
            "file": self.file,
            "prompt": list(self.judged.sentences),
            "text": list(self.text.sentences),
            "seed": [seed, self.prompt, self.sample],
            "frames": sum(self.judged.durations),
            "switch_frames": list(self.switch_frames),
        }


def frames_in(seconds: float, backbone: Backbone, block_frames: int) -> int:
    """The latent frames of the whole blocks that play nearest to so many seconds."""
    wanted = seconds * backbone.fps

    def away(blocks: int) -> float:
        return abs(backbone.to_pixel(blocks * block_frames) - wanted)

    return block_frames * min(range(1, int(wanted) + 2), key=away)


def tasks_of(
    given: flags.FlagValues, config: ml_collections.ConfigDict, backbone: Backbone
) -> list[Task]:
    """The videos that the flags ask for, sample by sample.

    Raises:
      UsageError: the prompt files do not belong together, or their prompts do not fit the suite.
    """
    suite, block_frames = SUITES[given.suite], config.video.block_frames
    path = Path(given.extended or given.prompts)
    pairs = prompts.load_extended(Path(given.prompts), path if given.extended else None)
    generate.check_switching(config, [text for _, text in pairs])
    default = frames_in(suite.seconds, backbone, block_frames)
    timed = []
    for judged, text in pairs:
        count = len(text.sentences)
        if count > 1 and not suite.switches:
            raise UsageError(
                f"{path}:{text.line} has {count} prompts, and a video of --suite={given.suite} has"
                " one; --suite=long switches between them"
            )
        if count != len(judged.sentences):
            raise UsageError(
                f"{path}:{text.line} has {count} prompts, and what it extends,"
                f" {given.prompts}:{judged.line}, {len(judged.sentences)}"
            )
        frames = generate.frames_of(given, config, sum(text.durations), default)
        switch_frames = generate.scheduled(text, path, frames, block_frames)
        bounds = itertools.pairwise((0, *switch_frames, frames))
        lasting = tuple(end - start for start, end in bounds)
        timed.append((dataclasses.replace(judged, durations=lasting), text, frames, switch_frames))
    samples = given.samples or suite.samples
    return [
        Task(
            prompt=number,
            sample=sample,
            file=vbench.numbered(number, len(timed), sample),
            judged=judged,
            text=text,
            blocks=frames // block_frames,
            switch_frames=switch_frames,
        )
        for sample in range(samples)
        for number, (judged, text, frames, switch_frames) in enumerate(timed)
    ]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What generates.

    Attributes:
      name: "online", "ema" or "reference" of a run, "lora" of files, or "base".
      run: the run directory, or None.
      iteration: of its checkpoint.
      adapters: the files.
    """

    name: str
    run: Path | None
    iteration: int
    adapters: Sequence[adapters_lib.Adapter]

    def record(self) -> dict[str, Any]:
        """What the manifest has of it: names, and sums of what it is made of."""
        if self.adapters:
            files = [[a.weight, sums.of_path(a.path)] for a in self.adapters]
            return {"name": self.name, "files": files}
        if self.run is None:
            return {"name": self.name}
        own = policy_sum(self.run, self.iteration, self.name)
        return {"name": self.name, "iteration": self.iteration, "sum": own}


def policy_of(given: flags.FlagValues, adapters: Sequence[adapters_lib.Adapter]) -> Policy:
    """The policy that the flags name; UsageError if the run has no checkpoint, or not this one."""
    path = Path(given.checkpoint or "")
    if adapters or not (given.checkpoint and path.is_dir()):
        return Policy("lora" if adapters else "base", None, 0, adapters)
    iteration = checkpoint_lib.chosen(path / "checkpoints", given.iteration)
    if iteration is None:
        raise UsageError(f"{path / 'checkpoints'} has no checkpoint yet")
    return Policy(given.policy or "online", path, iteration, ())


def manifest_of(
    given: flags.FlagValues,
    config: ml_collections.ConfigDict,
    policy: Policy,
    tasks: Sequence[Task],
    backbone: Backbone,
    scorer: scorers.Scorers,
) -> dict[str, Any]:
    """What an evaluation depends on, beside versions: it is continued with the same only."""
    files = backbone_lib.files_read(config)
    files.pop("config.paths.prompts", None)  # those of training
    reward = config.reward
    return {
        "mode": "custom",  # of what VBench is told of the videos
        "suite": given.suite,
        "policy": policy.record(),
        "files": {name: sums.of_path(path) for name, path in files.items()},
        "prompts": {
            name: sums.of_path(path)
            for name, path in (("prompts", given.prompts), ("extended", given.extended))
            if path
        },
        "seed": given.seed,
        "samples": 1 + max(task.sample for task in tasks),
        "video": {
            **{name: config.video[name] for name in ("height", "width", "block_frames")},
            "fps": backbone.fps,
            "frames": sorted({sum(task.judged.durations) for task in tasks}),
            "durations": sums.of_json([task.judged.durations for task in tasks]),
        },
        **{name: config[name].to_dict() for name in SECTIONS},
        "scoring": {
            "reward.scorer": config_lib.without_addresses(reward.scorer),
            "eval.scorer": config_lib.without_addresses(config.eval.scorer),
            **scorer.versions(),
            **{name: reward[name] for name in ("clip_frames", "clip_spacing")},
            "weights": reward.weights.to_dict(),
        },
        "encoding": {
            "arguments": list(video.ENCODING),
            "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(),
        },
    }


def begin(folder: Path, manifest: Mapping[str, Any], tasks: Sequence[Task], share: Share) -> None:
    """Checks that the folder is of this evaluation, and writes what it is made of.

    The first process also writes what is planned, and what VBench needs.

    Raises:
      UsageError: the folder was begun with something else; it names the field.
    """
    workdir.check_manifest(folder, manifest)
    versions = workdir.versions()
    before = records.object_in(folder / workdir.MANIFEST).get("versions", versions)
    ours = {name: x for name, x in versions.items() if name != "device_count"}
    if (other := workdir.difference(before, ours)) is not None:
        progress.warn(f"{folder} was begun with {other}: the rest may differ in the last bits")
    own = folder / workdir.manifest_of_process(share.process)
    write_json({**manifest, "versions": before}, own)
    if share.process:
        return
    write_lines([task.record(manifest["seed"]) for task in tasks], folder / "plan.jsonl")
    vbench.write_custom(folder, {task.file: " ".join(task.judged.sentences) for task in tasks})


# ---------------------------------------------------------------- videos


def generate_missing(
    config: ml_collections.ConfigDict,
    policy: Policy,
    tasks: Sequence[Task],
    seed: int,
    folder: Path,
) -> None:
    """Writes the videos of tasks that are not there, one on every device at a time, or on as many
    devices as share the tokens of a block.

    Videos of one batch are of one sample, and as far as possible of one length.
    """
    missing = [task for task in tasks if not (folder / task.file).exists()]
    if not missing:
        return
    missing.sort(key=lambda task: (task.sample, task.blocks, task.prompt))
    of_samples = [list(x) for _, x in itertools.groupby(missing, key=lambda task: task.sample)]
    rows = jax.local_device_count() // math.gcd(jax.local_device_count(), config.mesh.context)
    shards = math.gcd(rows, config.mesh.fsdp)  # of the weights
    at_once = min(config.mesh.data * config.mesh.fsdp or rows, rows, max(map(len, of_samples)))
    at_once = -(-at_once // shards) * shards
    said = [sentence for task in missing for sentence in task.text.sentences]
    with progress.bar("preparing"):
        run, variables = generate.load_run(
            config_lib.generating(config),
            policy.run,
            policy.adapters,
            policy.name,
            said,
            policy.iteration,
            at_once,
        )
    with progress.bar("generating videos", len(missing)) as advance:
        for of_sample in of_samples:
            for first in range(0, len(of_sample), at_once):
                some = of_sample[first : first + at_once]
                write_videos(run, variables, some, seed, folder)
                advance(len(some))


def write_videos(
    run: Run, variables: PyTree, tasks: Sequence[Task], seed: int, folder: Path
) -> None:
    """Generates and writes the videos of as many tasks as there are devices, or fewer.

    Args:
      run: its mesh has the devices.
      variables: of the policy.
      tasks: of one sample. A device without a task makes the last one once more, for nobody.
      seed: of the noise.
      folder: for the files.

    Raises:
      DivergedError: a video is not finite.
    """
    devices = prompt_shards(run.mesh)
    every = [*tasks, *[tasks[-1]] * (devices - len(tasks))]
    schedules = [
        generate.sentence_schedule(task.text.sentences, task.switch_frames) for task in every
    ]
    speaker = generate.Speaker(run, variables, *schedules)
    numbers = np.array([task.prompt for task in every], np.int32)
    noise = keys.NoiseKey(keys.draw_key(seed, "suite", tasks[0].sample), numbers)
    blocks = max(task.blocks for task in tasks)
    made = (x for x, _ in stream(run, variables, speaker, noise, blocks))
    pixels = generate.decoded(run, _finite(run, made, tasks))
    with ExitStack() as stack:
        writers = []
        for block, videos in enumerate(progress.steps(pixels, "blocks", blocks)):
            images = [video.enlarge(x) for x in videos[: len(tasks)]]
            if block == 0:
                (height, width), fps = images[0].shape[1:3], run.backbone.fps
                opened = (video.writing(folder / x.file, height, width, fps) for x in tasks)
                writers = [stack.enter_context(writing) for writing in opened]
            for task, write, frames in zip(tasks, writers, images, strict=True):
                for frame in frames if block < task.blocks else ():
                    write(frame)


def _finite(run: Run, latents: Iterator[Array], tasks: Sequence[Task]) -> Iterator[Array]:
    """The blocks as they come; DivergedError if one is not finite."""
    for x in latents:
        if not run.programs.all_finite(x):
            names = ", ".join(task.file for task in tasks)
            raise DivergedError(f"the policy makes videos that are not finite, here {names}")
        yield x


def segments_of(task: Task, prompt_count: int, seed: int, backbone: Backbone) -> list[dict]:
    """What segments/plan.jsonl has of a video: a record of every prompt segment."""
    bounds = (0, *task.switch_frames, sum(task.judged.durations))
    pixels = itertools.pairwise(map(backbone.to_pixel, bounds))
    return [
        {
            "file": vbench.numbered(task.prompt, prompt_count, task.sample, segment),
            "video": task.file,
            "segment": segment,
            "pixels": [start, end],
            "prompt": sentence,
            "seed": [seed, task.prompt, task.sample],
        }
        for segment, (sentence, (start, end)) in enumerate(
            zip(task.judged.sentences, pixels, strict=True)
        )
    ]


def write_segments(
    tasks: Sequence[Task], seed: int, folder: Path, share: Share, backbone: Backbone
) -> None:
    """Writes the prompt segments of this process's videos as videos, in `folder`/segments.

    That is a folder for VBench as `folder` is, in which each is judged by its own sentence.
    """
    prompt_count = 1 + max(task.prompt for task in tasks)
    of_tasks = [segments_of(task, prompt_count, seed, backbone) for task in tasks]
    clips = folder / "segments" / "videos"
    own = [x for task, x in zip(tasks, of_tasks, strict=True) if share.has(task.prompt)]
    with progress.bar("writing segments", len(own)) as advance:
        for rows in own:
            missing = [row for row in rows if not (clips / row["file"]).exists()]
            frames = video.read(folder / "videos" / rows[0]["video"]) if missing else None
            for row in missing:
                assert frames is not None
                start, end = row["pixels"]
                video.write(clips / row["file"], frames[start:end], backbone.fps)
            advance()
    if share.process:
        return
    every = list(itertools.chain(*of_tasks))
    write_lines(every, folder / "segments" / "plan.jsonl")
    vbench.write_custom(folder / "segments", {row["file"]: row["prompt"] for row in every})
    write_json({"mode": "custom"}, folder / "segments" / workdir.MANIFEST)


# ---------------------------------------------------------------- scores


def scored(folder: Path) -> dict[tuple[int, int], Mapping[str, Any]]:
    """(prompt, sample) -> what the score files of all processes have of it.

    Raises:
      UsageError: a line is damaged; it names file and line.
    """
    files = sorted(folder.glob("scores*.jsonl"))
    rows = [row for path in files for row in records.lines_in(path, records.SCORED)]
    return {(row["prompt"], row["sample"]): row for row in rows}


def score_missing(
    config: ml_collections.ConfigDict,
    tasks: Sequence[Task],
    folder: Path,
    share: Share,
    backbone: Backbone,
    scorer: scorers.Scorers,
) -> None:
    """Scores the videos of tasks that no process has scored, and appends each to a file."""
    done = scored(folder)
    missing = [task for task in tasks if (task.prompt, task.sample) not in done]
    if not missing:
        return
    block_frames, reward = config.video.block_frames, config.reward
    first, second = (backbone.to_pixel(n * block_frames) for n in (1, 2))
    size = backbone_lib.pixel_shape(config, backbone)[1:]
    name = f"scores_{share.process}.jsonl" if share.process else "scores.jsonl"
    with (
        progress.bar("scoring videos", len(missing)) as advance,
        appending(folder / name) as append,
    ):
        for task in missing:
            made = video_files.score_file(
                scorer,
                folder / "videos" / task.file,
                task.judged,
                (reward.clip_frames, reward.clip_spacing),
                (first, second - first),
                size,
            )
            arrays = {name: np.asarray(x) for name, x in made.scores.items()}
            total = float(composite.composite(arrays, reward.weights))
            append(
                {
                    "prompt": task.prompt,
                    "sample": task.sample,
                    "file": task.file,
                    "scores": {"reward": total, **made.scores},
                    "segments": made.segments,
                }
            )
            advance()


def scorers_of(config: ml_collections.ConfigDict, fps: float) -> scorers.Scorers:
    """What the configuration optimises and watches, of videos of so many frames per second.

    Raises:
      UsageError: a scorer is none, or a weight has no component.
    """
    optimised, watched, both = (
        # A value that stands for a score would stay in the results.
        scorers.Scorers(names, config.paths, {**config.reward.http, "required": True}, fps)
        for names in (
            config.reward.scorer,
            config.eval.scorer,
            f"{config.reward.scorer},{config.eval.scorer}",
        )
    )
    both.check()
    parts = optimised.components(), watched.components()
    composite.check_weights(*parts, config.reward.weights)
    return both


# ---------------------------------------------------------------- results


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Score -> number of a prompt -> the mean over its samples."""
    return {
        name: _means(rows, lambda row, name=name: row["scores"].get(name))
        for name in dict.fromkeys(name for row in rows for name in row["scores"])
    }


def _means(rows: Sequence[Mapping[str, Any]], value_of: Any) -> dict[int, float]:
    """Number of a prompt -> the mean of what its rows have; without those that have nothing."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (value := value_of(row)) is not None:
            found.setdefault(row["prompt"], []).append(value)
    return {prompt: float(np.mean(found[prompt])) for prompt in sorted(found)}


def _interval(values: Mapping[int, float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "ci95": None, "prompts": 0}
    mean, interval = statistics.bootstrap_interval(np.array([*values.values()]))
    return {"mean": mean, "ci95": interval, "prompts": len(values)}


def results_of(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Means over prompts with intervals, of the scores and of every prompt segment.

    Args:
      rows: of the evaluation, from `scored`.
      others: of the one that it is compared with, of the same prompts; none for none.

    Returns:
      "scores": name -> "mean", "ci95" and how many "prompts" it is of; "segments": name -> the same
      of each segment; "against": name -> "difference" to the others, "ci95" and "win_rate", paired
      by prompt.
    """
    own, theirs = by_prompt(rows), by_prompt(others)
    segments: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(name for row in rows for name in row["segments"]):
        count = max(len(row["segments"].get(name, ())) for row in rows)
        segments[name] = [
            _interval(_means(rows, lambda row, n=name, m=m: _at(row["segments"].get(n, ()), m)))
            for m in range(count)
        ]
    against = {}
    for name in own.keys() & theirs.keys():
        both = sorted(own[name].keys() & theirs[name].keys())
        if both:
            now, before = (np.array([x[name][p] for p in both]) for x in (own, theirs))
            difference, interval = statistics.bootstrap_interval(now - before)
            wins = statistics.win_rate(before, now)
            against[name] = {"difference": difference, "ci95": interval, "win_rate": wins}
    return {
        "scores": {name: _interval(values) for name, values in own.items()},
        "segments": segments if any(len(x) > 1 for x in segments.values()) else {},
        "against": {name: against[name] for name in own if name in against},
    }


def _at(values: Sequence[float | None], place: int) -> float | None:
    return values[place] if place < len(values) else None


def finish(
    folder: Path, manifest: Mapping[str, Any], tasks: Sequence[Task], against: Path | None
) -> None:
    """Writes results.json and results.md and prints the table, once all videos are scored.

    Raises:
      UsageError: another process has been given something else; it names the field.
    """
    workdir.check_manifest(folder, manifest)
    rows = scored(folder)
    wanted = [(task.prompt, task.sample) for task in tasks]
    if left := sum(key not in rows for key in wanted):
        progress.say(
            f"{folder}: {len(wanted) - left:,} of {len(wanted):,} videos are scored; the process"
            " that scores the last one writes the results, and so does the same command later"
        )
        return
    others = [] if against is None else [*scored(against).values()]
    results = results_of([rows[key] for key in wanted], others)
    about: dict[str, Any] = {
        "suite": manifest["suite"],
        "policy": manifest["policy"],
        "prompts": 1 + max(task.prompt for task in tasks),
        "videos": len(tasks),
        "compared_with": None if against is None else str(against),
    }
    write_json(about | results, folder / "results.json")
    title = f"suite {about['suite']}, {about['policy']['name']}: {about['videos']:,} videos of"
    title = f"{title} {about['prompts']:,} prompts"
    tables = _tables(results)
    text = [f"# {title}", ""]
    if against is not None:
        text += [f"Differences are to `{against}`, paired by prompt.", ""]
    for columns, cells in tables:
        text += [_markdown(columns), _markdown(["---"] * len(columns)), *map(_markdown, cells), ""]
    text += ["Intervals (95 %) are of resampled prompts."]
    with replacing(folder / "results.md") as temporary:
        temporary.write_text("\n".join([*text, ""]), encoding="utf-8")
    print(flush=True)
    for columns, cells in tables:
        progress.table(title, columns, cells)
        title = ""
    print(f"\nwrote {folder / 'results.md'}", flush=True)


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tables(results: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of the scores, and of the segments where there are several."""
    columns, rows = ["score", "mean", "95 % interval"], []
    compared = results["against"]
    for name, of in results["scores"].items():
        rows.append([name, f"{of['mean']:.4f}", statistics.show_interval(of["ci95"])])
        if name in compared:
            to = compared[name]
            interval = statistics.show_interval(to["ci95"])
            rows[-1] += [f"{to['difference']:+.4f}", interval, f"{to['win_rate']:.0%}"]
        elif compared:
            rows[-1] += ["", "", ""]
    columns += ["difference", "95 % interval", "wins"] if compared else []
    tables = [(columns, rows)]
    if results["segments"]:
        means = {name: [x["mean"] for x in of] for name, of in results["segments"].items()}
        tables.append(video_files.segment_table(means))
    return tables


def check_against(against: Path, folder: Path, manifest: Mapping[str, Any], videos: int) -> None:
    """UsageError unless the evaluation in `against` is finished and can be paired with this one."""
    if against.resolve() == folder.resolve():
        raise UsageError(f"--against={against} is --output itself; name another evaluation")
    if not (against / workdir.MANIFEST).exists():
        raise UsageError(f"--against={against} has no {workdir.MANIFEST}: it is no evaluation")
    theirs = records.object_in(against / workdir.MANIFEST)
    if (other := workdir.difference(theirs, {name: manifest[name] for name in PAIRED})) is not None:
        raise UsageError(
            f"--against={against} was made with {other}: only videos of the same prompts, noise and"
            " length, scored in the same way, are compared"
        )
    if (there := len(scored(against))) < videos:
        raise UsageError(
            f"--against={against} has scores of {there:,} of {videos:,} videos; finish it first"
        )


# ---------------------------------------------------------------- the command


def evaluate(given: flags.FlagValues, arguments: Sequence[str], share: Share) -> None:
    """Generates, scores and sums up the share of this process; see the module.

    Args:
      given: the flags of kvpo_jax.evaluate.
      arguments: --config.FIELD=VALUE.
      share: which process this is.

    Raises:
      UsageError: flags, files or prompts do not go together, or the folder is of another
        evaluation.
    """
    for name, value in (("prompts", given.prompts), ("output", given.output)):
        if not value:
            raise UsageError(f"--suite needs --{name}=..., see docs/evaluation.md")
    config = generate.find_config(given, arguments, {"policy": bool(given.policy)}, scored=True)
    adapters = adapters_lib.parse(given.lora) if given.lora else []
    config = adapters_lib.configured(config, adapters) if adapters else config
    folder = Path(given.output)
    if (folder / "config.json").exists():
        raise UsageError(f"--output={folder} is the directory of a run; name another folder")
    video.ffmpeg()  # without it nothing can be written
    backbone = backbone_lib.load(config)
    scorer = scorers_of(config, backbone.fps)
    tasks = tasks_of(given, config, backbone)
    backbone.check_sentences([s for task in tasks for s in task.text.sentences])
    policy = policy_of(given, adapters)
    manifest = manifest_of(given, config, policy, tasks, backbone, scorer)
    against = Path(given.against) if given.against else None
    if against is not None:
        check_against(against, folder, manifest, len(tasks))
    command.use_compilation_cache()
    own = [task for task in tasks if share.has(task.prompt)]
    with workdir.locked(folder, f".lock_{share.process}"):
        begin(folder, manifest, tasks, share)
        generate_missing(config, policy, own, given.seed, folder / "videos")
        score_missing(config, own, folder, share, backbone, scorer)
        if given.segment_clips:
            write_segments(tasks, given.seed, folder, share, backbone)
        with workdir.locked(folder, ".lock", wait=True):
            finish(folder, manifest, tasks, against)
