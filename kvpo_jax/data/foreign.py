"""Prompt files of neighbouring projects as prompt sequences.

LongLive 1.0's pairs of files, LongLive 2.0's folders of captions, infinity-rope's timed prompts.
MemFlow's and LongLive's `.jsonl`, and VBench's lists, are read by `prompts.load` as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvpo_jax.data import prompts
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError

_TIMED = re.compile(r"(?P<sentence>.*?)\s*\[\s*(?P<length>\d+(?:\.\d+)?)\s*s?\s*#?\s*\]", re.DOTALL)
DURATIONS = "shot_durations.txt"


class Clock(NamedTuple):
    """How long a video is in latent frames.

    Attributes:
      fps: latent frames per second: 4 of Wan, for 16 pixel frames.
      block_frames: latent frames of a block, the least that a prompt can have.
    """

    fps: float = 4.0
    block_frames: int = 3

    def durations(self, seconds: Sequence[float], where: str) -> tuple[int, ...]:
        """Latent frames of segments of so many seconds, in whole blocks.

        Their ends are rounded, so that no error adds up. UsageError, beginning with `where`, if one
        is too short for a block.
        """
        ends, total = [0], 0.0
        for number, length in enumerate(seconds, start=1):
            total += length
            ends.append(round(total * self.fps / self.block_frames) * self.block_frames)
            if ends[-1] == ends[-2]:
                raise UsageError(
                    f"{where}: segment {number} lasts {length:g} s, and a block of"
                    f" {self.block_frames} latent frames {self.block_frames / self.fps:g} s"
                )
        return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def pairs(paths: Sequence[Path]) -> list[PromptSequence]:
    """Sequence i has line i of every file, as LongLive's `TwoTextDataset` reads two.

    Raises:
      UsageError: the files have not the same lines, or one has sequences of several sentences.
    """
    if len(paths) < 2:
        raise UsageError("name two files or more, the first with the first prompts")
    columns = [prompts.load(path) for path in paths]
    for path, column in zip(paths, columns, strict=True):
        if long := [s.line for s in column if len(s.sentences) > 1]:
            raise UsageError(f"{path}:{long[0]}: expected one prompt per line")
    for path, column in zip(paths[1:], columns[1:], strict=True):
        lines = [s.line for s in columns[0]], [s.line for s in column]
        if lines[0] != lines[1]:
            odd = min(set(lines[0]) ^ set(lines[1]))
            raise UsageError(
                f"{path}: only one of it and {paths[0]} has a prompt in line {odd}; the files must"
                " have the same lines"
            )
    return [
        PromptSequence(tuple(s.sentences[0] for s in row), row[0].line)
        for row in zip(*columns, strict=True)
    ]


def timed(path: Path, clock: Clock) -> list[PromptSequence]:
    """The sequences of a `.txt` of infinity-rope: `first prompt[10s] | second[5s]; labels`.

    Segments are separated by `|`, or just follow each other. A `#` in the brackets, which asks for
    a cut, is dropped, and so are the labels behind a semicolon.
    """
    sequences = []
    for number, line in enumerate(prompts.read_text(path).split("\n"), start=1):
        if line.strip():
            sequences.append(_timed_line(line, number, f"{path}:{number}", clock))
    if not sequences:
        raise UsageError(f"{path} has no prompts")
    return sequences


def _timed_line(line: str, number: int, where: str, clock: Clock) -> PromptSequence:
    found, end = [], 0
    for match in _TIMED.finditer(line):
        found.append((match["sentence"].strip(" |\t"), float(match["length"])))
        end = match.end()
    rest = line[end:].strip()
    if not found or (rest and not rest.startswith(";")) or not all(s for s, _ in found):
        lost = rest or line.strip()
        raise UsageError(
            f"{where}: {lost[:60]!r} has no duration; a line reads first[10s] | last[5s]"
        )
    durations = clock.durations([length for _, length in found], where)
    return PromptSequence(tuple(sentence for sentence, _ in found), number, durations)


def captions(folder: Path, block_frames: int) -> list[PromptSequence]:
    """A sequence of every folder of captions of LongLive 2.0, in the order of their names.

    A folder has 0.json, 1.json, ..., each with a "caption", and may have DURATIONS: the number of
    blocks of each. Its parent is `folder`, or `folder`/caption.
    """
    root = folder / "caption" if (folder / "caption").is_dir() else folder
    shots = sorted(path for path in root.iterdir() if path.is_dir())
    if not shots and any(root.glob("*.json")):
        shots = [root]
    if not shots:
        raise UsageError(f"{root} has no folders of captions (0.json, 1.json, ...)")
    return [_shot(path, line, block_frames) for line, path in enumerate(shots, start=1)]


def _shot(folder: Path, line: int, block_frames: int) -> PromptSequence:
    files = sorted((p for p in folder.glob("*.json") if p.stem.isdecimal()), key=_number)
    if [_number(path) for path in files] != list(range(len(files))) or not files:
        raise UsageError(f"{folder}: expected captions 0.json, 1.json, ... without a gap")
    sentences = tuple(map(_caption, files))
    path = folder / DURATIONS
    if not path.is_file():
        return PromptSequence(sentences, line)
    blocks = prompts.read_text(path).replace(",", " ").split()
    if len(blocks) != len(sentences) or not all(b.isdecimal() and int(b) > 0 for b in blocks):
        raise UsageError(
            f"{path}: expected {len(sentences)} numbers of blocks, one per caption, found"
            f" {' '.join(blocks)[:60]!r}"
        )
    return PromptSequence(sentences, line, tuple(int(b) * block_frames for b in blocks))


def _number(path: Path) -> int:
    return int(path.stem)


def _caption(path: Path) -> str:
    try:
        caption = json.loads(prompts.read_text(path))["caption"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}: expected {{"caption": "..."}} ({error!r})') from error
    if not isinstance(caption, str) or not caption.strip():
        raise UsageError(f'{path}: "caption" is no text')
    return " ".join(caption.split())
