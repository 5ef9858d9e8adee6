"""The device mesh, the specs of the structs of `types`, and the one home of `shard_map`.

Mesh axes are ("data", "branch") over all devices: prompts lie over data, branches over branch, weights on every
device. A rollout carries one copy of the anchor per shard of `branch`, so that the anchor and the branches of a device
run in the same batch of the same program, and identity routing gives the anchor bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.types import Array, KVCache, MemoryBank, PyTree, ReplayTuples, TextKV

REPLICATED = Spec()
PROMPTS = Spec("data")
TRAJECTORIES = Spec("data", "branch")
TEXT = TextKV(k=Spec(None, "data"), v=Spec(None, "data"))


def _cache_spec(frame: Spec, sink: int, bank: bool) -> KVCache:
    kv = Spec(None, *frame)
    return KVCache(k=kv, v=kv, frame=frame, bank=MemoryBank(*[kv] * 8) if bank else None, sink=sink)


def history_spec(sink: int, bank: bool = False) -> KVCache:
    """Specs of a cache with frame int32[P, slots], with or without a memory bank."""
    return _cache_spec(PROMPTS, sink, bank)


def page_spec(sink: int, bank: bool = False) -> KVCache:
    """Specs of a cache with frame int32[P, T, slots], with or without a memory bank."""
    return _cache_spec(TRAJECTORIES, sink, bank)


def replay_spec(sink: int, bank: bool = False) -> ReplayTuples:
    """Specs of ReplayTuples."""
    cache = history_spec(sink)
    return ReplayTuples(
        z=TRAJECTORIES, u=TRAJECTORIES, history=cache, page=cache, rows=REPLICATED, start_frame=REPLICATED,
        segment=REPLICATED, noise=PROMPTS, bank=history_spec(sink, bank).bank,
    )  # fmt: skip


def make_mesh(data: int, branch: int, prompts: int, branches: int) -> Mesh:
    """A mesh of data x branch devices.

    0 lets the device count choose: as many devices over prompts as divide both, then over branches. ValueError where
    the sizes do not divide `prompts` and `branches`, or need more devices than there are.
    """
    devices = jax.devices()
    if not data:
        data = math.gcd(len(devices) // max(branch, 1), prompts)
    if not branch:
        branch = math.gcd(len(devices) // data, branches)
    if prompts % data:
        raise ValueError(f"mesh.data={data} does not divide train.prompts_per_iteration={prompts}")
    if branches % branch:
        raise ValueError(f"mesh.branch={branch} does not divide rollout.branches={branches}")
    if data * branch > len(devices):
        raise ValueError(f"mesh.data={data} x mesh.branch={branch} needs {data * branch} of {len(devices)} devices")
    return Mesh(np.asarray(devices[: data * branch]).reshape(data, branch), ("data", "branch"))


def shard(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`function` on every device's part of its arguments, with varying-axes checking on."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def vary_over_branch(x: Array) -> Array:
    """Inside `shard`: marks an array that is equal on all shards of `branch` as one that a loop may change."""
    return jax.lax.pcast(x, "branch", to="varying")


def place(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """The tree on the mesh, every leaf with the same spec."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def constrain(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """Inside jit: asks for every leaf to have this spec."""
    return jax.tree.map(partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec)), tree)


def trajectories(mesh: Mesh, branches: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the T = branch shards + G trajectories: (branch of each, -1 for an anchor; positions of branches).

    Every shard of the mesh axis `branch` begins with its copy of the anchor.
    """
    shards = mesh.shape["branch"]
    order = np.arange(branches).reshape(shards, -1)
    order = np.concatenate([np.full((shards, 1), -1), order], axis=1).reshape(-1)
    return order, np.flatnonzero(order >= 0)


def branches_of(x: Array, mesh: Mesh, branches: int) -> Array:
    """The branches of x [P, T, ...], as [P, G, ...]."""
    shards = mesh.shape["branch"]
    x = x.reshape(x.shape[0], shards, 1 + branches // shards, *x.shape[2:])[:, :, 1:]
    return x.reshape(x.shape[0], branches, *x.shape[3:])
