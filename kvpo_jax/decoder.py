"""Latent videos to pixels, block by block: the frames that are read, and what leads up to them.

What the branches of a group share is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.backbone import Backbone
from kvpo_jax.models import layers
from kvpo_jax.runtime import progress, sharding
from kvpo_jax.types import Array, Pixels, PyTree, Windows


def spec_of(mesh: Mesh, trajectories: int) -> Spec:
    """How the videos of so many trajectories per prompt are split over the mesh while decoding."""
    return sharding.PROMPTS if trajectories % mesh.shape["branch"] else sharding.TRAJECTORIES


def make_step(
    decode: Callable[[PyTree, Array, Array, Any], tuple[Array, Any]], mesh: Mesh, block_frames: int
) -> Callable:
    """Compiles the decoding of a block.

    Args:
      decode: of a `Backbone`.
      mesh: of the latents.
      block_frames: F.

    Returns:
      (weights, latents float[P, T, frames, Y, X, C], first_frame, depth int32[F], state) -> (pixels
      of the block, state). The state has the leading axes P and T and is updated in place.
    """

    def decode_shard(
        weights: PyTree, latents: Array, depth: Array, state: Any
    ) -> tuple[Array, Any]:
        p, t = latents.shape[:2]
        latents, state = jax.tree.map(lambda x: x.reshape(p * t, *x.shape[2:]), (latents, state))
        out = decode(weights, latents, depth, state)
        return jax.tree.map(lambda x: x.reshape(p, t, *x.shape[1:]), out)

    @partial(jax.jit, donate_argnums=4)
    @layers.exact
    def step(
        weights: PyTree, latents: Array, first_frame: Array, depth: Array, state: Any
    ) -> tuple[Array, Any]:
        block = jax.lax.dynamic_slice_in_dim(latents, first_frame, block_frames, axis=2)
        spec = spec_of(mesh, latents.shape[1])
        sharded = jax.shard_map(
            decode_shard,
            mesh=mesh,
            in_specs=(sharding.REPLICATED, spec, sharding.REPLICATED, spec),
            out_specs=(spec, spec),
        )
        return sharded(weights, block, depth, state)

    return step


class Read(NamedTuple):
    """Decoded frames of a block that are read.

    Attributes:
      pixels: [P, T, frames, h, w, 3], all frames of the block.
      places: int32[frames], where they are in `Pixels`; what is not read is behind its end.
    """

    pixels: Array
    places: np.ndarray


class VideoDecoder:
    """Latents float[P, T, frames, Y, X, C] to pixels of those frames that are read.

    Each device decodes its own videos. If T is not a multiple of the shards of `branch`, it decodes
    all videos of its prompts. It decodes the videos of a group one after another, because a
    decoder's memory of a video is larger than the video. The programs serve every pivot.

    Args:
      backbone: whose decoder.
      mesh: of the latents.
      block_frames: F.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, block_frames: int):
        self._mesh, self._frames, self._backbone = mesh, block_frames, backbone
        self._weights = backbone.load_decoder(NamedSharding(mesh, sharding.REPLICATED))
        self._step = make_step(backbone.decode, mesh, block_frames)
        self._fork = jax.jit(self._repeated, static_argnums=1)
        self._pick = jax.jit(self._picked, static_argnums=2)
        self._new = jax.jit(self._zeros, static_argnums=(0, 1))
        self._put = jax.jit(self._written, donate_argnums=0)
        self._flat = jax.jit(self._flattened, donate_argnums=0)

    def videos(self, latents: Array, windows: Windows) -> Pixels:
        """Pixels of latents float[P, T, frames, Y, X, C]; `windows` [start, end) are read."""
        chex.assert_rank(latents, 6)
        read, _ = self._blocks(latents, 0, latents.shape[2] // self._frames, None, windows)
        out = self._blank(read, latents.shape[1], 1, windows)
        return Pixels(self._flat(self._filled(out, read, 0)), None, windows)

    def block(self, latents: Array, state: Any) -> tuple[Array, Any]:
        """Pixels [P, frames', h, w, 3] of the next block float[P, F, Y, X, C], and the new state.

        `state` is that of the block before, None for the first.
        """
        all_stages = np.full(self._frames, np.iinfo(np.int32).max, np.int32)
        pixels, state = self._step(self._weights, latents[:, None], 0, all_stages, state)
        return pixels[:, 0], state

    def group(self, branches: Array, anchor: Array, pivot: int, windows: Windows) -> Pixels:
        """Pixels of branches and of their anchor.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ; what is before it is decoded once.
          windows: the pixel frames [start, end) that are read.
        """
        chex.assert_rank([branches, anchor], [6, 5])
        chex.assert_equal_shape([branches[:, 0], anchor])
        g, blocks, anchor = branches.shape[1], branches.shape[2] // self._frames, anchor[:, None]
        prefix, state = self._blocks(anchor, 0, pivot, None, windows)
        shards = self._mesh.shape["branch"]
        at_once, out = 1 if g % shards else shards, None
        for turn in progress.steps(range(g // at_once), "decoding branches"):
            videos, forked = self._pick(branches, turn, at_once), self._fork(state, at_once)
            own, _ = self._blocks(videos, pivot, blocks, forked, windows)
            if out is None:
                out = self._blank([*prefix, *own], at_once, g // at_once, windows)
            out = jax.block_until_ready(self._filled(out, [*prefix, *own], turn))
        own, _ = self._blocks(anchor, pivot, blocks, state, windows)
        of_anchor = self._filled(self._blank([*prefix, *own], 1, 1, windows), [*prefix, *own], 0)
        fork = self._backbone.to_pixel(pivot * self._frames)
        return Pixels(self._flat(out), self._flat(of_anchor), windows, fork)

    def _blocks(
        self, latents: Array, first: int, end: int, state: Any, windows: Windows
    ) -> tuple[list[Read], Any]:
        """What is read of the blocks first ... end - 1, and the decoder's state after them."""
        depth, read = self._backbone.depths(windows, latents.shape[2]), []
        for block in progress.steps(range(first, end), "decoding blocks"):
            start, stop = block * self._frames, (block + 1) * self._frames
            # What runs later has a state, which the first block makes.
            if depth[start:stop].any() or (state is None and depth[stop:].any()):
                pixels, state = self._step(self._weights, latents, start, depth[start:stop], state)
                read += [Read(pixels, places) for places in self._places(start, stop, windows)]
        return read, state

    def _places(self, start: int, stop: int, windows: Windows) -> Iterator[np.ndarray]:
        """`Read.places` of the latent frames start ... stop - 1, for each window that has some."""
        frames = np.arange(*map(self._backbone.to_pixel, (start, stop)))
        before, total = 0, length(windows)
        for first, last in windows:
            inside = (first <= frames) & (frames < last)
            if inside.any():
                yield np.where(inside, before + frames - first, total).astype(np.int32)
            before += last - first

    def _blank(self, read: Sequence[Read], at_once: int, turns: int, windows: Windows) -> Array:
        """Zeros [P, at_once, turns, n, h, w, 3] for what is read."""
        p, _, _, *picture = read[0].pixels.shape
        return self._new((p, at_once, turns, length(windows), *picture), read[0].pixels.dtype)

    def _filled(self, out: Array, read: Sequence[Read], turn: int) -> Array:
        """`out` with the frames of the videos whose turn it is."""
        for pixels, places in read:
            out = self._put(out, pixels, places, turn)
        return out

    def _repeated(self, tree: PyTree, trajectories: int) -> PyTree:
        tree = jax.tree.map(lambda x: jnp.repeat(x, trajectories, axis=1), tree)
        return sharding.constrain(tree, self._mesh, spec_of(self._mesh, trajectories))

    def _picked(self, branches: Array, turn: Array, at_once: int) -> Array:
        """The videos whose turn it is, one of every shard: [P, G, ...] -> [P, at_once, ...]."""
        rows = branches.reshape(branches.shape[0], at_once, -1, *branches.shape[2:])
        video = jax.lax.dynamic_index_in_dim(rows, turn, axis=2, keepdims=False)
        return sharding.constrain(video, self._mesh, spec_of(self._mesh, at_once))

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        zeros = jnp.zeros(shape, dtype)
        return sharding.constrain(zeros, self._mesh, spec_of(self._mesh, shape[1]))

    def _written(self, out: Array, pixels: Array, places: Array, turn: Array) -> Array:
        """Writes frames of [P, T, frames, ...] at their places into [P, at_once, turns, n, ...].

        T is at_once, or 1 for what all trajectories share.
        """

        def write(out: Array, pixels: Array, places: Array, turn: Array) -> Array:
            pixels = jnp.broadcast_to(pixels, (*out.shape[:2], *pixels.shape[2:]))
            return out.at[:, :, turn, places].set(pixels, mode="drop")

        into, of = (spec_of(self._mesh, x.shape[1]) for x in (out, pixels))
        one = sharding.REPLICATED
        sharded = jax.shard_map(
            write, mesh=self._mesh, in_specs=(into, of, one, one), out_specs=into
        )
        return sharded(out, pixels, places, turn)

    def _flattened(self, out: Array) -> Array:
        """[P, at_once, turns, ...] -> [P, at_once * turns, ...]."""
        pixels = out.reshape(out.shape[0], -1, *out.shape[3:])
        return sharding.constrain(pixels, self._mesh, spec_of(self._mesh, pixels.shape[1]))


def length(windows: Windows) -> int:
    """Frames of `Pixels` with these windows."""
    return sum(end - start for start, end in windows)
