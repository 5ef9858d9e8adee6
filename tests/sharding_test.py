"""One device and eight: the mesh, the order of trajectories, and rollouts and energies that do not
depend on either.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import SMALLEST, bare_run, batch_of, configure, random_variables
from jax.sharding import PartitionSpec as P

from kvpo_jax import programs, rollout
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.types import ReplayTuples, Rollout

PROMPTS, BRANCHES, FRAMES = 4, 8, 3
PIVOT = 5
FIELDS = {
    **SMALLEST,
    "video.blocks": 7,
    "video.switch_frames": (12, 18),
    "rollout.branches": BRANCHES,
    "rollout.window_blocks": 1,
    # MemFlow's bank, full at the pivot, and its sparse memory.
    "window.bank": 3,
    "window.bank_interval": 1,
    "model.sparse_memory": 2,
}
# Programs that a rollout and a replay use.
USED = (
    "encode_text",
    "blank",
    "draw",
    "shared_block",
    "shared_recache",
    "fork",
    "branch_block",
    "branch_recache",
)
# data, fsdp, branch, context, branches at a time (0: all)
MESHES = ((2, 1, 2, 2, 0), (2, 2, 2, 1, 4), (1, 1, 8, 1, 0))


@dataclasses.dataclass(frozen=True)
class Run:
    """What one mesh made of the same seed and weights; the arrays are NumPy's, for any mesh to
    read.

    Attributes:
      rollout: from pivot 5; the prompts switch before the fork and after it.
      identity: the same with the draws that are the deployment window.
      energies: float[P, G] of another policy, on the tuples of the run on one device.
      compilations: of each program in USED.
    """

    rollout: Rollout
    identity: Rollout
    energies: np.ndarray
    compilations: dict[str, int]


def run(
    data: int, fsdp: int, branch: int, context: int, chunk: int, tuples: ReplayTuples | None = None
) -> Run:
    config = configure("configs/tiny.py", {**FIELDS, "rollout.branch_chunk": chunk})
    mesh = sharding.make_mesh(data, branch, PROMPTS, BRANCHES, fsdp=fsdp, context=context)
    equipment = bare_run(config, mesh)
    variables = sharding.place_weights(random_variables(config, 0.25), mesh)
    other, rng = random_variables(config, 0.25, seed=1)["lora"], np.random.default_rng(0)
    embeddings = rng.normal(size=(PROMPTS, 3, 3, 4)).astype(np.float32)
    changed = np.array(
        [[False, True, True], [False, True, False], [False, False, True], [False, False, False]]
    )
    batch = batch_of(sharding.place(embeddings, mesh, sharding.PROMPTS), changed)

    def roll(routed_frames):
        noise = keys.NoiseKey(jax.random.key(7), jnp.arange(PROMPTS))
        out = rollout.rollout(equipment, variables, batch, noise, routed_frames, PIVOT)
        return jax.tree.map(np.asarray, out)

    draw = equipment.programs.draw
    routed_frames = draw(jax.random.key(0), jnp.arange(PROMPTS), PIVOT * FRAMES)
    perturbed = roll(routed_frames)
    identity = roll(routed_frames.at[:].set(jnp.arange(6, 12)))
    tuples = tuples or perturbed.replay
    bank = tuples.page.bank.replace(heads_axis=sharding.context_axis(mesh))
    tuples = tuples.replace(page=tuples.page.replace(bank=bank))
    energies, floor = jax.jit(programs.make_energies(config, equipment.mesh))(
        variables["params"], other, embeddings, perturbed.text, tuples, False
    )
    compilations = {n: c for n, c in equipment.programs.compilations().items() if n in USED}
    assert floor.shape == energies.shape
    return Run(perturbed, identity, np.asarray(energies), compilations)


@pytest.fixture(scope="module")
def one_device() -> Run:
    return run(1, 1, 1, 1, 0)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def eight_devices(request, one_device) -> Run:
    return run(*request.param, tuples=one_device.rollout.replay)


# ---------------------------------------------------------------- independence of the mesh


def test_rollouts_do_not_depend_on_the_mesh(one_device, eight_devices):
    """To 1e-6 of the largest number of an array."""
    bank = one_device.rollout.replay.page.bank
    assert bank.frame.min() >= 0 and not np.array_equal(bank.frame[0], bank.frame[1])
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(eight_devices.rollout),
        jax.tree.leaves(one_device.rollout),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        allowed = min(2e-6, 1e-6 * np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(ours, theirs, atol=allowed, rtol=0, err_msg=name)
    # Were all branches the same, their order would not show.
    branches = one_device.rollout.branches
    assert all(
        np.abs(branches[:, g] - branches[:, h]).max() > 1e-3
        for g in range(BRANCHES)
        for h in range(g)
    )


def test_energies_do_not_depend_on_the_mesh(one_device, eight_devices):
    assert one_device.energies.shape == (PROMPTS, BRANCHES) and one_device.energies.min() > 1e-3
    np.testing.assert_allclose(eight_devices.energies, one_device.energies, rtol=1e-6)
    assert np.all(np.std(one_device.energies, axis=1) > 1e-3)


def test_the_look_of_videos_does_not_depend_on_the_mesh():
    pixels = np.random.default_rng(0).integers(0, 256, (PROMPTS, 8, 3, 4, 4, 3), np.uint8)
    alone = programs.appearance(pixels, 2)
    for data, fsdp, branch, context, _ in MESHES:
        mesh = sharding.make_mesh(data, branch, PROMPTS, BRANCHES, fsdp=fsdp, context=context)
        placed = sharding.place(pixels, mesh, sharding.TRAJECTORIES)
        for name, values in jax.jit(programs.appearance, static_argnums=1)(placed, 2).items():
            np.testing.assert_allclose(values, alone[name], rtol=1e-6)


def test_every_shard_carries_the_same_anchor(eight_devices):
    """Branches that are not perturbed are the anchor bit for bit, also those that another device
    holds.
    """
    out = eight_devices.identity
    np.testing.assert_array_equal(
        out.branches, np.broadcast_to(out.anchor[:, None], out.branches.shape)
    )


def test_nothing_compiles_twice_on_a_mesh(eight_devices):
    assert eight_devices.compilations == dict.fromkeys(USED, 1)


# ---------------------------------------------------------------- the mesh


@pytest.mark.parametrize(
    "data, branch, prompts, branches, expected",
    [
        (1, 1, 4, 8, (1, 1)),
        (2, 4, 4, 8, (2, 4)),
        (0, 0, 8, 8, (8, 1)),  # all devices over prompts
        (0, 0, 4, 8, (4, 2)),  # the rest over branches
        (0, 0, 6, 8, (2, 4)),  # 2 divides 6 prompts and 8 devices
        (0, 0, 3, 8, (1, 8)),
        (0, 0, 3, 3, (3, 1)),  # what divides nothing stays idle
        (0, 4, 8, 8, (2, 4)),
        (2, 0, 2, 8, (2, 4)),
        (2, 0, 2, 6, (2, 3)),
        (0, 0, 12, 6, (4, 2)),
        (0, 0, 5, 7, (1, 7)),
    ],
)
def test_make_mesh(data, branch, prompts, branches, expected):
    mesh = sharding.make_mesh(data, branch, prompts, branches)
    assert mesh.axis_names == ("data", "fsdp", "branch", "context")
    assert mesh.devices.shape == (expected[0], 1, expected[1], 1)
    assert [device.id for device in mesh.devices.flat] == list(range(mesh.size))


@pytest.mark.parametrize(
    "data, fsdp, branch, prompts, branches, expected",
    [
        (0, 2, 0, 8, 8, (4, 2, 1)),  # prompts over both
        (0, 2, 0, 2, 8, (1, 2, 4)),
        (0, 8, 0, 8, 8, (1, 8, 1)),
        (2, 2, 0, 4, 3, (2, 2, 1)),
        (0, 2, 0, 6, 4, (1, 2, 4)),  # of 3 prompts a shard, 3 x 1 leaves more idle than 1 x 4
    ],
)
def test_make_mesh_of_weights_in_shards(data, fsdp, branch, prompts, branches, expected):
    mesh = sharding.make_mesh(data, branch, prompts, branches, fsdp=fsdp)
    assert mesh.devices.shape == (*expected, 1)
    assert sharding.prompt_shards(mesh) == expected[0] * fsdp


def test_devices_lie_side_by_side_over_context_then_branch_then_fsdp():
    """So a node has the tokens of a block, then the branches of a prompt, then a weight."""
    mesh = sharding.make_mesh(1, 2, 2, 2, fsdp=2, context=2)
    numbers = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(numbers, [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]])


def test_what_a_mesh_is_for_is_said():
    said = [sharding.describe(sharding.make_mesh(0, 0, p, g), p, g) for p, g in ((4, 8), (5, 7))]
    assert said[0] == "8 devices: 4 prompts over 4, 8 branches over 2"
    mesh = sharding.make_mesh(2, 2, 4, 8, fsdp=2)
    assert sharding.describe(mesh, 4, 8) == f"{said[0]}, weights over 2"
    assert said[1].startswith(
        "7 devices: 5 prompts over 1, 7 branches over 7; 1 idle, for no larger sizes"
    )


@pytest.mark.parametrize(
    "data, branch, prompts, branches, message",
    [
        (3, 1, 4, 8, "mesh.data=3 does not divide 4 prompts at a time"),
        (1, 3, 4, 8, "mesh.branch=3 does not divide 8 branches at a time"),
        (4, 4, 4, 8, "mesh.data=4 x mesh.branch=4 needs 16 of 8 devices"),
        (16, 0, 16, 8, "mesh.data=16 .* needs .* of 8 devices"),
        (0, 16, 4, 16, "mesh.branch=16 needs .* of 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(data, branch, prompts, branches, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data, branch, prompts, branches)


@pytest.mark.parametrize(
    "data, fsdp, context, prompts, message",
    [
        (0, 3, 1, 4, "^mesh.fsdp=3 does not divide 4 prompts at a time"),
        (2, 4, 1, 4, "^mesh.data=2 x mesh.fsdp=4 does not divide 4 prompts at a time"),
        (2, 8, 1, 16, "^mesh.data=2 x mesh.branch=1 x mesh.fsdp=8 needs 16 of 8 devices"),
        (0, 16, 1, 16, "mesh.fsdp=16 needs 16 of 8 devices"),
        (2, 1, 8, 4, "^mesh.data=2 x mesh.branch=1 x mesh.context=8 needs 16 of 8 devices"),
    ],
)
def test_shards_of_weights_that_do_not_fit_are_an_error(data, fsdp, context, prompts, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data, 0, prompts, 8, fsdp=fsdp, context=context)


# ---------------------------------------------------------------- the order of trajectories


@pytest.mark.parametrize(
    "branch, order",
    [
        (1, [-1, 0, 1, 2, 3, 4, 5, 6, 7]),
        (2, [-1, 0, 1, 2, 3, -1, 4, 5, 6, 7]),
        (4, [-1, 0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7]),
        (8, [-1, 0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7]),
    ],
)
def test_every_shard_begins_with_an_anchor(branch, order):
    mesh = sharding.make_mesh(1, branch, PROMPTS, BRANCHES)
    np.testing.assert_array_equal(sharding.trajectories(mesh, BRANCHES), order)
    x = jnp.broadcast_to(jnp.asarray(order), (2, len(order)))[..., None] + jnp.array([0.0, 0.5])
    np.testing.assert_array_equal(
        sharding.branches_of(x, mesh, BRANCHES)[1], np.arange(8)[:, None] + [0.0, 0.5]
    )


# ---------------------------------------------------------------- weights in shards


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((30, 1536, 8960), 2),  # a kernel of every layer, along the longest side
        ((30, 8960, 1536), 1),
        ((64, 8, 8), 1),  # of equal ones the first, and never the layers
        ((8, 6, 7), None),  # not the layers, though nothing else divides
        ((30, 12), 1),
        ((1536,), 0),
        ((6,), None),
        ((), None),
    ],
)
def test_a_weight_is_cut_along_its_longest_axis(shape, axis):
    mesh = sharding.make_mesh(1, 1, 8, 8, fsdp=4)
    spec = sharding.weight_spec(np.empty(shape), mesh)
    assert spec == (P() if axis is None else P(*[None] * axis, "fsdp"))
    assert sharding.weight_spec(np.empty(shape), sharding.make_mesh(4, 2, 8, 8)) == P()


def test_a_device_has_its_share_of_weights_and_state(tmp_path):
    """A checkpoint goes from mesh to mesh, to the last bit."""
    config = configure("configs/tiny.py", FIELDS)
    variables = random_variables(config, 0.25)

    def states(fsdp):
        mesh = sharding.make_mesh(1, 1, 8, 8, fsdp=fsdp)
        state = state_lib.init_state(config, mesh, variables["lora"])
        planned = state_lib.abstract_state(config, mesh)
        assert [x.sharding for x in jax.tree.leaves((state.lora, state.optimiser))] == [
            x.sharding for x in jax.tree.leaves((planned.lora, planned.optimiser))
        ]
        return state, sharding.place_weights(variables["params"], mesh), planned

    def on_a_device(tree):
        return sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(tree))

    made = {fsdp: states(fsdp) for fsdp in (1, 2, 4)}
    for fsdp in (2, 4):
        for ours, theirs in zip(made[fsdp][:2], made[1][:2], strict=True):
            share = on_a_device(ours) / on_a_device(theirs)
            assert 1 / fsdp <= share < 1.03 / fsdp, (fsdp, share)
    for before, after in ((2, 1), (1, 4)):
        saved, like = made[before][0], made[after][2]
        with checkpoint.manager(tmp_path / f"{before}", keep=1) as checkpoints:
            checkpoint.save(checkpoints, 1, saved, {})
            _, restored, _ = checkpoint.restore_latest(checkpoints, like)
        for leaf, expected, wanted in zip(
            *map(jax.tree.leaves, (restored, saved, like)), strict=True
        ):
            assert leaf.sharding == wanted.sharding
            np.testing.assert_array_equal(leaf, expected)


def test_a_shard_knows_where_it_was_cut():
    shard = sharding.Shard(jnp.zeros((3, 5)), axis=1)
    assert shard.remove_axis(0, {}).axis == 0 and shard.remove_axis(2, {}).axis == 1
    assert shard.add_axis(0, {}).axis == 2 and shard.add_axis(2, {}).axis == 1
    mesh = sharding.make_mesh(2, 2, 4, 2, fsdp=2)
    tree = {"kernel": np.arange(24.0).reshape(2, 3, 4), "bias": np.arange(3.0)}
    boxes, specs = sharding.in_shards(tree, mesh)
    assert specs == {"kernel": sharding.Shard(P(None, None, "fsdp"), 2), "bias": P()}
    whole = jax.shard_map(
        lambda boxes: jax.tree.map(lambda x: x[None], sharding.unboxed(sharding.vary(boxes))),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(("data", "fsdp", "branch")),
    )(boxes)
    for name, expected in tree.items():
        np.testing.assert_array_equal(whole[name], np.broadcast_to(expected, whole[name].shape))


def test_placed_and_constrained_arrays_lie_where_they_should():
    mesh = sharding.make_mesh(4, 2, PROMPTS, BRANCHES)
    tree = {"a": np.ones((4, 8)), "b": np.ones((4, 2, 3))}
    for placed in (
        sharding.place(tree, mesh, sharding.TRAJECTORIES),
        jax.jit(lambda t: sharding.constrain(t, mesh, sharding.TRAJECTORIES))(tree),
    ):
        assert {name: x.addressable_shards[0].data.shape for name, x in placed.items()} == {
            "a": (1, 4),
            "b": (1, 1, 3),
        }
    everywhere = sharding.place(tree, mesh)
    assert all(
        x.sharding.is_fully_replicated and len(x.addressable_shards) == 8
        for x in everywhere.values()
    )


def test_nothing_waits_for_what_is_only_traced(monkeypatch):
    """JAX would look through everything that has been traced, for every array."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or tree)
    tree = {"made": jnp.ones(3)}
    jax.eval_shape(sharding.wait, tree)
    assert not waited
    assert sharding.wait(tree) is tree and waited == [tree]


def test_a_copy_on_the_host_comes_back_as_it_was():
    """In shards and whole; what is still in use stays where it is, and the rest takes no memory."""
    mesh = sharding.make_mesh(2, 2, 4, 8)
    shape = (4, 37)  # of nothing else

    def placed(value: float, spec: P):
        return sharding.place(np.full(shape, value) + np.arange(37), mesh, spec)

    def live():
        return sum(x.shape == shape for x in jax.live_arrays())

    before = live()
    tree = {"whole": placed(1.0, P()), "rows": placed(2.0, P("data")), "used": placed(3.0, P())}
    used, specs = tree["used"], {name: x.sharding for name, x in tree.items()}
    back = sharding.on_host(tree, [used])
    del tree
    assert live() == before + 1
    again = back()
    assert again["used"] is used and {name: x.sharding for name, x in again.items()} == specs
    for name, value in {"whole": 1.0, "rows": 2.0}.items():
        np.testing.assert_array_equal(again[name], np.full(shape, value) + np.arange(37))
