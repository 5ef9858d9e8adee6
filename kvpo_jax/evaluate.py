"""Held-out rewards of a finished or running run: reference, online and EMA policy, same prompts and noise.

python -m kvpo_jax.evaluate --workdir=runs/tiny-... [--config.eval.prompts=64 ...]
"""

import sys
from functools import partial
from pathlib import Path

import jax
from absl import app, flags, logging

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import checkpoint, heldout, report, rollout, sharding, train
from kvpo_jax import config as config_lib


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    workdir = Path(flags.FLAGS.workdir)
    try:
        config = config_lib.resolve(None, workdir, arguments[1:])
        config_lib.check_files(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    config_lib.use_compilation_cache()
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.branch, config.train.prompts_per_iteration, config.rollout.branches
    )
    backbone = backbone_lib.load(config)
    params = backbone.load(jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    decoder = backbone.load_decoder(jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    decode = partial(heldout.make_decode(backbone, mesh), decoder)
    stages = rollout.build(config, mesh)
    with checkpoint.manager(workdir / "checkpoints", config.train.keep) as checkpoints:
        restored = checkpoint.restore_latest(
            checkpoints, train.init_state(config, train.make_optimiser(config.train), mesh)
        )
    if restored is None:
        sys.exit(f"error: {workdir / 'checkpoints'} has no checkpoint yet")
    iteration, state, _ = restored
    results = {
        name: heldout.evaluate(config, backbone, mesh, stages, decode, {"params": params, "lora": lora})
        for name, lora in (("reference", state.reference), ("online", state.lora), ("ema", state.ema))
    }
    rewards = {name: {"reward": result.reward, **result.components} for name, result in results.items()}
    print(f"iteration {iteration} of {workdir}\n{report.final_table(rewards)}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "run directory", required=True)
    app.run(main, flags_parser=config_lib.parse_flags)
