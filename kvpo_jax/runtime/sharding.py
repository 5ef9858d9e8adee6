"""The device mesh, the specs of the structs of `types`, and what several processes need.

The mesh has the axes AXES over all devices. Prompts are split over data and fsdp, branches over
branch. A rollout carries one copy of the anchor per shard of `branch`, so that the anchor and the
branches of a device run in the same batch of the same program, and identity routing gives the
anchor bit for bit.

Weights, policies and optimiser state are cut over fsdp (`weight_spec`). A program makes a weight
whole where the network reads it, and drops it again (`Shard`).

With several processes (docs/cluster.md) each holds a box of the mesh, and all run the same
program. The host reads what every device has, or its own part of an array (`own_part`), which
`gather` joins with those of the others.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax import struct
from flax.core import meta
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpo_jax.errors import NotFiniteError, SharedError, UsageError
from kvpo_jax.types import Array, KVCache, PyTree, ReplayTuples, TextKV

# Any, because specs stand where a struct has arrays.
Spec: Any = PartitionSpec
AXES = ("data", "fsdp", "branch", "context")
ROWS = ("data", "fsdp")  # over which prompts are split
REPLICATED = Spec()
PROMPTS = Spec(ROWS)
TRAJECTORIES = Spec(ROWS, "branch")
BRANCHES = Spec("branch")
TEXT = TextKV(k=Spec(None, ROWS), v=Spec(None, ROWS))


def cache_spec(cache: KVCache, frame: Spec, heads: str | None = None) -> KVCache:
    """Specs of a cache (arrays or shapes) whose `frame` has the spec PROMPTS or TRAJECTORIES.

    `heads`: the axis over which the heads of its keys and values are split, or None.
    """
    alike = Spec(None, *frame)

    def split(kv: Array) -> Spec:  # [L, ..., H, D]
        return alike if heads is None else Spec(*alike, *[None] * (kv.ndim - len(alike) - 2), heads)

    def with_heads(part: Any, names: Sequence[str]) -> Any:
        specs = {name: split(getattr(part, name)) for name in names}
        return jax.tree.map(lambda _: alike, part).replace(**specs)

    bank = cache.bank and with_heads(cache.bank, ("k", "v", "new_k", "new_v"))
    return with_heads(cache, ("k", "v")).replace(frame=frame, bank=bank)


def replay_spec(history: KVCache, page: KVCache, own: bool = False) -> ReplayTuples:
    """Specs of ReplayTuples, from those of a history and of pages, with or without a memory bank.

    `own`: the page is that of each branch.
    """
    shared = history.replace(kept=0)
    of_blocks = jax.tree.map(lambda spec: Spec(*spec[:2], None, *spec[2:]), history.bank)
    return ReplayTuples(
        z=TRAJECTORIES,
        u=TRAJECTORIES,
        history=history.replace(bank=None),
        page=(page if own else shared).replace(bank=of_blocks),
        frames=REPLICATED,
        start_frame=REPLICATED,
        segment=REPLICATED,
        noise=PROMPTS,
        anchor=PROMPTS,
        fresh=PROMPTS,
        peers=PROMPTS,
        steps=PROMPTS,
    )


def make_mesh(
    data: int,
    branch: int,
    prompts: int,
    branches: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    fsdp: int = 1,
    context: int = 1,
) -> Mesh:
    """A mesh of data x fsdp x branch x context devices.

    Args:
      data: devices over prompts; 0 lets the device count choose.
      branch: devices over branches; 0 likewise.
      prompts: what `data` x `fsdp` must divide.
      branches: what `branch` must divide.
      devices: to choose from; None: all.
      fsdp: devices over prompts that share the weights.
      context: devices over the tokens of a block.

    A chosen size uses the most devices. If several do, it has the most over prompts, because every
    shard of branches rolls out an anchor of its own.

    Raises:
      UsageError: given sizes do not divide, or need more devices than there are. With several
        processes also: a device would be idle, or a process would not hold a box.
    """
    devices = devices or jax.devices()
    if prompts % ((data or 1) * fsdp):
        raise UsageError(
            f"{_named(data=data, fsdp=fsdp)} does not divide {prompts} prompts at a time"
            " (train.micro_batch)"
        )
    if branch and branches % branch:
        raise UsageError(
            f"mesh.branch={branch} does not divide {branches} branches at a time"
            " (rollout.branch_chunk, objective.anchors)"
        )

    def divisors(size, count):
        return [size] if size else [n for n in range(1, count + 1) if count % n == 0]

    sizes = itertools.product(divisors(data, prompts // fsdp), divisors(branch, branches))
    most = len(devices) // (fsdp * context)
    fitting = [size for size in sizes if math.prod(size) <= most]
    data, branch = max(
        fitting, key=lambda size: (math.prod(size), size[0]), default=(data or 1, branch or 1)
    )
    shape = data, fsdp, branch, context
    named, count = _named(data=data, branch=branch, fsdp=fsdp, context=context), math.prod(shape)
    if count > len(devices):
        raise UsageError(f"{named} needs {count} of {len(devices)} devices")
    own = jax.local_device_count()
    inner = [math.prod(shape[axis:]) for axis in range(1, len(shape))]
    boxes = all(n % own == 0 or own % n == 0 for n in inner)
    if jax.process_count() > 1 and (count < len(devices) or not boxes):
        raise UsageError(
            f"{named} does not fit {jax.process_count()} processes of {own} devices: every device"
            " must have a place, and the devices of a process must divide mesh.context, its product"
            " with mesh.branch, and that with mesh.fsdp, or be divided by them; try other mesh"
            " sizes, prompts (train.prompts_per_iteration or train.micro_batch) or"
            " rollout.branches"
        )
    return Mesh(np.asarray(devices[:count]).reshape(shape), AXES)


def _named(**sizes: int) -> str:
    """The fields of mesh sizes; those that are left to the run or cut nothing go unsaid."""
    chosen = {"fsdp": 1, "context": 1}
    said = [f"mesh.{axis}={n}" for axis, n in sizes.items() if n > chosen.get(axis, 0)]
    return " x ".join(said)


def prompt_shards(mesh: Mesh) -> int:
    """Over how many shards the prompts are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def describe(mesh: Mesh, prompts: int, branches: int) -> str:
    """What is split over what, in words, and how many devices are idle."""
    idle = len(jax.devices()) - mesh.size
    text = (
        f"{mesh.size} device{'s' * (mesh.size > 1)}: {prompts} prompts over {prompt_shards(mesh)},"
        f" {branches} branches over {mesh.shape['branch']}"
    )
    split = (("fsdp", "weights"), ("context", "tokens of a block"))
    text += "".join(f", {what} over {mesh.shape[x]}" for x, what in split if mesh.shape[x] > 1)
    return f"{text}; {idle} idle, for no larger sizes divide prompts and branches" if idle else text


def context_axis(mesh: Mesh) -> str | None:
    """The axis over which the tokens of a block are split; None where each device has them all."""
    return "context" if mesh.shape["context"] > 1 else None


def vary_over_branch(x: Array, *further: str | None) -> Array:
    """Inside `shard_map`: lets a loop change an array that is equal on all shards of `branch`.

    `further`: other such axes, or None.
    """
    axes = tuple(axis for axis in ("branch", *further) if axis)
    return jax.lax.pcast(x, axes, to="varying")


def put(x: np.ndarray | Array, sharding: jax.sharding.Sharding) -> Array:
    """Puts `x`, which every process has, on the devices of `sharding`.

    Nothing is sent or compared between processes.
    """
    return jax.make_array_from_process_local_data(sharding, x, x.shape)


def vary(tree: PyTree, *further: str | None) -> PyTree:
    """Inside `shard_map`: gives every shard its own copy of a replicated tree, or of its weights.

    Its gradients are then summed over the shards once, and not at every use in the innermost loop.
    `further`: the axis of the tokens, or None, for what the network reads of its own; what comes
    out of it is the same for all tokens, and so is what is done with that.
    """
    axes = tuple(axis for axis in (*ROWS, "branch", *further) if axis)

    def cast(x: Array | Shard) -> Array | Shard:
        if isinstance(x, Shard):  # the parts differ over fsdp already
            equal = tuple(axis for axis in axes if axis != "fsdp")
            return x.replace_boxed(jax.lax.pcast(x.part, equal, to="varying"))
        return jax.lax.pcast(x, axes, to="varying")

    return jax.tree.map(cast, tree, is_leaf=lambda x: isinstance(x, Shard))


# ---------------------------------------------------------------- weights in shards


def weight_spec(x: Array, mesh: Mesh) -> Spec:
    """How a weight lies on the mesh, from its shape: cut over fsdp along its largest axis.

    The first of several axes is never cut, since it may be the layers', and a loop over the layers
    takes them one by one. What the size divides along no other axis is whole on every device.
    """
    size = mesh.shape["fsdp"]
    axes = [axis for axis in range(x.ndim > 1, x.ndim) if x.shape[axis] % size == 0]
    if size == 1 or not axes:
        return REPLICATED
    return Spec(*[None] * max(axes, key=lambda axis: x.shape[axis]), "fsdp")


def weight_specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """`weight_spec` of every leaf: base weights, LoRA trees, optimiser and train state, or shapes.

    Of what is no weight, the state has single numbers only, which are whole.
    """
    return jax.tree.map(partial(weight_spec, mesh=mesh), tree)


def weight_sharding(x: Array, mesh: Mesh) -> NamedSharding:
    """`weight_spec` on the mesh."""
    return NamedSharding(mesh, weight_spec(x, mesh))


def weight_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """`weight_sharding` of every leaf."""
    return jax.tree.map(partial(weight_sharding, mesh=mesh), tree)


def place_weights(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree on the mesh, as `weight_specs` says."""
    return jax.tree.map(put, tree, weight_shardings(tree, mesh))


class Shard(struct.PyTreeNode, meta.AxisMetadata):
    """Inside `shard_map`: this device's part of a weight.

    flax unboxes a parameter where a module reads it, and the part is then joined with the others'.
    So in a loop over layers one layer is whole at a time, also in the backward pass if
    `Wan.regather`. As no gather waits for another result of its layer, XLA may begin those of later
    weights while it computes with the first. The gradient of a part is the sum over the devices.

    Attributes:
      part: the array.
      axis: along which the weight is cut.
    """

    part: Array
    axis: int = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """The whole weight."""
        return jax.lax.all_gather(self.part, "fsdp", axis=self.axis, tiled=True)

    def replace_boxed(self, val: Any) -> Shard:
        """Another part of a weight that is cut alike."""
        return self.replace(part=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Shard:
        """The part with a new axis at `index`."""
        return self.replace(axis=self.axis + (index <= self.axis))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Shard:
        """The part without the axis at `index`."""
        return self.replace(axis=self.axis - (index < self.axis))


def in_shards(tree: PyTree, mesh: Mesh) -> tuple[PyTree, PyTree]:
    """Weights for `shard_map`: what it takes, and the specs. Inside, what is cut is a `Shard`."""

    def box(x: Any, spec: Spec) -> Any:
        return Shard(x, tuple(spec).index("fsdp")) if "fsdp" in tuple(spec) else x

    specs = weight_specs(tree, mesh)
    return jax.tree.map(box, tree, specs), jax.tree.map(box, specs, specs)


def unboxed(tree: PyTree) -> PyTree:
    """Inside `shard_map`: the weights whole, all at once."""
    return meta.unbox(tree)


def place(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """The tree on the mesh, every leaf with the same spec."""
    return jax.tree.map(partial(put, sharding=NamedSharding(mesh, spec)), tree)


def on_host(tree: PyTree, now: PyTree) -> Callable[[], PyTree]:
    """() -> the tree as it is and where it is; until then it takes no device's memory.

    Arrays that `now` has, too, are not copied: they stay there.
    """
    there = {id(x) for x in jax.tree.leaves(now)}

    def kept(x: Array) -> Callable[[], Array]:
        if id(x) in there:
            return lambda: x
        shape, sharding = x.shape, x.sharding
        shards = {str(shard.index): shard.data for shard in x.addressable_shards}  # no replicas
        parts = {index: np.array(data) for index, data in shards.items()}
        return lambda: jax.make_array_from_callback(shape, sharding, lambda i: parts[str(i)])

    leaves, structure = jax.tree.flatten(tree)
    copies = {id(x): kept(x) for x in leaves}
    order = [id(x) for x in leaves]
    return lambda: jax.tree.unflatten(structure, [copies[name]() for name in order])


def constrain(tree: PyTree, mesh: Mesh, spec: Spec = REPLICATED) -> PyTree:
    """Inside jit: asks for every leaf to have this spec."""
    return jax.tree.map(
        partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec)), tree
    )


def constrain_like(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """Inside jit: asks for every leaf to have its own spec."""
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, named)


def wait(tree: PyTree) -> PyTree:
    """The tree, once its arrays are made; at once where a loop of the host is only traced.

    JAX says of every array that is traced why nothing can wait for it, and looks through all that
    has been traced so far to say it.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        return tree
    return jax.block_until_ready(tree)


def trajectories(mesh: Mesh, branches: int) -> np.ndarray:
    """The branch of each of the T trajectories, int[T]; -1 for an anchor.

    T is the number of branch shards plus G. Every shard of the mesh axis `branch` begins with its
    copy of the anchor.
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

# Environment variables that reveal several processes: the counts set by srun and Open MPI's mpirun,
# and the index set by Kubernetes.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Of the same launchers: the count, the number of a process, and that on its machine.
LAUNCHED = (
    (STARTED[0], "SLURM_PROCID", "SLURM_LOCALID"),
    (STARTED[1], "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
INDEXED_POD = "JOB_COMPLETION_INDEX"
SAID = 500  # bytes of an error that the other processes are told


def distributed_arguments(
    environment: Mapping[str, str],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize; None for a run of a single process.

    Args:
      environment: os.environ; if it shows a launcher, JAX works out the rest itself.
      coordinator, num_processes, process_id: the flags, which take precedence over a launcher.

    Raises:
      UsageError: some of the flags are missing.
    """
    if num_processes == 1:
        return None
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise UsageError(
                "several processes are told --coordinator, --num_processes and --process_id;"
                f" --{missing[0]} is missing"
            )
        several = INDEXED_POD in environment or any(
            int(environment.get(name, 1)) > 1 for name in STARTED
        )
        return {} if several else None
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


class Share(NamedTuple):
    """A process among several that divide work and do not talk to one another.

    Attributes:
      process: its number.
      processes: how many there are.
      local: its number among those of its machine; None if all devices are its own.
    """

    process: int
    processes: int
    local: int | None = None

    def has(self, number: int) -> bool:
        """Whether a piece of the work is this process's."""
        return number % self.processes == self.process


def share_of(
    environment: Mapping[str, str], num_processes: int | None, process_id: int | None
) -> Share:
    """Which process this is, by the flags or else by the launcher's variables.

    Raises:
      UsageError: a flag is missing, or there is no such process.
    """
    if num_processes is None and process_id is None:
        for count, own, local in LAUNCHED:
            if int(environment.get(count, 1)) > 1:
                return Share(*(int(environment[name]) for name in (own, count, local)))
        if INDEXED_POD not in environment:
            return Share(0, 1)
    if process_id is None and INDEXED_POD in environment:
        process_id = int(environment[INDEXED_POD])
    if num_processes == 1:
        process_id = process_id or 0
    if num_processes is None or process_id is None:
        missing = "num_processes" if num_processes is None else "process_id"
        raise UsageError(
            f"several processes are told --num_processes and --process_id; --{missing} is missing"
        )
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"--process_id={process_id}: with --num_processes={num_processes} they are numbered"
            f" from 0 to {num_processes - 1}"
        )
    return Share(process_id, num_processes)


def is_main() -> bool:
    """Whether this process writes and prints; the prompts of its devices are the first."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process. Every process has to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _processes(mesh: Mesh) -> np.ndarray:
    """int[rows, columns, context]: the process of each box of the mesh; a row has whole prompts."""
    steps = tuple(slice(None, None, size) for size in mesh.local_mesh.devices.shape)
    boxes = np.vectorize(lambda device: device.process_index)(mesh.devices[steps])
    return boxes.reshape(-1, *boxes.shape[2:])


def splits_groups(mesh: Mesh) -> bool:
    """Whether the branches of a prompt are on several processes."""
    return _processes(mesh).shape[1] > 1


def total(count: int) -> int:
    """The sum over the processes. Every process has to ask."""
    return int(multihost_utils.process_allgather(np.asarray(count)).sum())


def device_memory() -> float | None:
    """Bytes that JAX may take of a device, the least on any; None if they are not known (CPU).

    Every process has to ask, and gets the same answer.
    """
    own = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    least = multihost_utils.process_allgather(np.float32(min(own))).min()
    return float(least) or None


def own_prompts(mesh: Mesh, prompts: int) -> np.ndarray:
    """Which of the prompts are on this process's devices, in order."""
    rows = np.any(_processes(mesh) == jax.process_index(), axis=(1, 2))
    return np.arange(prompts).reshape(len(rows), -1)[rows].reshape(-1)


def from_own_prompts(x: np.ndarray, mesh: Mesh, prompts: int) -> Array:
    """float[P, ...] with the spec PROMPTS; each process brings its `own_prompts`."""
    return jax.make_array_from_process_local_data(
        NamedSharding(mesh, PROMPTS), x, (prompts, *x.shape[1:])
    )


def own_part(x: Array) -> Array:
    """The part of a sharded array that is on this process's devices, as an array of its own."""
    if x.is_fully_addressable:
        return x
    placed: Any = x.sharding
    return multihost_utils.global_array_to_host_local_array(x, placed.mesh, placed.spec)


def whole(x: Array | np.ndarray) -> np.ndarray:
    """The whole of an array, on every process. Every process has to ask."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def together(compute: Callable[[], PyTree]) -> PyTree:
    """What `compute` makes of this process's part; its error is one on all, so that none waits.

    Every process has to ask.

    Raises:
      NotFiniteError: a process has met a FloatingPointError.
      SharedError: a process has met another error; if that is no UsageError or OSError, it prints
        its traceback. On one process alone the error is raised as it is.
    """
    result, error = None, None
    try:
        result = compute()
    except Exception as raised:
        if jax.process_count() == 1:
            raise
        error = raised
    if jax.process_count() == 1:
        return result
    kind = 0 if error is None else 2 if isinstance(error, FloatingPointError) else 1
    kinds = multihost_utils.process_allgather(np.asarray(kind))
    if not np.any(kinds):
        return result
    if error is not None and not isinstance(error, UsageError | OSError):
        traceback.print_exception(error)
    text = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    content = np.frombuffer(text.encode()[:SAID].ljust(SAID), np.uint8)
    first = int(np.argmax(kinds > 0))
    said = bytes(multihost_utils.process_allgather(content)[first]).decode(errors="replace")
    raise (NotFiniteError if kinds[first] == 2 else SharedError)(
        f"process {first} of {jax.process_count()}: {said.strip()}"
    ) from error


def gather(compute: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """Joins what `compute` makes of each process's part: float[P, G] or float[P], on every process.

    If several processes hold a prompt, or a branch, what depends on it alone is taken from the
    first of them.

    Raises:
      Exception: see `together`.
    """
    own = together(compute)
    processes = _processes(mesh)[:, :, 0]

    def join(x: np.ndarray) -> np.ndarray:  # [processes, ...]
        if x.ndim == 2:
            return x[processes[:, 0]].reshape(-1)
        return rearrange(x[processes], "row column p g -> (row p) (column g)")

    return jax.tree.map(join, multihost_utils.process_allgather(own))
