"""What a run carries from one iteration to the next, and its optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import abstract_variables
from kvpo_jax.runtime import checkpoint, progress, sharding, sums
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import Array, PyTree


class TrainState(struct.PyTreeNode):
    """The state of a run; all of it is in a checkpoint.

    Attributes:
      iteration: int32[], iterations done.
      lora: the policy that is trained (pi_theta).
      old: the policy that makes the rollouts (pi_old).
      reference: the frozen initial policy (pi_ref).
      ema: the average of lora over optimiser steps.
      optimiser: optax state.
      energy_unit: float32[], running mean of the spread of a group's energies, the common unit of
        tau (`objective.next_unit`); 0 until the first iteration measures it.
    """

    iteration: Array
    lora: PyTree
    old: PyTree
    reference: PyTree
    ema: PyTree
    optimiser: optax.OptState
    energy_unit: Array


def make_optimiser(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW on the LoRA tree: global-norm clip, linear warm-up, decoupled weight decay.

    `train` is that section of the config.
    """
    rate = train.learning_rate
    if train.warmup:
        rate = optax.linear_schedule(rate / train.warmup, rate, max(train.warmup - 1, 1))
    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.adamw(rate, weight_decay=train.weight_decay),
    )


def init_state(config: ml_collections.ConfigDict, mesh: Mesh, lora: PyTree) -> TrainState:
    """The state before the first iteration: every policy is `lora`."""
    optimiser_state = make_optimiser(config.train).init(lora)
    iteration: Any = np.zeros((), np.int32)
    energy_unit: Any = np.zeros((), np.float32)
    state = TrainState(iteration, lora, lora, lora, lora, optimiser_state, energy_unit)
    return sharding.place_weights(state, mesh)


def abstract_state(config: ml_collections.ConfigDict, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and placement of a run's state."""
    lora = abstract_variables(wan_config(config))["lora"]
    optimiser_state = jax.eval_shape(make_optimiser(config.train).init, lora)
    iteration: Any = jax.ShapeDtypeStruct((), jnp.int32)
    energy_unit: Any = jax.ShapeDtypeStruct((), jnp.float32)
    state = TrainState(iteration, lora, lora, lora, lora, optimiser_state, energy_unit)
    placed = sharding.weight_shardings(state, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, placed
    )


def saved_state(
    workdir: Path,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    which: checkpoint.Which = checkpoint.NEWEST,
) -> TrainState:
    """The state in one of a run's checkpoints, to read; the run may be under way.

    Raises:
      UsageError: there is none yet, not this one, or it is not of this config (see
        `checkpoint.restore`).
    """
    with progress.bar("reading a checkpoint"):
        restored = checkpoint.read(workdir / "checkpoints", abstract_state(config, mesh), which)
    if restored is None:
        raise UsageError(f"{workdir / 'checkpoints'} has no checkpoint yet")
    return restored[1]


# What a policy is called -> its field of TrainState.
POLICIES = {"online": "lora", "ema": "ema", "reference": "reference"}


def policy_of(state: TrainState, name: str) -> PyTree:
    """The LoRA tree of one of POLICIES."""
    return getattr(state, POLICIES[name])


def policy_sum(workdir: Path, iteration: int, name: str) -> str:
    """The checksum of one of POLICIES in a run's checkpoint; its arrays are not read."""
    path, field = workdir / "checkpoints" / str(iteration), POLICIES[name]
    saved = checkpoint.sums_in(path)
    return sums.of_json({leaf: x for leaf, x in saved.items() if leaf.startswith(f"{field}.")})
