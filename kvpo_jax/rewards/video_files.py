"""Scores of video files: a table on the terminal and a CSV file."""

from __future__ import annotations

import csv
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvpo_jax.data import prompts
from kvpo_jax.errors import UsageError, listed
from kvpo_jax.rewards import composite, preprocess, scorers
from kvpo_jax.runtime import progress, video
from kvpo_jax.runtime.atomic import keeping_part
from kvpo_jax.types import Pixels

SHOWN = 24  # characters of a prompt in the table
CUT = 40  # letters from which on a name may have less than the whole prompt


def score(
    scorer: composite.Scorer,
    folder: Path,
    sequences: Sequence[prompts.PromptSequence],
    clips: tuple[int, int],
    output: Path,
    blocks: tuple[int, int] | None = None,
) -> dict[str, dict[str, float]]:
    """Scores every video of `folder`, writes CSV files and prints tables.

    Each row is written at once: after an error, the rows before it are in `output`.part. Where a
    video has several prompts, `segments_file` has what scorers of clips say of each of them.

    Args:
      scorer: see `composite.Scorer`.
      folder: its videos are scored in the order of their names, 2.mp4 before 10.mp4.
      sequences: the prompt sequences of the videos, see `pair`.
      clips: clip_frames and clip_spacing, as in section `reward` of a config.
      output: the CSV file; its folder is made.
      blocks: pixel frames of a generator's first block and of every other one; None if unknown.

    Returns:
      file name -> component -> score, and their "mean".

    Raises:
      UsageError: videos and prompt sequences do not belong together, or a file is not a whole
        video. An error of the scorer gets a note that names the file.
    """
    files = _videos(folder)
    pairs = list(zip(files, pair(files, sequences), strict=True))
    several = any(len(sequence.sentences) > 1 for sequence in sequences)
    rows: dict[str, dict[str, float]] = {}
    segments: list[Mapping[str, Sequence[float | None]]] = []
    with ExitStack() as stack, progress.bar("scoring", len(files)) as advance:
        append = stack.enter_context(_writing(output))
        append_segment = append  # until a video has some
        for path, sequence in pairs:
            scores, alone = score_file(scorer, path, sequence, clips, blocks)
            names = list(next(iter(rows.values()), scores))
            if list(scores) != names:
                raise UsageError(
                    f"{path}: the rewards are {', '.join(scores)}, those of the videos before it"
                    f" {', '.join(names)}"
                )
            rows[path.name] = scores
            prompt = " | ".join(sequence.sentences)
            append({"video": path.name, "prompt": prompt, **scores})
            if several and alone:
                if not segments:
                    append_segment = stack.enter_context(_writing(segments_file(output)))
                segments.append(alone)
                for m, sentence in enumerate(sequence.sentences):
                    of_segment = {name: values[m] for name, values in alone.items()}
                    about = {"video": path.name, "segment": m, "prompt": sentence}
                    append_segment({**about, **of_segment})
            advance(description=path.name)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    shown = [*(textwrap.shorten(s.sentences[0], SHOWN, placeholder="...") for _, s in pairs), ""]
    cells = [
        [name, prompt, *(f"{row[column]:.4f}" for column in names)]
        for (name, row), prompt in zip(rows.items(), shown, strict=True)
    ]
    progress.table("", ["", "prompt", *names], cells)
    if segments:
        progress.table("", *segment_table(_segment_means(segments)))
        print(f"wrote {segments_file(output)}", flush=True)
    print(f"wrote {output}", flush=True)
    return rows


def segments_file(output: Path) -> Path:
    """The CSV file of the prompt segments, beside that of the videos."""
    return output.with_name(f"{output.stem}_segments{output.suffix}")


@contextmanager
def _writing(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes a row of a CSV file, which is in it when it returns."""
    with keeping_part(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        tables: list[csv.DictWriter[str]] = []

        def append(row: Mapping[str, Any]) -> None:
            if not tables:
                tables.append(csv.DictWriter(file, list(row)))
                tables[0].writeheader()
            tables[0].writerow(row)
            file.flush()

        yield append


def _segment_means(
    videos: Sequence[Mapping[str, Sequence[float | None]]],
) -> dict[str, list[float | None]]:
    """Component -> the mean over the videos of each prompt segment, None where no video has it."""
    means: dict[str, list[float | None]] = {}
    for name in videos[0]:
        of_segments = itertools.zip_longest(*(video[name] for video in videos))
        found = ([x for x in values if x is not None] for values in of_segments)
        means[name] = [float(np.mean(values)) if values else None for values in found]
    return means


def segment_table(means: Mapping[str, Sequence[float | None]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of the prompt segments, from component -> mean of each."""
    count = max(map(len, means.values()))
    rows = [
        [name, *("" if x is None else f"{x:.4f}" for x in of), *[""] * (count - len(of))]
        for name, of in means.items()
    ]
    return ["by segment", *map(str, range(count))], rows


def pair(
    files: Sequence[Path], sequences: Sequence[prompts.PromptSequence]
) -> list[prompts.PromptSequence]:
    """The prompt sequence of every video.

    Where names are first sentences, they say which: `000_a_red_disk.mp4` as kvpo-generate writes
    it, or `a red disk-0.mp4`, of which there may be several. Where no name is, videos and sequences
    are paired in their orders.

    Raises:
      UsageError: videos and sequences do not belong together; the message says which do not.
    """
    fitting = [_fitting(path, sequences) for path in files]
    if not any(fitting):
        if len(files) != len(sequences):
            raise UsageError(
                f"{files[0].parent} has {len(files)} videos, but there are {len(sequences)} prompt"
                " sequences, and no name of a video is a prompt"
            )
        return list(sequences)
    if strangers := [path.name for path, found in zip(files, fitting, strict=True) if not found]:
        raise UsageError(
            f"{files[0].parent}: some videos are named by their prompts, but {listed(strangers)}"
            f" {'are' if len(strangers) > 1 else 'is'} named by none of the {len(sequences)} prompt"
            " sequences"
        )
    # Several sequences may begin with the same sentence: their videos are in the same order.
    alike = {found: [i for i, other in enumerate(fitting) if other == found] for found in fitting}
    chosen: dict[int, int] = {}
    for found, videos in alike.items():
        if len(found) not in (1, len(videos)):
            lines = listed([str(sequences[i].line) for i in found])
            raise UsageError(
                f"{files[videos[0]]}: its name fits the prompts of the lines {lines}; there are"
                f" {len(videos)} such videos for {len(found)} sequences"
            )
        chosen |= dict(zip(videos, found * len(videos) if len(found) == 1 else found, strict=True))
    if without := [s.sentences[0] for i, s in enumerate(sequences) if i not in chosen.values()]:
        raise UsageError(f"{files[0].parent} has no video of {listed(without)}")
    return [sequences[chosen[i]] for i in range(len(files))]


def _fitting(path: Path, sequences: Sequence[prompts.PromptSequence]) -> tuple[int, ...]:
    """Which sequences begin with the sentence that a video is named by."""
    stem = path.stem
    names = {prompts.slug(name) for name in (stem, re.sub(r"^\d+_|-\d+$", "", stem)) if name} - {""}

    def fits(sequence: prompts.PromptSequence) -> bool:
        words = prompts.slug(sequence.sentences[0])
        return any(name == words or (len(name) >= CUT and words.startswith(name)) for name in names)

    return tuple(i for i, sequence in enumerate(sequences) if fits(sequence))


def _videos(folder: Path) -> list[Path]:
    """The video files of a folder, in the order of their names with numbers read as numbers."""

    def parts(path: Path) -> list[tuple[bool, int | str]]:
        pieces = re.split(r"(\d+)", path.name)
        return [(not p.isdecimal(), int(p) if p.isdecimal() else p) for p in pieces]

    # A system writes files like ._a.mp4 beside a.mp4.
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in video.SUFFIXES
        and not path.name.startswith(".")
        and not path.is_dir()
    ]
    if not files:
        raise UsageError(f"{folder} has no videos ({', '.join(video.SUFFIXES)})")
    return sorted(sorted(files), key=parts)


def switch_pixels(sequence: prompts.PromptSequence, count: int) -> list[int]:
    """The frames of a video of `count` frames at which the prompts after the first begin.

    By the durations of the sequence if it has some: exactly for a video of so many latent frames,
    in proportion for a cut one. Else the segments have equal lengths.
    """
    segments, total = len(sequence.sentences), sum(sequence.durations)
    if not total:
        return [round(m * count / segments) for m in range(1, segments)]
    switch_frames = prompts.switch_frames(sequence)
    if count == composite.latent_to_pixel(total):
        return [composite.latent_to_pixel(frame) for frame in switch_frames]
    return [round(frame * count / total) for frame in switch_frames]


class Scored(NamedTuple):
    """The scores of a video.

    Attributes:
      scores: component -> score.
      segments: component of the scorers of clips -> the mean over the clips of each prompt segment;
        None of one that is too short to have a clip.
    """

    scores: dict[str, float]
    segments: dict[str, list[float | None]]


def score_file(
    scorer: composite.Scorer,
    path: Path,
    sequence: prompts.PromptSequence,
    clips: tuple[int, int],
    blocks: tuple[int, int] | None,
    size: tuple[int, int] | None = None,
) -> Scored:
    """Scores a video file; scorers of whole videos get all its frames.

    Args:
      scorer: see `composite.Scorer`.
      path: the file.
      sequence: its prompts.
      clips: clip_frames and clip_spacing, as in section `reward` of a config.
      blocks: pixel frames of a generator's first block and of every other one; None if unknown.
      size: height and width that the video was made with; None: as it is.

    Raises:
      UsageError: it is no whole video, or not of this size. An error of the scorer gets a note that
        names the file.
    """
    frames, sentences = video.read(path), sequence.sentences
    count, segments = len(frames), len(sentences)
    switches = switch_pixels(sequence, count)
    clip_frames, spacing = clips
    clipping = composite.Clipping(switches, clip_frames, int, spacing)
    try:
        frames = frames if size is None else video.reduced(frames, *size)
        pixels = jnp.asarray(frames[None, None])
        if not isinstance(scorer, scorers.Scorers):  # which make floats of what is scored
            pixels = preprocess.to_float(pixels)
        cut = composite.segment_clips(count, segments, clipping)
        whole = Pixels(pixels, None, ((0, count),))
        of_clips = composite.clip_rewards(scorer, whole, [sentences], cut)
        scores = composite.mean_rewards(of_clips)
        made: list[list[Mapping[str, np.ndarray]]] = [[] for _ in sentences]
        for clip, of_clip in zip(cut, of_clips, strict=True):
            made[clip.segment].append(of_clip)
        of_segments = [composite.mean_rewards(of) if of else None for of in made]
        alone = {
            name: [None if of is None else float(of[name][0, 0]) for of in of_segments]
            for name in scores
        }
        if isinstance(scorer, scorers.Scorers):
            starts = range(blocks[0], count, blocks[1]) if blocks else ()
            every = [composite.Clip(0, 0, count)]
            scores |= composite.video_rewards(scorer.of_videos, whole, [sentences], every, starts)
    except Exception as error:
        error.add_note(str(path))
        raise
    return Scored({name: float(value[0, 0]) for name, value in scores.items()}, alone)
