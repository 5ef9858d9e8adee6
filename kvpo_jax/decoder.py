"""Latent videos to pixels, block by block, so that what the branches of a group share is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import sharding
from kvpo_jax.backbone import Backbone
from kvpo_jax.types import Array, PyTree


def spec_of(mesh: Mesh, trajectories: int) -> Spec:
    """How the videos of so many trajectories per prompt lie on the mesh while they are decoded."""
    return sharding.PROMPTS if trajectories % mesh.shape["branch"] else sharding.TRAJECTORIES


def make_step(decode: Callable[[PyTree, Array, Any], tuple[Array, Any]], mesh: Mesh, block_frames: int) -> Callable:
    """(weights, latents float[P, T, frames, Y, X, C], first_frame, state) -> (pixels of a block, state), compiled.

    `decode` is that of a `Backbone`; the state, with leading axes P and T, is updated in place.
    """

    def of_shard(weights: PyTree, latents: Array, state: Any) -> tuple[Array, Any]:
        p, t = latents.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(p * t, *x.shape[2:]), (latents, state))
        return jax.tree.map(lambda x: x.reshape(p, t, *x.shape[1:]), decode(weights, *flat))

    @partial(jax.jit, donate_argnums=3)
    def step(weights: PyTree, latents: Array, first_frame: Array, state: Any) -> tuple[Array, Any]:
        block = jax.lax.dynamic_slice_in_dim(latents, first_frame, block_frames, axis=2)
        spec = spec_of(mesh, latents.shape[1])
        shard = sharding.shard(of_shard, mesh, in_specs=(sharding.REPLICATED, spec, spec), out_specs=(spec, spec))
        return shard(weights, block, state)

    return step


class Decoder:
    """Latents float[P, T, frames, Y, X, C] to pixels [P, T, frames', h, w, 3].

    Each device decodes its own videos; where T is not a multiple of the shards of `branch`, all of its prompts'. Of a
    group it decodes one after the other, for a decoder's memory of a video is larger than the video. The programs are
    the same for every pivot.

    Args:
      backbone: whose decoder.
      mesh: of the latents.
      block_frames: F.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, block_frames: int):
        self._mesh, self._frames = mesh, block_frames
        self._weights = backbone.load_decoder(NamedSharding(mesh, sharding.REPLICATED))
        self._step = make_step(backbone.decode, mesh, block_frames)
        self._fork = jax.jit(self._repeated, static_argnums=1)
        self._join = jax.jit(self._joined)
        self._pick = jax.jit(self._picked, static_argnums=2)
        self._put = jax.jit(self._written, static_argnums=3, donate_argnums=0)
        self._flat = jax.jit(self._flattened, donate_argnums=0)

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
        shards = self._mesh.shape["branch"]
        at_once, out = 1 if g % shards else shards, None
        prefixes = [self._fork(pixels, at_once) for pixels in prefix]  # one by one: their number is the pivot's
        for turn in range(g // at_once):
            videos = self._pick(branches, turn, at_once)
            own = self._blocks(videos, pivot, blocks, self._fork(state, at_once))[0]
            out = self._put(out, self._join([*prefixes, *own]), turn, g // at_once)
        of_anchor = self._blocks(anchor, pivot, blocks, state)[0]
        return self._flat(out), self._join([*prefix, *of_anchor])

    def _blocks(self, latents: Array, first: int, end: int, state: Any) -> tuple[list[Array], Any]:
        """Pixels of the blocks first ... end - 1, and the decoder's state after them."""
        pixels = []
        for block in range(first, end):
            out, state = self._step(self._weights, latents, block * self._frames, state)
            pixels.append(out)
        return pixels, state

    def _repeated(self, tree: PyTree, trajectories: int) -> PyTree:
        tree = jax.tree.map(lambda x: jnp.repeat(x, trajectories, axis=1), tree)
        return sharding.constrain(tree, self._mesh, spec_of(self._mesh, trajectories))

    def _picked(self, branches: Array, turn: Array, at_once: int) -> Array:
        """The videos whose turn it is, one of every shard: [P, G, ...] -> [P, at_once, ...]."""
        rows = branches.reshape(branches.shape[0], at_once, -1, *branches.shape[2:])
        video = jax.lax.dynamic_index_in_dim(rows, turn, axis=2, keepdims=False)
        return sharding.constrain(video, self._mesh, spec_of(self._mesh, at_once))

    def _written(self, out: Array | None, pixels: Array, turn: Array, turns: int) -> Array:
        """[P, at_once, turns, ...] with the videos whose turn it is; None is one that is still empty."""
        if out is None:
            out = jnp.zeros((*pixels.shape[:2], turns, *pixels.shape[2:]), pixels.dtype)
        out = jax.lax.dynamic_update_index_in_dim(out, pixels, turn, axis=2)
        return sharding.constrain(out, self._mesh, spec_of(self._mesh, pixels.shape[1]))

    def _flattened(self, out: Array) -> Array:
        pixels = out.reshape(out.shape[0], -1, *out.shape[3:])
        return sharding.constrain(pixels, self._mesh, spec_of(self._mesh, pixels.shape[1]))

    def _joined(self, blocks: Sequence[Array]) -> Array:
        pixels = jnp.concatenate(blocks, axis=2)
        return sharding.constrain(pixels, self._mesh, spec_of(self._mesh, pixels.shape[1]))
