"""The rollout (paper §3.2; Algorithm 1, steps 1-2): shared prefix, fork, anchor and branches from one noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from kvpo_jax import flow, kv_cache, memory_bank, routing, sharding
from kvpo_jax.models.wan import Wan, wan_config
from kvpo_jax.types import Array, BlockKV, BlockRecord, Context, KVCache, PyTree, ReplayTuples, Rollout, TextKV

# (x, sigma, text, context, start_frame, own_keys) -> velocity, BlockKV: `Wan.apply` with its variables bound.
Network = Callable[..., tuple[Array, BlockKV]]


# Every random draw of a run is of one seed: fold_in(fold_in(seed, stream), step), then prompt, frame, ... No stream
# folds in what must not change it: noise never depends on the branch.
STREAMS = ("lora", "pivot", "routing", "noise", "shuffle", "heldout")


def stream(seed: int, name: str, step: int) -> Array:
    """The key of one of STREAMS at an iteration."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(name)), step)


def per_trajectory(text: TextKV, trajectories: int) -> TextKV:
    """TextKV of P prompts, repeated for each of their T trajectories."""
    return jax.tree.map(lambda x: jnp.repeat(x, trajectories, axis=1), text)


def encode_text(model: Wan, variables: PyTree, embeddings: Array) -> TextKV:
    """Text keys and values float[L, P, M, K, H, D] of token embeddings float[P, M, K, text_dim]."""
    p, m = embeddings.shape[:2]
    text = model.apply(variables, embeddings.reshape(p * m, *embeddings.shape[2:]), method=Wan.encode_text)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], p, m, *x.shape[2:]), text)


def denoise_block(
    network: Network,
    schedule: flow.Schedule,
    text: TextKV,
    history: KVCache,
    page: KVCache | None,
    rows: Array,
    noise: Array,
    start_frame: Array,
) -> tuple[BlockRecord, BlockKV]:
    """Generates one block of T trajectories of P prompts, and the keys and values to cache for it.

    Args:
      network: see Network.
      schedule: noise levels of the S solver steps and of the cache-writing pass.
      text: TextKV of P prompts.
      history: frames that the trajectories of a prompt share, frame int32[P, slots].
      page: frames that each trajectory wrote itself, frame int32[P, T, slots], or None. Its memory bank, or without a
        page the history's, is attended to as it stands.
      rows: int32[P, T, S+1, A], what each pass attends to (routing.py).
      noise: float[P, S+1, F, Y, X, C]: the initial latent, then what `renoise` adds before each later pass. Shared by
        the trajectories: they differ in their rows alone.
      start_frame: int32[], first frame of the block.
    """
    p, t, passes, _ = rows.shape
    chex.assert_axis_dimension(noise, 1, passes)
    text = per_trajectory(text, t)
    bank = (history if page is None else page).bank
    noise = jnp.repeat(jnp.moveaxis(noise, 1, 0), t, axis=1)  # [S+1, P*T, F, Y, X, C]
    start = jnp.full((p * t,), start_frame, jnp.int32)
    # The level and the noise of the *next* pass; the last pass has none, and what is made of it is dropped.
    shifted = lambda x: jnp.concatenate([x[1:], x[-1:]])

    def one_pass(carry, xs):
        x, _ = carry
        row, sigma, told, sigma_next, noise_next = xs
        context = memory_bank.attend(kv_cache.read(row, history, page), bank)
        velocity, kv = network(x, jnp.full((p * t,), told), text, context, start)
        return (flow.step(schedule.solver, x, velocity, sigma, sigma_next, noise_next), kv), (x, velocity)

    per_pass = (jnp.moveaxis(rows, 2, 0), schedule.sigma, schedule.told, shifted(schedule.sigma), shifted(noise))
    blank = jax.tree.map(jnp.zeros_like, _block_kv_like(history, page, p * t, noise.shape[2]))
    (_, kv), (z, u) = jax.lax.scan(one_pass, (noise[0], blank), per_pass)
    unfold = lambda y: jnp.moveaxis(y, 0, 1).reshape(p, t, *y.shape[:1], *y.shape[2:])
    z, u = (unfold(y[: passes - 1]) for y in (z, u))
    x_clean = flow.to_clean(z[:, :, -1], u[:, :, -1], schedule.sigma[passes - 2])
    return BlockRecord(z=z, u=u, x_clean=x_clean), kv


def _block_kv_like(history: KVCache, page: KVCache | None, batch: int, frames: int) -> BlockKV:
    """Some BlockKV of the right shape, type and sharding, to start a loop from."""
    source = history.k if page is None else page.k.reshape(page.k.shape[0], batch, *page.k.shape[3:])
    first = source[:, :, :1]
    if page is None:
        first = jnp.repeat(first, batch // source.shape[1], axis=1)
    kv = jnp.repeat(first, frames, axis=2)
    return BlockKV(k=kv, v=kv)


def recache(
    network: Network,
    text: TextKV,
    history: KVCache,
    page: KVCache | None,
    latents: Array,
    start_frame: Array,
) -> BlockKV:
    """Keys and values of the last frames under a new prompt (LongLive's prompt switch), from one forward.

    The clean latents float[P, T, R, Y, X, C] of frames start_frame ... start_frame + R - 1 attend to the sink and to
    the youngest R - sink of themselves; the oldest are queries only. Where the sink lies within the R frames (a switch
    at frame R), it is made anew as well.
    """
    p, t, frames = latents.shape[:3]
    sink = jnp.arange(history.sink)
    row = jnp.where(start_frame >= history.sink, sink, -1)
    context = kv_cache.read(jnp.broadcast_to(row, (p, t, history.sink)), history, page)
    context = memory_bank.attend(context, (history if page is None else page).bank)
    index = jnp.arange(frames)
    own_keys = (index >= history.sink) | (start_frame + index < history.sink)
    flat = latents.reshape(p * t, *latents.shape[2:])
    start = jnp.full((p * t,), start_frame, jnp.int32)
    return network(flat, jnp.zeros(p * t), per_trajectory(text, t), context, start, own_keys)[1]


def forget(changed: Array, cache: KVCache, frames: int | None = None) -> KVCache:
    """The cache with zero keys and values for the prompts bool[P] that changed, or for its first `frames` slots only.

    The frames stay resident and are attended to as zeros, as LongLive without `global_sink` leaves its sink.
    """
    select = changed.reshape(1, -1, *[1] * (cache.k.ndim - 2))
    slot = jnp.arange(cache.frame.shape[-1])[:, None, None, None]
    select &= slot < (cache.frame.shape[-1] if frames is None else frames)
    zero = lambda x: jnp.where(select, 0, x)
    return cache.replace(k=zero(cache.k), v=zero(cache.v))


def replace_where(changed: Array, new: BlockKV, history: KVCache, page: KVCache | None, start_frame: Array) -> BlockKV:
    """`new` for the prompts bool[P] that changed, and what the caches hold for the others."""
    frames = new.k.shape[2]
    p, t = (*history.frame.shape[:1], 1) if page is None else page.frame.shape[:2]
    rows = jnp.broadcast_to(start_frame + jnp.arange(frames, dtype=jnp.int32), (p, t, frames))
    old: Context = kv_cache.read(rows, history, page)
    select = jnp.repeat(changed, t)[None, :, None, None, None, None]
    return BlockKV(k=jnp.where(select, new.k, old.k), v=jnp.where(select, new.v, old.v))


# ---------------------------------------------------------------- the compiled stages


@dataclasses.dataclass(frozen=True)
class Stages:
    """The compiled programs of a rollout, each of which serves every block and every pivot.

    Built by `build` for one config and mesh. `variables` is {"params": ..., "lora": ...} of the generating policy,
    text a TextKV with an extra segment axis, float[L, P, M, K, H, D].

    Attributes:
      encode_text: (variables, float[P, M, K, text_dim]) -> text.
      blank: (P) -> a history without frames.
      draw: (key, prompts int32[P], fork frame) -> CHR draws int32[P, G, routed].
      shared_block: (variables, text, segment, history, NoiseKey, start_frame) -> x_clean float[P, F, Y, X, C], history.
      shared_recache: (variables, text, segment, changed, history, latents, start_frame) -> history.
      fork: (history) -> empty pages for the anchor and the branches.
      branch_block: (variables, text, segment, history, page, selected, perturbed, NoiseKey, start_frame)
        -> BlockRecord, page.
      branch_recache: (variables, text, segment, changed, history, page, latents, start_frame) -> page.
    """

    encode_text: Callable
    blank: Callable
    draw: Callable
    shared_block: Callable
    shared_recache: Callable
    fork: Callable
    branch_block: Callable
    branch_recache: Callable

    def compilations(self) -> dict[str, int]:
        """How often each stage has been compiled; 1 each after a run over any number of pivots."""
        return {f.name: getattr(self, f.name)._cache_size() for f in dataclasses.fields(self)}


def segment_of(frame: int, switch_frames: Sequence[int]) -> int:
    """Index of the prompt segment that holds a latent frame."""
    return sum(frame >= switch for switch in switch_frames)


def recorded_blocks(config: ml_collections.ConfigDict) -> int:
    """Blocks that are replayed from the pivot on: at least the perturbed window, or config.replay.blocks."""
    return max(config.replay.blocks, config.rollout.window_blocks)


def prompts_at_once(config: ml_collections.ConfigDict) -> int:
    """Prompts that are rolled out, scored and replayed together."""
    return config.train.micro_batch or config.train.prompts_per_iteration


def branches_at_once(config: ml_collections.ConfigDict) -> int:
    """Branches that are rolled out together, each chunk with an anchor of its own."""
    return config.rollout.branch_chunk or config.rollout.branches


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run: the config's sizes, or those that use the most devices."""
    at_once = prompts_at_once(config), branches_at_once(config)
    return sharding.make_mesh(config.mesh.data, config.mesh.branch, *at_once, devices)


@struct.dataclass
class NoiseKey:
    """What the noise of a batch is drawn from.

    Attributes:
      key: of the iteration.
      prompts: int32[P], the number of each prompt in its iteration; the same in whatever batches they come.
    """

    key: Array
    prompts: Array


def block_noise(noise: NoiseKey, start_frame: Array, shape: tuple[int, ...]) -> Array:
    """Noise float[P, *shape] of one block: a function of seed, prompt and frame, never of the branch or the policy."""
    key = jax.random.fold_in(noise.key, start_frame)
    draw = lambda prompt: jax.random.normal(jax.random.fold_in(key, prompt), shape)
    return jax.vmap(draw)(noise.prompts)


def check(config: ml_collections.ConfigDict) -> None:
    """ValueError, naming the field, where the video's layout cannot be rolled out."""
    video, recache_frames = config.video, config.window.recache_frames
    if recache_frames % video.block_frames:
        raise ValueError(f"window.recache_frames={recache_frames} is no multiple of {video.block_frames}")
    for frame in video.switch_frames:
        if frame % video.block_frames or not recache_frames <= frame < video.blocks * video.block_frames:
            raise ValueError(
                f"video.switch_frames has {frame}; expected multiples of video.block_frames={video.block_frames} from "
                f"window.recache_frames={recache_frames} on, inside the video"
            )
    if config.rollout.draw not in routing.DRAWS:
        raise ValueError(f"rollout.draw is {config.rollout.draw!r}; expected one of {', '.join(routing.DRAWS)}")


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Stages:
    """The compiled stages of rollouts with this config on this mesh."""
    check(config)
    cfg = wan_config(config)
    model = Wan(cfg)
    schedule = flow.schedule(
        config.sampler.steps, config.sampler.shift, config.sampler.solver, config.sampler.context_step
    )
    window = routing.window(config)
    video = config.video
    passes = len(config.sampler.steps) + 1
    tokens = cfg.tokens_per_frame(video.height, video.width)
    noise_shape = (passes, video.block_frames, video.height, video.width, cfg.channels)
    has_bank = config.window.bank > 0
    order = sharding.trajectories(mesh, branches_at_once(config))
    routed_pass = np.arange(passes) < config.rollout.perturbed_steps
    routed_pass[-1] = config.rollout.perturb_write

    history_spec = sharding.history_spec(window.sink, has_bank)
    page_spec = sharding.page_spec(window.sink, has_bank)
    one, prompts, each = sharding.REPLICATED, sharding.PROMPTS, sharding.TRAJECTORIES
    record_spec = BlockRecord(z=each, u=each, x_clean=each)
    bind = lambda variables: partial(model.apply, variables)
    of_segment = lambda text, segment: jax.tree.map(lambda x: x[:, :, segment], text)

    def admit(cache, text):
        if not has_bank:
            return cache
        return cache.replace(bank=memory_bank.admit(cache.bank, text, config.window.bank_reinsert))

    def write(cache, kv, start_frame):
        cache = kv_cache.append(cache, kv, start_frame)
        if not has_bank:
            return cache
        return cache.replace(bank=memory_bank.record(cache.bank, kv, start_frame, config.window.bank_interval))

    def shared_block(variables, text, segment, history, noise, start_frame):
        row = routing.deployment_row(window, start_frame)
        rows = jnp.broadcast_to(row, (noise.shape[0], 1, passes, window.slots))
        text = of_segment(text, segment)
        history = admit(history, text)
        record, kv = denoise_block(bind(variables), schedule, text, history, None, rows, noise, start_frame)
        return record.x_clean[:, 0], write(history, kv, start_frame)

    def branch_block(variables, text, segment, history, page, selected, routed, noise, start_frame):
        default = routing.deployment_row(window, start_frame)
        rows = jnp.where(
            routed[:, :, :, None], routing.routed_rows(window, selected, start_frame)[:, :, None, :], default
        )
        noise = sharding.vary_over_branch(noise)
        text = of_segment(text, segment)
        page = admit(page, text)
        record, kv = denoise_block(bind(variables), schedule, text, history, page, rows, noise, start_frame)
        return record, write(page, kv, start_frame)

    def shared_recache(variables, text, segment, changed, history, latents, start_frame):
        if not config.window.global_sink:
            history = forget(changed, history)
        new = recache(bind(variables), of_segment(text, segment), history, None, latents[:, None], start_frame)
        new = replace_where(changed, new, history, None, start_frame)
        return kv_cache.append(history, new, start_frame)

    def branch_recache(variables, text, segment, changed, history, page, latents, start_frame):
        if not config.window.global_sink:
            # The history is shared with the replay and stays; a page that holds the sink hides it.
            old_sink = jnp.broadcast_to(jnp.arange(window.sink), (*page.frame.shape[:2], window.sink))
            sink = kv_cache.read(old_sink, history, page)
            page = kv_cache.append(page, BlockKV(k=sink.k, v=sink.v), 0)
            page = forget(changed, page, window.sink)
        new = recache(bind(variables), of_segment(text, segment), history, page, latents, start_frame)
        new = replace_where(changed, new, history, page, start_frame)
        return kv_cache.append(page, new, start_frame)

    shard = partial(sharding.shard, mesh=mesh)
    shared_block_ = shard(
        shared_block,
        in_specs=(one, sharding.TEXT, one, history_spec, prompts, one),
        out_specs=(prompts, history_spec),
    )
    branch_block_ = shard(
        branch_block,
        in_specs=(one, sharding.TEXT, one, history_spec, page_spec, each, each, prompts, one),
        out_specs=(record_spec, page_spec),
    )

    def keyed_shared_block(variables, text, segment, history, key, start_frame):
        noise = block_noise(key, start_frame, noise_shape)
        return shared_block_(variables, text, segment, history, noise, start_frame)

    def keyed_branch_block(variables, text, segment, history, page, selected, perturbed, key, start_frame):
        p, t = page.frame.shape[:2]
        noise = block_noise(key, start_frame, noise_shape)
        routed = perturbed & jnp.asarray(order >= 0)[:, None] & jnp.asarray(routed_pass)[None, :]
        routed = jnp.broadcast_to(routed, (p, t, passes))
        selected = selected[:, np.maximum(order, 0)]
        return branch_block_(variables, text, segment, history, page, selected, routed, noise, start_frame)

    def empty(batch, slots, spec):
        cache = kv_cache.empty(
            cfg.num_layers, batch, slots, tokens, cfg.num_heads, cfg.head_dim, window.sink, jnp.dtype(cfg.dtype)
        )
        if has_bank:
            cache = cache.replace(bank=memory_bank.empty(cache, config.window.bank))
        named = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
        return jax.tree.map(jax.lax.with_sharding_constraint, cache, named)

    def fork(history):
        # What a recache writes, what the replay reads, and what the next block attends to.
        written = (config.window.recache_frames, recorded_blocks(config) * video.block_frames, window.past)
        slots = window.sink + max(written)
        page = empty((history.frame.shape[0], len(order)), slots, page_spec)
        return page.replace(bank=memory_bank.repeat(history.bank, len(order)))

    def draw(key, prompts, fork_frame):
        draw_rows = routing.DRAWS[config.rollout.draw]
        last_start = fork_frame + (recorded_blocks(config) - 1) * video.block_frames
        start, stop = routing.routable(window, fork_frame, last_start)
        frames = video.blocks * video.block_frames
        of_prompt = lambda prompt: draw_rows(
            jax.random.fold_in(key, prompt), window, config.rollout.branches, frames, start, stop
        )
        return jax.vmap(of_prompt)(prompts)

    return Stages(
        encode_text=jax.jit(shard(partial(encode_text, model), in_specs=(one, prompts), out_specs=sharding.TEXT)),
        blank=jax.jit(lambda p: empty((p,), window.cache_frames, history_spec), static_argnums=0),
        draw=jax.jit(draw),
        shared_block=jax.jit(keyed_shared_block, donate_argnums=3),
        shared_recache=jax.jit(
            shard(
                shared_recache,
                in_specs=(one, sharding.TEXT, one, prompts, history_spec, prompts, one),
                out_specs=history_spec,
            ),
            donate_argnums=4,
        ),
        fork=jax.jit(fork),
        branch_block=jax.jit(keyed_branch_block, donate_argnums=4),
        branch_recache=jax.jit(
            shard(
                branch_recache,
                in_specs=(one, sharding.TEXT, one, prompts, history_spec, page_spec, each, one),
                out_specs=page_spec,
            ),
            donate_argnums=5,
        ),
    )


# ---------------------------------------------------------------- the host's loop over blocks


def _recent(latents: Sequence[Array], config: ml_collections.ConfigDict, axis: int) -> Array:
    """The frames that a prompt switch recaches, from the list of a trajectory's blocks."""
    return jnp.concatenate(latents[-(config.window.recache_frames // config.video.block_frames) :], axis=axis)


def generate(
    stages: Stages,
    config: ml_collections.ConfigDict,
    variables: PyTree,
    text: TextKV,
    changed: np.ndarray,
    key: NoiseKey,
    blocks: int,
) -> tuple[list[Array], KVCache]:
    """Generates the first `blocks` blocks under the deployment window.

    Args:
      stages: from `build`.
      config: the config that the stages were built with.
      variables: {"params": ..., "lora": ...} of the generating policy.
      text: float[L, P, M, K, H, D], from `stages.encode_text`.
      changed: bool[P, M], where a prompt segment differs from the one before it.
      key: of the noise.
      blocks: how many.

    Returns:
      The blocks, float[P, F, Y, X, C] each, and the history as the next block needs it: a prompt switch that is due
      at that block has been made.
    """
    frames, switches = config.video.block_frames, tuple(config.video.switch_frames)
    history, latents = stages.blank(changed.shape[0]), []
    for block in range(blocks + 1):
        frame = block * frames
        segment = segment_of(frame, switches)
        if frame in switches:
            history = stages.shared_recache(
                variables, text, segment, changed[:, segment], history, _recent(latents, config, 1),
                frame - config.window.recache_frames,
            )  # fmt: skip
        if block < blocks:
            x, history = stages.shared_block(variables, text, segment, history, key, frame)
            latents.append(x)
    return latents, history


def rollout(
    stages: Stages,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    variables: PyTree,
    text: TextKV,
    changed: np.ndarray,
    noise_key: NoiseKey,
    selected: Array,
    pivot: int,
) -> Rollout:
    """One group rollout of P prompts: shared prefix, then the anchor and G branches to the end of the video.

    Arguments as in `generate`; `selected` int32[P, G, routed] are the CHR draws (`stages.draw`), `pivot` the first
    perturbed block. Blocks before the pivot are generated once; within the window the branches' first solver steps are
    routed; after it the default window returns, and what the branches wrote stays in their pages, which last as long
    as their chunk (config.rollout.branch_chunk).
    """
    frames, switches = config.video.block_frames, tuple(config.video.switch_frames)
    window_blocks, recorded = config.rollout.window_blocks, recorded_blocks(config)
    prefix, history = generate(stages, config, variables, text, changed, noise_key, pivot)

    def of_chunk(selected: Array) -> Rollout:
        """The anchor and some of the branches, from the fork to the end of the video."""
        page = stages.fork(history)
        trajectories = page.frame.shape[1]
        latents = [jnp.repeat(x[:, None], trajectories, axis=1) for x in prefix]
        records, banks, anchor_page = [], [], None
        for block in range(pivot, config.video.blocks):
            frame = block * frames
            segment = segment_of(frame, switches)
            if frame in switches and block > pivot:
                page = stages.branch_recache(
                    variables, text, segment, changed[:, segment], history, page, _recent(latents, config, 2),
                    frame - config.window.recache_frames,
                )  # fmt: skip
            if block == pivot + recorded - 1:
                # Every later write may evict what the replay of the first blocks reads.
                anchor_page = kv_cache.trajectory(page, 0)
            record, page = stages.branch_block(
                variables, text, segment, history, page, selected, block < pivot + window_blocks, noise_key, frame
            )
            latents.append(record.x_clean)
            if block < pivot + recorded:
                records.append((block, record))
                banks.append(memory_bank.trajectory(page.bank, 0))

        video = jnp.concatenate(latents, axis=2)
        window = routing.window(config)
        of_branches = lambda x: sharding.branches_of(x, mesh, selected.shape[1])
        starts = [block * frames for block, _ in records]
        shape = (len(config.sampler.steps) + 1, *prefix[0].shape[1:])
        noise = [block_noise(noise_key, start, shape)[:, -1] for start in starts]
        return Rollout(
            branches=of_branches(video),
            anchor=video[:, 0],
            replay=ReplayTuples(
                z=jnp.stack([of_branches(r.z) for _, r in records], axis=2),
                u=jnp.stack([of_branches(r.u) for _, r in records], axis=2),
                history=history.replace(bank=None),
                page=anchor_page.replace(bank=None),
                bank=jax.tree.map(lambda *x: jnp.stack(x, axis=2), *banks),
                rows=jnp.stack([routing.deployment_row(window, start) for start in starts]),
                start_frame=jnp.asarray(starts, jnp.int32),
                segment=jnp.asarray([segment_of(start, switches) for start in starts], jnp.int32),
                noise=jnp.stack(noise, axis=1),
            ),
        )

    at_once = branches_at_once(config)
    out = of_chunk(selected[:, :at_once])
    join = lambda *x: jnp.concatenate(x, axis=1)
    for first in range(at_once, config.rollout.branches, at_once):
        # Of its copy of the anchor nothing is kept.
        chunk = of_chunk(selected[:, first : first + at_once])
        z, u = join(out.replay.z, chunk.replay.z), join(out.replay.u, chunk.replay.u)
        out = out.replace(branches=join(out.branches, chunk.branches), replay=out.replay.replace(z=z, u=u))
        del chunk
    return out
