"""Latent videos to pixels, block by block, so that what the branches of a group share is decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import sharding
from kvpo_jax.backbone import Backbone
from kvpo_jax.types import Array, PyTree


class Decoder:
    """Latents float[P, T, frames, Y, X, C] to pixels [P, T, frames', h, w, 3].

    Each device decodes its own videos; where T is not a multiple of the shards of `branch`, all of its prompts'. The
    programs are the same for every pivot.

    Args:
      backbone: whose decoder.
      mesh: of the latents.
      block_frames: F.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, block_frames: int):
        self._backbone, self._mesh, self._frames = backbone, mesh, block_frames
        self._weights = backbone.load_decoder(NamedSharding(mesh, sharding.REPLICATED))
        self._step = jax.jit(self._next_block, donate_argnums=3)
        self._fork = jax.jit(self._repeated, static_argnums=1)
        self._join = jax.jit(self._joined)

    def videos(self, latents: Array) -> Array:
        """Pixels of float[P, T, frames, Y, X, C]."""
        return self._join(self._blocks(latents, 0, latents.shape[2] // self._frames, None)[0])

    def group(self, branches: Array, anchor: Array, pivot: int) -> tuple[Array, Array]:
        """Pixels [P, G, ...] of branches and [P, 1, ...] of their anchor.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ; what is before it is decoded once.
        """
        g, blocks, anchor = branches.shape[1], branches.shape[2] // self._frames, anchor[:, None]
        prefix, state = self._blocks(anchor, 0, pivot, None)
        of_branches, _ = self._blocks(branches, pivot, blocks, self._fork(state, g))
        of_anchor, _ = self._blocks(anchor, pivot, blocks, state)
        prefixes = [self._fork(pixels, g) for pixels in prefix]
        return self._join([*prefixes, *of_branches]), self._join([*prefix, *of_anchor])

    def _blocks(self, latents: Array, first: int, end: int, state: Any) -> tuple[list[Array], Any]:
        """Pixels of the blocks first ... end - 1, and the decoder's state after them."""
        pixels = []
        for block in range(first, end):
            out, state = self._step(self._weights, latents, block * self._frames, state)
            pixels.append(out)
        return pixels, state

    # ------------------------------------------------------------ compiled

    def _spec(self, trajectories: int) -> Spec:
        return sharding.PROMPTS if trajectories % self._mesh.shape["branch"] else sharding.TRAJECTORIES

    def _next_block(self, weights: PyTree, latents: Array, first_frame: Array, state: Any) -> tuple[Array, Any]:
        def of_shard(weights: PyTree, latents: Array, state: Any) -> tuple[Array, Any]:
            p, t = latents.shape[:2]
            flat = jax.tree.map(lambda x: x.reshape(p * t, *x.shape[2:]), (latents, state))
            return jax.tree.map(lambda x: x.reshape(p, t, *x.shape[1:]), self._backbone.decode(weights, *flat))

        block = jax.lax.dynamic_slice_in_dim(latents, first_frame, self._frames, axis=2)
        spec = self._spec(latents.shape[1])
        shard = sharding.shard(
            of_shard, self._mesh, in_specs=(sharding.REPLICATED, spec, spec), out_specs=(spec, spec)
        )  # fmt: skip
        return shard(weights, block, state)

    def _repeated(self, tree: PyTree, trajectories: int) -> PyTree:
        tree = jax.tree.map(lambda x: jnp.repeat(x, trajectories, axis=1), tree)
        return sharding.constrain(tree, self._mesh, self._spec(trajectories))

    def _joined(self, blocks: Sequence[Array]) -> Array:
        pixels = jnp.concatenate(blocks, axis=2)
        return sharding.constrain(pixels, self._mesh, self._spec(pixels.shape[1]))
