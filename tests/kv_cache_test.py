"""The cache by hand: every key and value holds the number of its frame, so that a look-up can be
read off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.algorithm import kv_cache, memory_bank
from kvpo_jax.types import BlockKV

LAYERS, TOKENS, HEADS, HEAD_DIM = 2, 2, 1, 2
SLOTS, SINK = 7, 2  # a ring of 5
SHAPE = kv_cache.KVShape(LAYERS, TOKENS, HEADS, HEAD_DIM)

append, read = jax.jit(kv_cache.append), jax.jit(kv_cache.read)


def value(frame, mark=0.0):
    """What the key of a frame holds in these tests; `mark` tells writers apart. The value is its
    negative.
    """
    return 100.0 * frame + mark


def frames_kv(frames, batch: int, mark=0.0) -> BlockKV:
    """BlockKV of absolute frames for `batch` trajectories; i / 10 tells trajectories apart, l / 100
    layers.
    """
    base = value(np.asarray(frames, np.float32), mark)[None, None, :]
    base = base + 0.1 * np.arange(batch)[None, :, None] + 0.01 * np.arange(LAYERS)[:, None, None]
    k = np.broadcast_to(base[..., None, None, None], (*base.shape, TOKENS, HEADS, HEAD_DIM)).astype(
        np.float32
    )
    return BlockKV(k=k, v=-k)


def blank(*batch: int, slots=SLOTS):
    return kv_cache.empty(SHAPE, batch, slots, SINK, jnp.float32)


def filled(stop: int, *batch: int, block=2, mark=0.0):
    """A cache that frames 0 ... stop - 1 were appended to, block by block."""
    cache = blank(*batch)
    for start in range(0, stop, block):
        new = frames_kv(range(start, min(start + block, stop)), int(np.prod(batch)), mark)
        cache = append(cache, new, start)
    return cache


def snapshot(cache):
    return jax.tree.map(lambda x: np.array(x), cache)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- slots and eviction


def test_slot_of_by_hand():
    # Two sink slots, then a ring of five that begins anew at frames 7 and 12.
    frames = jnp.arange(13)
    np.testing.assert_array_equal(
        kv_cache.slot_of(blank(1), frames), [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 2]
    )


def test_a_cache_without_a_ring_is_an_error():
    with pytest.raises(ValueError, match="2 frames cannot hold a sink of 2"):
        blank(1, slots=SINK)


@pytest.mark.parametrize(
    "stop, resident",
    [
        (0, []),
        (2, [0, 1]),
        (6, [0, 1, 2, 3, 4, 5]),
        (8, [0, 1, 3, 4, 5, 6, 7]),
        (12, [0, 1, 7, 8, 9, 10, 11]),
        (20, [0, 1, 15, 16, 17, 18, 19]),
    ],
)
def test_the_oldest_are_evicted_and_the_sink_never(stop, resident):
    cache = filled(stop, 3)
    for frame, slot in zip(cache.frame[0], range(SLOTS), strict=True):
        assert frame == -1 or kv_cache.slot_of(cache, frame) == slot
    np.testing.assert_array_equal(np.sort(cache.frame[1][cache.frame[1] >= 0]), resident)


def test_append_writes_its_own_slots_only():
    cache = filled(8, 2)  # frames 0 1 | 7 3 4 5 6
    np.testing.assert_array_equal(cache.frame, [[0, 1, 7, 3, 4, 5, 6]] * 2)
    appended = append(cache, frames_kv([8, 9], 2, mark=0.5), 8)
    np.testing.assert_array_equal(appended.frame, [[0, 1, 7, 8, 9, 5, 6]] * 2)
    kept = np.array([0, 1, 2, 5, 6])
    np.testing.assert_array_equal(appended.k[:, :, kept], cache.k[:, :, kept])
    np.testing.assert_array_equal(appended.v[:, :, kept], cache.v[:, :, kept])
    np.testing.assert_array_equal(appended.k[:, :, 3:5], frames_kv([8, 9], 2, mark=0.5).k)
    np.testing.assert_array_equal(appended.v[:, :, 3:5], frames_kv([8, 9], 2, mark=0.5).v)


def test_writing_frames_again_replaces_them():
    """What the recache at a prompt switch relies on, the sink included."""
    cache = append(filled(6, 1), frames_kv(range(6), 1, mark=0.5), 0)
    np.testing.assert_array_equal(cache.frame, [[0, 1, 2, 3, 4, 5, -1]])
    np.testing.assert_array_equal(cache.k[:, :, :6], frames_kv(range(6), 1, mark=0.5).k)


def test_a_traced_start_is_as_good_as_a_number():
    cache, new = filled(8, 2), frames_kv([8, 9], 2)
    assert_equal(append(cache, new, 8), kv_cache.append(cache, new, 8))


def test_the_old_cache_is_unchanged():
    cache = filled(8, 2)
    before = snapshot(cache)
    appended = append(cache, frames_kv([8, 9], 2), 8)
    assert not np.array_equal(appended.k, before.k)
    assert_equal(cache, before)


def test_frames_that_are_kept_outlive_the_ring():
    """Two sink slots, a ring of three, and four slots for the frames that each prompt names."""
    frames = jnp.array([[3, 3, 9, -1], [5, 2, 6, 0]])
    cache = kv_cache.empty(SHAPE, (2,), SINK + 3 + 4, SINK, jnp.float32, kept=4)
    cache = kv_cache.keep(cache, frames.reshape(2, 2, 2))
    for start in range(0, 14, 2):
        cache = append(cache, frames_kv([start, start + 1], 2), start)
    # The second 3 and a frame of the sink are not there twice: -2 - f still waits for frame f.
    expected = [[0, 1, 11, 12, 13, 3, -5, 9, -1], [0, 1, 11, 12, 13, 5, 2, 6, -2]]
    np.testing.assert_array_equal(cache.frame, expected)
    asked = jnp.array([[[0, 3, 9, 11, 2]], [[0, 3, 6, 13, 2]]])
    context = read(asked, cache)
    np.testing.assert_array_equal(context.frame, [[0, 3, 9, 11, -1], [0, -1, 6, 13, 2]])
    keys = context.k[0, :, :, 0, 0, 0]
    np.testing.assert_allclose(keys[0, :4], [0, 300, 900, 1100], rtol=1e-6)
    np.testing.assert_allclose(keys[1, 2:], [600.1, 1300.1, 200.1], rtol=1e-6)
    again = append(cache, frames_kv([2, 3, 4], 2, mark=0.5), 2)  # made anew, each in its own slot
    np.testing.assert_array_equal(again.frame[:, 5:], cache.frame[:, 5:])
    np.testing.assert_allclose(again.k[0, :, (5, 6), 0, 0, 0], [[300.5, 500.1], [0, 200.6]])


def test_a_history_that_keeps_none_is_as_it_was():
    cache = blank(1)
    assert_equal(kv_cache.keep(cache, jnp.array([[[4, 5]]])), cache)


# ---------------------------------------------------------------- positions


def test_positions_in_a_window_by_hand():
    """A sink of 3, nine local frames and a block of 3, as long as the video is that short."""
    frames = jnp.array([[0, 1, 2, 3, 11, 12], [0, 2, 18, 26, 9, -1]])
    np.testing.assert_array_equal(
        kv_cache.positions(frames, jnp.array([15, 30]), 3, 15),
        # Of the block 27 ... 29, at 12 ... 14, the local frames 18 ... 26 stand at 3 ... 11, right
        # behind the sink; frame 9, of a bank, stands where the oldest of them does.
        [[0, 1, 2, 3, 11, 12], [0, 2, 3, 11, 3, 0]],
    )


def test_each_layer_of_a_bank_says_which_frames_it_holds():
    bank = memory_bank.empty(blank(1), 2, 3, False)
    cache = filled(8, 1).replace(bank=bank.replace(frame=jnp.array([[[6, 3]], [[3, 6]]])))
    context = read(jnp.array([[[0, 7, -1]]]), cache).valid_first()
    np.testing.assert_array_equal(context.frames(0), [[6, 3, 0, 7, -1]])
    np.testing.assert_array_equal(context.frames(1), [[3, 6, 0, 7, -1]])


# ---------------------------------------------------------------- reading


def test_read_by_absolute_frame():
    history = filled(8, 2)
    asked = jnp.array(
        [[[5, 0, 7], [1, 3, 4]], [[6, 6, 0], [7, 5, 3]]]
    )  # [P, T, A], any order, also twice
    context = read(asked, history)
    np.testing.assert_array_equal(context.frame, asked.reshape(4, 3))
    assert context.k.shape == context.v.shape == (LAYERS, 4, 3, TOKENS, HEADS, HEAD_DIM)
    prompt = np.array([0, 0, 1, 1])
    for layer in range(LAYERS):
        expected = value(asked.reshape(4, 3)) + 0.1 * prompt[:, None] + 0.01 * layer
        np.testing.assert_allclose(context.k[layer, :, :, 1, 0, 1], expected, rtol=1e-6)
        np.testing.assert_allclose(context.v[layer, :, :, 0, 0, 0], -expected, rtol=1e-6)


def test_what_is_not_resident_is_empty():
    history = filled(8, 1)  # frames 0 1 | 7 3 4 5 6
    # -1 is empty; 2 was evicted by 7, which has its slot; 8 and 12 are not there yet, though their
    # slots are taken.
    context = read(jnp.array([[[0, -1, 2, 7, 8, 12]]]), history)
    np.testing.assert_array_equal(context.frame, [[0, -1, -1, 7, -1, -1]])


def test_nothing_is_found_in_a_blank_cache():
    context = read(jnp.arange(-1, 6)[None, None], blank(1), blank(1, 1))
    np.testing.assert_array_equal(context.frame, np.full((1, 7), -1))


def test_the_page_comes_before_the_history():
    history = filled(8, 1)
    page = append(blank(1, 2), frames_kv([6, 7, 8], 2, mark=0.5), 6)
    asked = jnp.array([[[0, 5, 6, 7, 8, 2], [8, 7, 6, 5, 1, -1]]])
    context = read(asked, history, page)
    np.testing.assert_array_equal(context.frame, [[0, 5, 6, 7, 8, -1], [8, 7, 6, 5, 1, -1]])
    # Frames 6 and 7 are in both; each trajectory (0 and 0.1) reads its own.
    np.testing.assert_allclose(
        context.k[0, 0, :5, 0, 0, 0], [0, 500, 600.5, 700.5, 800.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        context.k[0, 1, :5, 0, 0, 0], [800.6, 700.6, 600.6, 500, 100], rtol=1e-6
    )
    np.testing.assert_allclose(
        context.v[1, 0, :5, 0, 0, 0], [-0.01, -500.01, -600.51, -700.51, -800.51], rtol=1e-6
    )


def test_a_page_of_other_size_than_the_history():
    history = filled(12, 1)  # frames 0 1 | 7 8 9 10 11
    page = append(blank(1, 1, slots=5), frames_kv([12, 13], 1, mark=0.5), 12)
    context = read(jnp.array([[[1, 9, 11, 12, 13]]]), history, page)
    np.testing.assert_array_equal(context.frame, [[1, 9, 11, 12, 13]])
    np.testing.assert_allclose(
        context.k[0, 0, :, 0, 0, 0], [100, 900, 1100, 1200.5, 1300.5], rtol=1e-6
    )


def test_reading_changes_nothing():
    history, page = filled(8, 1), append(blank(1, 2), frames_kv([8], 2), 8)
    before = snapshot((history, page))
    read(jnp.array([[[0, 8], [7, -1]]]), history, page)
    assert_equal((history, page), before)


def test_one_slice_per_trajectory():
    """P and T are told apart: every (prompt, trajectory) reads what it wrote."""
    page = filled(3, 2, 3)
    context = read(jnp.full((2, 3, 1), 2), blank(2), page)
    np.testing.assert_allclose(context.k[0, :, 0, 0, 0, 0], 200 + 0.1 * np.arange(6), rtol=1e-6)


# ---------------------------------------------------------------- histories and pages


def test_repeat_gives_every_trajectory_the_cache():
    cache = filled(8, 2)
    pages = kv_cache.repeat(cache, 3)
    assert pages.frame.shape == (2, 3, SLOTS) and pages.k.shape == (
        LAYERS,
        2,
        3,
        SLOTS,
        TOKENS,
        HEADS,
        HEAD_DIM,
    )
    assert pages.sink == cache.sink
    for index in range(3):
        assert_equal(kv_cache.trajectory(pages, index), cache)


def test_trajectory_is_the_inverse_of_writing_it():
    pages = filled(3, 2, 3)
    own = kv_cache.trajectory(pages, 1)
    assert own.frame.shape == (2, SLOTS) and own.sink == SINK
    # Trajectory 1 of prompts 0 and 1 is row 1 and row 4 of the batch that was appended.
    np.testing.assert_allclose(own.k[0, :, 2, 0, 0, 0], [200.1, 200.4], rtol=1e-6)
    frames = jnp.full((2, 1, 1), 2)
    found = read(frames, own)
    # As a history, as a page of its own, and as a page that the trajectories share.
    for other in (read(frames, blank(2), kv_cache.repeat(own, 1)), read(frames, blank(2), own)):
        for name in ("k", "v", "frame"):
            np.testing.assert_array_equal(getattr(other, name), getattr(found, name))


def test_the_cache_keeps_its_dtype():
    cache = kv_cache.empty(SHAPE, (1,), SLOTS, SINK, jnp.bfloat16)
    cache = append(cache, frames_kv([0], 1), 0)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16 and cache.frame.dtype == jnp.int32
