"""Reads what a run directory says of its run. It imports no JAX, and no module that a config names.

What is in the files: docs/runs.md, and `metrics.branch_records`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kvpo_jax.errors import UsageError

ANY = "*"  # in a kind: every other name
NUMBER = (int, float, type(None))  # null is what was not finite
NUMBERS = [NUMBER]
BY_NAME = {ANY: NUMBERS}
BY_NUMBER = {ANY: NUMBER}

# What a line of a file must have; it may have more.
METRICS = {"iteration": int, ANY: NUMBER}
PER_BRANCH = {
    "reward": NUMBERS,
    "routed": [[int]],
    "advantage": NUMBERS,
    "energy": NUMBERS,
    "energy_old": NUMBERS,
    "energy_reference": NUMBERS,
    "probability": NUMBERS,
    "ratio": NUMBERS,
}
BRANCHES = {
    "iteration": int,
    "prompt": [str],
    "pivot": int,
    "fork_frame": int,
    "window": [int],
    "reward_anchor": NUMBER,
    "components": {ANY: {"branches": NUMBERS, "anchor": NUMBER}},
    "gate_open": bool,
    **PER_BRANCH,
}
HELDOUT = {
    "iteration": int,
    "prompt": [[str]],
    "reward": {"reference": NUMBERS, "online": NUMBERS, "ema": NUMBERS},
    "components": {"reference": BY_NAME, "online": BY_NAME, "ema": BY_NAME},
    "optimised": [str],
    "first_pivot": int,
    "blocks": BY_NAME,
}
SCORED = {"prompt": int, "sample": int, "file": str, "scores": BY_NUMBER, "segments": BY_NAME}


@dataclasses.dataclass(frozen=True)
class Records:
    """What a run has written down; empty where there is no such file.

    Attributes:
      config: config.json as it is; a run of an older version lacks newer fields.
      metrics: metrics.jsonl, one object per iteration; None for what was not finite.
      branches: branches.jsonl, one object per iteration and prompt.
      heldout: heldout.jsonl, one object per evaluation.
      summary: summary.json.
      versions: versions.json.
    """

    config: ConfigDict
    metrics: Sequence[Mapping[str, Any]]
    branches: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    versions: Mapping[str, Any]


def read_run(workdir: Path | str) -> Records:
    """The records of the run in `workdir`, under way or finished.

    A last line that is not whole, as of a run that writes it now, is left out.

    Raises:
      UsageError: there is no run in `workdir`, or a file is damaged; it names file and line.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UsageError(f"{workdir} is not the directory of a run: there is no such directory")
    if not any((workdir / name).exists() for name in ("config.json", "metrics.jsonl")):
        raise UsageError(
            f"{workdir} is not the directory of a run: it has no config.json and no metrics.jsonl"
        )
    branches = lines_in(workdir / "branches.jsonl", BRANCHES)
    return Records(
        config=ConfigDict(with_tuples(object_in(workdir / "config.json"))).lock(),
        metrics=lines_in(workdir / "metrics.jsonl", METRICS),
        branches=branches,
        heldout=lines_in(workdir / "heldout.jsonl", HELDOUT),
        summary=object_in(workdir / "summary.json"),
        versions=object_in(workdir / "versions.json"),
    )


def with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: with_tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} without the file. UsageError that names it if it is damaged."""
    return _parsed(path.read_bytes(), str(path), {}) if path.exists() else {}


def lines_in(path: Path, kind: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; [] without the file.

    Args:
      path: the file. A last line that is not whole is left out.
      kind: what each object must have, as METRICS and the others; see `_fault`.

    Raises:
      UsageError: a line is damaged, or no such object; it names file and line.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    return [_parsed(line, f"{path}:{number}", kind) for number, line in enumerate(lines, 1)]


def _parsed(text: bytes, place: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    """An object of this kind; UsageError that begins with its `place` if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or not even text
        raise UsageError(f"{place} is damaged: {error}; remove it or put it right") from error
    fault = _fault(value, kind, "")
    if not fault and kind is BRANCHES:
        count = len(value["reward"])
        other = [name for name in PER_BRANCH if len(value[name]) != count]
        fault = f"{other[0]} is not of the {count} branches of reward" if other else ""
    if fault:
        raise UsageError(f"{place} is damaged: {fault}; remove it or put it right")
    return value


def _fault(value: Any, kind: Any, name: str) -> str:
    """What of a JSON value is not of a kind; "" if nothing is.

    A kind is a type, a tuple of types, a list of one kind, or name -> kind of an object.
    """
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is no object"
        below = f"{name}." if name else ""
        if missing := [key for key in kind if key != ANY and key not in value]:
            return f"there is no {below}{missing[0]}"
        inner = {key: kind.get(key, kind.get(ANY)) for key in value}
        found = (
            _fault(value[key], inner[key], f"{below}{key}")
            for key in value
            if inner[key] is not None
        )
        return next(filter(None, found), "")
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        found = (_fault(x, kind[0], f"{name}[{i}]") for i, x in enumerate(value))
        return next(filter(None, found), "")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) in kinds and not (type(value) is int and abs(value) >= 2**63):
        return ""
    words = {int: "a whole number", str: "text", bool: "true or false"}
    expected = "a number" if kind is NUMBER else words[kind]
    return f"{name} is {json.dumps(value)[:40]}, not {expected}"
