"""Rows and draws by hand, and the draws' distribution."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kvpo_jax.algorithm import routing
from kvpo_jax.runtime import config as config_lib

PAPER = routing.Window(sink=3, past=9, near=3, excluded=3, cache_frames=36)
RELEASE = routing.Window(sink=3, past=6, near=1, excluded=4, cache_frames=33, shared_ring=True)
BLOCK = 3


def row(*frames: int, slots: int = PAPER.slots) -> np.ndarray:
    """The frames, then -1 to the end."""
    return np.array([*frames, *[-1] * (slots - len(frames))])


# ---------------------------------------------------------------- the window


def test_windows_of_the_presets():
    assert routing.window(config_lib.load("configs/tiny.py").window) == PAPER
    assert routing.window(config_lib.load("configs/tiny.py:release").window) == RELEASE
    assert (PAPER.routed, PAPER.slots) == (6, 12)
    assert (RELEASE.routed, RELEASE.slots) == (5, 9)


@pytest.mark.parametrize(
    "fields", [{"near": 9}, {"near": -1}, {"excluded": 2}, {"cache_frames": 11}]
)
def test_a_window_that_cannot_be_is_an_error(fields):
    config = config_lib.load("configs/tiny.py")
    with config.unlocked():
        config.window.update(fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        routing.window(config.window)


# ---------------------------------------------------------------- deployment rows


@pytest.mark.parametrize(
    "start_frame, expected",
    [
        (0, row()),
        (3, row(0, 1, 2)),
        (6, row(0, 1, 2, 3, 4, 5)),
        (9, row(0, 1, 2, 3, 4, 5, 6, 7, 8)),
        (12, row(*range(12))),
        (15, row(0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14)),
        (30, row(0, 1, 2, *range(21, 30))),
    ],
)
def test_deployment_row_by_hand(start_frame, expected):
    ours = routing.deployment_frames(PAPER, start_frame)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == jnp.int32


@pytest.mark.parametrize(
    "start_frame, expected",
    [
        (0, row(slots=9)),
        (3, row(0, 1, 2, slots=9)),
        (6, row(0, 1, 2, 3, 4, 5, slots=9)),
        (9, row(*range(9), slots=9)),
        (12, row(0, 1, 2, 6, 7, 8, 9, 10, 11)),
        (15, row(0, 1, 2, 9, 10, 11, 12, 13, 14)),
    ],
)
def test_deployment_row_of_the_release(start_frame, expected):
    np.testing.assert_array_equal(routing.deployment_frames(RELEASE, start_frame), expected[:9])


def test_deployment_row_of_a_traced_start():
    np.testing.assert_array_equal(
        jax.jit(lambda frame: routing.deployment_frames(PAPER, frame))(15),
        routing.deployment_frames(PAPER, 15),
    )


# ---------------------------------------------------------------- routed rows


def test_routed_row_by_hand():
    # 15 past frames: the sink 0 1 2, six of 3 ... 11, the near frames 12 13 14.
    routed_frames = jnp.array([11, 3, 9, 4, 8, 5])
    np.testing.assert_array_equal(
        routing.routed_context(PAPER, routed_frames, 15), [0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14]
    )
    # In the next block of the window the draws stay, the near frames move on.
    np.testing.assert_array_equal(
        routing.routed_context(PAPER, routed_frames, 18), [0, 1, 2, 3, 4, 5, 8, 9, 11, 15, 16, 17]
    )


def test_routed_row_of_the_release_by_hand():
    # 15 past frames: five of 3 ... 10, then frame 14 alone; 11 12 13 can be in no row.
    routed_frames = jnp.array([3, 4, 6, 9, 10])
    np.testing.assert_array_equal(
        routing.routed_context(RELEASE, routed_frames, 15), [0, 1, 2, 3, 4, 6, 9, 10, 14]
    )


def test_the_draw_of_the_deployment_window_is_the_deployment_row():
    np.testing.assert_array_equal(
        routing.routed_context(PAPER, jnp.arange(6, 12), 15), routing.deployment_frames(PAPER, 15)
    )


def test_routed_rows_of_many_branches():
    routed_frames = routing.draw_independent(
        jax.random.key(0), PAPER, 10, 36, *routing.routable(PAPER, 21, 33)
    )
    rows = routing.routed_context(PAPER, routed_frames.reshape(2, 5, 6), 21)
    assert rows.shape == (2, 5, 12) and rows.dtype == jnp.int32
    for branch, ours in zip(routed_frames, rows.reshape(10, 12), strict=True):
        np.testing.assert_array_equal(ours, [0, 1, 2, *branch, 18, 19, 20])


# ---------------------------------------------------------------- the routable set


def test_omega_of_the_paper():
    start, stop = routing.routable(PAPER, 15, 27)
    # L = 15: {4, ..., 12} counted from 1
    assert list(range(int(start) + 1, int(stop) + 1)) == [4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    "window, fork, last_start, expected",
    [
        (PAPER, 12, 24, (3, 9)),
        (PAPER, 36, 48, (3, 33)),
        (PAPER, 42, 54, (9, 39)),  # 36 frames held: 0 1 2 and 9 ... 41; the fork freezes them
        (RELEASE, 15, 21, (3, 11)),
        (RELEASE, 36, 36, (6, 32)),  # 33 held: 0 1 2 and 6 ... 35
        (RELEASE, 36, 48, (18, 32)),  # and still held when block 48 is written
    ],
)
def test_routable_frames_by_hand(window, fork, last_start, expected):
    start, stop = routing.routable(window, fork, last_start)
    assert (int(start), int(stop)) == expected


# ---------------------------------------------------------------- draws


def draws(kind: str, window=PAPER, seed=0, branches=8, fork=15):
    start, stop = routing.routable(window, fork, fork)
    return np.asarray(routing.DRAWS[kind](jax.random.key(seed), window, branches, 36, start, stop))


@pytest.mark.parametrize("window, fork", [(PAPER, 15), (PAPER, 30), (RELEASE, 15), (RELEASE, 30)])
@pytest.mark.parametrize("kind", routing.DRAWS)
def test_draws_are_distinct_frames_of_omega(kind, window, fork):
    routed_frames = draws(kind, window, branches=40, fork=fork)
    assert routed_frames.shape == (40, window.routed) and routed_frames.dtype == np.int32
    assert np.all(np.diff(routed_frames, axis=1) > 0)  # ascending, hence distinct
    # Neither the sink nor the youngest frames.
    assert routed_frames.min() == window.sink and routed_frames.max() == fork - window.excluded - 1


@pytest.mark.parametrize("kind", routing.DRAWS)
def test_draws_are_a_function_of_the_key(kind):
    np.testing.assert_array_equal(draws(kind, seed=3), draws(kind, seed=3))
    assert not np.array_equal(draws(kind, seed=3), draws(kind, seed=4))


def test_branches_draw_differently():
    assert len({tuple(branch) for branch in draws("independent", fork=33)}) == 8


def test_the_bound_on_frames_does_not_matter():
    """The same set of draws is possible for any `frames` that holds the routable set."""
    start, stop = routing.routable(PAPER, 15, 15)
    routed_frames = routing.draw_independent(jax.random.key(0), PAPER, 1200, 12, start, stop)
    assert (int(routed_frames.min()), int(routed_frames.max())) == (3, 11)
    assert len({tuple(branch) for branch in np.asarray(routed_frames)}) == 84


def subsets_p_value(routed_frames: np.ndarray, pool: range) -> float:
    """p of the chi-square test that every subset of `pool` is equally often among the draws [n,
    routed].
    """
    subsets = itertools.combinations(pool, routed_frames.shape[1])
    cell = {subset: i for i, subset in enumerate(subsets)}
    counts = np.bincount([cell[tuple(branch)] for branch in routed_frames], minlength=len(cell))
    assert counts.sum() / len(cell) > 50
    return stats.chisquare(counts).pvalue


def test_independent_draws_are_uniform():
    """Over all 84 subsets of the 9 routable frames, which says more than that each frame is as
    frequent.
    """
    p = subsets_p_value(draws("independent", branches=8400), range(3, 12))
    assert 0.01 < p < 0.99


@pytest.mark.parametrize("branch", [0, 5])
def test_dispersed_draws_of_a_branch_are_uniform(branch):
    start, stop = routing.routable(PAPER, 15, 15)
    keys = jax.random.split(jax.random.key(1), 8400)

    def draw(key):
        return routing.draw_dispersed(key, PAPER, 8, 36, start, stop)[branch]

    routed_frames = jax.vmap(draw)(keys)
    assert 0.01 < subsets_p_value(np.asarray(routed_frames), range(3, 12)) < 0.99


def test_the_test_of_uniformity_sees_a_bias():
    """Draws that leave frame 11 out every tenth time."""
    routed_frames = draws("independent", branches=8400)
    biased = np.where(routed_frames == 11, np.int32(20), routed_frames)
    replacement = np.array([min(set(range(3, 12)) - set(branch)) for branch in routed_frames])
    every_tenth = np.arange(8400) % 10 == 0
    replaced = every_tenth[:, None] & (biased == 20)
    routed_frames = np.where(replaced, replacement[:, None], routed_frames)
    assert subsets_p_value(np.sort(routed_frames, axis=1), range(3, 12)) < 1e-6


def test_dispersed_draws_by_hand():
    # pool of 8, 4 branches: they begin at 0, 2, 4, 6 and go round
    permutation = jnp.array([10, 17, 12, 15, 11, 16, 14, 13])
    expected = [[10, 12, 17], [11, 12, 15], [11, 14, 16], [10, 13, 14]]
    np.testing.assert_array_equal(routing.disperse(permutation, 8, 3, 4), expected)
    # More branches than frames: they begin one after the other, and the ninth where the first did.
    many = routing.disperse(permutation, 8, 3, 9)
    np.testing.assert_array_equal(many[0], many[8])
    np.testing.assert_array_equal(many[1], [12, 15, 17])


def test_dispersed_draws_are_shifts_of_one_permutation():
    """Pool of 27, 8 branches, shift 3: neighbours share three of six frames, and the next ones
    none.
    """
    routed_frames = [set(branch) for branch in draws("dispersed", fork=33)]
    assert [len(routed_frames[g] & routed_frames[g + 1]) for g in range(7)] == [3] * 7
    assert [len(routed_frames[g] & routed_frames[g + 2]) for g in range(6)] == [0] * 6
    assert len(set.union(*routed_frames)) == 27


# ---------------------------------------------------------------- pivots


def test_pivots_without_switches():
    # From 15 past frames on (12 fill the window, but then there are as many routable frames as
    # slots to route), up to the last block at which three blocks are left of twelve.
    assert routing.eligible_pivots(PAPER, 12, BLOCK, 3, ()) == [5, 6, 7, 8, 9]
    assert routing.eligible_pivots(PAPER, 12, BLOCK, 1, ()) == [5, 6, 7, 8, 9, 10, 11]


def test_no_switch_strictly_inside_the_window():
    # A switch at 24 forbids windows that begin at 18 or 21; one that begins or ends at 24 is
    # allowed.
    assert routing.eligible_pivots(PAPER, 12, BLOCK, 3, (12, 24)) == [5, 8, 9]
    assert routing.eligible_pivots(PAPER, 12, BLOCK, 1, (12, 24)) == [5, 6, 7, 8, 9, 10, 11]


def test_pivots_of_the_release():
    # 12 past frames: 3 ... 7 are as many as are routed; 15: 3 ... 10 are eight.
    assert routing.eligible_pivots(RELEASE, 12, BLOCK, 4, (12, 24)) == [8]
    assert routing.eligible_pivots(RELEASE, 12, BLOCK, 4, ()) == [5, 6, 7, 8]


def test_pivots_of_a_shared_ring_need_frames_that_stay_resident():
    """A history of 18 frames is a sink of 3 and a ring of 15."""
    small = routing.Window(sink=3, past=6, near=1, excluded=4, cache_frames=18, shared_ring=True)
    assert routing.eligible_pivots(small, 12, BLOCK, 1, ()) == [5, 6, 7, 8, 9, 10, 11]
    # When the fourth block of the window is written, fork - 6 is the oldest frame held; fork - 5
    # the youngest routable.
    with pytest.raises(ValueError, match="no block can be a pivot"):
        routing.eligible_pivots(small, 12, BLOCK, 4, ())
    # Where the fork freezes the history, how long the window lasts does not matter.
    frozen = dataclasses.replace(small, shared_ring=False)
    assert routing.eligible_pivots(frozen, 12, BLOCK, 4, ()) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "blocks, window_blocks, switches",
    [(5, 1, ()), (7, 3, ()), (9, 4, (18,)), (12, 3, (18, 21, 24, 27, 30))],
)
def test_no_pivot_is_an_error_that_says_what_to_change(blocks, window_blocks, switches):
    with pytest.raises(
        ValueError, match="video.blocks.*rollout.window_blocks.*video.switch_frames"
    ):
        routing.eligible_pivots(PAPER, blocks, BLOCK, window_blocks, switches)
