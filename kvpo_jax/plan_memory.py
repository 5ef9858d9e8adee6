"""What a run costs in memory, before it starts: from shapes, and from the compiled programs.

    kvpo-plan --config=configs/longlive.py --devices=8 --memory_gb=141
    kvpo-plan --config=configs/longlive.py --devices=8 --compile --target=h200
    kvpo-plan --config=configs/longlive.py --devices=32 --work --efficiency=0.5

The first table shows the arrays of an iteration, the second how much of them is resident on a
device in each stage, and about what the stage's program needs besides. Both take seconds: the run's
own functions are traced, and nothing is allocated. With --compile the programs are compiled ahead
of time: XLA says how much memory each of them needs, and what a call sends to other devices (GB) is
counted in it. --target=h200 compiles for that GPU, which need not be there: JAX's CUDA packages are
enough (pip install 'kvpo_jax[cuda12]'). Otherwise the programs are compiled for CPU devices. XLA's
CPU backend has no bfloat16 products and would keep float32 copies of whole caches, so what computes
in bfloat16 is compiled in float32 there, and half of what it needs is shown. With
train.micro_batch=0 the plan is that of the largest micro-batch that fits, as in a run. If none
does, the fastest mesh and settings are proposed with which the run fits, by what --work counts.

--table prints which of some numbers of GPUs the config fits on, from one to 256, with which mesh,
and how long an iteration takes there. It takes a while.

--work counts instead what an iteration computes on a device, stage by stage, and how long that
takes at a share of the speed that a Hopper GPU can reach (--efficiency); and what the device sends
to others, over which axes of the mesh, and how long that takes at the bandwidths that are given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags
from jax.experimental import topologies

from kvpo_jax import backbone, fitting, memory, network, planning, work
from kvpo_jax.errors import UsageError
from kvpo_jax.fitting import GB
from kvpo_jax.memory import Program
from kvpo_jax.rewards import scorers
from kvpo_jax.run import make_mesh
from kvpo_jax.runtime import command, progress, sharding, workdir
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.config import branches_at_once, check_trained, wan_config, with_fields

# ---------------------------------------------------------------- devices

# What XLA has to know of a GPU. Of these two only the bandwidth and the size of the memory differ.
GPUS = {"h100": (3_352_320_000_000, 84_929_347_584), "h200": (4_800_000_000_000, 150_754_820_096)}
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Devices to compile for: CPUs of this process, or GPUs that need not be there.

    Raises:
      UsageError: JAX's CUDA packages are not installed.
    """
    if target == "cpu":
        return jax.devices()[:count]
    bandwidth, memory = GPUS[target]
    description = GPU.format(bandwidth=bandwidth, memory=memory, name=target)
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{count}"
        ).devices
    except NotImplementedError as error:
        raise UsageError(
            f"--target={target} needs JAX's CUDA packages: pip install 'kvpo_jax[cuda12]'"
        ) from error


# ---------------------------------------------------------------- the command


class Temporary(NamedTuple):
    """What a program needs on one device besides its arguments and results, and what it sends."""

    gb: float
    sent_gb: float
    compile_seconds: float


def compile_programs(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    target: str,
    planned: Mapping[str, Program],
) -> dict[str, Temporary]:
    """title -> Temporary, of the programs that are planned, as they are compiled for the target."""
    wide, compiled = target == "cpu", config.copy_and_resolve_references()
    if wide:
        command.use_compilation_cache()
        compiled.model.dtype = compiled.decoder.dtype = "float32"
    elif config.model.attention == "auto":
        compiled.model.attention = "cudnn"  # "auto" asks the devices of this process
    programs, out = memory.plan(compiled, devices, wide).programs, {}
    sizes, wires = make_mesh(config, devices).shape, network.Wires()
    with progress.bar("compile", len(programs)) as advance:
        for title, program in programs.items():
            begin = time.monotonic()
            made = program.function.lower(*program.arguments).compile()
            share = 0.5 if wide and planned[title].dtype == "bfloat16" else 1.0
            gb = share * made.memory_analysis().temp_size_in_bytes / GB
            sent = network.by_axes(network.of_compiled(made.as_text(), sizes), sizes, wires)
            sent_gb = sum(axis.bytes for axis in sent.values()) / GB
            out[title] = Temporary(gb, sent_gb, time.monotonic() - begin)
            advance(1, f"compile: {title}")
    return out


def choose_micro_batch(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device], limit: float
) -> ml_collections.ConfigDict:
    """The config with the micro-batch of a run, and why in a line, if it leaves that open."""
    if config.train.micro_batch:
        return config
    config, reason = fitting.choose_micro_batch(config, devices, limit)
    print(reason)
    return config


# Flag -> what it does, and the flags that mean nothing beside it.
ALONE = {
    "table": ("is printed alone", ("devices", "memory_gb", "work", "compile", "target", "json")),
    "work": ("counts without compiling", ("compile", "target")),
}


def check_flags(given: flags.FlagValues) -> None:
    """Finds what is wrong with the flags before anything is counted, which takes minutes.

    Raises:
      UsageError: a number is out of its range, flags do not go together, or --json cannot be
        written.
    """
    for name, (what, others) in ALONE.items():
        if given[name].value and (asked := [x for x in others if given[x].present]):
            listed = " and ".join(f"--{x}" for x in asked)
            raise UsageError(f"--{name} {what}; leave {listed} out")
    if not 0 < given.efficiency <= 1:
        raise UsageError(
            f"--efficiency={given.efficiency:g} is a share of the peak, above 0 and up to 1"
        )
    for name, unit in (("memory_gb", "GB"), ("nvlink_gb", "GB/s"), ("infiniband_gb", "GB/s")):
        if not 0 < getattr(given, name) < math.inf:
            raise UsageError(f"--{name}={getattr(given, name):g} is a number of {unit}, above 0")
    if given.json:
        command.writable("json", given.json)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Finds what would end a run as it begins, as far as that shows without its larger files.

    Raises:
      UsageError: the config names what there is not, or an adapter of sizes that are not its own.
    """
    check_trained(config)
    backbone.check_size(config)
    backbone.check_tasks(config)
    scorers.check_known(config.reward.scorer)
    scorers.check_known(config.eval.scorer)
    backbone.check_there(config, ("weights", "paths.lora"))
    if config.paths.lora:
        backbone.check_lora(config.paths.lora, wan_config(config))


def speed_of(given: flags.FlagValues) -> planning.Speed:
    """How fast the devices are and how they are connected, as the flags say."""
    wires = network.Wires(given.node_devices, given.nvlink_gb * GB, given.infiniband_gb * GB)
    return planning.Speed(given.efficiency, wires)


def report_work(config: ml_collections.ConfigDict, given: flags.FlagValues) -> None:
    """Prints what an iteration computes, and how long that takes."""
    speed = speed_of(given)
    efficiency, wires = speed
    devices = jax.devices()[: given.devices]
    config = choose_micro_batch(config, devices, given.memory_gb * GB)
    count = work.count(config, devices)
    stages = {**count.stages, "sum": work.sum_of(count.stages.values())}
    sizes = make_mesh(config, devices).shape
    sent = {name: network.by_axes(stage.sent, sizes, wires) for name, stage in stages.items()}
    over = {name: sum(axis.seconds for axis in by.values()) for name, by in sent.items()}
    rows = [
        (
            name,
            f"{stage.flops / 1e15:.4g}",
            f"{stage.bytes / 1e12:.4g}",
            f"{stage.seconds / efficiency:.4g}",
            f"{over[name]:.4g}",
        )
        for name, stage in stages.items()
    ]
    title = f"{given.config} on {given.devices} devices: an iteration, on each device"
    progress.table(title, ("stage", "PFLOP", "TB", "seconds", "network s"), rows)
    peaks = ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in work.PEAK.items())
    print(f"\nmean over the pivots ({count.pivots}); {efficiency:.0%} of TFLOP/s: {peaks}\n")
    _print_sent(sent["sum"], sizes, wires)
    share = 1.0
    chunked = branches_at_once(config) < config.rollout.branches
    splits = chunked or sizes["branch"] * sizes["context"] > 1
    if splits or math.prod(sizes.values()) < given.devices:
        as_it_is = planning.timed(config, devices, speed, fitting.Proposal({}, 0.0))
        share = planning.needed(config, devices, speed, as_it_is)
        print(
            f"{share:.1%} of what the devices could compute meanwhile is needed; see docs/memory.md"
        )
    if given.json:
        figures = [
            {
                "name": name,
                "pflop": stage.flops / 1e15,
                "bytes": stage.bytes,
                "seconds": stage.seconds / efficiency,
                "network_seconds": over[name],
            }
            for name, stage in count.stages.items()
        ]
        asked = {"config": given.config, "devices": given.devices, "efficiency": efficiency}
        out = {**asked, "seconds": count.seconds(efficiency), "stages": figures}
        out |= {"mesh": dict(sizes), "network_seconds": over["sum"], "needed": share}
        out["sent"] = {" x ".join(axes): axis._asdict() for axes, axis in sent["sum"].items()}
        write_json(out, Path(given.json))


def _print_sent(
    sent: Mapping[tuple[str, ...], network.Sent], sizes: Mapping[str, int], wires: network.Wires
) -> None:
    """What a device sends in an iteration, over which axes of the mesh, and at which speed."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    rows = [
        (
            " x ".join(axes),
            f"{axis.bytes / GB:.4g}",
            f"{axis.bandwidth / GB:.4g}",
            f"{axis.seconds:.4g}",
        )
        for axes, axis in sent.items()
    ]
    if not rows:
        print(f"{mesh}: nothing is sent")
        return
    title = f"{mesh}: each device sends over the network"
    progress.table(title, ("axes", "GB", "GB/s", "seconds"), rows)
    print(
        f"\nin rings, {wires.inside / GB:g} GB/s inside a node of {wires.node} and"
        f" {wires.between / GB:g} for each GPU between nodes"
    )


def report(config: ml_collections.ConfigDict, given: flags.FlagValues) -> None:
    """Prints both tables, and whether the run fits or what makes it fit."""
    devices, limit = target_devices(given.target, given.devices), given.memory_gb * GB
    asked = config
    config = choose_micro_batch(config, devices, limit)
    planned = memory.plan(config, devices)
    estimate = memory.estimate(planned)
    title = f"{given.config} on {given.devices} devices; 1e9 bytes on each device"
    sizes = {name: size / GB for name, size in estimate.sizes.items()}
    progress.table(title, ("part", "GB"), [(name, f"{gb:.2f}") for name, gb in sizes.items()])
    compiled = {}
    if given.compile:
        compiled = compile_programs(config, devices, given.target, planned.programs)
    exact = {title: temporary.gb * GB for title, temporary in compiled.items()}
    complete = estimate._replace(working=estimate.working | exact)
    print()
    _print_stages(complete, compiled)
    if rewards := [] if config.reward.resident else [n for n in sizes if n.startswith("reward")]:
        gb = sum(sizes[name] for name in rewards)
        print(f"reward.resident=False: {gb:.2f} GB of rewards are resident only to score")
    peak, estimated = complete.peak(), "" if given.compile else ", estimated without compiling"
    if peak <= limit:
        print(f"\nfits into {given.memory_gb:g} GB: {peak / GB:.2f} at most{estimated}")
    else:
        print(f"\ndoes not fit into {given.memory_gb:g} GB{estimated}; what does?", flush=True)
        excess = max(0.0, peak - estimate.peak())  # of the compiler's figures over the estimate
        _propose(asked, devices, limit - excess, excess, speed_of(given))
    if given.json:
        figures = {"config": given.config, "devices": given.devices}
        for name, of_stage in (("working_gb", complete.working), ("stage_gb", complete.needed())):
            figures[name] = {title: size / GB for title, size in of_stage.items()}
        figures["sent_gb"] = {title: made.sent_gb for title, made in compiled.items()}
        write_json({**figures, "resident_gb": sizes}, Path(given.json))


def _propose(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    limit: float,
    excess: float,
    speed: planning.Speed,
) -> None:
    """Prints the fastest that fits, or what it takes that anything does; see `advice`."""
    found = planning.fastest(config, devices, limit, speed)
    if not found.options:
        lowest = with_fields(config, found.least.fields)
        other = fitting.propose(lowest, devices, limit)
        fields = {**found.least.fields, **other.fields}
        print(advice(fitting.Proposal(fields, other.peak), limit, excess))
        return
    _print_options(found.options)
    best = found.options[0]
    print(f"\n{advice(best.proposal, limit, excess, best.seconds)}")


def _print_options(options: Sequence[planning.Option]) -> None:
    """How long an iteration takes with each, the fastest first, and what it needs."""
    rows = []
    for option in options:
        sizes = (option.proposal.fields[f"mesh.{axis}"] for axis in sharding.AXES)
        figures = (option.computing, option.sending, option.seconds, option.proposal.peak / GB)
        rows.append((" x ".join(map(str, sizes)), *(f"{x:.4g}" for x in figures)))
    title = "an iteration by count, on the meshes that fit and that were timed"
    columns = (" x ".join(sharding.AXES), "computing, s", "network, s", "in all", "GB")
    progress.table(title, columns, rows)


def advice(
    proposal: fitting.Proposal, limit: float, excess: float = 0.0, seconds: float | None = None
) -> str:
    """What a proposal says to somebody whose run does not fit.

    Args:
      proposal: from `planning.fastest` or `fitting.propose`.
      limit: bytes that it was to need at most.
      excess: bytes that it needs besides.
      seconds: of an iteration, if they were counted.
    """
    gb = f"{(proposal.peak + excess) / GB:.2f} GB"
    gb += "" if seconds is None else f", {seconds:.0f} s by count"
    if proposal.peak > limit:
        tried = f" with {proposal.arguments()}" if proposal.fields else ""
        return (
            f"nothing that was tried fits; the least is {gb}{tried}. It takes more devices, or"
            " devices with more memory"
        )
    kind = "with the same gradient" if proposal.is_same_gradient() else "as another run"
    return f"it fits {kind}, {gb}, with: {proposal.arguments()}"


def _print_stages(estimate: memory.Estimate, compiled: Mapping[str, Temporary]) -> None:
    rows = []
    for title, needed in estimate.needed().items():
        figures = (sum(estimate.resident[title].values()), estimate.working[title], needed)
        made = compiled.get(title)
        further = (f"{made.sent_gb:.3g}", f"{made.compile_seconds:.0f} s") if made else ("", "")
        cells = (title, *(f"{size / GB:.2f}" for size in figures))
        rows.append((*cells, *(further if compiled else ())))
    kind = ("temporary", "in all", "sends", "compiled in") if compiled else ("working", "in all")
    progress.table("", ("stage", "resident", *kind), rows)


# Devices, what they are, and 1e9 bytes of one.
CLUSTERS = (
    (1, "24 GB GPU", 24.0),
    (1, "H100", 80.0),
    (1, "H200", 141.0),
    (8, "H100", 80.0),
    (8, "H200", 141.0),
    (32, "H200", 141.0),
    (64, "H200", 141.0),
    (128, "H200", 141.0),
    (256, "H200", 141.0),
)
SHARE = 0.92  # of a device's memory that the estimate may take: 130 GB of an H200


def report_table(config: ml_collections.ConfigDict, given: flags.FlagValues) -> None:
    """Prints, for each of CLUSTERS, whether a run fits and how long an iteration then takes.

    Raises:
      UsageError: the config can be had on none of them.
    """
    speed, mesh = speed_of(given), " x ".join(sharding.AXES)
    seconds = ("computing, s", "network, s", "needed", "prompts per hour")
    rows = [("devices", "limit, GB", "needs, GB", mesh, *seconds, "settings")]
    faults = []
    for count, name, gb in progress.steps(CLUSTERS, "clusters"):
        devices = jax.devices()[:count]
        try:
            found = planning.fastest(config, devices, SHARE * gb * GB, speed)
            cells = _fitting_cells(config, devices, speed, found)
        except UsageError as error:  # such as a mesh of more devices
            faults.append(error)
            cells = _no_cells(str(error))
        rows.append((f"{count} {name}", f"{SHARE * gb:.0f}", *cells))
    if len(faults) == len(CLUSTERS):
        raise faults[-1]
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")


Cells = tuple[str, str, str, str, str, str, str]  # of a row of the table behind the limit


def _no_cells(reason: str) -> Cells:
    """Of devices on which a run cannot be had."""
    return f"no: {reason}", "", "", "", "", "", ""


def _fitting_cells(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    speed: planning.Speed,
    found: planning.Fastest,
) -> Cells:
    """Of the fastest that fits, or of what needs least."""
    if not found.options:
        return _no_cells(f"{found.least.peak / GB:.1f} at least")
    best = found.options[0]
    sizes = [f"mesh.{axis}" for axis in sharding.AXES]
    fields = best.proposal.fields
    settings = [f"{name}={value}" for name, value in fields.items() if name not in sizes]
    return (
        f"{best.proposal.peak / GB:.1f}",
        " x ".join(str(fields[name]) for name in sizes),
        f"{best.computing:.0f}",
        f"{best.sending:.1f}",
        f"{planning.needed(config, devices, speed, best):.0%}",
        f"{3600 * config.train.prompts_per_iteration / best.seconds:.0f}",
        ", ".join(settings),
    )


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    count = max(count for count, *_ in CLUSTERS) if given.table else given.devices
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    # What was compiled for devices that are not there cannot be read again.
    jax.config.update("jax_enable_compilation_cache", given.target == "cpu")
    make = report_table if given.table else report_work if given.work else report
    check_flags(given)
    config = workdir.resolve(given.config, None, arguments[1:])
    check_config(config)
    with progress.bar("planning"):
        make(config, given)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "config", "configs/longlive.py", "FILE[:PRESET]; --config.FIELD=VALUE changes a field"
    )
    flags.DEFINE_integer("devices", 8, "devices of the mesh", lower_bound=1)
    flags.DEFINE_float("memory_gb", 141.0, "memory of one device, in 1e9 bytes (H200: 141)")
    flags.DEFINE_bool("compile", False, "compile the programs too; minutes at full size")
    flags.DEFINE_enum("target", "cpu", ["cpu", *GPUS], "what to compile for")
    flags.DEFINE_bool("work", False, "count what an iteration computes, instead of memory")
    flags.DEFINE_bool("table", False, "what fits on one GPU to 256, and how long it takes")
    flags.DEFINE_float("efficiency", work.EFFICIENCY, "share of the peak that --work takes")
    wires = network.Wires()
    flags.DEFINE_integer("node_devices", wires.node, "devices of a node", lower_bound=1)
    flags.DEFINE_float("nvlink_gb", wires.inside / GB, "GB/s that a device sends inside its node")
    flags.DEFINE_float("infiniband_gb", wires.between / GB, "GB/s of it that go to other nodes")
    command.define_path("json", "", "file to write the figures to")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.plan_memory", define_flags, main)


if __name__ == "__main__":
    cli()
