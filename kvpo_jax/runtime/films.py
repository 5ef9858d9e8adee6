"""The videos of a run directory: their names, and their writer.

videos/iteration_00020/prompt_0_anchor.mp4, prompt_0_branch_3.mp4
videos/heldout_00040/000_online.mp4, 000_ema.mp4; videos/heldout_00000/000_reference.mp4
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvpo_jax.runtime import video
from kvpo_jax.runtime.worker import Worker

FOLDER = "videos"
WAITING = 8  # videos that wait for ffmpeg; more would fill the memory where it is slow
NAMES = {
    "iteration": re.compile(r"prompt_(?P<prompt>\d+)_(?P<name>anchor|branch_\d+)\.mp4"),
    "heldout": re.compile(r"(?P<prompt>\d+)_(?P<name>\w+)\.mp4"),
}
STEP = re.compile(rf"({'|'.join(NAMES)})_(\d+)")


class Film(NamedTuple):
    """What a video of a run shows.

    Attributes:
      kind: "iteration", of anchor and branches, or "heldout".
      step: the number of the iteration, as in branches.jsonl; of "heldout", how many were done, as
        in heldout.jsonl.
      prompt: the number of its prompt among those of the iteration, or among the held-out ones.
      name: "anchor" or "branch_3"; of "heldout", the policy.
    """

    kind: str
    step: int
    prompt: int
    name: str

    @property
    def path(self) -> Path:
        """Where it is, relative to the run directory."""
        heldout = self.kind == "heldout"
        prompt = f"{self.prompt:03d}" if heldout else f"prompt_{self.prompt}"
        return Path(FOLDER, f"{self.kind}_{self.step:05d}", f"{prompt}_{self.name}.mp4")


def branch_names(branches: int) -> list[str]:
    """The `Film.name` of an anchor and of so many branches, in this order."""
    return ["anchor", *(f"branch_{g}" for g in range(branches))]


def film_of(path: Path) -> Film | None:
    """What the video at this path shows; None if it is none of a run."""
    if (step := STEP.fullmatch(path.parent.name)) is None:
        return None
    if (named := NAMES[step[1]].fullmatch(path.name)) is None:
        return None
    return Film(step[1], int(step[2]), int(named["prompt"]), named["name"])


def films_in(workdir: Path) -> dict[Film, Path]:
    """The whole videos of a run directory, in order: by kind, step and prompt."""
    found = {film_of(path): path for path in (workdir / FOLDER).glob("*/*.mp4")}
    films = [film for film in found if film is not None]
    return {film: found[film] for film in sorted(films, key=_order)}


def _order(film: Film) -> tuple:
    """A key that counts branches as numbers: branch_10 is behind branch_9."""
    name, _, number = film.name.partition("_")
    return film.kind, film.step, film.prompt, name, int(number or 0)


def cut(workdir: Path, iterations: int, evaluations: int) -> None:
    """Leaves whole videos of the iterations and evaluations before these."""
    end = {"iteration": iterations, "heldout": evaluations}
    for folder in (workdir / FOLDER).glob("*"):
        step = STEP.fullmatch(folder.name)
        if step is not None and int(step[2]) >= end[step[1]]:
            shutil.rmtree(folder)
    for part in (workdir / FOLDER).glob("*/*.part"):
        part.unlink()


class FilmWriter:
    """Writes the videos of a run in a thread of its own.

    An error of ffmpeg is raised by the next call, at the latest by `close`.

    Args:
      workdir: the run directory.
      fps: frames per second.
    """

    def __init__(self, workdir: Path, fps: float):
        self._workdir, self._fps = workdir, fps
        self._worker = Worker("videos", WAITING)

    def write(self, film: Film, pixels: np.ndarray) -> None:
        """Writes a video uint8[frames, h, w, 3], soon."""
        self._worker.call(video.write, self._workdir / film.path, pixels, self._fps)

    def flush(self) -> None:
        """Waits until all videos are written."""
        self._worker.wait()

    def close(self) -> None:
        """Writes what waits and ends the thread, also after an error."""
        self._worker.close()
