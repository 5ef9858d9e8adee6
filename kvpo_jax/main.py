"""Runs KVPO; without arguments, the toy of configs/tiny.py in a fresh directory under runs/.

    python -m kvpo_jax.main [--config=FILE[:PRESET]] [--workdir=DIR] [--resume] [--profile] \\
        [--wandb] [--config.FIELD=VALUE ...]

On several hosts one command per process, each with the same arguments (docs/cluster.md).
"""

import os
import sys
from contextlib import ExitStack
from typing import Any

import jax
from absl import flags

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import command, mirror, progress, sharding, workdir
from kvpo_jax.runtime.config import check_trained, prompts_at_once
from kvpo_jax.runtime.process import STOPPED, ending_together

# Least threads of XLA's CPU client, which otherwise has as many as the process may use cores. With
# as few as the process has devices it waits for ever: one device's next program holds a thread
# until its last ones are done, another device's operation over all processes finds none, and these
# wait for it.
CPU_THREADS = 16

__doc__ = f"{__doc__}\nThe words in the line of an iteration:\n\n{progress.legend()}\n"


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    distributed = sharding.distributed_arguments(
        os.environ, given.coordinator, given.num_processes, given.process_id
    )
    if distributed is not None and not given.workdir:
        raise UsageError("several processes need --workdir=DIR, a directory that all of them see")
    if distributed and distributed["process_id"]:
        progress.mute()
    directory = workdir.run_directory(given.config, given.workdir, given.resume)
    config = workdir.resolve(given.config, directory, arguments[1:])
    check_trained(config)

    if given.wandb:
        mirror.check()

    # These take seconds that a mistyped flag should not.
    from kvpo_jax import backbone, budget, evaluate, fitting, run, train

    backbone.check_files(config)
    if distributed is not None:
        join(distributed)
    with ending_together():
        if (summary := workdir.finished(config, directory)) is not None:
            if sharding.is_main():
                evaluate.print_finished(directory, summary, config)
            return
        command.use_compilation_cache()
        with progress.bar("preparing"):
            fitted = fitting.fitted(config)
            # What cannot work is an error before the run directory is made.
            equipment = run.load(fitted)
            run.eligible_pivots(fitted, equipment.backbone.to_pixel)
            equipment = budget.limited(equipment)
            equipment.initial_lora()
        with ExitStack() as stack:
            stack.enter_context(workdir.locked(directory))
            if sharding.is_main():
                at_once = prompts_at_once(fitted)
                workdir.start_run(config, directory, equipment.files, at_once)
                print(f"run directory: {directory}", flush=True)
                if given.wandb:
                    stack.enter_context(mirror.mirrored(config, directory))
            summary = train.train(equipment, directory, given.profile)
        if summary is None:
            sys.exit(STOPPED)


def join(distributed: dict[str, Any]) -> None:
    """Waits for all processes.

    None may still read the run directory once the first begins to write there.
    """
    os.environ.setdefault("NPROC", str(max(CPU_THREADS, os.cpu_count() or 1)))
    try:
        jax.distributed.initialize(**distributed)
    except ValueError as error:
        raise UsageError(
            f"{error} One of several processes, it seems: give each --coordinator, "
            "--num_processes and --process_id, or --num_processes=1 if it is a run of its own "
            "(docs/cluster.md)"
        ) from error
    if not sharding.is_main():
        progress.mute()


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "config",
        None,
        "FILE[:PRESET]; default: configs/tiny.py. --config.FIELD=VALUE changes a field",
    )
    command.define_path("workdir", None, "run directory; a run that is in it already is continued")
    flags.DEFINE_bool("resume", False, "continue the run in --workdir, or else the newest in runs/")
    flags.DEFINE_bool("profile", False, "leave a trace of the third iteration in WORKDIR/profile")
    flags.DEFINE_bool("wandb", False, "mirror TensorBoard to Weights & Biases (extra wandb)")
    flags.DEFINE_string("coordinator", None, "host:port of process 0; any free port of its host")
    flags.DEFINE_integer("num_processes", None, "processes of the run; 1: alone, however started")
    flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.main", define_flags, main)


if __name__ == "__main__":
    cli()
