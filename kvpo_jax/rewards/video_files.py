"""Scores of video files: a table on the terminal and a CSV file."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    """Scores every video of `folder`, writes a CSV file and prints a table.

    Each row is written at once: after an error, the rows before it are in `output`.part.

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
    rows: dict[str, dict[str, float]] = {}
    with (
        keeping_part(output) as part,
        part.open("w", newline="", encoding="utf-8") as file,
        progress.bar("scoring", len(files)) as advance,
    ):
        for path, sequence in pairs:
            scores = score_file(scorer, path, sequence, clips, blocks).scores
            if not rows:
                names = list(scores)
                table = csv.DictWriter(file, ["video", "prompt", *names])
                table.writeheader()
            if list(scores) != names:
                raise UsageError(
                    f"{path}: the rewards are {', '.join(scores)}, those of the videos before it"
                    f" {', '.join(names)}"
                )
            rows[path.name] = scores
            prompt = " | ".join(sequence.sentences)
            table.writerow({"video": path.name, "prompt": prompt, **scores})
            file.flush()
            advance(description=path.name)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    shown = [*(textwrap.shorten(s.sentences[0], SHOWN, placeholder="...") for _, s in pairs), ""]
    cells = [
        [name, prompt, *(f"{row[column]:.4f}" for column in names)]
        for (name, row), prompt in zip(rows.items(), shown, strict=True)
    ]
    progress.table("", ["", "prompt", *names], cells)
    print(f"wrote {output}", flush=True)
    return rows


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
      segments: component of the scorers of clips -> the mean over the clips of each prompt segment
        that has one.
    """

    scores: dict[str, float]
    segments: dict[str, list[float]]


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
        pairs = [*zip(cut, of_clips, strict=True)]
        of_segments = [
            composite.mean_rewards([made for clip, made in pairs if clip.segment == segment])
            for segment in sorted({clip.segment for clip in cut})
        ]
        alone = {name: [float(made[name][0, 0]) for made in of_segments] for name in scores}
        if isinstance(scorer, scorers.Scorers):
            starts = range(blocks[0], count, blocks[1]) if blocks else ()
            every = [composite.Clip(0, 0, count)]
            scores |= composite.video_rewards(scorer.of_videos, whole, [sentences], every, starts)
    except Exception as error:
        error.add_note(str(path))
        raise
    return Scored({name: float(value[0, 0]) for name, value in scores.items()}, alone)
