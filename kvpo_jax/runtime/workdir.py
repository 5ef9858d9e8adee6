"""The run directory: where it is, and what it records of the run."""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import kvpo_jax
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.config import (
    PACKAGE,
    TINY,
    check,
    check_resumable,
    flat,
    from_record,
    load,
    load_saved,
    override,
    prompts_at_once,
    shipped,
    with_tuples,
)


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return bool(_steps(workdir))


def _steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints. A save under way has a longer name."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return [int(name) for name in names if name.isdigit()]


def _checkpoint_config(workdir: Path) -> ConfigDict | None:
    """The configuration that the newest checkpoint was made with; None if it does not say."""
    if not (steps := _steps(workdir)):
        return None
    # Orbax's JSON item, read without orbax: processes may still have to join.
    record = workdir / "checkpoints" / str(max(steps)) / "extra" / "metadata"
    try:
        saved = json.loads(record.read_text())["config"]
    except (OSError, ValueError, KeyError):  # damage is named when the checkpoint is restored
        return None
    return from_record(saved, record)


def run_directory(spec: str | None, workdir: str | None, resume: bool) -> Path:
    """Where the run is or will be.

    `workdir` if it is given; else the newest run under runs/ to resume, or a new directory there.
    """
    where = Path(workdir or "runs").absolute()
    if found := set("[]\\") & set(str(where)):
        raise UsageError(
            f"{where}: orbax cannot read checkpoints from a path with {' '.join(sorted(found))}"
        )
    if workdir:
        if Path(workdir).is_file():
            raise UsageError(f"--workdir={workdir} is a file; name a directory")
        if resume and not (Path(workdir) / "config.json").exists():
            raise UsageError(f"--resume: there is no run in {workdir}")
        return Path(workdir)
    if resume:
        configs = list(Path("runs").glob("*/config.json"))
        if not configs:
            raise UsageError(f"--resume: there is no run under {Path('runs').absolute()}")
        return max(configs, key=lambda file: file.stat().st_mtime).parent
    path, _, preset = (spec or TINY).partition(":")
    name = "-".join(
        [Path(path).stem, *([preset] if preset else []), time.strftime("%Y%m%d-%H%M%S")]
    )
    candidates = (Path("runs", f"{name}-{i}" if i else name) for i in itertools.count())
    return next(path for path in candidates if not path.exists())


def resolve(spec: str | None, workdir: Path | None, arguments: Sequence[str]) -> ConfigDict:
    """The checked configuration of the run in `workdir`, new or continued.

    A continued run that is given no `spec` keeps its own configuration, with `arguments` over it.
    Before there is a checkpoint, any configuration may replace the one that is saved; afterwards
    the newest checkpoint says what the run is, for config.json may have been edited or lost.
    """
    saved = made_with = None
    if workdir is not None:
        if (workdir / "config.json").exists():
            saved = load_saved(workdir / "config.json")
        if has_checkpoint(workdir):
            made_with = _checkpoint_config(workdir) or saved
            saved = saved or made_with
    base = saved if saved is not None and spec is None else load(spec or str(shipped(TINY)))
    config = override(base, arguments)
    check(config)
    if made_with is not None:
        check_resumable(made_with, config)
    return config


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the run directory and holds it for the main process of one run.

    The lock is the kernel's: it goes with the process, however that ends.

    Raises:
      UsageError: another process holds it; the message says which.
    """
    if not sharding.is_main():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(f"{workdir}: a run is under way here, {file.read()}") from error
        except OSError as error:  # a file system without locks
            print(f"{workdir} cannot be locked ({error}): start no second run in it", flush=True)
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()} since {now}")
        file.flush()
        yield


def start_run(config: ConfigDict, workdir: Path, at_once: int | None = None) -> None:
    """Writes config.json and versions.json, and prints how a continued run differs from them.

    Args:
      config: as it was asked for.
      workdir: the run directory.
      at_once: prompts at a time, if the devices have chosen; None: as the config says.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    now_versions = {**versions(), "prompts_at_once": at_once or prompts_at_once(config)}
    for record, now, what in (
        (workdir / "config.json", config.to_dict(), "continued with another configuration"),
        (workdir / "versions.json", now_versions, "not bit for bit the run that was interrupted"),
    ):
        if has_checkpoint(workdir) and record.exists():
            before = flat(with_tuples(json.loads(record.read_text())))
            pairs = [(name, before.get(name, value), value) for name, value in flat(now).items()]
            if changed := [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]:
                print(f"{what}: {', '.join(changed)}", flush=True)
        write_json(now, record)


def versions() -> dict[str, Any]:
    """What this run's numbers depend on besides its configuration."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    devices = jax.devices()
    return {
        "kvpo_jax": kvpo_jax.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that holds the package, "-dirty" if it has changes.

    None outside of a checkout.
    """
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(PACKAGE.parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return done.stdout.strip()
