"""Where maths meets mesh: every compiled program of a run, its sharding and its donations.

`build` compiles `algorithm` and `models` for one config and mesh. Each program serves every block
and every pivot, so a run compiles each of them once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpo_jax.algorithm import (
    block,
    chunked,
    explore,
    flow,
    keys,
    kv_cache,
    losses,
    memory_bank,
    objective,
    replay,
    routing,
)
from kvpo_jax.models import umt5
from kvpo_jax.models.layers import exact
from kvpo_jax.models.wan import Wan, init_variables
from kvpo_jax.rewards import stream
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import (
    branches_at_once,
    compares_energies,
    own_starts,
    position_span,
    prompts_at_once,
    recorded_blocks,
    replayed_steps,
    settled_from,
    unrouted_frames,
    wan_config,
)
from kvpo_jax.state import TrainState, abstract_state, make_optimiser
from kvpo_jax.types import (
    Array,
    BlockRecord,
    Experience,
    Gradient,
    Judged,
    KVCache,
    PyTree,
    Replayed,
    ReplayTuples,
    Scores,
    TextKV,
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; see `build`.

    `variables` is {"params": ..., "lora": ...} of the generating policy, `text` a TextKV with an
    extra segment axis, float[L, P, M, K, H, D]. What is marked "in place" is donated.

    Attributes:
      encode_text: (variables, float[P, M, K, text_dim]) -> text.
      blank: (P) -> a history without frames.
      keep: (a history without frames, CHR draws) -> one that will keep the drawn frames, where its
        ring is too short for them.
      draw: (key, prompts int32[P], fork frame) -> CHR draws int32[P, G, routed], or int32[P, G, 0]
        where nothing is routed (config.rollout.explore).
      shared_block: (variables, text, segment, history in place, NoiseKey, start_frame) -> x_clean
        float[P, F, Y, X, C], history.
      shared_recache: (variables, text, segment, changed, history in place, latents, start_frame)
        -> history.
      fork: (history) -> empty pages for the anchor and the branches.
      branch_block: (variables, text, segment, history, page in place, routed_frames, window_blocks,
        NoiseKey, start_frame) -> BlockRecord, page; window_blocks are b* and b* + W.
      branch_recache: (variables, text, segment, changed, history, page in place, latents,
        start_frame) -> page.
      read_page: (page) -> what the replay reads of it, as it is now: what the anchor wrote, or each
        branch; without a bank.
      record: (latents float[P, T, F, Y, X, C] of all B blocks, BlockRecords of the W that are
        replayed, NoiseKey, first frames int32[W], segments int32[W]) -> videos of the branches
        float[P, G, frames, Y, X, C] and of the anchor, ReplayTuples without their caches.
      err: the arguments of `judge` -> its scores, as a judge that errs gives them
        (config.reward.noise).
      judge: (Scores, Scores of the local signal or None, key, prompts int32[P]) -> advantages
        float[P, G], whether the gate is open bool[P].
      replay: (lora, params, Experience, wanted bool[]) -> Gradient, Replayed of this policy. The
        gradient is 0 and costs nothing where it is not wanted, so that the energies of every policy
        come from one program and are comparable to the last bit.
      accumulate: (Gradient in place, Gradient) -> their sum.
      apply: (TrainState, Gradient) -> TrainState, metrics.
      follow: (old LoRA, new LoRA, decay float[]) -> decay old + (1 - decay) new.
      pixel_std: (pixels [P, G, frames, h, w, 3], how many of the frames count, the first ones) ->
        their std over the branches, the mean, float[].
      appearance: (pixels [P, T, frames, h, w, 3], how many of the frames count, the first ones) ->
        name -> float[P, T], see `appearance`.
      group_means: (Judged, the floor of its energies or None) -> name -> float[], see
        `group_means`.
      self_similarity: (latents float[P, 1, n, Y, X, C], how many of the frames count) -> float[P,
        lags], see `self_similarity`.
      all_finite: (latents of a rollout, or of held-out videos) -> whether every number is, bool[].
    """

    encode_text: Callable[[PyTree, Array | np.ndarray], TextKV]
    blank: Callable[[int], KVCache]
    keep: Callable[[KVCache, Array], KVCache]
    draw: Callable[[Array, Array | np.ndarray, int], Array]
    shared_block: Callable[..., tuple[Array, KVCache]]
    shared_recache: Callable[..., KVCache]
    fork: Callable[[KVCache], KVCache]
    branch_block: Callable[..., tuple[BlockRecord, KVCache]]
    branch_recache: Callable[..., KVCache]
    read_page: Callable[[KVCache], KVCache]
    record: Callable[..., tuple[Array, Array, ReplayTuples]]
    err: Callable[..., tuple[Scores, Scores | None]]
    judge: Callable[..., tuple[Array, Array]]
    replay: Callable[[PyTree, PyTree, Experience, np.ndarray], tuple[Gradient, Replayed]]
    accumulate: Callable[[Gradient, Gradient], Gradient]
    apply: Callable[[TrainState, Gradient], tuple[TrainState, dict[str, Array]]]
    follow: Callable[[PyTree, PyTree, np.ndarray], PyTree]
    pixel_std: Callable[[Array, int], Array]
    appearance: Callable[[Array, int], dict[str, Array]]
    group_means: Callable[..., dict[str, Array]]
    self_similarity: Callable[[Array, int], Array]
    all_finite: Callable[[PyTree], Array]

    def compilations(self) -> dict[str, int]:
        """How often each program has been compiled: at most once for what it is given in a run."""
        return {f.name: getattr(self, f.name)._cache_size() for f in dataclasses.fields(self)}


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Programs:
    """The programs of a run with this config on this mesh; nothing is compiled until it is called.

    Raises:
      UsageError: the config names something that there is not, or sizes that do not fit; it names
        the field.
    """
    caches = _Caches(config, mesh)
    energies = make_energies(config, mesh, caches)
    replicated: Any = NamedSharding(mesh, sharding.REPLICATED)
    state = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    gradient = Gradient(state.lora, squared=replicated, counted=replicated, metrics=replicated)
    return Programs(
        **_cache_programs(config, mesh, caches),
        shared_block=jax.jit(exact(_shared_block(config, mesh, caches)), donate_argnums=3),
        branch_block=jax.jit(exact(_branch_block(config, mesh, caches)), donate_argnums=4),
        **_recache_programs(config, mesh, caches),
        **_record_programs(config, mesh, caches),
        err=jax.jit(_make_err(config)),
        judge=jax.jit(_make_judge(config)),
        replay=jax.jit(
            exact(_make_replay(config, mesh, energies)), out_shardings=(gradient, replicated)
        ),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=gradient),
        apply=jax.jit(_make_apply(config), out_shardings=(state, replicated)),
        follow=jax.jit(follow, out_shardings=state.lora),
        pixel_std=jax.jit(pixel_std, static_argnums=1),
        appearance=jax.jit(appearance, static_argnums=1),
        group_means=jax.jit(group_means),
        self_similarity=jax.jit(self_similarity, static_argnums=1),
        all_finite=jax.jit(all_finite, out_shardings=replicated),
    )


# ---------------------------------------------------------------- caches and their specs


class _Caches:
    """How the caches of a run are made, and how they lie on the mesh.

    Attributes:
      config: of the run.
      mesh: of the run.
      wan: sizes of the network.
      context: the mesh axis over which the tokens of a block are split, or None.
      model: the network.
      window: the slots of a context.
      order: int[T], the branch of each trajectory as it lies on the mesh; -1 is an anchor.
      page_slots: frames that a page holds.
      history_slots: frames that a history holds.
      kept: how many of these are frames that were drawn, beside the ring; 0: the ring has them all.
      history_spec: a KVCache of specs.
      page_spec: likewise.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh, self.wan = config, mesh, wan_config(config)
        self.context = sharding.context_axis(mesh)
        self.model = Wan(self.wan, self.context, regather=mesh.shape["fsdp"] > 1)
        self.window = routing.window(config.window)
        self.order = sharding.trajectories(mesh, branches_at_once(config))
        # Beside the sink, a page holds the longest of: a recache, the replayed window, the local
        # window.
        replayed = recorded_blocks(config) * config.video.block_frames
        written = max(config.window.recache_frames, replayed, self.window.past)
        self.page_slots = self.window.sink + written
        # Of the frames that may be drawn, a history holds all, or only those that are.
        routes = explore.EXPLORES[config.rollout.explore].routes
        drawn = config.rollout.branches * self.window.routed if routes else 0
        needed = unrouted_frames(config) + drawn
        self.history_slots = min(self.window.cache_frames, needed)
        self.kept = drawn if needed < self.window.cache_frames else 0
        self.history_spec = self._spec((1,), sharding.PROMPTS, self.kept)
        self.page_spec = self._spec((1, 1), sharding.TRAJECTORIES)

    def _empty(self, batch: tuple[int, ...], slots: int, kept: int = 0) -> KVCache:
        section, video = self.config.window, self.config.video
        kv, span = self.wan.kv_shape(video.height, video.width), position_span(self.config)
        dtype = jnp.dtype(self.wan.dtype)
        cache = kv_cache.empty(kv, batch, slots, self.window.sink, dtype, kept=kept, span=span)
        if not section.bank:
            return cache
        options = section.bank, section.bank_interval, section.bank_reinsert
        bank = memory_bank.empty(cache, *options, heads_axis=self.context)
        return cache.replace(bank=bank)

    def _spec(self, batch: tuple[int, ...], frame: PartitionSpec, kept: int = 0) -> KVCache:
        like = jax.eval_shape(lambda: self._empty(batch, self.window.sink + kept + 1, kept))
        return sharding.cache_spec(like, frame, self.context)

    def blank(self, prompts: int) -> KVCache:
        """A history without frames."""
        history = self._empty((prompts,), self.history_slots, self.kept)
        return sharding.constrain_like(history, self.mesh, self.history_spec)

    def keep(self, history: KVCache, drawn: Array) -> KVCache:
        """A history without frames that will keep those that are drawn."""
        history = kv_cache.keep(history, drawn)
        return sharding.constrain_like(history, self.mesh, self.history_spec)

    def fork(self, history: KVCache) -> KVCache:
        """Pages without frames, for every trajectory; each begins with the history's bank."""
        trajectories = len(self.order)
        page = self._empty((history.frame.shape[0], trajectories), self.page_slots)
        page = page.replace(bank=memory_bank.repeat(history.bank, trajectories))
        return sharding.constrain_like(page, self.mesh, self.page_spec)


# ---------------------------------------------------------------- generation


def _with_policy(
    function: Callable, mesh: Mesh, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable:
    """`function` in `shard_map`: its first argument are the variables of a policy.

    `in_specs` are those of the others. A plan knows a program by its function's name.
    """

    @wraps(function)
    def sharded(variables, *arguments):
        variables, specs = sharding.in_shards(variables, mesh)
        over_mesh = jax.shard_map(
            function, mesh=mesh, in_specs=(specs, *in_specs), out_specs=out_specs
        )
        return over_mesh(variables, *arguments)

    return sharded


def _bound(model: Wan, variables: PyTree, text: TextKV, segment: Array) -> tuple[Any, TextKV]:
    """The network of a policy, and the text of one segment."""
    return partial(model.apply, variables), jax.tree.map(lambda x: x[:, :, segment], text)


def _cache_programs(
    config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches
) -> dict[str, Callable]:
    """The programs that make text and caches, and that draw."""
    model, window, video, rollout = caches.model, caches.window, config.video, config.rollout
    draw_frames, routes = routing.DRAWS[rollout.draw], explore.EXPLORES[rollout.explore].routes

    def encode_text(variables, embeddings):
        return model.apply(variables, embeddings, method=Wan.encode_prompts)

    def draw(key, prompts, fork_frame):
        if not routes:
            return jnp.zeros((len(prompts), rollout.branches, 0), jnp.int32)
        last_start = fork_frame + (rollout.window_blocks - 1) * video.block_frames
        frames = video.blocks * video.block_frames
        pool = routing.routable(window, frames, fork_frame, last_start)

        def draw_prompt(prompt):
            own = jax.random.fold_in(key, prompt)
            return draw_frames(own, window, rollout.branches, pool, fork_frame)

        return jax.vmap(draw_prompt)(prompts)

    encode = _with_policy(encode_text, mesh, (sharding.PROMPTS,), sharding.TEXT)
    return {
        "encode_text": jax.jit(exact(encode)),
        "blank": jax.jit(caches.blank, static_argnums=0),
        "keep": jax.jit(caches.keep, donate_argnums=0),
        "draw": jax.jit(draw),
        "fork": jax.jit(caches.fork),
    }


def _noise_shape(config: ml_collections.ConfigDict, caches: _Caches) -> tuple[int, ...]:
    """[S+1, F, Y, X, C]: the noise that a block of one trajectory takes."""
    video, passes = config.video, len(config.sampler.steps) + 1
    return passes, video.block_frames, video.height, video.width, caches.wan.channels


def _shared_block(config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches) -> Callable:
    """The program of a block that the trajectories of a prompt share.

    It takes the key of the noise, and a shard of it the noise.
    """
    model, window, schedule = caches.model, caches.window, flow.schedule(config.sampler)
    noise_shape = _noise_shape(config, caches)

    def shared_shard(variables, text, segment, history, frames, noise, start_frame):
        network, text = _bound(model, variables, text, segment)
        record, history = block.generate_block(
            network, schedule, text, history, None, frames, noise, start_frame
        )
        return record.x_clean[:, 0], history

    one, prompts, history_spec = sharding.REPLICATED, sharding.PROMPTS, caches.history_spec
    shared = _with_policy(
        shared_shard,
        mesh,
        in_specs=(sharding.TEXT, one, history_spec, prompts, prompts, one),
        out_specs=(prompts, history_spec),
    )

    def shared_block(variables, text, segment, history, key, start_frame):
        noise = keys.block_noise(key, start_frame, noise_shape)
        frames = routing.deployment_frames(window, start_frame)
        frames = jnp.broadcast_to(frames, (len(noise), 1, noise_shape[0], window.slots))
        return shared(variables, text, segment, history, frames, noise, start_frame)

    return shared_block


def _branch_block(config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches) -> Callable:
    """The program of a block of the anchor and the branches; otherwise as `_shared_block`."""
    model, window, order = caches.model, caches.window, caches.order
    schedule, steps = flow.schedule(config.sampler), len(config.sampler.steps)
    video, rollout, noise_shape = config.video, config.rollout, _noise_shape(config, caches)
    explored = explore.EXPLORES[rollout.explore]
    transition = flow.transition(config.sampler, rollout) if explored.draws else None

    def branch_shard(variables, text, segment, history, page, frames, noise, start_frame, draws):
        network, text = _bound(model, variables, text, segment)
        if explored.noise is None:
            noise = sharding.vary_over_branch(noise)
        drawn = None if transition is None else block.Drawn(transition, draws)
        return block.generate_block(
            network, schedule, text, history, page, frames, noise, start_frame, drawn
        )

    one, prompts, each = sharding.REPLICATED, sharding.PROMPTS, sharding.TRAJECTORIES
    branches = _with_policy(
        branch_shard,
        mesh,
        in_specs=(
            *(sharding.TEXT, one, caches.history_spec, caches.page_spec, each),
            *(prompts if explored.noise is None else each, one, sharding.BRANCHES),
        ),
        out_specs=(BlockRecord(z=each, u=each, x_clean=each), caches.page_spec),
    )

    def branch_block(
        variables, text, segment, history, page, routed_frames, window_blocks, key, start_frame
    ):
        noise = keys.block_noise(key, start_frame, noise_shape)
        number = start_frame // video.block_frames
        explores = routing.explores(order >= 0, number, window_blocks)
        if explored.noise is not None:
            own = keys.own_noise(key, np.maximum(order, 0), start_frame, noise_shape)
            noise = explore.branch_noise(rollout, noise, own, explores)
        if explored.routes:
            perturbed = routing.perturbed_passes(rollout, steps, order >= 0, number, window_blocks)
            routed_frames = routed_frames[:, np.maximum(order, 0)]
            frames = routing.context_frames(window, routed_frames, start_frame, perturbed)
        else:
            frames = routing.deployment_frames(window, start_frame)
            shape = (len(noise), len(order), steps + 1, window.slots)
            frames = jnp.broadcast_to(frames, shape)
        arguments = (variables, text, segment, history, page, frames, noise, start_frame)
        return branches(*arguments, explores)

    return branch_block


def _recache_programs(
    config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches
) -> dict[str, Callable]:
    """The programs of a prompt switch."""
    model = caches.model
    switch = partial(block.switch_prompt, global_sink=config.window.global_sink)

    def shared_recache(variables, text, segment, changed, history, latents, start_frame):
        network, text = _bound(model, variables, text, segment)
        return switch(network, text, changed, history, None, latents[:, None], start_frame)

    def branch_recache(variables, text, segment, changed, history, page, latents, start_frame):
        network, text = _bound(model, variables, text, segment)
        return switch(network, text, changed, history, page, latents, start_frame)

    one, prompts, each = sharding.REPLICATED, sharding.PROMPTS, sharding.TRAJECTORIES
    begin, history, page = (sharding.TEXT, one, prompts), caches.history_spec, caches.page_spec
    shared = _with_policy(
        shared_recache, mesh, in_specs=(*begin, history, prompts, one), out_specs=history
    )
    branches = _with_policy(
        branch_recache, mesh, in_specs=(*begin, history, page, each, one), out_specs=page
    )
    return {
        "shared_recache": jax.jit(exact(shared), donate_argnums=4),
        "branch_recache": jax.jit(exact(branches), donate_argnums=5),
    }


def _record_programs(
    config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches
) -> dict[str, Callable]:
    """The programs that keep of a rollout what the rewards and the replay read."""
    video, section, steps = config.video, config.replay, len(config.sampler.steps)
    own, source = section.context == "own", replay.STATES[section.states]
    blank = caches.history_spec.replace(bank=None, kept=0)
    block_shape = (video.block_frames, video.height, video.width, caches.wan.channels)
    branches_of = partial(sharding.branches_of, mesh=mesh, branches=branches_at_once(config))

    def read_page(page):
        page = page.replace(bank=None)
        return kv_cache.map_trajectories(branches_of, page) if own else kv_cache.trajectory(page, 0)

    def record(latents, records, key, start_frames, segments):
        noise = anchor = fresh = drawn = None
        if section.context in replay.READS_NOISE:
            shape = (steps + 1, *block_shape)
            noise = [keys.block_noise(key, start, shape)[:, -1] for start in start_frames]
        if source.of_anchor:
            anchor = [made.z[:, 0] for made in records]
        if source.of_ends:
            shape = (replayed_steps(config), *block_shape)
            fresh = [keys.fresh_noise(key, start, shape) for start in start_frames]
        if section.steps_drawn:
            learned = min(section.grad_steps, replayed_steps(config))
            drawn = keys.drawn_steps(key, section.steps_drawn, learned)
        of_branches = [jax.tree.map(branches_of, made) for made in records]
        tuples = replay.record_tuples(
            caches.window, of_branches, start_frames, segments, noise, anchor, fresh, drawn
        )
        whole = block.join_blocks(latents, axis=2)
        return branches_of(whole), whole[:, 0], tuples

    def on_mesh(specs):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    page = caches.page_spec.replace(bank=None) if own else blank
    tuples = sharding.replay_spec(blank, page).replace(history=None, page=None)
    recorded = (sharding.TRAJECTORIES, sharding.PROMPTS, tuples)
    return {
        "read_page": jax.jit(read_page, out_shardings=on_mesh(page)),
        "record": jax.jit(record, out_shardings=on_mesh(recorded)),
    }


def _make_err(config: ml_collections.ConfigDict) -> Callable:
    """(scores, local, key, prompts) -> both with noise; see `Programs.err`."""

    def err(scores, local, key, numbers):
        noise = config.reward.weights, config.reward.noise, key, numbers
        erring = objective.noisy_scores(scores, *noise)
        return erring, None if local is None else objective.noisy_scores(local, *noise)

    return err


def _make_judge(config: ml_collections.ConfigDict) -> Callable:
    """(scores, local, key, prompts) -> advantages, gates; see `Programs.judge`."""

    def judge(scores, local, key, numbers):
        advantages = objective.compute_advantages(
            config.objective, config.reward.weights, scores, local
        )
        advantages = objective.control_advantages(
            config.objective, advantages, key, numbers, config.train.prompts_per_iteration
        )
        return advantages, objective.open_gates(scores, local)

    return judge


# ---------------------------------------------------------------- replay and update


def make_energies(
    config: ml_collections.ConfigDict, mesh: Mesh, caches: _Caches | None = None
) -> Callable[..., tuple[Array, Any]]:
    """(params, lora, embeddings, text, tuples, wanted, others) -> what the replay returns, no jit.

    That is what `replay.Energies` return, or `replay.state_losses` where the loss is taken state by
    state, which alone reads the `replay.Others`. config.replay.text says whose text keys and values
    the replay reads (`replay.TEXTS`); `wanted` is as in `chunked.sum_over_steps`.
    """
    caches = caches or _Caches(config, mesh)
    model, schedule = caches.model, flow.schedule(config.sampler)
    energies, read_text = replay.CONTEXTS[config.replay.context], replay.TEXTS[config.replay.text]
    draws = explore.EXPLORES[config.rollout.explore].draws
    transition = flow.transition(config.sampler, config.rollout) if draws else None
    setting = replay.Setting(
        config.replay, schedule, transition, settled_from(config), own_starts(config)
    )
    kind = losses.KINDS[config.objective.kind]
    of_state = kind.of_state and losses.bind(kind, config.replay, config.objective)
    replay.ENERGIES[config.replay.energy]  # an unknown name is an error now, not while tracing

    def policy(frozen, lora):
        params, embeddings, text = frozen
        variables = {"params": params, "lora": lora}
        encode = partial(model.apply, variables, embeddings, method=Wan.encode_prompts)
        return partial(model.apply, variables), read_text(encode, text)

    def energies_per_shard(params, lora, embeddings, text, tuples, wanted, others):
        text = jax.tree.map(lambda x: sharding.vary_over_branch(x, caches.context), text)
        frozen = sharding.vary(params, caches.context), embeddings, text
        # The energies of a branch keep its gradient for themselves, so LoRA is whole for them.
        lora = sharding.unboxed(sharding.vary(lora, caches.context))
        wanted = sharding.vary(wanted)
        if of_state is None:
            return energies(policy, setting, lora, frozen, tuples, wanted)
        if tuples.peers is not None:
            others = others.replace(advantages=sharding.vary_over_branch(others.advantages))
            tuples = tuples.replace(peers=sharding.vary_over_branch(tuples.peers))
        loras = sharding.vary((others.old, others.reference), caches.context)
        old, reference = sharding.unboxed(loras)
        on_policy = sharding.vary(others.on_policy)
        others = others.replace(old=old, reference=reference, on_policy=on_policy)
        return replay.state_losses(
            policy, setting, lora, frozen, tuples, wanted, of_state, others, losses.SEEN
        )

    one, prompts = sharding.REPLICATED, sharding.PROMPTS
    own = config.replay.context == "own"
    replayed = sharding.replay_spec(caches.history_spec, caches.page_spec, own)
    advantages = sharding.PROMPTS if kind.peers else sharding.TRAJECTORIES

    def replay_energies(params, lora, embeddings, text, tuples, wanted, others=None):
        if kind.peers:
            tuples = replay.with_peers(schedule, tuples, config.objective.anchors)
        (params, lora), weights = sharding.in_shards((params, lora), mesh)
        read = None
        if others is not None:
            loras, specs = sharding.in_shards((others.old, others.reference), mesh)
            others = others.replace(old=loras[0], reference=loras[1])
            read = replay.Others(advantages, one, *specs)
        sharded = jax.shard_map(
            energies_per_shard,
            mesh=mesh,
            in_specs=(*weights, prompts, sharding.TEXT, replayed, one, read),
            out_specs=sharding.TRAJECTORIES,
        )
        return sharded(params, lora, embeddings, text, tuples, wanted, others)

    return replay_energies


def _make_replay(config: ml_collections.ConfigDict, mesh: Mesh, energies: Callable) -> Callable:
    """(lora, params, Experience, wanted) -> (Gradient, Replayed): Eq. 5 to Eq. 8, Eq. 15, Eq. 16.

    Of a micro-batch, its share of the mean over all prompts of the iteration.
    """
    compares = compares_energies(config)
    of_batch = _group_loss(config) if compares else partial(_mean_loss, config.objective)

    def loss(lora, params, experience, wanted):
        tuples, others = experience.tuples, None
        if not compares:
            others = replay.Others(
                jnp.asarray(experience.advantages),
                jnp.asarray(experience.on_policy),
                experience.old,
                experience.reference,
            )
        replayed = energies(
            params, lora, experience.embeddings, experience.text, tuples, wanted, others
        )
        current, seen = sharding.constrain(replayed, mesh)  # every device sees all G of a group
        losses, metrics, gate, of_policy = of_batch(current, seen, experience)
        share = len(losses) / config.train.prompts_per_iteration
        return share * jnp.mean(losses), (share, metrics, gate, of_policy)

    def replay_groups(lora, params, experience, wanted):
        value, pull, (share, metrics, gate, replayed) = jax.vjp(
            lambda lora: loss(lora, params, experience, wanted), lora, has_aux=True
        )
        of_lora = chunked.if_wanted(pull, value, lora, wanted)
        means = {name: share * mean for name, mean in metrics.items()}
        squared = jnp.square(optax.global_norm(of_lora))
        return Gradient(of_lora, squared, jnp.sum(gate > 0), {"loss": value, **means}), replayed

    return replay_groups


# (energies [P, G], what the replay has seen, Experience) -> the losses float[P], metrics, gates
# float[P], and the Replayed.
OfBatch = Callable[[Array, Any, Experience], tuple[Array, dict[str, Array], Array, Replayed]]


def _group_loss(config: ml_collections.ConfigDict) -> OfBatch:
    """The losses of the energies of a group: `objective.loss`."""

    def group_losses(current, experience):
        return per_group(
            objective.loss, current, experience, experience.advantages, experience.gate_open
        )

    def per_group(function, current, experience, *further):
        of_group = partial(
            function,
            config.objective,
            energy_unit=experience.energy_unit,
            on_policy=experience.on_policy,
        )
        energies = current, experience.energies_old, experience.energies_ref
        return jax.vmap(of_group)(*energies, *further)

    def of_batch(current, floor, experience):
        losses, diagnostics = group_losses(current, experience)
        still = jax.lax.stop_gradient(current)
        of_energies = jax.grad(lambda e: jnp.sum(group_losses(e, experience)[0]))(still)
        policies = per_group(objective.policies, still, experience)
        replayed = Replayed(
            energies=still,
            floor=floor,
            probability=jnp.exp(policies.log_pi),
            ratio=jnp.exp(policies.log_rho),
            weight=objective.prompt_weight(of_energies),
        )
        return losses, diagnostics.means(), diagnostics.gate, replayed

    return of_batch


def _mean_loss(options: ml_collections.ConfigDict, of_branch, seen, experience):
    """The losses of states, averaged; see `OfBatch`."""
    branches = of_branch.shape[1]
    uniform = jnp.full(branches, -jnp.log(branches))
    gate = jax.vmap(lambda is_open: objective.gate_scale(options.gate, is_open, uniform))(
        experience.gate_open
    )
    losses = gate * of_branch.mean(axis=1)
    metrics = {name: x.mean() for name, x in seen.items()}
    metrics |= {"surrogate": of_branch.mean(), "gate": gate.mean()}
    still = jax.lax.stop_gradient(of_branch)
    replayed = Replayed(still, None, None, None, weight=gate)
    return losses, metrics, gate, replayed


def accumulate(total: Gradient, share: Gradient) -> Gradient:
    """The sum of two micro-batches."""
    return jax.tree.map(jnp.add, total, share)


def agreement(total: Gradient, count: int) -> Array:
    """How far the gradients of `count` micro-batches agree, float[] from -1 / (count - 1) to 1.

    The mean inner product of two of them over their mean square: 1 where all are equal, about 0
    where they have nothing in common (docs/algorithm.md). 0 where there is no gradient.
    """
    of_pairs = jnp.square(optax.global_norm(total.lora)) - total.squared
    return of_pairs / jnp.where(total.squared > 0, (count - 1) * total.squared, 1.0)


def follow(old: PyTree, new: PyTree, decay: Array) -> PyTree:
    """The old policy after it has followed the new one: the new one itself where decay is 0."""
    return jax.tree.map(lambda a, b: jnp.where(decay > 0, decay * a + (1 - decay) * b, b), old, new)


def _make_apply(config: ml_collections.ConfigDict) -> Callable:
    """(state, Gradient) -> (state, metrics): one optimiser step.

    If the gate leaves nothing of any prompt's loss, LoRA and optimiser state stay as they are: a
    zero gradient alone would still let AdamW's momentum and decay move them.
    """
    optimiser = make_optimiser(config.train)
    count = config.train.prompts_per_iteration // prompts_at_once(config)

    def apply(state, gradient):
        skip = gradient.counted == 0

        def unless_skipped(new, before):
            return jax.tree.map(lambda n, b: jnp.where(skip, b, n), new, before)

        updates, optimiser_state = optimiser.update(gradient.lora, state.optimiser, state.lora)
        lora = unless_skipped(optax.apply_updates(state.lora, updates), state.lora)
        ema = optax.incremental_update(lora, state.ema, 1 - config.train.ema_decay)
        metrics = {
            **gradient.metrics,
            "grad_norm": optax.global_norm(gradient.lora),
            **({"gradient_agreement": agreement(gradient, count)} if count > 1 else {}),
            "update_norm": optax.global_norm(jax.tree.map(jnp.subtract, lora, state.lora)),
            "lora_norm": optax.global_norm(lora),
            "skipped_update": skip.astype(jnp.float32),
        }
        state = state.replace(
            lora=lora,
            ema=unless_skipped(ema, state.ema),
            optimiser=unless_skipped(optimiser_state, state.optimiser),
        )
        return state, metrics

    return apply


def pixel_std(pixels: Array, frames: int) -> Array:
    """The std over the branches of pixels [P, G, n, h, w, 3], the mean over pixels, float[].

    Of the n frames the first `frames` count.

    Exactly 0 where the branches are equal (`objective.group_std`).
    """
    scale = 255.0 if pixels.dtype == jnp.uint8 else 1.0
    pixels = pixels[:, :, :frames].astype(jnp.float32)
    return jax.vmap(objective.group_std)(pixels).mean() / scale


APPEARANCE = ("exposure", "saturation", "clipped")  # what `appearance` tells


def appearance(pixels: Array, frames: int) -> dict[str, Array]:
    """How bright and how colourful videos are, name -> float[P, T]: means of `stream.looks`.

    Args:
      pixels: [P, T, n, h, w, 3], float in [0, 1] or uint8.
      frames: of the n frames the first so many count.
    """
    # A frame at a time, so that no float copy of the videos is made.
    by_frame = jax.lax.map(
        lambda index: stream.looks(stream.frame_of(pixels, index, 2)), jnp.arange(frames)
    )
    return {name: by_frame[name].mean(axis=0) for name in APPEARANCE}


def group_means(judged: Judged, floor: Array | None) -> dict[str, Array]:
    """What P groups look like, on average: rewards, win rate over the anchor, pixels, the floor.

    `floor` is `Replayed.floor`.
    """
    scores = judged.scores
    return {
        "reward": jnp.mean(scores.branches),
        "reward_anchor": jnp.mean(scores.anchor),
        "reward_std_in_group": jax.vmap(objective.reward_std)(scores.branches).mean(),
        "best_minus_anchor": jnp.mean(scores.branches.max(1) - scores.anchor),
        "win_rate": jnp.mean(scores.branches > scores.anchor[:, None]),
        "pixel_std_in_group": judged.pixel_std,
        "gate_open": jnp.mean(judged.gate_open),
        **({} if floor is None else {"energy_floor": jnp.mean(floor)}),
        **{f"reward_{name}": jnp.mean(x) for name, (x, _) in scores.components.items()},
        **{name: jnp.mean(x) for name, x in judged.appearance.items()},
    }


def self_similarity(latents: Array, frames: int) -> Array:
    """How alike the latent frames of a video are that lie some frames apart, float[P, frames - 1].

    Entry i is the mean cosine of frames t and t + i + 1, over all t.

    Args:
      latents: float[P, 1, n, Y, X, C] of single videos.
      frames: of the n frames the first so many count.
    """
    flat = latents[:, 0, :frames].astype(jnp.float32).reshape(len(latents), frames, -1)
    unit = flat / (jnp.linalg.norm(flat, axis=-1, keepdims=True) + 1e-12)
    cosines = jnp.einsum("pid,pjd->pij", unit, unit, precision="highest")
    diagonals = [jnp.diagonal(cosines, lag, 1, 2).mean(axis=-1) for lag in range(1, frames)]
    return jnp.stack(diagonals, axis=-1)


def all_finite(tree: PyTree) -> Array:
    """Whether every number in the tree is finite, bool[]."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


# ---------------------------------------------------------------- before a run has programs


def fresh_lora(config: ml_collections.ConfigDict, key: Array) -> PyTree:
    """The collection `lora` of a new adapter, which changes nothing: its B is 0."""

    def init_lora(key):
        return init_variables(wan_config(config), key)["lora"]

    return jax.jit(init_lora)(key)


def text_encoder(cfg: umt5.UMT5Config) -> Callable[[PyTree, Array, Array], Array]:
    """(params, ids int32[n, K], mask bool[n, K]) -> token embeddings float[n, K, dim]."""
    return jax.jit(exact(partial(umt5.embed, cfg)))


# ---------------------------------------------------------------- for plans of a run


def cache_specs(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[KVCache, KVCache]:
    """The specs of a history and of pages, for a plan that knows their shapes from `eval_shape`."""
    caches = _Caches(config, mesh)
    return caches.history_spec, caches.page_spec
