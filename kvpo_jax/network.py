"""What the devices of a mesh send to one another: counted in a program, and in seconds.

A program is counted twice over: as it was traced, loops multiplied, which `work` does for whole
iterations; and as it was compiled (`of_compiled`), which shows what the compiler added, joined or
moved out of a loop. A test compares the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from kvpo_jax.errors import UsageError

# ---------------------------------------------------------------- transfers


class Transfer(NamedTuple):
    """A kind of collective operation, and what it goes over.

    Attributes:
      kind: one of SENT.
      axes: of the mesh.
    """

    kind: str
    axes: tuple[str, ...]


# Transfer -> the bytes of its arrays, whole: what is gathered, summed or exchanged by a device.
Traffic = Mapping[Transfer, float]

# Kind -> what each of n devices sends, as a share of the whole, in a ring.
SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # the two after one another
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0 if n > 1 else 0.0,
}


def total(traffics: Iterable[Traffic]) -> Traffic:
    """The sum of any number of traffics."""
    out: dict[Transfer, float] = {}
    for traffic in traffics:
        for transfer, size in traffic.items():
            out[transfer] = out.get(transfer, 0.0) + size
    return out


def times(traffic: Traffic, factor: float) -> Traffic:
    """So many times a traffic; 0 times it is nothing."""
    return {transfer: size * factor for transfer, size in traffic.items() if factor}


# ---------------------------------------------------------------- as traced

# JAX's name of an operation -> its kind.
TRACED = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


def of_equation(equation: core.JaxprEqn) -> Traffic:
    """What an operation of a traced program sends; nothing if it is not one of TRACED."""
    kind = TRACED.get(equation.primitive.name)
    if kind is None:
        return {}
    names = equation.params.get("axes", equation.params.get("axis_name"))
    axes = tuple(names) if isinstance(names, Sequence) and not isinstance(names, str) else (names,)
    sides = (sum(map(_bytes, side)) for side in (equation.invars, equation.outvars))
    return {Transfer(kind, axes): float(max(sides))}


def _bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


# ---------------------------------------------------------------- as compiled

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def of_compiled(text: str, sizes: Mapping[str, int]) -> Traffic:
    """What a compiled program sends, its loops multiplied, and of a condition the most.

    Args:
      text: of the program (`jax.stages.Compiled.as_text`).
      sizes: of the mesh that it was compiled for, by axis.

    Raises:
      UsageError: a loop of unknown length sends something.
    """
    computations, entry = _computations(text)
    known: dict[str, Traffic] = {}

    def of(name: str) -> Traffic:
        if name not in known:
            known[name] = total(map(of_line, computations.get(name, ())))
        return known[name]

    def of_line(line: str) -> Traffic:
        operation = _OPERATION.match(line)
        if operation is None:
            return {}
        result, name = operation.groups()
        kind = name.removesuffix("-start")
        if kind in SENT:
            axes, members = _axes(line, sizes)
            return {Transfer(kind, axes): _whole(name, result, members)} if axes else {}
        if name == "conditional":
            found = (part for match in _BRANCHES.finditer(line) for part in match.groups() if part)
            branches = [of(part.strip(" %")) for parts in found for part in parts.split(",")]
            return max(branches, key=lambda traffic: sum(traffic.values()), default={})
        inner = total(of(called) for called in _CALLED.findall(line))
        if name == "while" and inner:
            trips = _TRIPS.search(line)
            if trips is None:
                raise UsageError(
                    "what a compiled loop of unknown length sends cannot be counted; XLA's double"
                    " buffering makes such loops: leave it out of XLA_FLAGS"
                )
            return times(inner, int(trips[1]))
        return inner

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> the lines of each function of a compiled program, and the name of the first."""
    out: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = out.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return out, entry


def _whole(name: str, result: str, members: int) -> float:
    """The bytes of a collective operation's arrays, from the type of its result."""
    arrays = [_size(kind, shape) for kind, shape in _ARRAY.findall(result)]
    if name == "collective-permute-start":
        return max(arrays)  # beside what comes in there is what goes out
    size = float(sum(arrays))
    if name == "all-gather-start":
        return size * members / (members + 1)
    return size * members if name.startswith("reduce-scatter") else size


def _size(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def _axes(line: str, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes over which the devices of a group differ, and how many they are."""
    if listed := _LISTED.search(line):
        group = np.array(_numbers(listed[1]))
    elif counted := _COUNTED.search(line):
        members, shape, order = counted.groups()
        devices = np.arange(math.prod(sizes.values())).reshape(_numbers(shape))
        group = devices.transpose(_numbers(order) if order else None).reshape(-1)[: int(members)]
    else:
        group = np.arange(math.prod(sizes.values()))
    places = np.stack(np.unravel_index(group, tuple(sizes.values())))
    differs = np.ptp(places, axis=1) > 0
    return tuple(np.array(list(sizes))[differs].tolist()), len(group)


# ---------------------------------------------------------------- in seconds


class Wires(NamedTuple):
    """How devices are connected.

    Attributes:
      node: devices of a node, which the mesh fills one after another.
      inside: bytes that a device sends to others of its node in a second.
      between: bytes that it sends to other nodes in a second, with an adapter of its own.
    """

    node: int = 8
    inside: float = 450e9  # NVLink of an H100 or H200, one direction
    between: float = 50e9  # InfiniBand NDR, 400 Gbit/s for each GPU


class Sent(NamedTuple):
    """What a device sends over some axes.

    Attributes:
      bytes: by a ring.
      seconds: that it takes if nothing else goes on.
      bandwidth: bytes in a second, the least of its transfers.
    """

    bytes: float
    seconds: float
    bandwidth: float


def by_axes(
    traffic: Traffic, sizes: Mapping[str, int], wires: Wires
) -> dict[tuple[str, ...], Sent]:
    """Axes with more than one device -> what a device sends over them.

    Args:
      traffic: of a device.
      sizes: of the mesh, by axis; devices of the last axis are next to one another.
      wires: between them.
    """
    out: dict[tuple[str, ...], Sent] = {}
    for (kind, named), whole in traffic.items():
        axes = tuple(axis for axis in sizes if axis in named and sizes[axis] > 1)
        if not axes:
            continue
        sent = whole * SENT[kind](math.prod(sizes[axis] for axis in axes))
        bandwidth = _bandwidth(kind, axes, sizes, wires)
        before = out.get(axes, Sent(0.0, 0.0, math.inf))
        out[axes] = Sent(
            before.bytes + sent, before.seconds + sent / bandwidth, min(before.bandwidth, bandwidth)
        )
    return out


def seconds(traffic: Traffic, sizes: Mapping[str, int], wires: Wires) -> float:
    """Seconds that a device sends, one transfer after another."""
    return sum(sent.seconds for sent in by_axes(traffic, sizes, wires).values())


def _bandwidth(kind: str, axes: tuple[str, ...], sizes: Mapping[str, int], wires: Wires) -> float:
    """Bytes that a device sends in a second over some axes, in the slowest group of devices.

    A ring enters and leaves a node once, so as many rings as a group has devices in a node share
    their adapters. What is exchanged in pairs leaves a node by the device's own adapter. Where a
    group's size does not divide a node's, some groups are inside a node and others are not.
    """
    devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    inner = tuple(list(sizes).index(axis) for axis in axes)
    size = math.prod(sizes[axis] for axis in axes)
    groups = np.moveaxis(devices, inner, range(-len(inner), 0)).reshape(-1, size)

    def of_group(group: np.ndarray) -> float:
        nodes, together = np.unique(group // wires.node, return_counts=True)
        if len(nodes) == 1:
            return wires.inside
        rings = 1 if kind in ("all-to-all", "collective-permute") else min(together)
        return min(wires.inside, rings * wires.between)

    return min(map(of_group, groups))
