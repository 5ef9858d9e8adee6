"""The mesh and the settings with which an iteration is fastest, of those that fit, by count.

`fastest` asks `fitting` what fits and `work` how long it takes. Nothing runs or is compiled. What
one shard of the mesh axis `data` does is what all do, so it is traced once for all of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from kvpo_jax import fitting, network, work
from kvpo_jax.errors import UsageError
from kvpo_jax.fitting import SAME_GRADIENT, Proposal
from kvpo_jax.runtime import progress, sharding
from kvpo_jax.runtime.config import prompts_at_once, split_branches, with_fields

# ---------------------------------------------------------------- how long it takes


class Speed(NamedTuple):
    """How fast devices are.

    Attributes:
      efficiency: the share of `work.PEAK` that products reach.
      wires: between the devices.
    """

    efficiency: float = work.EFFICIENCY
    wires: network.Wires = network.Wires()


class Option(NamedTuple):
    """Settings that fit.

    Attributes:
      proposal: the settings and what they need.
      computing: seconds of the products of an iteration on a device.
      sending: seconds that a device sends, as if it did nothing else meanwhile.
    """

    proposal: Proposal
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return self.computing + self.sending


def timed(
    config: ConfigDict, devices: Sequence[jax.Device], speed: Speed, proposal: Proposal
) -> Option:
    """How long an iteration takes with the settings of a proposal: with the pivot in the middle.

    Raises:
      UsageError: they do not go together, or not with so many devices.
    """
    alone, mesh = fitting.of_one_shard(
        with_fields(config, proposal.fields), devices, cut_least=True
    )
    own = math.prod(alone.mesh[axis] for axis in sharding.AXES)
    done = _work(FrozenConfigDict(alone), tuple(devices[:own]))
    sending = network.seconds(done.sent, mesh.shape, speed.wires)
    return Option(proposal, done.seconds / speed.efficiency, sending)


def undivided(config: ConfigDict, devices: Sequence[jax.Device], speed: Speed) -> float:
    """Seconds that one of the devices computes if it does everything, all branches at once."""
    fields = {f"mesh.{axis}": 1 for axis in sharding.AXES} | {"rollout.branch_chunk": 0}
    return timed(config, devices[:1], speed, Proposal(fields, math.inf)).computing


def needed(
    config: ConfigDict, devices: Sequence[jax.Device], speed: Speed, option: Option
) -> float:
    """The share of what devices could compute in the time of an option that is needed.

    The rest is idle, or computed more than once: an anchor and a prefix for every shard of branches
    and every chunk of them, what is not split over tokens, a forward pass of `model.remat`. It can
    be some percent above 1, for the measure is all prompts at once.
    """
    return undivided(config, devices, speed) / (len(devices) * option.computing)


@functools.cache
def _work(config: FrozenConfigDict, devices: tuple[jax.Device, ...]) -> work.Work:
    plain = config.as_configdict().lock()
    done = work.count(plain, devices, lambda pivots: [pivots[len(pivots) // 2]])
    return work.sum_of(done.stages.values())


# ---------------------------------------------------------------- what fits

# Of SAME_GRADIENT, what takes an iteration longer, and then what does not, by count.
SLOWER = ("model.remat", "rollout.branch_chunk")
AS_FAST = ("reward.resident", "train.micro_batch", "replay.chunk", "eval.batch")
# What the sizes of a mesh are where the config leaves them to others.
LEFT_OPEN = {"data": 0, "fsdp": 1, "branch": 0, "context": 1}


def meshes(config: ConfigDict, devices: int, node: int) -> list[dict[str, int]]:
    """The sizes of meshes to be tried, as fields: those that use the most devices.

    A size that the config gives stays. Weights are cut over one device, over those of a node, or
    over all that have other prompts. Meshes that split a prompt over fewer devices come first, and
    of the same split those that cut weights over fewer.
    """
    given = {
        axis: config.mesh[axis] for axis, left in LEFT_OPEN.items() if config.mesh[axis] != left
    }
    divisors = partial(fitting.divisors, below=devices + 1)
    branches = divisors(given.get("branch", split_branches(config)))
    contexts = divisors(given.get("context", config.model.num_heads))

    def cuts(rows: int, inner: int) -> set[int]:
        if "fsdp" in given:
            return {given["fsdp"]}
        if "data" in given:
            return {max(1, rows // given["data"])}
        return {1, math.gcd(rows, max(1, node // inner)), rows}

    def found() -> Iterator[dict[str, int]]:
        every = itertools.product(divisors(prompts_at_once(config)), branches, contexts)
        for rows, branch, context in every:
            for fsdp in sorted(cuts(rows, branch * context)):
                sizes = (rows // fsdp, fsdp, branch, context)
                mesh = dict(zip(sharding.AXES, sizes, strict=True))
                if rows % fsdp == 0 and mesh == mesh | given:
                    yield mesh

    every = [sizes for sizes in found() if math.prod(sizes.values()) <= devices]
    most = max((math.prod(sizes.values()) for sizes in every), default=0)
    used = [sizes for sizes in every if math.prod(sizes.values()) == most]
    used.sort(key=lambda mesh: (mesh["branch"] * mesh["context"], mesh["branch"], mesh["fsdp"]))
    return [{f"mesh.{axis}": n for axis, n in sizes.items()} for sizes in used]


def lowest(
    config: ConfigDict, devices: Sequence[jax.Device], mesh: dict[str, int], names: Sequence[str]
) -> Proposal | None:
    """The settings of these names that need least on a mesh; None if it cannot be."""
    fields: dict[str, Any] = dict(mesh)
    for name in names:
        values = [*SAME_GRADIENT[name](with_fields(config, fields))]
        tried = ({**fields, name: value} for value in reversed(values))
        fields = next((lower for lower in tried if _goes(config, devices, lower)), fields)
    if not _goes(config, devices, fields):
        return None
    return Proposal(fields, fitting.peak(with_fields(config, fields), devices))


def _goes(config: ConfigDict, devices: Sequence[jax.Device], fields: dict[str, Any]) -> bool:
    """Whether a config can have these fields on these devices."""
    try:
        fitting.of_one_shard(with_fields(config, fields), devices)
    except UsageError:
        return False
    return True


def settled(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    limit: float,
    least: Proposal,
    mesh: dict[str, int],
) -> Proposal:
    """The settings on a mesh that fit and are nearest to the config's own, the slower ones first.

    Args:
      config: of the run.
      devices: of the mesh.
      limit: bytes that a device has.
      least: a proposal that fits (`lowest`).
      mesh: those of its fields that are sizes of the mesh.
    """
    found, own = least, dict(mesh)
    if "train.micro_batch" in least.fields:
        own["train.micro_batch"] = least.fields["train.micro_batch"]
    if (peak := fitting.peak(with_fields(config, own), devices)) <= limit:
        found = Proposal(own, peak)
    for name in (*SLOWER, *AS_FAST):
        if name in found.fields:
            found = fitting.raised(config, devices, limit, found, name)
    return found


# ---------------------------------------------------------------- what is fastest

ALMOST = 1.02  # of the time in which devices divide the work without a rest: nothing else is sought


class Fastest(NamedTuple):
    """What was found.

    Attributes:
      options: what was timed of what fits, the fastest first; none if nothing fits.
      least: the settings that need least, of those tried.
    """

    options: list[Option]
    least: Proposal


def fastest(
    config: ConfigDict, devices: Sequence[jax.Device], limit: float, speed: Speed
) -> Fastest:
    """The mesh and the settings of the same gradient with which an iteration is fastest.

    Meshes are tried in the order of `meshes`: first those on which it fits without settings that
    make it slower, and then all. The search ends where no other could be faster by more than
    ALMOST. Settings are not sought on a mesh on which even the config's own, which need not fit,
    take as long as what was found.

    Raises:
      UsageError: no mesh can be had of so many devices.
    """
    asked, options = meshes(config, len(devices), speed.wires.node), list[Option]()
    if not any(_goes(config, devices, mesh) for mesh in asked):
        fitting.of_one_shard(config, devices)  # says why
        raise UsageError(f"no mesh of {len(devices)} devices goes with this config")
    enough = ALMOST * undivided(config, devices, speed) / len(devices)
    tried: list[Proposal] = []

    def fits(mesh: dict[str, int], names: Sequence[str]) -> Proposal | None:
        proposal = lowest(config, devices, mesh, names)
        tried.extend([proposal] if proposal else [])
        return proposal if proposal and proposal.peak <= limit else None

    def candidates() -> Iterator[tuple[dict[str, int], Proposal]]:
        for names in (AS_FAST, (*SLOWER, *AS_FAST)):
            for _, group in itertools.groupby(progress.steps(asked, "meshes"), _split):
                alike = list(group)
                # Those between cut weights less than the last, and gather more than the first.
                if not any(fits(mesh, names) for mesh in (alike[-1], alike[0])):
                    continue
                for mesh in alike:
                    if least := fits(mesh, names):
                        yield mesh, least

    best = math.inf
    for mesh, least in candidates():
        if timed(config, devices, speed, Proposal(mesh, math.inf)).seconds < best:
            proposal = settled(config, devices, limit, least, mesh)
            options.append(timed(config, devices, speed, proposal))
            best = min(option.seconds for option in options)
        if best <= enough:
            break
    options.sort(key=lambda option: option.seconds)
    return Fastest(options, min(tried, key=lambda proposal: proposal.peak))


def _split(mesh: dict[str, int]) -> tuple[int, int]:
    """How a prompt is split."""
    return mesh["mesh.branch"], mesh["mesh.context"]
