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
MEMFLOW = routing.Window(sink=3, past=6, near=0, excluded=3, cache_frames=33, keep_sink=False)
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
    pool = routing.routable(PAPER, 36, 21, 33)
    routed_frames = routing.draw_independent(jax.random.key(0), PAPER, 10, pool, 21)
    rows = routing.routed_context(PAPER, routed_frames.reshape(2, 5, 6), 21)
    assert rows.shape == (2, 5, 12) and rows.dtype == jnp.int32
    for branch, ours in zip(routed_frames, rows.reshape(10, 12), strict=True):
        np.testing.assert_array_equal(ours, [0, 1, 2, *branch, 18, 19, 20])


# ---------------------------------------------------------------- the routable set


def pool_of(window, fork: int, last_start: int) -> list[int]:
    return np.flatnonzero(routing.routable(window, 60, fork, last_start)).tolist()


def test_omega_of_the_paper():
    # L = 15: {4, ..., 12} counted from 1
    assert [frame + 1 for frame in pool_of(PAPER, 15, 27)] == [4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    "window, fork, last_start, expected",
    [
        (PAPER, 12, 24, range(3, 9)),
        (PAPER, 36, 48, range(3, 33)),
        (PAPER, 42, 54, range(9, 39)),  # 36 frames held: 0 1 2 and 9 ... 41; the fork freezes them
        (RELEASE, 15, 21, range(3, 11)),
        (RELEASE, 36, 36, range(6, 32)),  # 33 held: 0 1 2 and 6 ... 35
        (RELEASE, 36, 48, range(18, 32)),  # and still held when block 48 is written
        # MemFlow: the sink can be drawn, before the ring rolls and after it.
        (MEMFLOW, 21, 33, range(18)),
        (MEMFLOW, 39, 51, [0, 1, 2, *range(9, 36)]),
    ],
)
def test_routable_frames_by_hand(window, fork, last_start, expected):
    assert pool_of(window, fork, last_start) == list(expected)


# ---------------------------------------------------------------- draws


def draws(kind: str, window=PAPER, seed=0, branches=8, fork=15):
    pool = routing.routable(window, 36, fork, fork)
    return np.asarray(routing.DRAWS[kind](jax.random.key(seed), window, branches, pool, fork))


@pytest.mark.parametrize("window, fork", [(PAPER, 15), (PAPER, 30), (RELEASE, 15), (RELEASE, 30)])
@pytest.mark.parametrize("kind", ["independent", "dispersed"])
def test_draws_are_distinct_frames_of_omega(kind, window, fork):
    routed_frames = draws(kind, window, branches=40, fork=fork)
    assert routed_frames.shape == (40, window.routed) and routed_frames.dtype == np.int32
    assert np.all(np.diff(routed_frames, axis=1) > 0)  # ascending, hence distinct
    # Neither the sink nor the youngest frames.
    assert routed_frames.min() == window.sink and routed_frames.max() == fork - window.excluded - 1


def test_a_window_of_random_length_keeps_one_frame_to_all():
    """Of the draws that it would be without; every length as often, and the rest of a context is
    the same.
    """
    drawn, whole = (draws(k, branches=80, fork=30) for k in ("random_length", "independent"))
    lengths = np.sum(drawn >= 0, axis=1)
    assert sorted(set(lengths)) == [1, 2, 3, 4, 5, 6] and np.bincount(lengths).max() < 30
    for ours, theirs in zip(drawn, whole, strict=True):
        kept = ours[ours >= 0]
        assert np.all(np.diff(kept) > 0) and set(kept) <= set(theirs)
    context = np.asarray(routing.routed_context(PAPER, jnp.asarray(drawn[:1]), 30))[0]
    kept = drawn[0][drawn[0] >= 0]
    assert context[context >= 0].tolist() == [0, 1, 2, *kept, 27, 28, 29]
    assert (context >= 0).sum() == 6 + lengths[0]


@pytest.mark.parametrize("kind", routing.DRAWS)
def test_draws_are_a_function_of_the_key(kind):
    np.testing.assert_array_equal(draws(kind, seed=3), draws(kind, seed=3))
    assert not np.array_equal(draws(kind, seed=3), draws(kind, seed=4))


@pytest.mark.parametrize("fork, branches", [(15, 8), (15, 83), (33, 40)])
def test_branches_draw_differently_and_not_the_deployment_window(fork, branches):
    """At fork 15 there are 84 subsets of 9 frames: 83 branches take all but the deployed one."""
    drawn = {tuple(branch) for branch in draws("independent", fork=fork, branches=branches)}
    assert len(drawn) == branches
    assert tuple(range(fork - 9, fork - 3)) not in drawn


def test_more_branches_than_subsets_repeat_some():
    drawn = [tuple(branch) for branch in draws("independent", branches=90)]
    assert len(drawn) == 90 and len(set(drawn)) == 83


@pytest.mark.parametrize("window, fork", [(PAPER, 15), (RELEASE, 24), (MEMFLOW, 39)])
def test_the_deployed_subset_routes_nothing(window, fork):
    deployed = routing.deployed_subset(window, fork)
    assert deployed.shape == (window.routed,)
    np.testing.assert_array_equal(
        routing.routed_context(window, deployed, fork), routing.deployment_frames(window, fork)
    )


def test_the_bound_on_frames_does_not_matter():
    """The same set of draws is possible for any `frames` that holds the routable set."""
    for frames in (12, 60):
        pool = routing.routable(PAPER, frames, 15, 15)
        drawn = routing.draw_independent(jax.random.key(0), PAPER, 83, pool, 15)
        assert (int(drawn.min()), int(drawn.max())) == (3, 11)


def subsets_p_value(routed_frames: np.ndarray, pool: range, besides: tuple = ()) -> float:
    """p of the chi-square test that every subset of `pool`, `besides` apart, is equally often among
    the draws [n, routed].
    """
    subsets = itertools.combinations(pool, routed_frames.shape[1])
    cell = {subset: i for i, subset in enumerate(s for s in subsets if s != besides)}
    counts = np.bincount([cell[tuple(branch)] for branch in routed_frames], minlength=len(cell))
    assert counts.sum() / len(cell) > 50
    return stats.chisquare(counts).pvalue


def many_groups(kind: str, groups: int, branches: int = 8) -> np.ndarray:
    """int32[groups, G, routed] at fork 15, where nine frames can be drawn."""
    pool = routing.routable(PAPER, 36, 15, 15)

    def draw(key):
        return routing.DRAWS[kind](key, PAPER, branches, pool, 15)

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), groups)))


DEPLOYED = tuple(range(6, 12))


@pytest.mark.parametrize("branch", [0, 7])
def test_independent_draws_are_uniform(branch):
    """Every branch over all 83 subsets of the 9 routable frames but the deployed one, which says
    more than that each frame is as frequent.
    """
    drawn = many_groups("independent", 8400)[:, branch]
    assert 0.01 < subsets_p_value(drawn, range(3, 12), besides=DEPLOYED) < 0.99


def test_draws_of_a_group_are_uniform_pairs():
    """Two branches are any two of the 83 subsets, with equal chances in either order: the rank of
    the second among the 82 that the first leaves is uniform.
    """
    subsets = [s for s in itertools.combinations(range(3, 12), 6) if s != DEPLOYED]
    cell = {subset: i for i, subset in enumerate(subsets)}
    first, second = (
        np.array([cell[tuple(draw)] for draw in draws])
        for draws in many_groups("independent", 33600, branches=2).swapaxes(0, 1)
    )
    counts = np.bincount(second - (second > first), minlength=82)
    assert len(counts) == 82 and 0.01 < stats.chisquare(counts).pvalue < 0.99


@pytest.mark.parametrize("branch", [0, 5])
def test_dispersed_draws_of_a_branch_are_uniform(branch):
    drawn = many_groups("dispersed", 8400)[:, branch]
    assert 0.01 < subsets_p_value(drawn, range(3, 12)) < 0.99


def test_the_test_of_uniformity_sees_a_bias():
    """Draws that leave frame 11 out every tenth time."""
    drawn = many_groups("dispersed", 8400)[:, 0]
    replacement = np.array([min(set(range(3, 12)) - set(draw)) for draw in drawn])
    replaced = (np.arange(8400) % 10 == 0)[:, None] & (drawn == 11)
    biased = np.sort(np.where(replaced, replacement[:, None], drawn), axis=1)
    assert subsets_p_value(biased, range(3, 12)) < 1e-6


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


def pivots(window, blocks: int, recorded: int, switches=(), perturbed=None, branches=8):
    return routing.eligible_pivots(
        window, blocks, BLOCK, switches, branches, perturbed or recorded, recorded
    )


def test_pivots_without_switches():
    # From 15 past frames on (12 fill the window, but then there are as many routable frames as
    # slots to route), up to the last block at which three blocks are left of twelve.
    assert pivots(PAPER, 12, 3) == [5, 6, 7, 8, 9]
    assert pivots(PAPER, 12, 1) == [5, 6, 7, 8, 9, 10, 11]


def test_every_branch_has_a_subset_of_its_own():
    """15 past frames have 84 subsets, one of them the deployed one; 18 have 924."""
    assert pivots(PAPER, 12, 1, branches=83)[0] == 5
    assert pivots(PAPER, 12, 1, branches=84)[0] == 6


def test_no_switch_strictly_inside_the_window():
    # A switch at 24 forbids windows that begin at 18 or 21; one that begins or ends at 24 is
    # allowed.
    assert pivots(PAPER, 12, 3, (12, 24)) == [5, 8, 9]
    assert pivots(PAPER, 12, 1, (12, 24)) == [5, 6, 7, 8, 9, 10, 11]


def test_pivots_of_the_release():
    # 12 past frames: 3 ... 7 are as many as are routed; 15: 3 ... 10 are eight.
    assert pivots(RELEASE, 12, 4, (12, 24)) == [8]
    assert pivots(RELEASE, 12, 4) == [5, 6, 7, 8]


def test_pivots_of_a_shared_ring_need_frames_that_stay_resident():
    """A history of 18 frames is a sink of 3 and a ring of 15."""
    small = routing.Window(sink=3, past=6, near=1, excluded=4, cache_frames=18, shared_ring=True)
    assert pivots(small, 12, 1) == [5, 6, 7, 8, 9, 10, 11]
    # When the fourth block of the window is written, fork - 6 is the oldest frame held; fork - 5
    # the youngest routable.
    assert pivots(small, 12, 4) == []
    # The blocks that are replayed after the window write to the ring, too late for a draw.
    assert pivots(small, 12, 4, perturbed=1) == [5, 6, 7, 8]
    # Where the fork freezes the history, how long the window lasts does not matter.
    frozen = dataclasses.replace(small, shared_ring=False)
    assert pivots(frozen, 12, 4) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "blocks, recorded, switches",
    [(5, 1, ()), (7, 3, ()), (9, 4, (18,)), (12, 3, (18, 21, 24, 27, 30))],
)
def test_there_may_be_no_pivot(blocks, recorded, switches):
    assert pivots(PAPER, blocks, recorded, switches) == []
