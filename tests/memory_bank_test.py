"""The narrative bank with numbers that can be followed by hand, and inside a rollout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import bare_run, batch_of, configure
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import rollout
from kvpo_jax.algorithm import flow, keys, kv_cache, memory_bank, replay, routing
from kvpo_jax.models.wan import Wan, init_variables
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import BlockKV, TextKV

SLOTS, FRAMES, INTERVAL = 3, 3, 3


def cache(batch=(1,)):
    shape = kv_cache.KVShape(layers=2, tokens=1, heads=1, head_dim=1)
    return kv_cache.empty(shape, batch, 8, 3, jnp.float32)


def text(value=1.0) -> TextKV:
    return TextKV(k=jnp.full((2, 1, 4, 1, 1), value), v=jnp.zeros((2, 1, 4, 1, 1)))


def block(value: float) -> BlockKV:
    """Keys and values of a block whose first frame has `value` on layer 0 and its opposite on layer
    1.
    """
    kv = jnp.stack([jnp.full((1, FRAMES, 1, 1, 1), value), jnp.full((1, FRAMES, 1, 1, 1), -value)])
    return BlockKV(k=kv, v=10 * kv)


def play(values, reinsert=False, prompt=1.0):
    """The frames in the bank of both layers before each block; block b's keys are values[b]."""
    bank, seen = memory_bank.empty(cache(), SLOTS, INTERVAL, reinsert), []
    for b, value in enumerate(values):
        bank = memory_bank.admit(bank, text(prompt))
        seen.append(np.asarray(bank.frame[:, 0]).tolist())
        bank = memory_bank.record(bank, block(value), jnp.asarray(b * FRAMES))
    return seen, bank


def test_every_third_block_leaves_its_first_frame_and_it_enters_at_the_next():
    seen, bank = play([1.0] * 8)
    one, two, three = [0, -1, -1], [0, 9, -1], [0, 9, 18]
    assert [frames[0] for frames in seen] == [[-1, -1, -1], one, one, one, two, two, two, three]
    np.testing.assert_array_equal(bank.recorded, 3)


def test_a_full_bank_keeps_what_the_prompt_looks_at_most_and_each_layer_chooses():
    # Frames 0, 9, 18 have keys 2, 1, 3 on layer 0 (and the opposite on layer 1); frame 27 makes one
    # of them go.
    values = [2.0, 0, 0, 1.0, 0, 0, 3.0, 0, 0, 5.0, 0, 0]
    seen, bank = play(values)
    assert seen[10] == [[18, 0, 27], [9, 0, 27]]
    assert seen[11] == seen[10]  # it enters once
    np.testing.assert_array_equal(bank.k[0, 0, :, 0, 0, 0], [3, 2, 5])
    np.testing.assert_array_equal(bank.v[1, 0, :, 0, 0, 0], [-10, -20, -50])
    # With the opposite prompt the layers change roles.
    assert play(values, prompt=-1.0)[0][10] == [[9, 0, 27], [18, 0, 27]]


def test_released_reinsertion_fills_the_bank_with_the_newest_frame():
    values = [2.0, 0, 0, 1.0, 0, 0, 3.0, 0, 0, 5.0, 0, 0]
    seen, _ = play([*values, 0.0], reinsert=True)
    assert [frames[0] for frames in seen[10:]] == [[18, 0, 27], [27, 18, 27], [27, 27, 27]]


def test_saliency_is_the_mean_product_over_text_heads_and_tokens():
    rng = np.random.default_rng(0)
    heads = kv_cache.empty(kv_cache.KVShape(2, 4, 2, 5), (3,), 8, 3, jnp.float32)
    bank = memory_bank.empty(heads, SLOTS, INTERVAL, reinsert=False)
    bank = bank.replace(k=jnp.asarray(rng.normal(size=bank.k.shape), jnp.float32))
    prompt = TextKV(
        k=jnp.asarray(rng.normal(size=(2, 3, 6, 2, 5)), jnp.float32), v=jnp.zeros((2, 3, 6, 2, 5))
    )
    theirs = np.einsum("lpkhd,lpsnhd->lpskhn", prompt.k, bank.k).mean((3, 4, 5)) / np.sqrt(5)
    np.testing.assert_allclose(memory_bank.saliency(bank, prompt), theirs, atol=1e-6)
    forked = memory_bank.saliency(memory_bank.repeat(bank, 2), prompt)
    np.testing.assert_allclose(forked, np.repeat(theirs[:, :, None], 2, axis=2), atol=1e-6)

    def of_own_heads(k, prompt):
        return memory_bank.saliency(bank.replace(k=k, heads_axis="context"), prompt)

    split = jax.shard_map(
        of_own_heads,
        mesh=Mesh(np.asarray(jax.devices()[:2]), "context"),
        in_specs=(Spec(None, None, None, None, "context"), Spec()),
        out_specs=Spec(),
    )
    np.testing.assert_allclose(split(bank.k, prompt), theirs, atol=1e-6)


@pytest.mark.parametrize("sparse", [0, 1, 2, 6])
def test_sparse_activation_picks_chunks_per_head(sparse):
    """Against a loop over heads that deletes the chunks a head leaves out."""
    cfg_all, cfg = (
        wan_config(
            config_lib.override(
                config_lib.load("configs/tiny.py"), [f"--config.model.sparse_memory={n}"]
            )
        )
        for n in (0, sparse)
    )
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(2, 5, cfg.num_heads, 3)), jnp.float32)
    past = jnp.asarray(rng.normal(size=(2, 7, 4, cfg.num_heads, 3)), jnp.float32)
    chunk = jnp.asarray([[True] * 5 + [False] * 2, [True] * 2 + [False] * 5])
    if not sparse:
        assert cfg == cfg_all
        return
    from kvpo_jax.models.wan import Block

    ours = Block(cfg)._activated(q, past, chunk)
    for row in range(2):
        for head in range(cfg.num_heads):
            score = np.asarray(past[row, :, :, head].mean(1) @ q[row, :, head].mean(0))
            candidates = [a for a in range(7) if chunk[row, a]]
            kept = set(sorted(candidates, key=lambda a: -score[a])[:sparse]) | set(range(7)) - set(
                candidates
            )
            wanted = np.repeat([a in kept for a in range(7)], 4)
            np.testing.assert_array_equal(ours[row, head], wanted)


def test_memflow_rollout_forks_its_bank_and_replays_it():
    """Identity routing is the anchor bit for bit; the replay under its banks is exact."""
    fields = {
        "window.bank": 3,
        "window.bank_interval": 1,
        "model.sparse_memory": 3,
        "model.num_layers": 2,
        "video.blocks": 8,
        "video.switch_frames": (12,),
        "rollout.branches": 2,
        "rollout.window_blocks": 1,
        "replay.blocks": 2,
    }
    config = configure("configs/tiny.py", fields)
    run = bare_run(config, sharding.make_mesh(1, 1, 2, 2))
    cfg = wan_config(config)
    like = jax.eval_shape(partial(init_variables, cfg), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), like)
    embeddings = rng.normal(size=(2, 2, cfg.text_len, cfg.text_dim)).astype(np.float32)
    text = run.programs.encode_text(variables, embeddings)
    identity = jnp.broadcast_to(jnp.arange(6, 12, dtype=jnp.int32), (2, 2, 6))
    noise = keys.NoiseKey(jax.random.key(3), jnp.arange(2))
    batch = batch_of(embeddings, np.ones((2, 2), bool))
    roll = partial(rollout.rollout, run, variables, batch, noise, pivot=5)
    # At pivot 5 the default local window is 6..14; three near frames stay.
    same = roll(routed_frames=identity)
    np.testing.assert_array_equal(same.branches, jnp.repeat(same.anchor[:, None], 2, axis=1))
    assert same.replay.page.bank.frame.shape == (cfg.num_layers, 2, 2, 3)
    other = roll(routed_frames=run.programs.draw(jax.random.key(1), jnp.arange(2), 15))
    assert not np.array_equal(other.branches[:, 0], other.branches[:, 1])

    setting = replay.Setting(config.replay, flow.schedule(config.sampler), settled_from=2)

    def policy(variables, _):
        return (partial(Wan(cfg).apply, variables), text)

    @jax.jit
    def replayed(tuples):
        """With the steps from the third on as those that need no gradient in the first block."""
        return replay.anchor_energies(policy, setting, {}, variables, tuples)

    def energies(tuples):
        return replayed(tuples)[0]

    np.testing.assert_allclose(energies(same.replay), 0, atol=1e-10)
    total, floor = replayed(other.replay)  # they read what the branches have read, banks too
    assert floor.max() < 1e-10 and total.min() > 1e-6
    page = same.replay.page
    page = page.replace(bank=jax.tree.map(jnp.zeros_like, page.bank))
    without = same.replay.replace(page=page)
    assert np.all(energies(without) > 1e-6)
    assert run.programs.compilations()["branch_block"] == 1
    assert routing.window(config.window).slots == 12
