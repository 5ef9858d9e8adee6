"""Scores of video files: a table on the terminal and a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np

from kvpo_jax.data import prompts
from kvpo_jax.errors import UsageError
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import progress

SUFFIXES = (".mp4", ".webm", ".gif", ".mov")


def score(
    scorer: composite.Scorer,
    folder: Path,
    sequences: Sequence[prompts.PromptSequence],
    clip_frames: int,
    output: Path,
) -> dict[str, dict[str, float]]:
    """Scores every video of `folder`, writes a CSV file and prints a table.

    Each row is written at once: after an error, the rows before it are in `output`.part.

    Args:
      scorer: see `composite.Scorer`.
      folder: its videos are scored in the order of their names, 2.mp4 before 10.mp4.
      sequences: a prompt sequence for each video, in that order.
      clip_frames: as in section `reward` of a config.
      output: the CSV file; its folder is made.

    Returns:
      file name -> component -> score, and their "mean".

    Raises:
      UsageError: there are not as many prompt sequences as videos, or a file is not a video. An
        error of the scorer gets a note that names the file.
    """
    files = _videos(folder)
    if len(files) != len(sequences):
        raise UsageError(
            f"{folder} has {len(files)} videos, but there are {len(sequences)} prompt sequences"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = {}
    part = output.with_name(f"{output.name}.part")
    with part.open("w", newline="") as file, progress.bar("scoring", len(files)) as advance:
        for path, sequence in zip(files, sequences, strict=True):
            scores = _score_file(scorer, path, sequence.sentences, clip_frames)
            if not rows:
                table = csv.DictWriter(file, ["video", *scores])
                table.writeheader()
            rows[path.name] = scores
            table.writerow({"video": path.name, **scores})
            file.flush()
            advance(description=path.name)
    part.replace(output)
    names = list(next(iter(rows.values())))
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    cells = [[video, *(f"{row[name]:.4f}" for name in names)] for video, row in rows.items()]
    progress.table("", ["", *names], cells)
    print(f"wrote {output}", flush=True)
    return rows


def _videos(folder: Path) -> list[Path]:
    """The video files of a folder, in the order of their names with numbers read as numbers."""

    def parts(path: Path) -> list[tuple[bool, int | str]]:
        pieces = re.split(r"(\d+)", path.name)
        return [(not p.isdecimal(), int(p) if p.isdecimal() else p) for p in pieces]

    found = folder.iterdir() if folder.is_dir() else ()
    files = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UsageError(f"{folder} has no videos ({', '.join(SUFFIXES)})")
    return sorted(sorted(files), key=parts)


def _score_file(
    scorer: composite.Scorer, path: Path, sentences: Sequence[str], clip_frames: int
) -> dict[str, float]:
    """The components of a video file. Its prompt segments have equal lengths."""
    try:
        video = iio.imread(path)
    except Exception as error:  # a decoder's errors have no common type
        raise UsageError(f"{path} cannot be read as a video: {error}") from error
    frames, segments = len(video), len(sentences)
    pixels = jnp.asarray(video[None, None], jnp.float32) / 255
    switches = [round(m * frames / segments) for m in range(1, segments)]
    clipping = composite.Clipping(switches, clip_frames, to_pixel=int)
    try:
        scores = composite.segment_rewards(scorer, pixels, [sentences], clipping)
    except Exception as error:
        error.add_note(str(path))
        raise
    return {name: float(value[0, 0]) for name, value in scores.items()}
