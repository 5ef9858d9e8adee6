"""Runs KVPO; without arguments, the toy of configs/tiny.py in a fresh directory under runs/.

python -m kvpo_jax.main [--config=FILE[:PRESET]] [--workdir=DIR] [--resume] [--config.FIELD=VALUE ...]
"""

import sys

from absl import app, flags, logging

from kvpo_jax import config as config_lib

_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:PRESET]; a new run's default is configs/tiny.py. --config.FIELD=VALUE changes a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a run that is in it already is continued")
_RESUME = flags.DEFINE_bool("resume", False, "continue the run in --workdir, or else the newest under runs/")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # a checkpoint alone says thirty lines at INFO
    try:
        workdir = config_lib.run_directory(_CONFIG.value, _WORKDIR.value, _RESUME.value)
        config = config_lib.resolve(_CONFIG.value, workdir, arguments[1:])
        config_lib.check_files(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    config_lib.use_compilation_cache()
    config_lib.start_run(config, workdir)
    print(f"run directory: {workdir}", flush=True)

    from kvpo_jax import train  # its imports take seconds that a mistyped flag should not

    train.train_and_evaluate(config, workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
