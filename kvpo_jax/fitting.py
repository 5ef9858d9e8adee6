"""Settings with which a run fits into the memory of its devices, found with `memory.estimate`.

`fitted` is what a command runs: where the config leaves the micro-batch to the devices, the largest
that fits. `propose` lowers further settings, and says what `kvpo-plan` prints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from kvpo_jax import memory
from kvpo_jax.algorithm import objective
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import REMAT
from kvpo_jax.run import make_mesh
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import branches_at_once, prompts_at_once, recorded_blocks, with_fields

GB = 1e9

# ---------------------------------------------------------------- the estimate of a setting


def peak(config: ConfigDict, devices: Sequence[jax.Device]) -> float:
    """Bytes that the largest stage needs on a device; worked out once for every config.

    Raises:
      UsageError: the config does not fit together, or not to so many devices.
    """
    alone, mesh = of_one_shard(config, devices)
    return _peak(FrozenConfigDict(alone), tuple(devices[: mesh.size // mesh.shape["data"]]))


@functools.cache
def _peak(config: FrozenConfigDict, devices: tuple[jax.Device, ...]) -> float:
    return memory.estimate(memory.plan(config.as_configdict().lock(), devices)).peak()


def of_one_shard(
    config: ConfigDict, devices: Sequence[jax.Device], cut_least: bool = False
) -> tuple[ConfigDict, Mesh]:
    """The config of what one shard of `data` does, as all others do; and the whole mesh.

    A device of the one has what a device of the other has, and computes as much, so that settings
    for many devices are told from those for few.

    Args:
      config: of the whole.
      devices: of the whole mesh.
      cut_least: whether that shard cuts its weights, where it does, over as few devices as it can:
        each then has more of them, and computes as much.

    Raises:
      UsageError: the config does not fit together, or not to so many devices.
    """
    config_lib.check(config)
    mesh = make_mesh(config, devices)
    heldout = config_lib.heldout_at_once(config, sharding.prompt_shards(mesh))
    sizes = {f"mesh.{axis}": mesh.shape[axis] for axis in sharding.AXES} | {"mesh.data": 1}
    if cut_least and (cut := mesh.shape["fsdp"]) > 1:
        sizes["mesh.fsdp"] = min(n for n in range(2, cut + 1) if cut % n == 0)
    shards = sharding.prompt_shards(mesh) // sizes["mesh.fsdp"]
    of_shard = {
        "train.prompts_per_iteration": config.train.prompts_per_iteration // shards,
        "train.micro_batch": prompts_at_once(config) // shards,
        "eval.prompts": config.eval.prompts // shards,
        "eval.batch": heldout // shards,
    }
    return with_fields(config, sizes | of_shard), mesh


# ---------------------------------------------------------------- the micro-batch


class MicroBatch(NamedTuple):
    """A config with the micro-batch that was chosen for it, and the reason in a line."""

    config: ConfigDict
    reason: str


def fitted(config: ConfigDict) -> ConfigDict:
    """The config as the devices of this run can take it; all processes get the same one.

    With train.micro_batch=0 it is the largest that fits, and the main process prints which. Where
    the memory of the devices is not known, as on a CPU, all prompts are taken at once.

    Raises:
      UsageError: no micro-batch can be divided over the devices, or the advantages would depend on
        the devices.
    """
    limit = None if config.train.micro_batch else sharding.device_memory()
    if limit is None:
        return config
    chosen = choose_micro_batch(config, jax.devices(), limit)
    advantage, prompts = config.objective.advantage, config.train.prompts_per_iteration
    size = prompts_at_once(chosen.config)
    if advantage in objective.OVER_PROMPTS and size < prompts:
        raise UsageError(
            f"config.objective.advantage={advantage!r} is over the prompts that are taken together,"
            f" and the devices take {size} of {prompts}: set config.train.micro_batch={size},"
            " and leave it so, or lower config.train.prompts_per_iteration"
        )
    if sharding.is_main():
        print(chosen.reason, flush=True)
    return chosen.config


def choose_micro_batch(
    config: ConfigDict, devices: Sequence[jax.Device], limit: float
) -> MicroBatch:
    """The largest micro-batch that needs at most `limit` bytes on a device.

    If none fits, it is the one that needs least.

    Raises:
      UsageError: no micro-batch can be divided over the devices.
    """
    prompts = config.train.prompts_per_iteration
    needs: dict[int, float] = {}
    unfit = None
    for size in divisors(prompts, prompts + 1):
        try:
            needs[size] = peak(with_fields(config, {"train.micro_batch": size}), devices)
        except UsageError as error:
            unfit = unfit or error
            continue
        if needs[size] <= limit:
            break
    if not needs:
        assert unfit is not None, "1 divides every number"
        raise unfit
    size = min(needs, key=lambda n: needs[n] if needs[n] > limit else 0)
    reason = f"train.micro_batch={size} of {prompts}: {needs[size] / GB:.1f} of {limit / GB:.1f} GB"
    if needs[size] > limit:
        reason += "; no other needs less (see kvpo-plan)"
    elif larger := [n for n in needs if n > size]:
        reason += f"; {min(larger)} would need {needs[min(larger)] / GB:.1f} GB"
    return MicroBatch(with_fields(config, {"train.micro_batch": size}), reason)


# ---------------------------------------------------------------- further settings


def divisors(whole: int, below: int) -> list[int]:
    """Divisors of `whole` that are less than `below`, the largest first."""
    return [n for n in range(min(below - 1, whole), 0, -1) if whole % n == 0]


def _halves(size: int, least: int = 1) -> list[int]:
    """size // 2, size // 4, ... down to `least`."""
    return [size >> i for i in range(1, size.bit_length()) if size >> i >= least]


def _chunks(config: ConfigDict) -> list[int]:
    """Fewer states at a time than replay.chunk, or than a branch replays."""
    if config.replay.chunk:
        return _halves(config.replay.chunk)
    energies = config_lib.compares_energies(config)
    steps = config_lib.replayed_steps(config) if energies else config_lib.learned_steps(config)
    states = recorded_blocks(config) * steps
    return _halves(states) or [states]


# Field -> the values of it that may need less memory, the nearest first.
Ladder = dict[str, Callable[[ConfigDict], Iterable[Any]]]

# With these an iteration computes the same gradient, more slowly.
SAME_GRADIENT: Ladder = {
    "train.micro_batch": lambda c: divisors(c.train.prompts_per_iteration, prompts_at_once(c)),
    "replay.chunk": _chunks,
    "rollout.branch_chunk": lambda c: divisors(c.rollout.branches, branches_at_once(c)),
    "model.remat": lambda c: [name for name in REMAT if name == "block" != c.model.remat],
    "reward.resident": lambda c: [False] if c.reward.resident else [],
    "eval.batch": lambda c: divisors(c.eval.prompts, c.eval.batch or prompts_at_once(c)),
}
# These make it another run.
OTHER_RUN: Ladder = {
    "model.dtype": lambda c: ["bfloat16"] if c.model.dtype == "float32" else [],
    "lora.rank": lambda c: [] if c.paths.lora else _halves(c.lora.rank, 16),
    "rollout.branches": lambda c: _halves(c.rollout.branches, 4),
}


class Proposal(NamedTuple):
    """Settings that need less memory.

    Attributes:
      fields: dotted name -> value; the others stay.
      peak: bytes that the largest stage then needs on a device.
    """

    fields: dict[str, Any]
    peak: float

    def arguments(self) -> str:
        """The settings as they are pasted behind a command."""
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())

    def is_same_gradient(self) -> bool:
        """Whether the settings leave the gradient of an iteration as it is."""
        same = {*SAME_GRADIENT, *(f"mesh.{axis}" for axis in sharding.AXES)}
        return self.fields.keys() <= same


def propose(config: ConfigDict, devices: Sequence[jax.Device], limit: float) -> Proposal:
    """The first settings found that need at most `limit` bytes on a device.

    Settings are lowered step by step until the run fits: always the first of SAME_GRADIENT and then
    of OTHER_RUN that makes the largest stage smaller. Then each is raised again as far as the run
    still fits, for later ones may have made it needless. If nothing fits, the proposal is the
    smallest that was found, and its peak is above `limit`.
    """
    found = Proposal({}, peak(config, devices))
    while found.peak > limit:
        lower = _lower(config, devices, found)
        if lower is None:
            return found
        found = lower
    for name in list(found.fields):
        found = raised(config, devices, limit, found, name)
    return found


def raised(
    config: ConfigDict, devices: Sequence[jax.Device], limit: float, found: Proposal, name: str
) -> Proposal:
    """The proposal with one of its settings as near to the config's own as fits."""
    others = {field: value for field, value in found.fields.items() if field != name}
    values = (SAME_GRADIENT | OTHER_RUN)[name](with_fields(config, others))
    for fields in [others, *({**found.fields, name: value} for value in values)]:
        try:
            needed = peak(with_fields(config, fields), devices)
        except UsageError:
            continue
        if needed <= limit:
            return Proposal(fields, needed)
    return found


def _lower(config: ConfigDict, devices: Sequence[jax.Device], found: Proposal) -> Proposal | None:
    """The first setting that needs less than `found`."""
    now = with_fields(config, found.fields)
    for name, smaller in (SAME_GRADIENT | OTHER_RUN).items():
        for value in smaller(now):
            fields = {**found.fields, name: value}
            try:
                needed = peak(with_fields(config, fields), devices)
            except UsageError:  # this value does not go with the others; a smaller one may
                continue
            if needed < found.peak:
                return Proposal(fields, needed)
            break
    return None
