"""Makes the moving picture of before and after in README.md from a finished run.

    python -m kvpo_jax.main --workdir=runs/mine
    python tools/moving_picture.py --workdir=runs/mine --output=docs/before_after.gif

It generates the first held-out prompt sequences with the reference and with the trained policy,
from the same noise, as the run's evaluations do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import evaluate
from kvpo_jax import run as run_lib
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import command, pictures, progress
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.state import policy_of, saved_state


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    workdir, output = Path(given.workdir), Path(given.output)
    if output.suffix != ".gif":
        raise UsageError(f"--output={output} does not end in .gif")
    overrides = [f"--config.eval.prompts={given.prompts}", "--config.eval.batch=0"]
    config = config_lib.override(
        workdir_lib.trained_config(workdir, given.iteration), [*overrides, *arguments[1:]]
    )
    config_lib.check(config)
    backbone_lib.check_files(config)
    command.use_compilation_cache()
    with progress.bar("preparing"):
        run = run_lib.load(config)
        state = saved_state(workdir, config, run.mesh, given.iteration)
    results: dict[str, evaluate.Heldout] = {}
    videos: dict[str, dict[int, np.ndarray]] = {"before": {}, "after": {}}
    for name, policy in (("before", "reference"), ("after", "online")):
        film = videos[name].__setitem__
        with progress.bar(name):
            results[name] = evaluate.evaluate(run, policy_of(state, policy), film)
    pictures.moving(
        [run.backbone.prompts("heldout", i) for i in range(given.prompts)],
        backbone_lib.switch_pixels(config, run.backbone),
        {name: np.stack([of_run[i] for i in sorted(of_run)]) for name, of_run in videos.items()},
        {name: result.reward for name, result in results.items()},
        run.backbone.fps,
        output,
    )
    progress.say(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB")


def define_flags() -> None:
    """The flags of the command."""
    command.define_path("workdir", None, "run directory", required=True)
    command.define_iteration()
    command.define_path("output", "before_after.gif", "the GIF")
    flags.DEFINE_integer(
        "prompts",
        4,
        "held-out prompt sequences that are shown",
        lower_bound=2,
        upper_bound=pictures.PICTURED,
    )


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
