"""The device mesh, the specs of the structs of `types`, and the one home of `shard_map`.

Mesh axes are ("data", "branch") over all devices: prompts lie over data, branches over branch, weights on every
device. A rollout carries one copy of the anchor per shard of `branch`, so that the anchor and the branches of a device
run in the same batch of the same program, and identity routing gives the anchor bit for bit.

Of several processes (docs/cluster.md) each holds a rectangle of the mesh and runs the same program. What the host reads
is replicated on every device, or this process's part of an array (`own_part`), joined with the others' by `gather`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import multihost_utils
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


def make_mesh(data: int, branch: int, prompts: int, branches: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x branch devices, of all or of those given.

    0 lets the device count choose: sizes that divide `prompts` and `branches` and use the most devices; of several,
    the one with most over prompts, for every shard of branches has an anchor of its own. ValueError where given sizes
    do not divide them, or need more devices than there are, or, with several processes, leave some idle or cut one's
    devices into no rectangle.
    """
    devices = devices or jax.devices()
    if data and prompts % data:
        raise ValueError(f"mesh.data={data} does not divide {prompts} prompts at a time (train.micro_batch)")
    if branch and branches % branch:
        raise ValueError(f"mesh.branch={branch} does not divide {branches} branches at a time (rollout.branch_chunk)")
    divisors = lambda size, count: [size] if size else [n for n in range(1, count + 1) if count % n == 0]
    sizes = itertools.product(divisors(data, prompts), divisors(branch, branches))
    fitting = [size for size in sizes if math.prod(size) <= len(devices)]
    data, branch = max(fitting, key=lambda size: (math.prod(size), size[0]), default=(data or 1, branch or 1))
    if data * branch > len(devices):
        raise ValueError(f"mesh.data={data} x mesh.branch={branch} needs {data * branch} of {len(devices)} devices")
    own = jax.local_device_count()
    if jax.process_count() > 1 and (data * branch < len(devices) or branch % own and own % branch):
        raise ValueError(
            f"mesh.data={data} x mesh.branch={branch} does not fit {jax.process_count()} processes of {own} devices: "
            "every device must have a place, and mesh.branch and the devices of a process must divide one another; try "
            "other mesh sizes, prompts (train.prompts_per_iteration or train.micro_batch) or rollout.branches"
        )
    return Mesh(np.asarray(devices[: data * branch]).reshape(data, branch), ("data", "branch"))


def describe(mesh: Mesh, prompts: int, branches: int) -> str:
    """What lies where, in words, and how many devices have nothing to do."""
    data, branch = mesh.shape["data"], mesh.shape["branch"]
    idle = len(jax.devices()) - mesh.size
    text = (
        f"{mesh.size} device{'s' * (mesh.size > 1)}: {prompts} prompts over {data}, {branches} branches over {branch}"
    )
    return f"{text}; {idle} idle, for no larger sizes divide prompts and branches" if idle else text


def shard(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`function` on every device's part of its arguments, with varying-axes checking on."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def vary_over_branch(x: Array) -> Array:
    """Inside `shard`: marks an array that is equal on all shards of `branch` as one that a loop may change."""
    return jax.lax.pcast(x, "branch", to="varying")


def put(x: np.ndarray | Array, sharding: jax.sharding.Sharding) -> Array:
    """`x`, which every process has, on the devices of `sharding`; between processes nothing is sent or compared."""
    return jax.make_array_from_process_local_data(sharding, x, x.shape)


def vary(tree: PyTree) -> PyTree:
    """Inside `shard`: marks a replicated tree as each shard's own, so that its gradients are summed over shards once.

    Otherwise they are at every use, in the innermost loop.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, ("data", "branch"), to="varying"), tree)


def place(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """The tree on the mesh, every leaf with the same spec."""
    return jax.tree.map(partial(put, sharding=NamedSharding(mesh, spec)), tree)


def constrain(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """Inside jit: asks for every leaf to have this spec."""
    return jax.tree.map(partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec)), tree)


def trajectories(mesh: Mesh, branches: int) -> np.ndarray:
    """The order of the T = branch shards + G trajectories, int[T]: the branch of each, -1 for an anchor.

    Every shard of the mesh axis `branch` begins with its copy of the anchor.
    """
    shards = mesh.shape["branch"]
    order = np.arange(branches).reshape(shards, -1)
    return np.concatenate([np.full((shards, 1), -1), order], axis=1).reshape(-1)


def branches_of(x: Array, mesh: Mesh, branches: int) -> Array:
    """The branches of x [P, T, ...], as [P, G, ...]."""
    shards = mesh.shape["branch"]
    x = x.reshape(x.shape[0], shards, 1 + branches // shards, *x.shape[2:])[:, :, 1:]
    return x.reshape(x.shape[0], branches, *x.shape[3:])


# ---------------------------------------------------------------- several processes

# What srun and mpirun say of how many processes they have started; of a Kubernetes pod, that it is one of several.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
INDEXED_POD = "JOB_COMPLETION_INDEX"


def distributed_arguments(
    environment: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
    """What jax.distributed.initialize needs to join the processes of a run; None for a run of a single process.

    Args:
      environment: os.environ; where it shows a launcher, jax finds out the rest by itself.
      coordinator, num_processes, process_id: the flags; where they are given, the launcher is not asked.

    Raises:
      ValueError: some of the flags are missing.
    """
    if num_processes == 1:
        return None
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(
                f"several processes are told --coordinator, --num_processes and --process_id; --{missing[0]} is missing"
            )
        several = INDEXED_POD in environment or any(int(environment.get(name, 1)) > 1 for name in STARTED)
        return {} if several else None
    return {
        "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


def is_main() -> bool:
    """Whether this is the process that writes and prints; the prompts of its devices are the first."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process. Every process has to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _processes(mesh: Mesh) -> np.ndarray:
    """int[rows, columns]: the process of each rectangle of the mesh."""
    rows, columns = mesh.local_mesh.devices.shape
    return np.vectorize(lambda device: device.process_index)(mesh.devices[::rows, ::columns])


def own_prompts(mesh: Mesh, prompts: int) -> np.ndarray:
    """Which of the prompts lie on this process's devices, in order."""
    rows = np.any(_processes(mesh) == jax.process_index(), axis=1)
    return np.arange(prompts).reshape(len(rows), -1)[rows].reshape(-1)


def from_own_prompts(x: np.ndarray, mesh: Mesh, prompts: int) -> Array:
    """float[P, ...] with the spec PROMPTS, of which each process brings the rows `own_prompts`."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PROMPTS), x, (prompts, *x.shape[1:]))


def own_part(x: Array) -> Array:
    """The part of a sharded array that lies on this process's devices, as an array of their own."""
    if x.is_fully_addressable:
        return x
    return multihost_utils.global_array_to_host_local_array(x, x.sharding.mesh, x.sharding.spec)


def gather(compute: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """What `compute` makes of each process's part, float[P, G] or float[P] in the end, the same on every process.

    Several processes may hold a prompt; what depends on it alone is taken from the first. A FloatingPointError on one
    process is one on all, so that none waits for another.
    """
    own = error = None
    try:
        own = compute()
    except FloatingPointError as raised:
        error = raised
    if any_process(error is not None):
        raise error or FloatingPointError("another process met a number that is not finite, and names it")
    processes = _processes(mesh)

    def join(x: np.ndarray) -> Array:  # [processes, ...]
        if x.ndim == 2:
            return jnp.asarray(x[processes[:, 0]].reshape(-1))
        return jnp.asarray(rearrange(x[processes], "row column p g -> (row p) (column g)"))

    return jax.tree.map(join, multihost_utils.process_allgather(own))
