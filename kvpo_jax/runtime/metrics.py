"""The numbers of an iteration: what its groups look like, whether they are finite, their writers.

The writers have the methods of clu's `metric_writers.MetricWriter` that a run needs, and do not
inherit from it: clu's package of writers cannot be imported without TensorFlow.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import struct

from kvpo_jax.algorithm import objective
from kvpo_jax.errors import DivergedError, NotFiniteError, shortened
from kvpo_jax.runtime import films, pictures
from kvpo_jax.runtime.atomic import naming, replacing
from kvpo_jax.runtime.config import flat
from kvpo_jax.runtime.doctor import Doctor
from kvpo_jax.runtime.progress import Progress, warn
from kvpo_jax.runtime.worker import Worker
from kvpo_jax.types import Array, Judged, Replayed, Scores

# ---------------------------------------------------------------- what is reported of an iteration


class Group(struct.PyTreeNode):
    """What is reported of a micro-batch.

    Attributes:
      judged: rewards and gates of its P groups.
      routed_frames: int32[P, G, routed], the past frames that CHR drew for each branch.
      energies_old: float[P, G], of the old policy.
      energies_ref: float[P, G], of the reference.
      replayed: of the policy that is trained, in the last replay, which made the last update.
      sentences: P sequences (static).
      films: uint8[1 + G, frames, h, w, 3], the videos of anchor and branches of the first prompt of
        a pictured iteration, on the main process; else None.
    """

    judged: Judged
    routed_frames: Array
    energies_old: Array
    energies_ref: Array
    replayed: Replayed
    sentences: tuple[tuple[str, ...], ...] = struct.field(pytree_node=False)
    films: np.ndarray | None = None


def group_metrics(
    groups: Sequence[Group], means: Callable[..., Mapping[str, Array]]
) -> dict[str, float]:
    """What the groups of an iteration look like, name -> mean over its micro-batches.

    Args:
      groups: of the micro-batches.
      means: `programs.group_means`.
    """

    def of_batch(group: Group) -> dict[str, Array]:
        spread = objective.mean_spread(group.energies_old)
        # From the host, because several processes have some on all devices and some on their own.
        seen = means(*jax.device_get((group.judged, group.replayed.floor)))
        return {**seen, "energy_old_std_in_group": spread}

    batches = [of_batch(group) for group in groups]
    metrics = {name: float(np.mean([batch[name] for batch in batches])) for name in batches[0]}
    weight = np.concatenate([np.asarray(group.replayed.weight) for group in groups])
    metrics["prompts_with_weight"] = int(np.sum(weight > 0))
    metrics["prompt_weight_max"] = float(weight.max() / (weight.sum() or 1.0))
    return metrics


def branch_records(
    config: ml_collections.ConfigDict, pivot: int, groups: Sequence[Group]
) -> list[dict[str, Any]]:
    """What branches.jsonl has of an iteration: one record per prompt, in their order.

    docs/runs.md says what is in it. `window` are the perturbed blocks, the first and the last.
    """
    place = place_of(config, pivot)
    return [record for group in groups for record in _group_records(group, place)]


def place_of(config: ml_collections.ConfigDict, pivot: int) -> dict[str, Any]:
    """Where the branches of a record part from the anchor."""
    return {
        "pivot": pivot,
        "fork_frame": pivot * config.video.block_frames,
        "window": [pivot, pivot + config.rollout.window_blocks - 1],
    }


def score_records(scores: Scores) -> list[dict[str, Any]]:
    """The rewards of each of P prompts as a record has them."""
    components = {
        name: [{"branches": x, "anchor": a} for x, a in zip(*map(as_lists, pair), strict=True)]
        for name, pair in scores.components.items()
    }
    rewards = zip(as_lists(scores.branches), as_lists(scores.anchor), strict=True)
    return [
        {
            "reward": branches,
            "reward_anchor": anchor,
            "components": {name: of_prompts[i] for name, of_prompts in components.items()},
        }
        for i, (branches, anchor) in enumerate(rewards)
    ]


def _group_records(group: Group, place: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`branch_records` of a micro-batch; `place` is what all its records have."""
    judged, replayed = group.judged, group.replayed
    routed, scored = as_lists(group.routed_frames), score_records(judged.scores)
    prompts, branches = judged.advantages.shape

    def of_branches(x: Array | np.ndarray | None) -> list[list[Any]]:
        """A number of each branch; None where a loss by state has none, or replays few branches."""
        rows = [[]] * prompts if x is None else as_lists(x)
        return [[*row, *[None] * (branches - len(row))] for row in rows]

    columns = {
        "advantage": as_lists(judged.advantages),
        "energy": of_branches(replayed.energies),
        "energy_old": of_branches(group.energies_old),
        "energy_reference": of_branches(group.energies_ref),
        "probability": of_branches(replayed.probability),
        "ratio": of_branches(replayed.ratio),
        "gate_open": as_lists(judged.gate_open),
        "weight": as_lists(replayed.weight),
    }
    rows = zip(*columns.values(), strict=True)
    return [
        {
            "prompt": sentences,
            **place,
            "routed": routed[i],
            **scored[i],
            **dict(zip(columns, row, strict=True)),
        }
        for i, (sentences, row) in enumerate(zip(group.sentences, rows, strict=True))
    ]


def captions(scores: Scores) -> list[tuple[str, str]]:
    """(name, caption) of the videos of the first prompt: what it is, and its reward."""
    rewards = [scores.anchor[0], *scores.branches[0]]
    names = films.branch_names(len(rewards) - 1)
    return [
        (name, f"{name.replace('_', ' ')}  {reward:.4f}")
        for name, reward in zip(names, rewards, strict=True)
    ]


def as_lists(x: Array | np.ndarray) -> list[Any]:
    """The array as lists for JSON, with None for what is not finite.

    A float32 has the fewest digits that give it back: 0.1, not 0.10000000149011612.
    """
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        return x.tolist()
    short = x.astype(str).astype(float)
    return np.where(np.isfinite(short), short.astype(object), np.array(None)).tolist()


def check_finite(
    metrics: Mapping[str, Array], energies: Mapping[str, Array], sentences: Sequence[Sequence[str]]
) -> None:
    """NotFiniteError that names what is not finite: policy, prompt and branch, gradient or update.

    An update is finite if the new LoRA is: EMA and Adam's moments follow from LoRA and gradient.

    Args:
      metrics: of the gradient or of the update.
      energies: policy -> float[P, G].
      sentences: of the P prompts.
    """
    for policy, values in energies.items():
        finite = np.isfinite(np.asarray(values))
        for prompt, branch in np.argwhere(~finite)[:1]:
            diverged = policy == "trained"
            raise (DivergedError if diverged else NotFiniteError)(
                f"the energy of branch {branch} of prompt {sentences[prompt]} is "
                f"{values[prompt, branch]} under the {policy} policy"
            )
    for name in ("loss", "grad_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            raise NotFiniteError(f"{name} is {metrics[name]} though every energy is finite")
    for name in ("update_norm", "lora_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            raise NotFiniteError(
                f"{name} is {metrics[name]} though the gradient is finite: the update is too large;"
                " start again with a lower config.train.learning_rate"
            )


# ---------------------------------------------------------------- writers


class JsonlWriter:
    """Appends JSON objects to a file, one per line, which are in it when a call returns.

    Args:
      path: the file; its folder exists.
      first_step: the step that this process begins with. A continued run repeats the steps after
        its checkpoint: what an earlier process wrote of them is dropped, as is a last line that a
        kill has cut short. It is said which of the steps before are missing, incomplete or there
        twice; a damaged line is put aside.
      lines_per_step: how many objects a step has; None if not every step has one.
    """

    def __init__(self, path: Path, first_step: int = 0, lines_per_step: int | None = 1):
        _cut(path, first_step, lines_per_step)
        self._path, self._file = path, path.open("a")

    def write(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes a line {"iteration": step, ...} of each record; they have finite numbers only."""
        lines = [json.dumps({"iteration": step, **x}, allow_nan=False) for x in records]
        with naming(self._path):
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes {"iteration": step, ...}, with null for what is not finite, as JSON has no NaN."""
        values = {name: float(value) for name, value in scalars.items()}
        self.write(step, [{k: v if math.isfinite(v) else None for k, v in values.items()}])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes nothing: the file is for numbers."""

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, first_step: int, lines_per_step: int | None) -> None:
    """Leaves whole lines of the steps before `first_step`, and says what is wrong with them."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    steps = [_step_of(line) for line in lines]
    before = [step for step in steps if step is not None and step < first_step]
    damaged = [number for number, step in enumerate(steps, 1) if step is None]
    expected, lines_per_step = range(first_step if lines_per_step else 0), lines_per_step or 1
    missing, found = sorted(set(expected) - set(before)), Counter(before)
    incomplete = sorted(step for step, count in found.items() if count < lines_per_step)
    twice = sorted(step for step, count in found.items() if count > lines_per_step)
    aside = path.with_name(f"{path.name}.damaged")
    for what, which in (
        (f"damaged lines, put into {aside.name}", damaged),
        ("missing iterations", missing),
        ("incomplete iterations", incomplete),
        ("iterations that are there more than once", twice),
    ):
        if which:
            print(f"{path}: {what}: {shortened(which)}", flush=True)
    if damaged:
        with aside.open("ab") as file:
            file.writelines(lines[number - 1] for number in damaged)
    with replacing(path) as temporary:
        kept = zip(lines, steps, strict=True)
        temporary.write_bytes(b"".join(x for x, step in kept if step in found))


def _step_of(line: bytes) -> int | None:
    """The step of a line; None if it is damaged."""
    try:
        step = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int and step >= 0 else None


# The start of a metric's name -> that of its tag, by which TensorBoard groups them; the first that
# fits. A name that is to be whole has no *.
TAGS = {
    "heldout_*": "heldout/",
    "seconds_*": "time/",
    "reward_*": "reward/",
    "reward": "reward/branches",
    "win_rate": "reward/win_rate",
    "gate_open": "reward/gate_open",
    "pixel_std_in_group": "reward/pixel_std_in_group",
    "exposure": "reward/exposure",
    "saturation": "reward/saturation",
    "clipped": "reward/clipped",
    "passes_*": "time/passes_",
    "videos_scored": "time/videos_scored",
    "*": "policy/",
}
GIF_FRAMES, GIF_FPS = 64, 8  # at most; a longer video is shown faster than it plays
BUCKETS = 30  # of a histogram


def tag_of(metric: str) -> str:
    """The tag of a metric of metrics.jsonl, by `TAGS`."""
    for pattern, tag in TAGS.items():
        start = pattern.removesuffix("*")
        if metric == pattern:
            return tag
        if start != pattern and metric.startswith(start):
            return tag + metric.removeprefix(start)
    raise AssertionError("* fits every name")


class TensorboardXWriter:
    """Writes TensorBoard's event files.

    It uses tensorboardX's event files and not its SummaryWriter, whose thread does not report a
    full disk: the training loop would wait for it forever.

    Args:
      logdir: the folder of the event files; it is made.
      first_step: as in JsonlWriter; TensorBoard hides what earlier files have of later steps.
    """

    def __init__(self, logdir: Path, first_step: int = 0):
        from tensorboardX import summary  # imports torch where that is installed
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import summary_pb2
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        logdir.mkdir(parents=True, exist_ok=True)
        self._summary, self._proto, self._event = summary, summary_pb2, Event
        # Names begin with the second, which two processes of a run may share.
        with naming(logdir):
            self._file = EventsWriter(str(logdir / "events"), f".{os.getpid()}.{first_step}")
        self._logdir = logdir
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=first_step, session_log=start))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes a point of each curve."""
        self._write(step, [self._summary.scalar(name, scalars[name]) for name in scalars])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 or float in [0, 1], [h, w, 3] or several [n, h, w, 3] as one."""
        self._write(
            step,
            [
                self._summary.image(name, image, dataformats="NHWC"[-image.ndim :])
                for name, image in images.items()
            ],
        )

    def write_videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
        """Writes videos uint8[frames, h, w, 3] as GIFs of GIF_FPS, which its image page plays."""
        self._write(step, [self._gif(name, frames) for name, frames in videos.items()])

    def write_gallery(self, step: int, captions: Sequence[str], videos: np.ndarray) -> None:
        """Writes videos uint8[n, frames, h, w, 3] with their captions, as a GIF and as strips."""
        shown = pictures.strip(*videos.shape[1:4])
        strips = pictures.sheet(list(zip(captions, videos[:, shown], strict=True)), shown)
        self.write_images(step, {"branches/frames": np.asarray(strips)})
        moving = pictures.spread(videos.shape[1], GIF_FRAMES)
        gallery = pictures.gallery(captions, videos[:, moving])
        self.write_videos(step, {"branches/videos": gallery})

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, np.ndarray],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes how the finite numbers of each array are spread."""
        finite = {name: x[np.isfinite(x)] for name, x in arrays.items()}
        buckets = num_buckets or {}
        self._write(
            step,
            [
                self._summary.histogram(name, x, buckets.get(name, BUCKETS))
                for name, x in finite.items()
                if x.size
            ],
        )

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown."""
        self._write(step, [self._summary.text(name, text) for name, text in texts.items()])

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the configuration, field -> value, for the table that compares runs."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hparams.items()
        }
        shown = {tag_of(name): 0.0 for name in ("reward", "heldout_online")}
        self._write(0, list(self._summary.hparams(plain, shown))[:2])

    def _gif(self, name: str, frames: np.ndarray) -> Any:
        height, width = frames.shape[1:3]
        image = self._proto.Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=pictures.gif(frames, GIF_FPS),
        )
        return self._proto.Summary(value=[self._proto.Summary.Value(tag=name, image=image)])

    def _write(self, step: int, summaries: list[Any]) -> None:
        for part in summaries:
            event = self._event(step=step, wall_time=time.time(), summary=part)
            with naming(self._logdir):
                self._file.write_event(event)

    def flush(self) -> None:
        with naming(self._logdir):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Writes metrics.jsonl and, in a thread of its own, TensorBoard's event files.

    TensorBoard has the metrics under their tags (`tag_of`), everything else under its own name. An
    error of that thread is raised by the next call, at the latest by `close`.

    Args:
      workdir: the run directory; it is made.
      first_iteration: the iteration that this process begins with, 0 for a new run.
    """

    def __init__(self, workdir: Path | str, first_iteration: int):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = JsonlWriter(workdir / "metrics.jsonl", first_iteration)
        self._events = TensorboardXWriter(workdir / "tensorboard", first_iteration)
        self._worker = Worker("metrics")

    def write_scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of an iteration, once: a line of metrics.jsonl, a point per curve."""
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write_scalars(iteration, values)
        tagged = {tag_of(name): value for name, value in values.items()}
        self._later("write_scalars", iteration, tagged)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures for TensorBoard, as in TensorboardXWriter."""
        self._later("write_images", iteration, images)

    def write_gallery(self, iteration: int, captions: Sequence[str], videos: np.ndarray) -> None:
        """Draws videos and writes them for TensorBoard, as in TensorboardXWriter."""
        self._later("write_gallery", iteration, captions, videos)

    def write_histograms(self, iteration: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes how numbers are spread for TensorBoard, as in TensorboardXWriter."""
        self._later("write_histograms", iteration, arrays)

    def write_texts(self, iteration: int, texts: Mapping[str, str]) -> None:
        """Writes texts for TensorBoard, as in TensorboardXWriter."""
        self._later("write_texts", iteration, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the configuration for TensorBoard, as in TensorboardXWriter."""
        self._later("write_hparams", hparams)

    def flush(self) -> None:
        """Waits until everything is in the files."""
        self._worker.wait()

    def close(self) -> None:
        """Flushes and closes the files, also after an error."""
        try:
            self._worker.close()
        finally:
            try:
                self._events.close()
            finally:
                self._lines.close()

    def _later(self, method: str, *arguments: Any) -> None:
        self._worker.call(self._write_events, method, *arguments)

    def _write_events(self, method: str, *arguments: Any) -> None:
        getattr(self._events, method)(*arguments)
        self._events.flush()


# ---------------------------------------------------------------- recorder


class Recorder:
    """Writes and prints what happens in the iterations of a run; the main process has one.

    Args:
      config: of the run.
      workdir: its directory.
      first_iteration: the iteration that this process begins with.
      fps: of its videos.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Path, first_iteration: int, fps: float
    ):
        self._config = config
        # A run that has made all its iterations evaluates again what they have led to.
        evaluated = first_iteration + (first_iteration < config.train.iterations)
        self._writer = MetricWriter(workdir, first_iteration)
        self._records = JsonlWriter(
            workdir / "branches.jsonl", first_iteration, config.train.prompts_per_iteration
        )
        self._heldout = JsonlWriter(workdir / "heldout.jsonl", evaluated, lines_per_step=None)
        films.cut(workdir, first_iteration, evaluated)
        self._films = films.FilmWriter(workdir, fps)
        fields = flat(config)
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in sorted(fields.items()))
        self._writer.write_hparams(fields)
        text = f"| field | value |\n|---|---|\n{rows}"
        self._writer.write_texts(first_iteration, {"config": text})
        self._progress = Progress(config.train.iterations)
        self._doctor = Doctor(config)

    def record(self, iteration: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Reports an iteration, numbered from 0."""
        pivot = int(metrics["pivot"])
        records = branch_records(self._config, pivot, groups)
        self._records.write(iteration, records)
        self._writer.write_scalars(iteration, metrics)
        spread = {
            "reward/histogram": [group.judged.scores.branches for group in groups],
            "policy/energy_histogram": [group.replayed.energies for group in groups],
        }
        self._writer.write_histograms(
            iteration, {name: np.concatenate([*map(np.asarray, x)]) for name, x in spread.items()}
        )
        self._show(iteration, groups[0])
        self._progress.show(iteration, metrics)
        numbered = [{"iteration": iteration, **x} for x in (metrics, *records)]
        for line in self._doctor.visit(numbered[0], numbered[1:]):
            warn(line)

    def _show(self, iteration: int, group: Group) -> None:
        """Writes the videos of the first prompt, if any: as files, and for TensorBoard."""
        if group.films is None:
            return
        captioned = captions(group.judged.scores)
        for (name, _), video in zip(captioned, group.films, strict=True):
            self._films.write(films.Film("iteration", iteration, 0, name), video)
        self._writer.write_gallery(iteration, [text for _, text in captioned], group.films)

    def film_heldout(self, done: int, policy: str, prompt: int, video: np.ndarray) -> None:
        """Writes the video uint8[frames, h, w, 3] of a held-out prompt after `done` iterations."""
        if self._config.train.video_every:
            self._films.write(films.Film("heldout", done, prompt, policy), video)

    def record_heldout(self, done: int, record: Mapping[str, Any], picture: np.ndarray) -> None:
        """Reports the evaluation after `done` iterations.

        Args:
          done: how many have been made.
          record: what heldout.jsonl has of it.
          picture: uint8[h, w, 3] of what the reference and the online policy make.
        """
        self._heldout.write(done, [record])
        self._doctor.evaluated({"iteration": done, **record})
        self._writer.write_images(done - 1, {"heldout/before_after": picture})

    def flush(self) -> None:
        """Waits until all videos are written."""
        self._films.flush()

    def close(self) -> None:
        """Finishes the files, also after an error."""
        with ExitStack() as stack:
            for writer in (self._heldout, self._records, self._films, self._writer):
                stack.callback(writer.close)
