"""What CLIP, DINO and the aesthetic head have in common: frames to numbers, and consistency."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.models import vit
from kvpo_jax.models.layers import exact
from kvpo_jax.rewards import learned, preprocess
from kvpo_jax.rewards.composite import Shared
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.types import Array, PyTree

BATCH = 32  # frames that a device takes at once


@struct.dataclass
class Tower:
    """A loaded image tower, with what its file has besides.

    Attributes:
      params: its weights, on every device of the mesh.
      cfg: its config.
      mesh: the devices that it runs on; frames lie over all of them.
      batch: frames that a device takes at once, at most.
    """

    params: PyTree
    cfg: vit.ViTConfig = struct.field(pytree_node=False)
    mesh: Mesh = struct.field(pytree_node=False)
    batch: int = struct.field(pytree_node=False)


class Reading(NamedTuple):
    """What is made of a frame.

    Attributes:
      prepare: (uint8[n, h, w, 3], pixels of a side) -> normalised pixels.
      side: config -> pixels of that side.
      network: (config, params, normalised pixels) -> float32[n, width].
    """

    prepare: Callable[[Array, int], Array]
    side: Callable[[vit.VisionConfig], int]
    network: Callable[..., Array]


def load(
    path: Path | str, kind: str, config: type[vit.ViTConfig], mesh: Mesh | None, batch: int
) -> Tower:
    """An image tower that kvpo-convert wrote.

    Args:
      path: of the weights.
      kind: "clip", "dino" or "aesthetic".
      config: the kind's.
      mesh: to run on; None is all devices of this process.
      batch: frames that a device takes at once.

    Raises:
      UsageError: the file is of another kind or not whole.
    """
    cfg = checkpoint.noted_config(path, kind, config)
    mesh = mesh or learned.local_mesh()
    params = learned.load_params(path, vit.abstract_params(cfg), mesh)
    return Tower(params, cfg, mesh, batch)


@functools.cache
def reading_step(cfg: vit.ViTConfig, mesh: Mesh, reading: Reading) -> Callable[..., Array]:
    """The compiled part: (params, uint8[n, h, w, 3]) -> float32[n, width].

    Each device reads its own frames.
    """
    rows = Spec(mesh.axis_names)

    def read(params: PyTree, frames: Array) -> Array:
        pixels = reading.prepare(frames, reading.side(cfg.vision))
        return reading.network(cfg, params, pixels)

    sharded = jax.shard_map(read, mesh=mesh, in_specs=(sharding.REPLICATED, rows), out_specs=rows)
    return jax.jit(exact(sharded))


def of_frames(tower: Tower, reading: Reading, pixels: Array, shared: Shared | None) -> Array:
    """What is made of every frame of clips, float32[n, frames, width].

    Args:
      tower: the model.
      reading: what is made of a frame.
      pixels: [n, frames, h, w, 3], float in [0, 1] or uint8.
      shared: which frames are the same in several clips; they are read once.
    """
    n, frames = pixels.shape[:2]
    video, frame, which = learned.distinct_frames(n, frames, shared)
    out = learned.in_batches(
        functools.partial(reading_step(tower.cfg, tower.mesh, reading), tower.params),
        lambda rows: (preprocess.to_uint8(pixels[video[rows], frame[rows]]),),
        tower.mesh,
        rows=len(video),
        at_once=learned.frames_at_once(n, frames, tower.mesh, tower.batch),
    )
    return out[which].reshape(n, frames, -1)


def cosine(a: Array, b: Array) -> Array:
    """The cosines of features of length 1, over their last axis."""
    return jnp.sum(a * b, axis=-1)  # no product of matrices, which may lose digits


@jax.jit
def consistency(features: Array) -> Array:
    """VBench's consistency of clips, float32[n] in [0, 1].

    Every frame but the first is compared with the one before it and with the first one; cosines
    below 0 count as 0. It is 1 for a clip of one frame.

    Args:
      features: float32[n, frames, width] of length 1.
    """
    if features.shape[1] < 2:
        return jnp.ones(len(features))
    before, first = features[:, :-1], features[:, :1]
    both = (jnp.maximum(cosine(other, features[:, 1:]), 0) for other in (before, first))
    return jnp.mean(sum(both) / 2, axis=1)
