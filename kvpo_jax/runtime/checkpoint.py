"""What a run saves: its train state (orbax) and weight files (safetensors).

The train state is saved exactly, in the background, whole or not at all, with a checksum of every
leaf: a changed bit is an error when it is read. Weight files are read strictly: a tensor that is
missing, left over or of another shape is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from kvpo_jax.errors import SaveError, UsageError, shortened
from kvpo_jax.models.layers import config_from_dict
from kvpo_jax.runtime import progress, sharding, sums, weight_file
from kvpo_jax.types import PyTree

T = TypeVar("T")

# ---------------------------------------------------------------- train state

# In a checkpoint's JSON record:
LEAVES = "sums"  # name of a leaf -> its checksum
REWARD = "heldout_reward"  # what its policy got, if it was evaluated

NEWEST, BEST = "newest", "best"
Which = int | str  # a checkpoint: the number of its iteration, NEWEST, or BEST by its reward


def manager(directory: Path | str, keep: int, keep_best: int = 0) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run and clears away what a killed save has left.

    A save is written beside the others and committed at the end, so a kill at any moment leaves the
    last whole one. The caller closes the manager, which waits for the save in progress; it is a
    context manager too. Several processes open, save, restore and close together, in a directory
    that all of them see.

    Args:
      directory: made if it does not exist.
      keep: how many checkpoints are kept, the newest.
      keep_best: how many are kept besides, if they are not among those: the best by their rewards.
    """
    kept = policies.AnyPreservationPolicy(
        [policies.LatestN(keep), _Best(Path(directory), keep_best)]
    )
    return _open(
        directory,
        ocp.CheckpointManagerOptions(preservation_policy=kept, cleanup_tmp_directories=True),
    )


def reader(directory: Path | str) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run to read them. It changes nothing; the run may be under way."""
    return _open(directory, ocp.CheckpointManagerOptions(read_only=True))


def _open(directory: Path | str, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        Path(directory).absolute(), options=options, item_handlers=handlers
    )


@dataclasses.dataclass(frozen=True)
class _Best(policies.PreservationPolicy):
    """Keeps the `n` best checkpoints of a directory by their rewards.

    Orbax's own BestN reads them from a file without a checksum, and if that is damaged, it opens
    no checkpoint at all.
    """

    directory: Path
    n: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: policies.PreservationContext
    ) -> list[bool]:
        # The newest one may not have been written yet.
        saved = {x.step: (x.metrics or {}).get(REWARD) for x in checkpoints}
        found = {x: _reward(self.directory, x) if saved[x] is None else saved[x] for x in saved}
        ranked = _ranked(found)
        kept = ranked[-self.n :] if self.n else []
        return [x.step in kept for x in checkpoints]


def _reward(directory: Path, step: int) -> float | None:
    """What the policy of a checkpoint got; None if that is not known."""
    try:
        return record(directory / str(step)).get(REWARD)
    except (OSError, ValueError):
        return None


def _ranked(rewards: Mapping[int, float | None]) -> list[int]:
    """The steps that have a reward, the best last; of equal ones the newest."""
    known = [(reward, step) for step, reward in rewards.items() if reward is not None]
    return [step for _, step in sorted(known)]


def steps(directory: Path) -> list[int]:
    """The checkpoints that there are, in order. A save under way has a longer name."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def record(path: Path) -> dict[str, Any]:
    """The JSON record of the checkpoint in the folder `path`, as it was saved; read without orbax.

    Raises:
      OSError, ValueError: there is none, or a damaged one.
    """
    saved = json.loads((path / "extra" / "metadata").read_text())
    return sums.opened(saved) if sums.SEAL in saved else saved


def sums_in(path: Path) -> dict[str, str]:
    """Name of a leaf -> its checksum, in the checkpoint in the folder `path`.

    Raises:
      UsageError: it has no record of them, or a damaged one.
    """
    try:
        return dict(record(path)[LEAVES])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"checkpoint {path} has no checksums of its arrays ({error!r})") from error


def chosen(directory: Path, which: Which) -> int | None:
    """The step of the checkpoint that is asked for; None if there are no checkpoints at all.

    Raises:
      UsageError: it is not among them; the message lists what is there.
    """
    there = steps(directory)
    if not there or which == NEWEST:
        return there[-1] if there else None
    ranked = _ranked({step: _reward(directory, step) for step in there})
    if which == BEST and ranked:
        return ranked[-1]
    if which in there:
        return int(which)
    best = f"the best of them is {ranked[-1]}" if ranked else "none of them has been evaluated"
    raise UsageError(
        f"--iteration={which}: {directory} has the iterations {shortened(there, 20)}; {best}"
    )


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    tree: PyTree,
    extra: Mapping[str, Any],
    reward: float | None = None,
) -> None:
    """Saves arrays `tree` and JSON `extra` as `step`, in the background.

    A step that is saved already stays as it is. The first one in a directory is waited for and
    read back: where nothing can be read, that is an error now, and not when the run is continued.

    Args:
      checkpoints: from `manager`.
      step: which.
      tree: the arrays.
      extra: what JSON can hold.
      reward: of the policy in it on held-out prompts, by which the best are kept and found; None if
        it has not been evaluated.

    Raises:
      SaveError: this save, or the one before, has failed.
      UsageError: what was saved first cannot be read (see `restore_latest`).
    """
    if step in checkpoints.all_steps():
        return
    first = checkpoints.latest_step() is None
    evaluated = {} if reward is None else {REWARD: reward}
    sealed = sums.sealed({**extra, **evaluated, LEAVES: sums.of_arrays(_named(tree))})
    state, extra_item = ocp.args.StandardSave(tree), ocp.args.JsonSave(sealed)
    items = ocp.args.Composite(state=state, extra=extra_item)
    with _writable(checkpoints):
        checkpoints.save(step, args=items, metrics=evaluated)
    if first:
        restore_latest(checkpoints, tree)


def forget_after(checkpoints: ocp.CheckpointManager, step: int) -> None:
    """Deletes the checkpoints of later steps than `step`."""
    wait(checkpoints)
    for later in checkpoints.all_steps():
        if later > step:
            checkpoints.delete(later)


def look_after(checkpoints: ocp.CheckpointManager) -> None:
    """Looks whether the newest save has ended, without waiting for it.

    Raises:
      SaveError: it has failed.
    """
    if not checkpoints.is_saving_in_progress():
        wait(checkpoints)


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for the save under way.

    Raises:
      SaveError: it has failed.
    """
    with _writable(checkpoints):
        checkpoints.wait_until_finished()


def restore_latest(
    checkpoints: ocp.CheckpointManager, like: PyTree
) -> tuple[int, PyTree, dict[str, Any]] | None:
    """`restore` of the newest checkpoint; None if there is none."""
    wait(checkpoints)
    step = checkpoints.latest_step()
    return None if step is None else restore(checkpoints, step, like)


def restore(
    checkpoints: ocp.CheckpointManager, step: int, like: PyTree
) -> tuple[int, PyTree, dict[str, Any]]:
    """(step, tree, extra) of a checkpoint, bit for bit as saved.

    Args:
      checkpoints: from `manager` or `reader`.
      step: which.
      like: structure, shapes, dtypes and placement of the result: arrays or jax.ShapeDtypeStruct.
        A leaf that is not committed to devices here (or has no sharding) is not committed there.

    Raises:
      UsageError: the saved state has other leaves, shapes or dtypes, cannot be read, or is not what
        was saved; the message names the checkpoint, and the leaves or the checkpoint before it.
    """

    def signature(x):
        return f"{np.dtype(x.dtype).name}{list(x.shape)}"

    wanted = {name: signature(x) for name, x in _named(like).items()}
    with _readable(checkpoints, step):
        saved = {
            name: signature(x)
            for name, x in _named(checkpoints.item_metadata(step).state.tree).items()
        }
    where = f"checkpoint {checkpoints.directory / str(step)}"
    _check_same(where, saved, wanted)
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)), extra=ocp.args.JsonRestore()
    )
    with _readable(checkpoints, step):
        restored = checkpoints.restore(step, args=args)
        extra = _without_sums(restored.extra, restored.state, where)

    def place(x, like):
        return x if _is_committed(like) else jnp.asarray(np.asarray(x))

    return step, jax.tree.map(place, restored.state, like), extra


def read(
    directory: Path, like: PyTree, which: Which = NEWEST
) -> tuple[int, PyTree, dict[str, Any]] | None:
    """`restore` of a checkpoint of a run that may be under way; None if there are none.

    If the run deletes or saves a checkpoint meanwhile and the reading fails, it is tried again.

    Raises:
      UsageError: see `chosen` and `restore`.
    """
    while True:
        files = list(os.walk(directory))
        try:
            if (step := chosen(directory, which)) is None:
                return None
            with reader(directory) as checkpoints:
                return restore(checkpoints, step, like)
        except (UsageError, OSError):
            if list(os.walk(directory)) == files:
                raise


def _without_sums(record: Mapping[str, Any], tree: PyTree, where: str) -> dict[str, Any]:
    """What was saved as extra; ValueError unless it and every leaf are as they were saved."""
    if not record.keys() & {LEAVES, sums.SEAL}:
        if sharding.is_main():
            print(f"{where} is older than checksums: damage to it would not be seen", flush=True)
        return dict(record)
    extra = sums.opened(record)
    saved, found = extra.pop(LEAVES), sums.of_arrays(_named(tree))
    if changed := [name for name in found if saved.get(name) != found[name]]:
        raise ValueError(f"not what was saved: {shortened(changed)}")
    return extra


@contextlib.contextmanager
def _writable(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    """Turns an error of a save, of which orbax makes hundreds of lines, into one line that names
    the reason, the checkpoint and the last good one.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # of the machine, not of the disk
    except Exception as error:
        names = [path.name for path in Path(checkpoints.directory).glob("[0-9]*")]
        whole = [int(name) for name in names if name.isdigit()]
        begun = {int(name.partition(".")[0]) for name in names} - set(whole)
        failed = f"checkpoint {max(begun)}" if begun else "a checkpoint"
        last = f"the last good one is {max(whole)}" if whole else "there is none before it"
        raise SaveError(
            f"{failed} cannot be saved in {checkpoints.directory}: {_reason(error)}; {last};"
            f" mend that, and continue with --workdir={Path(checkpoints.directory).parent}"
        ) from error


# What keeps a file from being written.
_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def _reason(error: Exception) -> str:
    """Why nothing could be written; tensorstore only quotes the system's words."""
    known = (reason for reason in map(os.strerror, _REASONS) if reason in str(error))
    cause = f"{type(error).__name__}: {error}"
    return next(known, textwrap.shorten(cause, 300, placeholder=" ..."))


@contextlib.contextmanager
def _readable(checkpoints: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Turns an error of orbax, zarr or tensorstore, up to 150 lines, into one line that names the
    checkpoint.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # of the machine, not of the file
    except Exception as error:
        older = [other for other in checkpoints.all_steps() if other < step]
        instead = f"delete it to continue from {max(older)}" if older else "there is no older one"
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise UsageError(
            f"checkpoint {checkpoints.directory / str(step)} cannot be read ({cause});"
            f" if it is damaged, {instead}"
        ) from error


def _is_committed(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return x.committed if isinstance(x, jax.Array) else x.sharding is not None


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = (
        x.sharding
        if _is_committed(x)
        else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    )
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


# ---------------------------------------------------------------- weights


def save_weights(path: Path | str, tree: PyTree, metadata: Mapping[str, str]) -> None:
    """Writes a tree as a safetensors file, whole or not at all.

    Its tensors have names like "blocks/self_q/kernel".
    """
    tensors = {name: np.asarray(x) for name, x in _named(tree, "/").items()}
    stored = [
        weight_file.Stored(name, x.shape, x.dtype, (functools.partial(np.asarray, x),))
        for name, x in tensors.items()
    ]
    weight_file.write_safetensors(Path(path), stored, metadata)


def load_weights(path: Path | str, like: PyTree, unread: Collection[str] = ()) -> PyTree:
    """The tree that `save_weights` wrote.

    Args:
      path: a safetensors file.
      like: structure and shapes to load, arrays or jax.ShapeDtypeStruct; a tensor is cast to its
        dtype there and put on its sharding, if it has one.
      unread: first words of the names of tensors that the file may have and that are not loaded;
        every other tensor must be in `like`.

    Raises:
      UsageError: a tensor is missing, left over or of another shape, damaged or not finite, or the
        file is not whole; the message names the file and the tensors.
    """
    file = weight_file.open_file(path)
    read = [name for name in file.tensors if name.partition("/")[0] not in unread]
    saved = {name: str(list(file.tensors[name].shape)) for name in read}
    wanted = {name: str(list(x.shape)) for name, x in _named(like, "/").items()}
    _check_same(str(path), saved, wanted)

    def load(keys: Any, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        tensor = file.read(_name(keys, "/")).astype(x.dtype, copy=False)
        placement = getattr(x, "sharding", None)
        advance()
        return jnp.asarray(tensor) if placement is None else sharding.put(tensor, placement)

    with progress.bar(f"loading {file.path.name}, tensors", len(wanted)) as advance:
        return jax.tree_util.tree_map_with_path(load, like)


def metadata_config(path: Path | str, kind: str) -> dict[str, Any]:
    """The model config that kvpo-convert wrote into a file.

    Raises:
      OSError: there is no such file.
      UsageError: the file is of another kind than `kind`, or was not made by kvpo-convert.
    """
    metadata = weight_file.open_file(path).metadata
    if metadata.get("kind") != kind:
        raise UsageError(
            f"{path} holds {metadata.get('kind', 'no converted weights')!r}, expected {kind!r}:"
            " make it with kvpo-convert"
        )
    try:
        return dict(json.loads(metadata["config"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} says no config of its {kind} ({error!r}): make it with kvpo-convert"
        ) from error


def noted_config(path: Path | str, kind: str, config: type[T]) -> T:
    """`metadata_config` as the dataclass of its kind.

    Raises:
      OSError, UsageError: as `metadata_config`; or the note has not the fields of `config`.
    """
    values = metadata_config(path, kind)
    try:
        return config_from_dict(config, values)
    except TypeError as error:
        raise UsageError(
            f"{path} says no config of its {kind} ({error}): make it with kvpo-convert"
        ) from error


def generator_sizes(path: Path | str) -> dict[str, Any]:
    """The sizes that kvpo-convert wrote into a generator's file, by their names in config.model.

    They are empty for a file without a note, as those that ship with the package.

    Raises:
      OSError, UsageError: as `metadata_config`.
    """
    if "kind" not in weight_file.open_file(path).metadata:
        return {}
    sizes = metadata_config(path, "wan")
    return {name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()}


def adapter_sizes(path: Path | str) -> dict[str, Any]:
    """What kvpo-convert wrote into an adapter's file: rank, alpha, and its generator's sizes.

    Raises:
      OSError, UsageError: as `metadata_config`; or it says no rank or alpha.
    """
    sizes = metadata_config(path, "wan_lora")
    for name, kind in (("rank", int), ("alpha", int | float)):
        if not isinstance(size := sizes.get(name), kind) or size <= 0:
            raise UsageError(
                f"{path} says {name}={size!r} of its adapter, which is none: make it with"
                " kvpo-convert"
            )
    return sizes


# ---------------------------------------------------------------- names


def _name(keys: Any, separator: str) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=separator)


def _named(tree: PyTree, separator: str = ".") -> dict[str, Any]:
    """name -> leaf."""
    return {
        _name(keys, separator): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_same(where: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """UsageError that says how the leaves in `where` differ from those wanted.

    Args:
      where: a file or checkpoint.
      saved: name -> signature of its leaves.
      wanted: name -> signature.
    """
    faults = {
        "missing": sorted(wanted.keys() - saved.keys()),
        "left over": sorted(saved.keys() - wanted.keys()),
        "wrong": [
            f"{n} is {saved[n]}, not {wanted[n]}"
            for n in wanted
            if saved.get(n, wanted[n]) != wanted[n]
        ],
    }
    if found := [f"{kind}: {shortened(names)}" for kind, names in faults.items() if names]:
        raise UsageError(f"{where}: {'; '.join(found)}")
