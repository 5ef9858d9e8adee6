"""Latent videos to pixels, block by block; what the branches of a group share is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.backbone import Backbone
from kvpo_jax.models import layers
from kvpo_jax.runtime import sharding
from kvpo_jax.types import Array, Pixels, PyTree


def spec_of(mesh: Mesh, trajectories: int) -> Spec:
    """How the videos of so many trajectories per prompt are split over the mesh while decoding."""
    return sharding.PROMPTS if trajectories % mesh.shape["branch"] else sharding.TRAJECTORIES


def make_step(
    decode: Callable[[PyTree, Array, Any], tuple[Array, Any]], mesh: Mesh, block_frames: int
) -> Callable:
    """Compiles the decoding of a block.

    Args:
      decode: of a `Backbone`.
      mesh: of the latents.
      block_frames: F.

    Returns:
      (weights, latents float[P, T, frames, Y, X, C], first_frame, state) -> (pixels of the block,
      state). The state has the leading axes P and T and is updated in place.
    """

    def decode_shard(weights: PyTree, latents: Array, state: Any) -> tuple[Array, Any]:
        p, t = latents.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(p * t, *x.shape[2:]), (latents, state))
        return jax.tree.map(lambda x: x.reshape(p, t, *x.shape[1:]), decode(weights, *flat))

    @partial(jax.jit, donate_argnums=3)
    @layers.exact
    def step(weights: PyTree, latents: Array, first_frame: Array, state: Any) -> tuple[Array, Any]:
        block = jax.lax.dynamic_slice_in_dim(latents, first_frame, block_frames, axis=2)
        spec = spec_of(mesh, latents.shape[1])
        sharded = jax.shard_map(
            decode_shard,
            mesh=mesh,
            in_specs=(sharding.REPLICATED, spec, spec),
            out_specs=(spec, spec),
        )
        return sharded(weights, block, state)

    return step


class VideoDecoder:
    """Latents float[P, T, frames, Y, X, C] to pixels [P, T, frames', h, w, 3].

    Each device decodes its own videos. If T is not a multiple of the shards of `branch`, it decodes
    all videos of its prompts. It decodes the videos of a group one after another, because a
    decoder's memory of a video is larger than the video. The programs serve every pivot.

    Args:
      backbone: whose decoder.
      mesh: of the latents.
      block_frames: F.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, block_frames: int):
        self._mesh, self._frames, self._to_pixel = mesh, block_frames, backbone.to_pixel
        self._weights = backbone.load_decoder(NamedSharding(mesh, sharding.REPLICATED))
        self._step = make_step(backbone.decode, mesh, block_frames)
        self._fork = jax.jit(self._repeated, static_argnums=1)
        self._join = jax.jit(self._joined)
        self._pick = jax.jit(self._picked, static_argnums=2)
        self._put = jax.jit(self._written, static_argnums=3, donate_argnums=0)
        self._flat = jax.jit(self._flattened, donate_argnums=0)

    def videos(self, latents: Array) -> Pixels:
        """Pixels of latents float[P, T, frames, Y, X, C]."""
        chex.assert_rank(latents, 6)
        videos = self._join(self._blocks(latents, 0, latents.shape[2] // self._frames, None)[0])
        return Pixels(videos, None, ((0, videos.shape[2]),))

    def block(self, latents: Array, state: Any) -> tuple[Array, Any]:
        """Pixels [P, frames', h, w, 3] of the next block float[P, F, Y, X, C], and the new state.

        `state` is that of the block before, None for the first.
        """
        pixels, state = self._step(self._weights, latents[:, None], 0, state)
        return pixels[:, 0], state

    def group(self, branches: Array, anchor: Array, pivot: int) -> Pixels:
        """Pixels of branches and of their anchor.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ; what is before it is decoded once.
        """
        chex.assert_rank([branches, anchor], [6, 5])
        chex.assert_equal_shape([branches[:, 0], anchor])
        g, blocks, anchor = branches.shape[1], branches.shape[2] // self._frames, anchor[:, None]
        prefix, state = self._blocks(anchor, 0, pivot, None)
        shards = self._mesh.shape["branch"]
        at_once, out = 1 if g % shards else shards, None
        # One by one: their number depends on the pivot, so a program of all would compile again.
        prefixes = [self._fork(pixels, at_once) for pixels in prefix]
        for turn in range(g // at_once):
            videos = self._pick(branches, turn, at_once)
            own = self._blocks(videos, pivot, blocks, self._fork(state, at_once))[0]
            out = self._put(out, self._join([*prefixes, *own]), turn, g // at_once)
        of_anchor = self._blocks(anchor, pivot, blocks, state)[0]
        videos = self._flat(out)
        return Pixels(
            videos=videos,
            anchor=self._join([*prefix, *of_anchor]),
            windows=((0, videos.shape[2]),),
            fork=self._to_pixel(pivot * self._frames),
        )

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
        """Writes the videos whose turn it is into [P, at_once, turns, ...]; None: into zeros."""
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
