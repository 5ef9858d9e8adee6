"""What VBench wants generated: prompts, samples, and the names of the video files.

VBench finds a video by its name, `{prompt}-{sample}.mp4` with the prompt as its list has it; what
is generated from may be a longer text of the same line. Custom videos may have any name, and a JSON
file that says the prompt of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpo_jax.data import prompts
from kvpo_jax.errors import UsageError

SAMPLES = 5  # videos of a prompt
FILTERED = 25  # of prompts of temporal flickering, from which a filter chooses static ones
FLICKERING = "temporal_flickering"
LONGEST = 255  # bytes of a file name, on all usual file systems


def plan(
    originals: Path, extended: Path | None, info: Path | None, samples: int, numbered: bool
) -> list[dict[str, Any]]:
    """A record per different prompt: "prompts" (to generate from), "original", "videos" (names).

    Args:
      originals: the list, a prompt per line; a prompt that occurs again is left out.
      extended: the longer text of every line; None generates from the list itself.
      info: VBench_full_info.json, which tells the prompts of temporal flickering; None for none.
      samples: videos of each other prompt.
      numbered: name videos by the number of their prompt, for custom prompts of any length.

    Raises:
      UsageError: the lists have not the same lines, or a prompt cannot be a file name.
    """
    flicker = _flickering(info) if info is not None else set()
    records: dict[str, dict[str, Any]] = {}
    known = _single(originals)
    longer = known if extended is None else _single(extended)
    if len(longer) != len(known):
        raise UsageError(
            f"{extended} has {len(longer)} prompts and {originals} {len(known)}; line i of one must"
            " extend line i of the other"
        )
    for (line, original), (_, text) in zip(known, longer, strict=True):
        if original in records:
            continue
        count = FILTERED if original in flicker else samples
        name = f"{len(records):04d}" if numbered else original
        if not numbered:
            _check_name(f"{originals}:{line}", f"{name}-{count - 1}.mp4")
        videos = [f"{name}-{sample}.mp4" for sample in range(count)]
        records[original] = {"prompts": [text], "original": original, "videos": videos}
    return list(records.values())


def names(plan: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """file name -> original prompt, as VBench's --prompt_file has it."""
    return {name: record["original"] for record in plan for name in record["videos"]}


def _single(path: Path) -> list[tuple[int, str]]:
    """(line, prompt) of a list of single prompts."""
    sequences = prompts.load(path)
    if several := [s.line for s in sequences if len(s.sentences) > 1]:
        raise UsageError(f"{path}:{several[0]}: expected one prompt per line")
    return [(s.line, s.sentences[0]) for s in sequences]


def _flickering(path: Path) -> set[str]:
    """The prompts of temporal flickering."""
    try:
        made = json.loads(prompts.read_text(path))
        return {entry["prompt_en"] for entry in made if FLICKERING in entry["dimension"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no VBench_full_info.json ({error!r})") from error


def _check_name(where: str, name: str) -> None:
    """UsageError, beginning with `where`, unless a file can have the name."""
    if "/" in name or len(name.encode()) > LONGEST:
        raise UsageError(
            f"{where}: no file can be called {name[:40]!r}... (a slash, or more than {LONGEST}"
            " bytes): use --custom, which numbers the videos"
        )
