"""Rollouts of a generator with random weights: what is shared, what is routed, and what nothing may
change.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from equipment import SMALLEST, bare_run, batch_of, configure

from kvpo_jax import backbone, programs, rollout
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import block, flow, keys, kv_cache, routing
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import Wan, WanConfig, init_variables
from kvpo_jax.rewards import composite
from kvpo_jax.run import Run
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import BlockKV, PromptBatch, PyTree, Rollout, TextKV

PROMPTS, BRANCHES, STEPS = 2, 4, 4
BLOCKS, FRAMES, SWITCHES = 12, 3, (12, 24)
STEP_LEVELS = (1.0, 0.75, 0.5, 0.25)
PIVOTS = (5, 8, 9)  # 24 is frame 3 * 8: no window of three blocks begins at block 6 or 7
FIELDS = {
    **SMALLEST,
    "video.blocks": BLOCKS,
    "video.switch_frames": SWITCHES,
    "rollout.branches": BRANCHES,
    "replay.context": "self_rolled",  # the noise that it reads is recorded
}


def make_config(spec: str = "configs/tiny.py", **fields) -> ml_collections.ConfigDict:
    """The config with FIELDS and `fields` (section__name=value) over it."""
    return configure(spec, FIELDS | {name.replace("__", "."): v for name, v in fields.items()})


def noise_key(seed: int, prompts: int = PROMPTS) -> keys.NoiseKey:
    return keys.NoiseKey(jax.random.key(seed), jnp.arange(prompts))


@dataclasses.dataclass(frozen=True)
class World:
    """All that a rollout takes, but the draws and the pivot. Prompt 0 changes at every switch,
    prompt 1 never.
    """

    run: Run
    variables: PyTree
    batch: PromptBatch
    key: keys.NoiseKey

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.run.config

    @property
    def text(self) -> TextKV:
        return self.run.programs.encode_text(self.variables, self.batch.embeddings)

    def with_fields(self, **fields) -> "World":
        """Other fields that only the host's loop over blocks reads: the compiled programs serve
        them as well.
        """
        arguments = [f"--config.{name.replace('__', '.')}={v}" for name, v in fields.items()]
        config = config_lib.override(self.config, arguments)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, config=config))

    def generate(self, blocks: int = BLOCKS):
        prompt_at = rollout.script(self.config, self.text, self.batch.changed)
        return rollout.prefix(self.run, self.variables, prompt_at, self.key, blocks)

    def roll(self, pivot: int, routed_frames: jax.Array) -> Rollout:
        return rollout.rollout(self.run, self.variables, self.batch, self.key, routed_frames, pivot)

    def draw(self, pivot: int, seed: int = 0) -> jax.Array:
        return self.run.programs.draw(jax.random.key(seed), jnp.arange(PROMPTS), pivot * FRAMES)


def make_world(config: ml_collections.ConfigDict) -> World:
    run = bare_run(config, sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
    # Every parameter random: the zeros and ones of the initialisation would hide what depends on
    # them.
    like = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), like)
    embeddings = rng.normal(size=(PROMPTS, len(SWITCHES) + 1, 3, 4)).astype(np.float32)
    embeddings[1] = embeddings[1, 0]
    changed = np.array([[False, True, True], [False, False, False]])
    return World(run, variables, batch_of(embeddings, changed), noise_key(7))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(make_config())


@pytest.fixture(scope="module")
def rolled(world) -> Rollout:
    """Three perturbed blocks from pivot 5."""
    return world.roll(5, world.draw(5))


def identity(pivot: int, window: routing.Window) -> jax.Array:
    """Draws that are what the deployment window of the first perturbed block has in the routed
    slots.
    """
    fork = pivot * FRAMES
    frames = jnp.arange(fork - window.past, fork - window.near, dtype=jnp.int32)
    return jnp.broadcast_to(frames, (PROMPTS, BRANCHES, window.routed))


def against(branches, anchor):
    """The anchor as often as there are branches."""
    return np.broadcast_to(np.asarray(anchor)[:, None], branches.shape)


read = jax.jit(kv_cache.read)


@partial(jax.jit, static_argnums=0)
def network(cfg: WanConfig, variables: PyTree, *arguments, own_keys=None):
    """`Wan.apply`, by itself."""
    return Wan(cfg).apply(variables, *arguments, own_keys=own_keys)


def differs(a, b) -> bool:
    """By far more than rounding."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 1e-3


# ---------------------------------------------------------------- one noise, one prefix


@pytest.mark.parametrize("pivot", PIVOTS)
def test_identity_routing_is_the_anchor_bit_for_bit(world, pivot):
    """One perturbed block, through the switches after it, to the end of the video."""
    one_block = world.with_fields(rollout__window_blocks=1)
    out = one_block.roll(pivot, identity(pivot, routing.window(world.config.window)))
    np.testing.assert_array_equal(out.branches, against(out.branches, out.anchor))
    # Other draws are another video.
    assert differs(one_block.roll(pivot, world.draw(pivot)).branches, out.branches)


def test_identity_routing_of_a_longer_window(world):
    """The draws stay while the deployment window moves on: the first block is the anchor's, the
    second is not.
    """
    out = world.roll(5, identity(5, routing.window(world.config.window)))

    def of_block(b):
        return slice(b * FRAMES, (b + 1) * FRAMES)

    np.testing.assert_array_equal(
        out.branches[:, :, of_block(5)], against(out.branches, out.anchor)[:, :, of_block(5)]
    )
    assert differs(
        out.branches[:, :, of_block(6)], against(out.branches, out.anchor)[:, :, of_block(6)]
    )
    # Equal draws, equal branches.
    np.testing.assert_array_equal(out.branches[:, 1:], out.branches[:, :-1])


def test_branches_share_the_prefix_bit_for_bit(world, rolled):
    prefix = np.concatenate(world.generate(5)[0], axis=1)
    np.testing.assert_array_equal(rolled.anchor[:, :15], prefix)
    np.testing.assert_array_equal(
        rolled.branches[:, :, :15], against(rolled.branches, rolled.anchor)[:, :, :15]
    )


def test_branches_with_other_draws_differ(rolled):
    for g in range(BRANCHES):
        for other in (rolled.anchor, *(rolled.branches[:, h] for h in range(g))):
            for prompt in range(PROMPTS):
                assert differs(rolled.branches[prompt, g, 15:18], other[prompt, 15:18])


def test_the_anchor_does_not_depend_on_the_draws(world, rolled):
    other = world.roll(5, world.draw(5, seed=1))
    np.testing.assert_array_equal(other.anchor, rolled.anchor)
    chex.assert_trees_all_equal(other.replay.page, rolled.replay.page)
    assert differs(other.branches, rolled.branches)


def test_the_draws_of_a_branch_concern_that_branch_only(world, rolled):
    routed_frames = world.draw(5).at[0, 2].set(world.draw(5, seed=1)[0, 2])
    other = world.roll(5, routed_frames)
    changed = np.any(np.asarray(other.branches != rolled.branches), axis=(2, 3, 4, 5))
    np.testing.assert_array_equal(changed, [[False, False, True, False], [False] * 4])


@pytest.mark.parametrize("pivot", PIVOTS)
def test_the_anchor_is_what_the_generator_makes(world, pivot):
    """The same video as without a rollout around it, with prompt switches before, at and after the
    fork.
    """
    video = np.concatenate(world.generate()[0], axis=1)
    np.testing.assert_allclose(
        world.roll(pivot, world.draw(pivot)).anchor, video, atol=1e-5, rtol=0
    )


def test_pages_hold_a_window_that_is_longer_than_what_is_replayed():
    """15 past frames beside a recache of 12 and three replayed blocks of 3."""
    world = make_world(make_config(window__past=15, video__switch_frames="(15,)"))
    video = np.concatenate(world.generate()[0], axis=1)
    routed_frames = world.draw(6)
    np.testing.assert_allclose(world.roll(6, routed_frames).anchor, video, atol=1e-5, rtol=0)


def test_of_a_long_history_only_what_is_read_is_stored(world):
    """A history that holds the sink, 12 frames and the 24 that are drawn, and one that holds all:
    the same video and the same branches, bit for bit, through prompt switches.
    """
    short = make_world(make_config(window__cache_frames=40))
    draws, blocks = world.draw(9), short.generate()
    np.testing.assert_array_equal(short.draw(9), draws)
    assert draws.min() < 27 - 12  # the last 12 frames would not do
    chex.assert_trees_all_equal(blocks[0], world.generate()[0])
    np.testing.assert_array_equal(
        blocks[1].frame, [[0, 1, 2, *range(27, 36), 24, 25, 26, *[-1] * 24]] * 2
    )
    ours, theirs = short.roll(9, draws), world.roll(9, draws)
    chex.assert_trees_all_equal(
        (ours.branches, ours.anchor, ours.replay.z, ours.replay.u),
        (theirs.branches, theirs.anchor, theirs.replay.z, theirs.replay.u),
    )
    read_in_replay = jnp.broadcast_to(ours.replay.frames, (PROMPTS, *ours.replay.frames.shape))
    pasts = [read(read_in_replay, rolled.replay.history) for rolled in (ours, theirs)]
    chex.assert_trees_all_equal(*((past.k, past.v, past.frame) for past in pasts))


def test_a_video_alone_stores_what_its_window_reads():
    config = make_config(window__cache_frames=999)
    for section, frames in (({}, 3 + 12), ({"past": 15}, 3 + 15), ({"recache_frames": 3}, 3 + 9)):
        config.window.update({"past": 9, "recache_frames": 12} | section)
        assert config_lib.generating(config).window.cache_frames == frames
    unrouted = config_lib.override(config, ["--config.rollout.explore=init_noise"])
    for alone in (config_lib.generating(config), unrouted):
        run = bare_run(alone, sharding.make_mesh(1, 1, 1, 1))
        assert run.programs.blank(1).frame.shape == (1, 12)


def test_a_rollout_is_a_function_of_its_arguments(world, rolled):
    chex.assert_trees_all_equal(world.roll(5, world.draw(5)), rolled)


# ---------------------------------------------------------------- causality


def test_future_blocks_do_not_change_the_past(world):
    short, long = (world.generate(blocks)[0] for blocks in (5, BLOCKS))
    chex.assert_trees_all_equal(short, long[:5])


def test_future_noise_does_not_change_the_past(world):
    """One block more with this noise and with that: other latents, and every key and value before
    it as it was.
    """

    def one_more(key):
        _, history = world.generate(5)
        return world.run.programs.shared_block(world.variables, world.text, 1, history, key, 15)

    before = world.generate(5)[1]
    asked = jnp.broadcast_to(jnp.arange(15), (PROMPTS, 1, 15))
    past = read(asked, before)
    (x, history), (other, other_history) = one_more(world.key), one_more(noise_key(8))
    assert differs(x, other)
    for cache in (history, other_history):
        np.testing.assert_array_equal(cache.frame[:, 15:18], [[15, 16, 17]] * PROMPTS)
        found = read(asked, cache)
        chex.assert_trees_all_equal((found.k, found.v, found.frame), (past.k, past.v, past.frame))


# ---------------------------------------------------------------- what is routed


def read_velocity(world: World, x, level, rows, frame: int, history, page=None):
    """Velocities and keys of blocks float[P, G, F, Y, X, C] from the network itself, under rows
    int32[P, G, A].
    """
    context = read(rows, history, page)
    segment = config_lib.segment_of(frame, world.config.video.switch_frames)
    text = block.per_trajectory(jax.tree.map(lambda t: t[:, :, segment], world.text), x.shape[1])
    batch = context.frame.shape[0]
    arguments = (
        x.reshape(batch, *x.shape[2:]),
        jnp.full(batch, level),
        text,
        context,
        jnp.full(batch, frame),
    )
    velocity, kv = network(wan_config(world.config), world.variables, *arguments)
    return velocity.reshape(x.shape), kv


def test_only_the_first_steps_are_routed(world, rolled):
    window, replay = routing.window(world.config.window), rolled.replay
    sigma = world.config.sampler.steps
    # All start from one noise and part at the first step.
    np.testing.assert_array_equal(replay.z[:, 1:, 0, 0], replay.z[:, :-1, 0, 0])
    assert all(
        differs(replay.z[:, g, 0, 1], replay.z[:, h, 0, 1])
        for g in range(BRANCHES)
        for h in range(g)
    )
    routed = routing.routed_context(window, world.draw(5), 15)
    default = jnp.broadcast_to(routing.deployment_frames(window, 15), routed.shape)
    for step in range(STEPS):
        own, other = (
            (routed, default) if step < world.config.rollout.perturbed_steps else (default, routed)
        )
        z, u = replay.z[:, :, 0, step], replay.u[:, :, 0, step]
        velocity, _ = read_velocity(world, z, sigma[step], own, 15, replay.history)
        np.testing.assert_allclose(velocity, u, atol=1e-5, rtol=0)
        velocity, _ = read_velocity(world, z, sigma[step], other, 15, replay.history)
        assert differs(velocity, u)


def test_after_the_window_branches_read_their_own_frames_under_the_default_window(world):
    """The block after a window of one, from the keys of the branch's own clean latents, written
    unrouted.
    """
    out = world.with_fields(rollout__window_blocks=1, replay__blocks=2).roll(5, world.draw(5))
    window, replay = routing.window(world.config.window), out.replay
    assert replay.z.shape[:4] == (PROMPTS, BRANCHES, 2, STEPS)

    def rows(frame):
        return jnp.broadcast_to(
            routing.deployment_frames(window, frame), (PROMPTS, BRANCHES, window.slots)
        )

    _, kv = read_velocity(world, out.branches[:, :, 15:18], 0.0, rows(15), 15, replay.history)
    blank = replay.page.replace(frame=jnp.full_like(replay.page.frame, -1))
    page = kv_cache.append(kv_cache.repeat(blank, BRANCHES), kv, 15)
    for step, sigma in enumerate(world.config.sampler.steps):
        velocity, _ = read_velocity(
            world, replay.z[:, :, 1, step], sigma, rows(18), 18, replay.history, page
        )
        np.testing.assert_allclose(velocity, replay.u[:, :, 1, step], atol=1e-5, rtol=0)


def test_draws_differ_by_prompt_and_branch(world):
    routed_frames = np.asarray(world.draw(9))
    assert routed_frames.shape == (PROMPTS, BRANCHES, 6)
    assert len({tuple(draw) for draw in routed_frames.reshape(-1, 6)}) == PROMPTS * BRANCHES
    # A prompt's draws are of its number, not of its place in the batch.
    swapped = world.run.programs.draw(jax.random.key(0), jnp.array([1, 0]), 27)
    np.testing.assert_array_equal(swapped, routed_frames[::-1])


# ---------------------------------------------------------------- what is recorded


def test_what_is_left_for_the_replay(world, rolled):
    replay = rolled.replay
    assert rolled.branches.shape == (PROMPTS, BRANCHES, BLOCKS * FRAMES, 4, 2, 2)
    assert rolled.anchor.shape == (PROMPTS, BLOCKS * FRAMES, 4, 2, 2)
    assert replay.z.shape == replay.u.shape == (PROMPTS, BRANCHES, 3, STEPS, FRAMES, 4, 2, 2)
    np.testing.assert_array_equal(replay.start_frame, [15, 18, 21])
    np.testing.assert_array_equal(replay.segment, [1, 1, 1])
    np.testing.assert_array_equal(replay.frames[1], [0, 1, 2, *range(9, 18)])
    # The history as at the fork, and what the anchor wrote before the last block of the window.
    np.testing.assert_array_equal(
        np.sort(replay.history.frame, axis=1), [[-1] * 21 + list(range(15))] * PROMPTS
    )
    np.testing.assert_array_equal(
        np.sort(replay.page.frame, axis=1), [[-1] * 9 + list(range(15, 21))] * PROMPTS
    )


def test_states_follow_the_solver_and_end_in_the_video(world, rolled):
    z, u = rolled.replay.z, rolled.replay.u
    clean = rolled.branches[:, :, 15:24].reshape(PROMPTS, BRANCHES, 3, 1, FRAMES, 4, 2, 2)
    drop = np.diff([*world.config.sampler.steps, 0.0]).reshape(STEPS, 1, 1, 1, 1).astype(np.float32)
    np.testing.assert_allclose(
        z + drop * u, np.concatenate([z[:, :, :, 1:], clean], axis=3), atol=1e-6, rtol=0
    )


def test_noise_is_of_seed_prompt_and_frame(world, rolled):
    shape = (STEPS + 1, FRAMES, 4, 2, 2)
    noise = keys.block_noise(world.key, 18, shape)
    np.testing.assert_array_equal(
        rolled.replay.z[:, :, 1, 0], against(rolled.replay.z[:, :, 1, 0], noise[:, 0])
    )
    np.testing.assert_array_equal(rolled.replay.noise[:, 1], noise[:, -1])
    np.testing.assert_array_equal(keys.block_noise(noise_key(7, 1), 18, shape)[0], noise[0])
    # Another prompt, frame and seed.
    for other in (
        noise[1],
        *(keys.block_noise(*of, shape)[0] for of in ((world.key, 21), (noise_key(8), 18))),
    ):
        assert abs(np.corrcoef(np.ravel(noise[0]), np.ravel(other))[0, 1]) < 0.2


def test_streams_do_not_meet():
    drawn = [
        keys.draw_key(seed, name, step)
        for seed in (0, 1)
        for name in keys.STREAMS
        for step in range(3)
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in drawn}) == len(drawn) == 48
    assert keys.draw_key(0, "noise", 2) == keys.draw_key(0, "noise", 2)


# ---------------------------------------------------------------- prompt switches


def test_segment_of_by_hand():
    assert [config_lib.segment_of(frame, (12, 24)) for frame in (0, 11, 12, 23, 24, 35)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_a_switch_concerns_the_prompts_that_change(world):
    switched = np.concatenate(world.generate()[0], axis=1)
    plain = np.concatenate(world.with_fields(video__switch_frames=()).generate()[0], axis=1)
    # Prompt 1 says the same in every segment: its cache is kept, and the video bit for bit.
    np.testing.assert_array_equal(switched[1], plain[1])
    np.testing.assert_array_equal(switched[0, :12], plain[0, :12])
    assert differs(switched[0, 12:15], plain[0, 12:15])


@pytest.mark.parametrize(
    ("start", "old", "keys"), [(0, [], 5), (1, [0], 4), (2, [0, 1], 3), (3, [0, 1, 2], 2)]
)
def test_recached_frames_read_the_whole_sink(start, old, keys):
    """Of five frames by one: what lies before them is read from the history, the rest of it is made
    anew with them; besides it the youngest two are keys.
    """
    shape = kv_cache.KVShape(1, 1, 1, 2)
    history = kv_cache.empty(shape, (1,), 12, 3, jnp.float32)
    for frame in range(start + 5):
        kv = BlockKV(*2 * (jnp.full((1, 1, 1, 1, 1, 2), float(frame)),))
        history = kv_cache.append(history, kv, frame)
    seen = {}

    def network(x, sigma, text, context, start_frame, own_keys):
        seen.update(context=context, own=own_keys)
        return x, None

    latents, text = jnp.zeros((1, 1, 5, 1, 1, 2)), jnp.zeros((1, 1, 1))
    block.recache(network, text, history, None, latents, jnp.asarray(start))
    assert sorted(int(f) for f in seen["context"].frame.ravel() if f >= 0) == old
    assert int(seen["own"].sum()) == keys


@pytest.mark.parametrize("blocks, sink", [(4, False), (8, True)])
def test_recache_at_a_switch(world, blocks, sink):
    """Keys and values of the last 12 frames under the new prompt; of the prompt that does not
    change, as they were.

    At frame 12 the sink lies within the recached frames and is made anew, and all of them are keys.
    Later they read the old sink, and of themselves the last nine.
    """
    stop, segment = blocks * FRAMES, blocks // 4
    frames = np.arange(stop - 12, stop)
    latents, _ = world.generate(blocks)
    # The history just before the switch: the config of this run has no switch at this frame.
    before = tuple(frame for frame in SWITCHES if frame != stop)
    _, old = world.with_fields(video__switch_frames=before).generate(blocks)
    _, new = world.generate(blocks)

    clean = jnp.concatenate(latents[-4:], axis=1)
    row = jnp.array([[0, 1, 2]] if sink else [[-1, -1, -1]])
    context = read(jnp.broadcast_to(row, (PROMPTS, 1, 3)), old)
    own_keys = jnp.arange(12) >= (3 if sink else 0)
    text = jax.tree.map(lambda t: t[:, :, segment], world.text)
    arguments = (clean, jnp.zeros(PROMPTS), text, context, jnp.full(PROMPTS, stop - 12))
    _, expected = network(wan_config(world.config), world.variables, *arguments, own_keys=own_keys)
    asked = jnp.broadcast_to(jnp.arange(stop), (PROMPTS, 1, stop))
    ours, kept = read(asked, new), read(asked, old)
    np.testing.assert_array_equal(ours.frame, kept.frame)
    for name in ("k", "v"):
        ours_, kept_, expected_ = (
            np.asarray(getattr(tree, name)) for tree in (ours, kept, expected)
        )
        np.testing.assert_array_equal(ours_[:, 1], kept_[:, 1])
        np.testing.assert_array_equal(ours_[:, 0, : stop - 12], kept_[:, 0, : stop - 12])
        np.testing.assert_allclose(ours_[:, 0, frames], expected_[:, 0], atol=1e-5, rtol=0)
        assert differs(ours_[1, 0, frames], kept_[1, 0, frames])


def test_the_branches_switch_as_well(world, rolled):
    """A new prompt at frame 24 changes every branch of its prompt from there on, and no other."""
    embeddings = world.batch.embeddings.copy()
    embeddings[0, 2] = embeddings[0, 1]
    batch = world.batch.replace(embeddings=embeddings)
    other = dataclasses.replace(world, batch=batch).roll(5, world.draw(5))
    np.testing.assert_array_equal(other.branches[:, :, :24], rolled.branches[:, :, :24])
    np.testing.assert_array_equal(other.branches[1], rolled.branches[1])
    for g in range(BRANCHES):
        assert differs(other.branches[0, g, 24:27], rolled.branches[0, g, 24:27])


def test_a_prompt_that_does_not_change_keeps_its_cache(world):
    """`changed` alone decides: with the text of another prompt, but not marked as changed, nothing
    is made anew.
    """
    blocks, history = world.generate(4)
    before, latents = jax.tree.map(np.array, history), jnp.concatenate(blocks, axis=1)
    after = world.run.programs.shared_recache(
        world.variables, world.text, 2, np.array([False, True]), history, latents, 0
    )
    np.testing.assert_array_equal(after.frame, before.frame)
    for ours, theirs in ((after.k, before.k), (after.v, before.v)):
        np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
        assert differs(ours[:, 1], theirs[:, 1])


# ---------------------------------------------------------------- what else branches may explore

EXPLORING = {
    "rollout__window_blocks": 1,
    "replay__blocks": 2,
    "video__blocks": 7,
    "video__switch_frames": (12,),
}
BLOCK_SHAPE = (STEPS + 1, FRAMES, 4, 2, 2)


def exploring(explore: str, **fields) -> tuple[World, Rollout]:
    """A rollout from pivot 5 whose branches explore in the pivot alone; two blocks are recorded."""
    world = make_world(make_config(rollout__explore=explore, **EXPLORING, **fields))
    return world, world.roll(5, world.draw(5))


def own_noise(world: World, block: int) -> jax.Array:
    return keys.own_noise(world.key, np.arange(BRANCHES), block * FRAMES, BLOCK_SHAPE)


@pytest.mark.parametrize("mix", ["preserving", "additive"])
def test_branches_with_initial_noise_of_their_own(mix):
    """They begin the pivot with it, follow the solver, and share the noise of the next block."""
    world, out = exploring("init_noise", rollout__noise_mix=mix, rollout__noise_scale=0.6)
    shared, own = keys.block_noise(world.key, 15, BLOCK_SHAPE)[:, None], own_noise(world, 5)
    kept = 0.8 if mix == "preserving" else 1.0
    z, u = out.replay.z, out.replay.u
    np.testing.assert_allclose(
        z[:, :, 0, 0], kept * shared[:, :, 0] + 0.6 * own[:, :, 0], atol=1e-6
    )
    np.testing.assert_allclose(z[:, :, 0, 1], z[:, :, 0, 0] - 0.25 * u[:, :, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(z[:, 1:, 1, 0], z[:, :-1, 1, 0])
    assert differs(out.branches[:, :, 18:21], against(out.branches, out.anchor)[:, :, 18:21])
    # Nothing is routed, and the anchor is what the generator makes.
    assert out.routed_frames.shape == (PROMPTS, BRANCHES, 0)
    window = routing.window(world.config.window)
    frames = routing.deployment_frames(window, 15)
    rows = jnp.broadcast_to(frames, (PROMPTS, BRANCHES, window.slots))
    velocity, _ = read_velocity(world, z[:, :, 0, 1], 0.75, rows, 15, out.replay.history)
    np.testing.assert_allclose(velocity, u[:, :, 0, 1], atol=1e-5)
    video = np.concatenate(world.generate(7)[0], axis=1)
    np.testing.assert_allclose(out.anchor, video, atol=1e-5, rtol=0)


def test_own_noise_is_of_the_branch_and_unlike_the_shared():
    """Whichever branches are rolled out together; it is standard normal."""
    key, shape = noise_key(3), (64,)
    noise = np.asarray(keys.own_noise(key, np.arange(4), 15, shape))
    later = keys.own_noise(key.replace(first=np.int32(2)), np.arange(2), 15, shape)
    np.testing.assert_array_equal(later, noise[:, 2:])
    drawn = [*noise.reshape(-1, 64), *np.asarray(keys.block_noise(key, 15, shape))]
    drawn += [*np.asarray(keys.own_noise(key, np.arange(1), 18, shape))[:, 0]]
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.45
    assert abs(np.std(noise) - 1) < 0.1


def test_every_prompt_draws_steps_of_its_own():
    """In order, none of them twice, each as often as the others, however prompts are batched."""
    key = noise_key(3).replace(prompts=np.arange(300))
    steps = np.asarray(keys.drawn_steps(key, 2, 4))
    assert steps.shape == (300, 2) and np.all(steps[:, 0] < steps[:, 1])
    counts = np.bincount(steps.ravel(), minlength=4)
    assert counts.size == 4 and np.all(np.abs(counts - 150) < 40)
    few = keys.drawn_steps(key.replace(prompts=np.arange(7, 9)), 2, 4)
    np.testing.assert_array_equal(few, steps[7:9])
    np.testing.assert_array_equal(keys.drawn_steps(key, 4, 4)[0], np.arange(4))


def test_drawn_transitions_of_full_strength_are_the_renoise_solver():
    """Branches that draw every step but the last with eta = 1; what they add is their own. With the
    noise that they share it would be the anchor, bit for bit.
    """
    world, out = exploring("transition", sampler__solver="renoise", rollout__stochasticity=1.0)
    z, u, sigma = out.replay.z[:, :, 0], out.replay.u[:, :, 0], (*STEP_LEVELS, 0.0)
    shared, own = keys.block_noise(world.key, 15, BLOCK_SHAPE)[:, None], own_noise(world, 5)
    np.testing.assert_array_equal(z[:, 1:, 0], z[:, :-1, 0])  # one initial latent
    for s in range(STEPS - 1):
        clean = z[:, :, s] - sigma[s] * u[:, :, s]
        expected = (1 - sigma[s + 1]) * clean + sigma[s + 1] * own[:, :, s + 1]
        np.testing.assert_allclose(z[:, :, s + 1], expected, atol=1e-5)
    np.testing.assert_allclose(
        out.branches[:, :, 15:18], z[:, :, -1] - sigma[STEPS - 1] * u[:, :, -1], atol=1e-5
    )
    # The next block is nobody's own: the solver's, with the shared noise.
    z, u = out.replay.z[:, :, 1], out.replay.u[:, :, 1]
    shared = keys.block_noise(world.key, 18, BLOCK_SHAPE)[:, None]
    expected = (1 - sigma[1]) * (z[:, :, 0] - u[:, :, 0]) + sigma[1] * shared[:, :, 1]
    np.testing.assert_allclose(z[:, :, 1], expected, atol=1e-5)


def test_drawn_steps_with_the_shared_noise_are_the_solver_bit_for_bit(monkeypatch):
    """eta = 1 in a compiled rollout: branches whose own noise is the shared are the anchor. The
    noise has few digits, so that it is the same wherever it is made.
    """
    block_noise = keys.block_noise

    def shared(key, frame, shape):
        return jnp.round(8 * block_noise(key, frame, shape)) / 8

    def own(key, branches, frame, shape):
        return jnp.repeat(shared(key, frame, shape)[:, None], len(branches), axis=1)

    monkeypatch.setattr(keys, "block_noise", shared)
    monkeypatch.setattr(keys, "own_noise", own)
    _, out = exploring("transition", sampler__solver="renoise", rollout__stochasticity=1.0)
    np.testing.assert_array_equal(out.branches, against(out.branches, out.anchor))


def test_branches_that_explore_nothing_are_the_anchor():
    _, out = exploring("none")
    np.testing.assert_array_equal(out.branches, against(out.branches, out.anchor))


# ---------------------------------------------------------------- no block that nobody reads


@pytest.mark.parametrize("blocks", [8, 10])
def test_what_is_made_does_not_depend_on_where_it_ends(world, rolled, blocks):
    """Pivot 5 replays blocks 5 to 7. The rest is 0, in arrays of one shape for all ends."""
    short = rollout.rollout(
        world.run, world.variables, world.batch, world.key, world.draw(5), 5, blocks
    )
    made = blocks * FRAMES
    chex.assert_trees_all_equal(short.replay, rolled.replay)
    for ours, theirs in ((short.branches, rolled.branches), (short.anchor, rolled.anchor)):
        assert ours.shape == theirs.shape
        ours, theirs = np.moveaxis(ours, -4, 0), np.moveaxis(theirs, -4, 0)
        np.testing.assert_array_equal(ours[:made], theirs[:made])
        assert np.all(ours[made:] == 0) and np.all(np.any(theirs[made:], axis=(1, 2, 3, 4)))


def test_blocks_are_made_up_to_the_last_that_is_read():
    """LongLive's last clip ends with pixel 530, in latent frame 133 of block 44. A window of 5
    blocks from block 41 on is later.
    """
    config, to_pixel = longlive(), composite.latent_to_pixel
    clips = backbone.windows_read(config, to_pixel)
    assert clips == ((58, 94), (207, 243), (351, 387), (495, 531))
    assert backbone.windows_read(config, to_pixel, whole=True) == (*clips, (0, 585))
    assert backbone.blocks_read(config, to_pixel, clips) == 45
    assert backbone.blocks_read(config, to_pixel, [(0, 585)]) == 49
    assert backbone.blocks_read(config, to_pixel, [(0, 1)]) == 1
    assert backbone.blocks_read(config, to_pixel, ()) == 0
    anchored = longlive("objective.advantage=anchor")
    assert backbone.windows_read(anchored, to_pixel, 41)[4:] == ((489, 549),)


# ---------------------------------------------------------------- compile once


def test_nothing_compiles_twice(world):
    """Over all pivots, window lengths and draws."""
    jax.clear_caches()  # of what other tests have rolled out
    for pivot in routing.eligible_pivots(
        routing.window(world.config.window), BLOCKS, FRAMES, SWITCHES, BRANCHES, 1, 1
    ):
        for window_blocks in (1, 3):
            if pivot + window_blocks <= BLOCKS:
                world.with_fields(rollout__window_blocks=window_blocks).roll(
                    pivot, world.draw(pivot, seed=pivot)
                )
    others = ("err", "judge", "replay", "accumulate", "apply", "follow", "group_means")
    others += ("pixel_std", "appearance", "self_similarity", "all_finite")
    others += ("keep",)  # of a longer history than this
    expected = {f.name: int(f.name not in others) for f in dataclasses.fields(programs.Programs)}
    expected["record"] = 2  # one for each number of replayed blocks, of which a run has one
    assert world.run.programs.compilations() == expected


# ---------------------------------------------------------------- pivots


def longlive(*fields: str) -> ml_collections.ConfigDict:
    spec = config_lib.load("configs/longlive.py")
    return config_lib.override(spec, [f"--config.{field}" for field in fields])


def test_a_pivot_leaves_enough_of_what_is_scored_behind_it():
    """Of LongLive's 144 scored frames the last clip, [495, 531), has 36. Block 42 begins at pixel
    1 + 4 * 125 = 501, where 30 are left; block 44, the last with five to perturb, at 525 with 6.
    """
    to_pixel = composite.latent_to_pixel
    assert run_lib.eligible_pivots(longlive(), to_pixel)[-1] == 41
    assert run_lib.eligible_pivots(longlive("reward.min_behind=0.2"), to_pixel)[-1] == 42
    assert run_lib.eligible_pivots(longlive("reward.min_behind=0"), to_pixel)[-1] == 44


def test_one_long_prompt_is_scored_to_its_end():
    """585 frames are four clips, as far apart as those of four prompts; with one clip in the middle
    half of the pivots would have nothing to change.
    """
    to_pixel = composite.latent_to_pixel
    one = longlive("video.switch_frames=()")
    assert run_lib.eligible_pivots(one, to_pixel) == tuple(range(5, 42))
    single = longlive("video.switch_frames=()", "reward.clip_spacing=0")
    assert run_lib.eligible_pivots(single, to_pixel)[-1] == 25  # pixel 297; the clip is [274, 310)


def test_no_pivot_is_an_error_that_says_what_to_change():
    changes = "video.blocks.*rollout.window_blocks.*video.switch_frames"
    with pytest.raises(UsageError, match=changes):
        run_lib.eligible_pivots(longlive("rollout.window_blocks=45"), int)
    whole = longlive("reward.clip_frames=0", "reward.min_behind=0.95")  # 528 of 585 are behind 5
    with pytest.raises(UsageError, match=r"reward.min_behind=0.95 .* block 5.* 0.90"):
        run_lib.eligible_pivots(whole, composite.latent_to_pixel)


# ---------------------------------------------------------------- the release


def test_the_release_preset(world):
    """Renoise, routing in every pass, the cache-writing one included, dispersed draws, four
    recorded blocks.
    """
    release = make_world(make_config("configs/tiny.py:release", video__switch_frames=()))
    window = routing.window(release.config.window)
    assert run_lib.eligible_pivots(release.config, int) == (5, 6, 7, 8)
    routed_frames = release.draw(8)
    assert routed_frames.shape == (PROMPTS, BRANCHES, 5)
    out = release.roll(8, routed_frames)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out))
    assert out.replay.z.shape == (PROMPTS, BRANCHES, 4, STEPS, FRAMES, 4, 2, 2)
    np.testing.assert_array_equal(out.replay.frames[0], [0, 1, 2, *range(18, 24)])
    video = np.concatenate(release.generate()[0], axis=1)
    np.testing.assert_allclose(out.anchor, video, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(
        out.branches[:, :, :24], against(out.branches, out.anchor)[:, :, :24]
    )
    assert all(differs(out.branches[:, g, 24:27], out.anchor[:, 24:27]) for g in range(BRANCHES))

    # All steps are routed, and each adds the noise that the branches share.
    schedule = flow.schedule(release.config.sampler)
    rows = routing.routed_context(window, routed_frames, 24)
    noise = keys.block_noise(release.key, 24, (STEPS + 1, FRAMES, 4, 2, 2))
    for step in range(STEPS):
        z, u = out.replay.z[:, :, 0, step], out.replay.u[:, :, 0, step]
        velocity, _ = read_velocity(release, z, schedule.sigma[step], rows, 24, out.replay.history)
        np.testing.assert_allclose(velocity, u, atol=1e-5, rtol=0)
        clean = z - schedule.sigma[step] * u
        level = schedule.sigma[step + 1]
        mixed = (1 - level) * clean + level * noise[:, None, step + 1]
        if step < STEPS - 1:
            np.testing.assert_allclose(mixed, out.replay.z[:, :, 0, step + 1], atol=2e-6, rtol=0)
        else:
            np.testing.assert_allclose(clean, out.branches[:, :, 24:27], atol=2e-6, rtol=0)

    # The keys of the noised latent, told that it is clean, written while it is routed: the next
    # block reads them.
    _, kv = read_velocity(release, mixed, 0.0, rows, 24, out.replay.history)
    blank = out.replay.page.replace(frame=jnp.full_like(out.replay.page.frame, -1))
    page = kv_cache.append(kv_cache.repeat(blank, BRANCHES), kv, 24)
    rows = routing.routed_context(window, routed_frames, 27)
    velocity, _ = read_velocity(
        release, out.replay.z[:, :, 1, 0], schedule.sigma[0], rows, 27, out.replay.history, page
    )
    np.testing.assert_allclose(velocity, out.replay.u[:, :, 1, 0], atol=1e-5, rtol=0)

    one_block = release.with_fields(rollout__window_blocks=1).roll(8, identity(8, window))
    np.testing.assert_array_equal(one_block.branches, against(one_block.branches, one_block.anchor))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": {"recache_frames": 10}}, "window.recache_frames=10 is not a multiple of 3"),
        ({"video": {"switch_frames": (13,)}}, r"video.switch_frames=\(13,\)"),
        (
            {"video": {"switch_frames": (9,)}},
            r"video.switch_frames=\(9,\).*window.recache_frames=12",
        ),
        ({"video": {"switch_frames": (12, 36)}}, r"\(12, 36\): expected .* between 0 and 36"),
        ({"rollout": {"draw": "shifted"}}, "rollout.draw='shifted' is .*independent, dispersed"),
        ({"sampler": {"solver": "heun"}}, "sampler.solver='heun' is not one of euler, renoise"),
        ({"window": {"near": 9}}, "config.window: near=9"),
    ],
)
def test_a_layout_that_cannot_be_rolled_out_is_an_error_that_names_the_field(fields, message):
    config = make_config()
    with config.unlocked():
        for section, values in fields.items():
            config[section].update(values)
    with pytest.raises(UsageError, match=message):
        config_lib.check(config)
