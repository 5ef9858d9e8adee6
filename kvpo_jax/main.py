"""Runs KVPO; without arguments, the toy of configs/tiny.py in a fresh directory under runs/.

python -m kvpo_jax.main [--config=FILE[:PRESET]] [--workdir=DIR] [--resume] [--profile] [--config.FIELD=VALUE ...]

On several hosts one command per process, each with the same arguments (docs/cluster.md).
"""

import os
from typing import Any

import jax
from absl import app, flags, logging

from kvpo_jax import config as config_lib
from kvpo_jax import sharding

_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:PRESET]; a new run's default is configs/tiny.py. --config.FIELD=VALUE changes a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a run that is in it already is continued")
_RESUME = flags.DEFINE_bool("resume", False, "continue the run in --workdir, or else the newest under runs/")
_PROFILE = flags.DEFINE_bool("profile", False, "leave a trace of the third iteration in WORKDIR/profile")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; any free port of its host")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the run; 1: alone, whatever started it")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # a checkpoint alone says thirty lines at INFO
    try:
        distributed = sharding.distributed_arguments(
            os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
        if distributed is not None and not _WORKDIR.value:
            raise ValueError("several processes need --workdir=DIR, a directory that all of them see")
        workdir = config_lib.run_directory(_CONFIG.value, _WORKDIR.value, _RESUME.value)
        config = config_lib.resolve(_CONFIG.value, workdir, arguments[1:])
        config_lib.check_files(config)
        if distributed is not None:
            join(distributed)
        config_lib.use_compilation_cache()

        from kvpo_jax import backbone, heldout, rollout, train  # seconds that a mistyped flag should not take

        # What cannot work leaves no run behind: sizes for the devices, scorers, and of the files all but the weights.
        heldout.batch_size(config, rollout.make_mesh(config))
        backbone.load(config).prompts("heldout", 0)
        if sharding.is_main():
            config_lib.start_run(config, workdir)
            print(f"run directory: {workdir}", flush=True)
        train.train_and_evaluate(config, workdir, _PROFILE.value)
    except (ValueError, OSError, FloatingPointError) as error:
        config_lib.explain(error)


def join(distributed: dict[str, Any]) -> None:
    """Waits for all processes, so that none reads the run directory once the first begins to write there."""
    try:
        jax.distributed.initialize(**distributed)
    except ValueError as error:
        raise ValueError(
            f"{error} One of several processes, it seems: give each --coordinator, --num_processes and "
            "--process_id, or --num_processes=1 if it is a run of its own (docs/cluster.md)"
        ) from error


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
