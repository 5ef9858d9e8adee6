"""The run directory: where it is, and what it records of the run."""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict

import kvpo_jax
from kvpo_jax.errors import UsageError, shortened
from kvpo_jax.runtime import checkpoint as checkpoint_lib
from kvpo_jax.runtime import progress, sharding
from kvpo_jax.runtime.atomic import naming, write_json
from kvpo_jax.runtime.checkpoint import NEWEST, Which
from kvpo_jax.runtime.config import (
    PACKAGE,
    TINY,
    another_run,
    check,
    check_resumable,
    flat,
    from_record,
    load,
    load_saved,
    named_fields,
    override,
    prompts_at_once,
    shipped,
    with_resumable,
)
from kvpo_jax.runtime.records import object_in, with_tuples


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return bool(checkpoint_lib.steps(workdir / "checkpoints"))


def _record(workdir: Path, which: Which = NEWEST) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint and its JSON record; None if there are none, or if it is a damaged one.

    It is read without orbax, because processes may still have to join.
    """
    folder = workdir / "checkpoints"
    while (step := checkpoint_lib.chosen(folder, which)) is not None:
        path = folder / str(step)
        try:
            return path, checkpoint_lib.record(path)
        except (OSError, ValueError):
            if checkpoint_lib.chosen(folder, which) == step:  # else a run has deleted it meanwhile
                return None  # damage is named when the checkpoint is restored
    return None


def _checkpoint_config(workdir: Path, which: Which = NEWEST) -> tuple[Path, ConfigDict] | None:
    """A checkpoint, and the configuration that it was made with; None if it has none."""
    if (found := _record(workdir, which)) is None or "config" not in found[1]:
        return None
    path, record = found
    return path, from_record(record["config"], path)


def trained_config(workdir: Path, which: Which = NEWEST) -> ConfigDict:
    """The configuration of a run, to look at what it has trained.

    That of its checkpoint, for config.json may have been edited or lost. A line says how it
    differs. Fields in which a continued run may differ, as where its files are, are config.json's.

    Raises:
      UsageError: there is no run in `workdir`, or not this checkpoint of it.
    """
    written = workdir / "config.json"
    if (found := _checkpoint_config(workdir, which)) is None:
        return load_saved(written)
    checkpoint, trained = found
    try:
        saved = load_saved(written) if written.exists() else None
        fault = f"there is no {written}"
    except UsageError as error:
        saved, fault = None, str(error)
    if saved is None:
        print(f"{fault}; the configuration of {checkpoint} is taken", flush=True)
        return trained
    if names := another_run(trained, saved):
        now, then = flat(saved), flat(trained)
        changed = [f"{name}={now.get(name)!r} is not {then.get(name)!r}" for name in names]
        change = f"{written} was changed, {shortened(changed)}"
        print(f"{change}; the configuration of {checkpoint} is taken", flush=True)
    return with_resumable(trained, saved)


def _is_run(workdir: Path) -> bool:
    return (workdir / "config.json").exists() or has_checkpoint(workdir)


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
        if resume and not _is_run(Path(workdir)):
            raise UsageError(f"--resume: there is no run in {workdir}")
        if not resume and has_checkpoint(where) and not (where / "config.json").exists():
            raise UsageError(
                f"{workdir} has checkpoints and no config.json; --resume continues the run that the"
                " newest of them was made with"
            )
        return Path(workdir)
    if resume:
        runs = [path for path in Path("runs").glob("*") if _is_run(path)]
        if not runs:
            raise UsageError(f"--resume: there is no run under {Path('runs').absolute()}")

        def started(path: Path) -> float:
            record = path / "config.json"
            return (record if record.exists() else path / "checkpoints").stat().st_mtime

        return max(runs, key=started)
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

    Sizes of the generator are those of its weight file, see `_sized`.
    """
    saved = made_with = None
    if workdir is not None:
        if (workdir / "config.json").exists():
            saved = load_saved(workdir / "config.json")
        if has_checkpoint(workdir):
            _, made_with = _checkpoint_config(workdir) or (None, saved)
            saved = saved or made_with
            if saved is None:
                raise UsageError(
                    f"{workdir}: its newest checkpoint does not say what it was made with, and"
                    " there is no config.json; put that of the run back"
                )
    base = saved if saved is not None and spec is None else load(spec or str(shipped(TINY)))
    config = _sized(override(base, arguments), named_fields(arguments))
    check(config)
    if made_with is not None:
        check_resumable(made_with, config)
    return config


def _sized(config: ConfigDict, named: Sequence[str]) -> ConfigDict:
    """The config with the sizes that the converted file in config.weights says of its generator.

    A line says which sizes of a configuration file they replace.

    Args:
      config: with the flags over it. A file that is not there is left to `backbone.check_files`.
      named: fields that flags have set. They stay, and must be the file's. But for
        model.text_len, on which no weight depends.

    Raises:
      UsageError: a flag asks for another size, or the file says what no generator has.
    """
    path, model = config.weights, config.model
    if not path or not Path(path).is_file():
        return config
    sizes = checkpoint_lib.generator_sizes(path)
    for name, size in sizes.items():
        if name not in model or _kinds(size) != _kinds(model[name]):
            raise UsageError(
                f"{path} says {name}={size!r} of its generator, which is no size of one here; make"
                " it with kvpo-convert"
            )
    other = {name: size for name, size in sizes.items() if size != model[name]}
    asked = [name for name in other if f"model.{name}" in named]
    if wrong := [name for name in asked if name != "text_len"]:
        raise UsageError(
            f"{path} has {_listed(other, wrong)}, the command line"
            f" {_listed(model, wrong, 'config.model.')}; leave out what the file says, or bring"
            " weights of these sizes"
        )
    if taken := [name for name in other if name not in asked]:
        has = _listed(other, taken)
        progress.say(f"{path} has {has}, taken in place of the config's {_listed(model, taken)}")
    sized = config.copy_and_resolve_references().unlock()
    sized.model.update({name: other[name] for name in taken})
    return sized.lock()


def _kinds(value: Any) -> Any:
    """The type of a value, or the types in a tuple."""
    return [type(x) for x in value] if isinstance(value, tuple) else type(value)


def _listed(values: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> str:
    """Some of the values with their names, "dim=1536, num_layers=30"."""
    return ", ".join(f"{prefix}{name}={values[name]}" for name in names)


MANIFEST = "manifest.json"  # of a folder that a command fills: what it is made of


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks that what a folder was begun with is what it is continued with.

    Args:
      folder: it may have a MANIFEST, and one of each further process, `manifest_of_process`; keys
        of them that are not in `manifest` do not count.
      manifest: of this command, what JSON can hold.

    Raises:
      UsageError: a field is another one; the message names it.
    """
    for path in sorted(folder.glob("manifest*.json")):
        if (other := difference(object_in(path), manifest)) is not None:
            raise UsageError(f"{folder} was begun with {other}; choose another --output")


def manifest_of_process(process: int) -> str:
    """The name of the manifest of a process that shares a folder with others."""
    return f"manifest_{process}.json" if process else MANIFEST


def difference(before: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """The first field of `manifest` that was another one, "seed 0, not 1"; None if none was."""
    kept = {name: before.get(name) for name in manifest}
    then, now = (flat(with_tuples(json.loads(json.dumps(x)))) for x in (kept, manifest))
    for name in [*now, *then]:
        if then.get(name) != now.get(name):
            old, new = (textwrap.shorten(repr(x.get(name)), 100) for x in (then, now))
            return f"{name} {old}, not {new}"
    return None


@contextmanager
def locked(workdir: Path, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Makes the run directory and holds it for the main process of one run.

    The lock is the kernel's: it goes with the process, however that ends.

    Args:
      workdir: the directory.
      name: of the file that is locked; processes that share a directory have one each.
      wait: whether to wait for another process that holds it.

    Raises:
      UsageError: another process holds it, and is not waited for; the message says which.
    """
    if not sharding.is_main():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / name, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(f"{workdir}: a run is under way here, {file.read()}") from error
        except OSError as error:  # a file system without locks
            print(f"{workdir} cannot be locked ({error}): start no second run in it", flush=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {platform.node()} since {now}"
        with naming(Path(file.name)):
            file.truncate(0)
            os.write(file.fileno(), owner.encode())  # a buffer would be written again at the end
        yield


def start_run(
    config: ConfigDict,
    workdir: Path,
    files: Mapping[str, str] = MappingProxyType({}),
    at_once: int | None = None,
) -> None:
    """Writes config.json, versions.json and files.json, and prints how a continued run differs.

    Args:
      config: as it was asked for.
      workdir: the run directory; it is made if it does not exist.
      files: what names it -> checksum of every file that is read. A run that is continued compares
        them with those of its newest checkpoint.
      at_once: prompts at a time, if the devices have chosen; None: as the config says.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint, saved = _record(workdir) or (None, {})
    for name, before in saved.get("files", {}).items():
        if files.get(name, before) != before:
            field = flat(config).get(name.removeprefix("config."))
            print(
                f"{name}{f'={field}' if field else ''} has changed since {checkpoint}: its checksum"
                f" was {before} and is {files[name]}",
                flush=True,
            )
    write_json(dict(files), workdir / "files.json")
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


def finished(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """What summary.json holds, if the run has nothing left to do.

    That is so if it is of the newest checkpoint and of the same held-out evaluation, and if it has
    config.train.iterations, or has no passes left of config.train.budget_passes for another one.
    """
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        done, evaluated = summary["iterations"], with_tuples(summary["eval"])
        # A version that counted no passes had no budget to end a run.
        spent = 0 < config.train.budget_passes < summary.get("passes_with_another_iteration", 0)
        whole = done >= config.train.iterations or spent
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or not a whole one
        return None
    newest = done == (checkpoint_lib.chosen(workdir / "checkpoints", NEWEST) or 0)
    return summary if whole and newest and evaluated == config.eval.to_dict() else None


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
