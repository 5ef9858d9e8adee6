"""What a run costs in memory, before it starts: from shapes, and from the compiled programs.

    kvpo-plan --config=configs/longlive.py --devices=8 --memory_gb=141
    kvpo-plan --config=configs/longlive.py --devices=8 --compile --target=h200
    kvpo-plan --config=configs/longlive.py --devices=32 --work --efficiency=0.5

The first table shows the arrays of an iteration, the second how much of them is resident on a
device in each stage, and about what the stage's program needs besides. Both take seconds: the run's
own functions are traced, and nothing is allocated. With --compile the programs are compiled ahead
of time, and XLA says how much memory each of them needs. --target=h200 compiles for that GPU, which
need not be there: JAX's CUDA packages are enough (pip install 'kvpo_jax[cuda12]'). Otherwise the
programs are compiled for CPU devices. XLA's CPU backend has no bfloat16 products and would keep
float32 copies of whole caches, so what computes in bfloat16 is compiled in float32 there, and half
of what it needs is shown. With train.micro_batch=0 the plan is that of the largest micro-batch that
fits, as in a run. If none does, the last line proposes settings with which the run fits.

--work counts instead what an iteration computes on a device, stage by stage, and how long that
takes at a share of the speed that a Hopper GPU can reach (--efficiency).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags
from jax.experimental import topologies

from kvpo_jax import backbone, fitting, memory, work
from kvpo_jax.errors import UsageError
from kvpo_jax.fitting import GB
from kvpo_jax.memory import Program
from kvpo_jax.runtime import command, progress, workdir
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.config import check_trained

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
    """What a program needs on one device besides its arguments and results."""

    gb: float
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
    with progress.bar("compile", len(programs)) as advance:
        for title, program in programs.items():
            begin = time.monotonic()
            analysis = program.function.lower(*program.arguments).compile().memory_analysis()
            share = 0.5 if wide and planned[title].dtype == "bfloat16" else 1.0
            gb = share * analysis.temp_size_in_bytes / GB
            out[title] = Temporary(gb, time.monotonic() - begin)
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


def report_work(config: ml_collections.ConfigDict, given: flags.FlagValues) -> None:
    """Prints what an iteration computes, and how long that takes.

    Raises:
      UsageError: the efficiency is not a share, or something is to be compiled.
    """
    efficiency = given.efficiency
    if not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency={efficiency:g} is a share of the peak, above 0 and up to 1")
    if given.compile:
        raise UsageError("--work counts without compiling; leave --compile out")
    devices = jax.devices()[: given.devices]
    config = choose_micro_batch(config, devices, given.memory_gb * GB)
    count = work.count(config, devices)
    stages = {**count.stages, "sum": work.sum_of(count.stages.values())}
    rows = [
        (
            name,
            f"{stage.flops / 1e15:.4g}",
            f"{stage.bytes / 1e12:.4g}",
            f"{stage.seconds / efficiency:.4g}",
        )
        for name, stage in stages.items()
    ]
    title = f"{given.config} on {given.devices} devices: an iteration, on each device"
    progress.table(title, ("stage", "PFLOP", "TB", "seconds"), rows)
    peaks = ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in work.PEAK.items())
    print(f"\nmean over the pivots ({count.pivots}); {efficiency:.0%} of TFLOP/s: {peaks}")
    if given.json:
        figures = [
            {
                "name": name,
                "pflop": stage.flops / 1e15,
                "bytes": stage.bytes,
                "seconds": stage.seconds / efficiency,
            }
            for name, stage in count.stages.items()
        ]
        asked = {"config": given.config, "devices": given.devices, "efficiency": efficiency}
        out = {**asked, "seconds": count.seconds(efficiency), "stages": figures}
        write_json(out, Path(given.json))


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
        print(f"\nfits into {given.memory_gb:.0f} GB: {peak / GB:.2f} at most{estimated}")
    else:
        print(f"\ndoes not fit into {given.memory_gb:.0f} GB{estimated}; what does?", flush=True)
        excess = max(0.0, peak - estimate.peak())  # of the compiler's figures over the estimate
        print(advice(fitting.propose(asked, devices, limit - excess), limit - excess, excess))
    if given.json:
        figures = {"config": given.config, "devices": given.devices}
        for name, of_stage in (("working_gb", complete.working), ("stage_gb", complete.needed())):
            figures[name] = {title: size / GB for title, size in of_stage.items()}
        write_json({**figures, "resident_gb": sizes}, Path(given.json))


def advice(proposal: fitting.Proposal, limit: float, excess: float = 0.0) -> str:
    """What a proposal says to somebody whose run does not fit.

    Args:
      proposal: from `fitting.propose`.
      limit: bytes that it was to need at most.
      excess: bytes that it needs besides.
    """
    gb = f"{(proposal.peak + excess) / GB:.2f} GB"
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
        seconds = [f"{compiled[title].compile_seconds:.0f} s" if title in compiled else ""]
        cells = (title, *(f"{size / GB:.2f}" for size in figures))
        rows.append((*cells, *(seconds if compiled else ())))
    kind = ("temporary", "in all", "compiled in") if compiled else ("working", "in all")
    progress.table("", ("stage", "resident", *kind), rows)


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", given.devices)
    # What was compiled for devices that are not there cannot be read again.
    jax.config.update("jax_enable_compilation_cache", given.target == "cpu")
    make = report_work if given.work else report
    config = workdir.resolve(given.config, None, arguments[1:])
    check_trained(config)
    backbone.check_size(config)
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
    flags.DEFINE_float("efficiency", work.EFFICIENCY, "share of the peak that --work takes")
    command.define_path("json", "", "file to write the figures to")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.plan_memory", define_flags, main)


if __name__ == "__main__":
    cli()
