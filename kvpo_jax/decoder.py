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
from kvpo_jax.rewards.preprocess import to_uint8
from kvpo_jax.runtime import progress, sharding
from kvpo_jax.types import Array, Pixels, PyTree, SplitRows, Windows


def split_rows(backbone: Backbone, mesh: Mesh) -> SplitRows | None:
    """How frames lie over `context` while they are decoded; None: every device has whole ones."""
    axis = sharding.context_axis(mesh)
    return SplitRows(axis, mesh.shape[axis], backbone.rows) if axis and backbone.rows else None


def spec_of(mesh: Mesh, trajectories: int, rows: SplitRows | None = None, before: int = 3) -> Spec:
    """How the videos of so many trajectories per prompt are split over the mesh while decoding.

    Args:
      mesh: of the latents.
      trajectories: T.
      rows: see `split_rows`.
      before: of an array [P, T, ..., rows, ...], how many axes are before that of the rows.
    """
    spec = sharding.PROMPTS if trajectories % mesh.shape["branch"] else sharding.TRAJECTORIES
    return Spec(*spec, *[None] * (before - len(spec)), rows.axis) if rows else spec


def make_step(
    decode: Callable[..., tuple[Array, Any]],
    mesh: Mesh,
    block_frames: int,
    rows: SplitRows | None = None,
) -> Callable:
    """Compiles the decoding of a block.

    Args:
      decode: of a `Backbone`.
      mesh: of the latents.
      block_frames: F.
      rows: see `split_rows`.

    Returns:
      (weights, latents float[P, T, frames, Y, X, C], first_frame, depth int32[F], state) -> (pixels
      of the block, state). The state has the leading axes P and T and is updated in place. Pixels
      and state are split as `rows` says.
    """
    if rows:
        decode = partial(decode, rows=rows)

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
        if rows:
            beyond = (0, rows.padded - rows.count)
            block = jnp.pad(block, [*[(0, 0)] * 3, beyond, *[(0, 0)] * 2])
        spec = spec_of(mesh, latents.shape[1], rows)
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
    decoder's memory of a video is larger than the video. The devices of `context` have rows of the
    same videos, if the backbone can split them; what is returned is whole on each of them. The
    programs serve every pivot.

    Args:
      backbone: whose decoder.
      mesh: of the latents.
      block_frames: F.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, block_frames: int):
        self._mesh, self._frames, self._backbone = mesh, block_frames, backbone
        self._weights = backbone.load_decoder(NamedSharding(mesh, sharding.REPLICATED))
        self._all_stages = np.full(block_frames, np.iinfo(np.int32).max, np.int32)
        self._rows = split_rows(backbone, mesh)
        self._step = make_step(backbone.decode, mesh, block_frames, self._rows)
        self._fork = jax.jit(self._repeated, static_argnums=1)
        self._pick = jax.jit(self._picked, static_argnums=2)
        self._new = jax.jit(self._zeros, static_argnums=(0, 1))
        self._put = jax.jit(self._written, donate_argnums=0)
        # What is gathered cannot be where its parts were.
        self._flat = jax.jit(self._flattened, donate_argnums=() if self._rows else 0)
        self._of_shards = jax.jit(self._picked_prompts)
        self._show = jax.jit(self._shown, static_argnums=1)

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
        pixels, state = self._step(self._weights, latents[:, None], 0, self._all_stages, state)
        return self._frame(pixels[:, 0]), state

    def group(self, branches: Array, anchor: Array, pivot: int, windows: Windows) -> Pixels:
        """Pixels of branches and of their anchor.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ; what is before it is decoded once.
          windows: the pixel frames [start, end) that are read.
        """
        at_once, turns = self._turns_of(branches.shape[1])
        of_branches = of_anchor = None
        decode = partial(self._blocks, windows=windows)
        for turn, read in self._trajectories(branches, anchor, pivot, decode):
            if turn is None:
                of_anchor = self._filled(self._blank(read, 1, 1, windows), read, 0)
                continue
            if of_branches is None:
                of_branches = self._blank(read, at_once, turns, windows)
            of_branches = sharding.wait(self._filled(of_branches, read, turn))
        fork = self._backbone.to_pixel(pivot * self._frames)
        return Pixels(self._flat(of_branches), self._flat(of_anchor), windows, fork)

    def group_films(self, branches: Array, anchor: Array, pivot: int) -> np.ndarray | None:
        """All frames of the group of the first prompt.

        Every shard of prompts decodes its own first one meanwhile. A block goes to the host as soon
        as it is decoded, so that this takes less of a device than `group`.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ.

        Returns:
          uint8[1 + G, frames', h, w, 3], the anchor first; None on other processes than the main.
        """
        branches, anchor = self._of_shards(branches, 0), self._of_shards(anchor[:, None], 0)[:, 0]
        at_once, turns = self._turns_of(branches.shape[1])
        out: np.ndarray | None = None
        decode = partial(self._film, count=1)
        for turn, shown in self._trajectories(branches, anchor, pivot, decode):
            if not shown:
                continue
            if out is None:
                frames = sum(block.shape[2] for block in shown)
                out = np.empty((1 + at_once * turns, frames, *shown[0].shape[3:]), np.uint8)
            of_branches, end = out[1:].reshape(at_once, turns, *out.shape[1:]), 0  # a view
            into = out[:1] if turn is None else of_branches[:, turn]
            for block in shown:
                start, end = end, end + block.shape[2]
                into[:, start:end] = block[0]
        return out

    def films(self, latents: Array, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """All frames of the videos of the first `count` prompts, one after another.

        Of the latents float[P, 1, frames, Y, X, C] every shard decodes one at a time.

        Yields:
          (number of the prompt, uint8[frames', h, w, 3]), on the main process.
        """
        shards, blocks = sharding.prompt_shards(self._mesh), latents.shape[2] // self._frames
        of_shard = latents.shape[0] // shards
        for first in range(min(of_shard, count)):
            rows = -(-(count - first) // of_shard)  # shards whose prompt is one of the first
            videos = self._of_shards(latents, first)
            shown, _ = self._film(videos, 0, blocks, None, rows)
            for row in range(rows if shown else 0):
                yield row * of_shard + first, np.concatenate([x[row, 0] for x in shown])

    def _turns_of(self, branches: int) -> tuple[int, int]:
        """How many of so many branches are decoded at once, one on every shard, and how often."""
        shards = self._mesh.shape["branch"]
        at_once = 1 if branches % shards else shards
        return at_once, branches // at_once

    def _trajectories(
        self,
        branches: Array,
        anchor: Array,
        pivot: int,
        decode: Callable[[Array, int, int, Any], tuple[list, Any]],
    ) -> Iterator[tuple[int | None, list]]:
        """Decodes branches and anchor in turns, and what they share once.

        Args:
          branches: float[P, G, frames, Y, X, C].
          anchor: float[P, frames, Y, X, C].
          pivot: the first block in which they differ.
          decode: (latents, first block, end, state) -> (what is read of these blocks, state).

        Yields:
          (number of the turn, what is read of its videos), at last (None, that of the anchor).
        """
        chex.assert_rank([branches, anchor], [6, 5])
        chex.assert_equal_shape([branches[:, 0], anchor])
        blocks, anchor = branches.shape[2] // self._frames, anchor[:, None]
        shared, state = decode(anchor, 0, pivot, None)
        at_once, turns = self._turns_of(branches.shape[1])
        for turn in progress.steps(range(turns), "decoding branches"):
            videos, forked = self._pick(branches, turn, at_once), self._fork(state, at_once)
            own, _ = decode(videos, pivot, blocks, forked)
            yield turn, [*shared, *own]
        own, _ = decode(anchor, pivot, blocks, state)
        yield None, [*shared, *own]

    def _film(
        self, latents: Array, first: int, end: int, state: Any, count: int
    ) -> tuple[list[np.ndarray], Any]:
        """All frames of the blocks first ... end - 1 of the first `count` prompts.

        Returns:
          A uint8[count, T, frames, h, w, 3] per block, on the main process; and the state.
        """
        out = []
        for start in range(first * self._frames, end * self._frames, self._frames):
            pixels, state = self._step(self._weights, latents, start, self._all_stages, state)
            shown = self._show(pixels, count)
            out += [np.asarray(shown)] if sharding.is_main() else []
        return out, state

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
        return sharding.constrain(tree, self._mesh, spec_of(self._mesh, trajectories, self._rows))

    def _picked(self, branches: Array, turn: Array, at_once: int) -> Array:
        """The videos whose turn it is, one of every shard: [P, G, ...] -> [P, at_once, ...]."""
        rows = branches.reshape(branches.shape[0], at_once, -1, *branches.shape[2:])
        video = jax.lax.dynamic_index_in_dim(rows, turn, axis=2, keepdims=False)
        return sharding.constrain(video, self._mesh, spec_of(self._mesh, at_once))

    def _picked_prompts(self, latents: Array, number: Array) -> Array:
        """The prompt of this number of every shard: [P, T, ...] -> [shards, T, ...]."""
        shards = sharding.prompt_shards(self._mesh)
        prompts = latents.reshape(shards, -1, *latents.shape[1:])
        picked = jax.lax.dynamic_index_in_dim(prompts, number, axis=1, keepdims=False)
        return sharding.constrain(picked, self._mesh, spec_of(self._mesh, picked.shape[1]))

    def _shown(self, pixels: Array, count: int) -> Array:
        """The first `count` of [P, T, ...] as uint8, on every device."""
        return sharding.constrain(self._frame(to_uint8(pixels[:count])), self._mesh)

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        zeros = jnp.zeros(shape, dtype)
        return sharding.constrain(zeros, self._mesh, spec_of(self._mesh, shape[1], self._rows, 4))

    def _written(self, out: Array, pixels: Array, places: Array, turn: Array) -> Array:
        """Writes frames of [P, T, frames, ...] at their places into [P, at_once, turns, n, ...].

        T is at_once, or 1 for what all trajectories share.
        """

        def write(out: Array, pixels: Array, places: Array, turn: Array) -> Array:
            pixels = jnp.broadcast_to(pixels, (*out.shape[:2], *pixels.shape[2:]))
            return out.at[:, :, turn, places].set(pixels, mode="drop")

        into, of = (spec_of(self._mesh, x.shape[1], self._rows, x.ndim - 3) for x in (out, pixels))
        one = sharding.REPLICATED
        sharded = jax.shard_map(
            write, mesh=self._mesh, in_specs=(into, of, one, one), out_specs=into
        )
        return sharded(out, pixels, places, turn)

    def _flattened(self, out: Array) -> Array:
        """[P, at_once, turns, ...] -> [P, at_once * turns, ...], of whole frames."""
        pixels = self._frame(out.reshape(out.shape[0], -1, *out.shape[3:]))
        return sharding.constrain(pixels, self._mesh, spec_of(self._mesh, pixels.shape[1]))

    def _frame(self, pixels: Array) -> Array:
        """[..., h, w, 3] without what is beyond the last row of a frame."""
        if self._rows is None:
            return pixels
        return pixels[..., : pixels.shape[-3] // self._rows.padded * self._rows.count, :, :]


def length(windows: Windows) -> int:
    """Frames of `Pixels` with these windows."""
    return sum(end - start for start, end in windows)
