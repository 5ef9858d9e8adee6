"""Train states come back bit for bit, even after a kill in the middle of a save; weight files are
strict.
"""

import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint


def train_state(scale: float):
    """A LoRA tree with an optimiser state of NamedTuples, in three dtypes."""
    params = {
        "q": {
            "a": scale * jnp.arange(16.0).reshape(8, 2) / 3,
            "b": jnp.full((3,), scale, jnp.bfloat16) / 3,
        }
    }
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1.0, 3))
    )
    state = optimiser.init(params)
    _, state = optimiser.update(params, state, params)
    return {"lora": params, "optimiser": state, "cursor": jnp.uint32(7)}


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_restores_the_newest_bit_for_bit_and_keeps_two(tmp_path):
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, train_state(0.0)) is None
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, step, train_state(step), {"reward": step / 3})
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        assert list(checkpoints.all_steps()) == [2, 3]
        step, tree, extra = checkpoint.restore_latest(checkpoints, train_state(0.0))
        assert (step, extra) == (3, {"reward": 3 / 3})
        assert_bitwise_equal(tree, train_state(3))
        # Uncommitted, as it was: it goes along with arrays on any device.
        jax.block_until_ready(tree["cursor"] + jax.device_put(jnp.uint32(1), jax.devices()[3]))
        checkpoint.save(checkpoints, 3, train_state(9), {})  # saved already: left alone
        checkpoints.wait_until_finished()
        assert_bitwise_equal(
            checkpoint.restore_latest(checkpoints, train_state(0.0))[1], train_state(3)
        )


def test_restores_onto_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))

    def rows(x):
        return NamedSharding(mesh, P("data") if x.ndim == 2 else P())

    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows(x)), train_state(0.0)
    )
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 1, train_state(1), {})
        _, tree, _ = checkpoint.restore_latest(checkpoints, like)
    assert_bitwise_equal(tree, train_state(1))
    assert tree["lora"]["q"]["a"].sharding == like["lora"]["q"]["a"].sharding
    assert len(tree["lora"]["q"]["a"].addressable_shards) == 8


def test_a_donated_state_does_not_reach_into_the_save_in_progress(tmp_path):
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {str(i): jnp.zeros((500, 500)) for i in range(8)}
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 0, tree, {})  # the first save is waited for, the second not
        checkpoint.save(checkpoints, 1, tree, {})
        tree = jax.block_until_ready(add_one(tree))
        _, restored, _ = checkpoint.restore_latest(checkpoints, tree)
    assert all(float(jnp.max(jnp.abs(x))) == 0 for x in restored.values())


def test_another_state_is_an_error_that_names_checkpoint_and_leaf(tmp_path):
    state = train_state(1)
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 5, state, {})
        with pytest.raises(
            ValueError, match=r"checkpoint .*5: wrong: cursor is uint32\[\], not float32\[\]"
        ):
            checkpoint.restore_latest(checkpoints, {**state, "cursor": jnp.float32(0)})
        with pytest.raises(ValueError, match=r"missing: ema"):
            checkpoint.restore_latest(checkpoints, {**state, "ema": jnp.zeros(3)})
        with pytest.raises(ValueError, match=r"left over: cursor"):
            checkpoint.restore_latest(
                checkpoints, {k: v for k, v in state.items() if k != "cursor"}
            )


def test_an_unfinished_save_is_passed_over(tmp_path):
    with checkpoint.manager(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, train_state(step), {})
    # What a kill leaves: a directory that still has its temporary name, with part of the files.
    unfinished = (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    for commit in unfinished.rglob("commit_success.txt"):
        commit.unlink()
    with checkpoint.reader(tmp_path) as checkpoints:  # it may be a save in progress
        assert checkpoint.restore_latest(checkpoints, train_state(0.0))[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    with checkpoint.manager(tmp_path, keep=3) as checkpoints:
        step, tree, _ = checkpoint.restore_latest(checkpoints, train_state(0.0))
        assert step == 1
        assert_bitwise_equal(tree, train_state(1))
        checkpoint.save(checkpoints, 2, train_state(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("damage", ["cut data files", "no state", "empty metadata"])
def test_a_damaged_checkpoint_is_an_error_of_one_line_that_names_the_one_before(tmp_path, damage):
    with checkpoint.manager(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, train_state(step), {})
    state = tmp_path / "2" / "state"
    if damage == "cut data files":
        for path in state.rglob("d/*"):  # all: some are leftovers of the save, which nobody reads
            os.truncate(path, path.stat().st_size // 2)
    elif damage == "no state":
        shutil.rmtree(state)
    else:
        (state / "_METADATA").write_text("")
    for open_checkpoints in (checkpoint.reader, lambda path: checkpoint.manager(path, keep=3)):
        with open_checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
            checkpoint.restore_latest(checkpoints, train_state(0.0))
        assert str(error.value).startswith(f"checkpoint {tmp_path / '2'} cannot be read (")
        assert str(error.value).endswith("if it is damaged, delete it to continue from 1")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    shutil.rmtree(tmp_path / "1")
    with (
        checkpoint.reader(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"2 cannot be read \(.*\); .* there is no older one$"),
    ):
        checkpoint.restore_latest(checkpoints, train_state(0.0))


def flip(path, at, bit=0x40):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_a_flipped_bit_of_any_leaf_is_an_error_that_names_it(tmp_path):
    """What orbax reads without a word: it gives other numbers of the same shape."""
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, train_state(step), {})
        _, good, _ = checkpoint.restore_latest(checkpoints, train_state(0.0))
    names = [jax.tree_util.keystr(k, simple=True, separator=".") for k, _ in leaves_of(good)]
    read = ocp.CheckpointManager.restore
    for changed, name in enumerate(names):

        def restore(self, step, args, changed=changed):
            restored = read(self, step, args=args)
            leaves, structure = jax.tree.flatten(restored.state)
            content = np.array(leaves[changed])  # of the leaf, its last byte
            content.reshape(-1).view(np.uint8)[-1] ^= 1
            leaves[changed] = jax.device_put(content, leaves[changed].sharding)
            return ocp.args.Composite(
                state=jax.tree.unflatten(structure, leaves), extra=restored.extra
            )

        with pytest.MonkeyPatch.context() as patch, checkpoint.reader(tmp_path) as checkpoints:
            patch.setattr(ocp.CheckpointManager, "restore", restore)
            with pytest.raises(UsageError) as error:
                checkpoint.restore_latest(checkpoints, train_state(0.0))
        assert str(error.value) == (
            f"checkpoint {tmp_path / '2'} cannot be read (ValueError: not what was saved: "
            f"{name}); if it is damaged, delete it to continue from 1"
        )


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_flipped_bits_on_disk_never_become_other_numbers(tmp_path):
    """In the files of the newest checkpoint, wherever they are; some are read by nobody."""
    folder, damaged = tmp_path / "good", tmp_path / "damaged"
    incompressible = jax.random.normal(jax.random.key(0), 3000)
    numbers = {"w": incompressible, **train_state(2)}
    like = jax.tree.map(jnp.zeros_like, numbers)
    with checkpoint.manager(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, numbers, {"config": {"seed": 7}})
    files = sorted(path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file())
    largest = max(files, key=lambda file: (folder / file).stat().st_size)
    noticed, rng = [], np.random.default_rng(0)
    for file in [*files, *files, *[largest] * 8]:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        if size := (folder / file).stat().st_size:
            flip(damaged / file, rng.integers(size))
        try:
            with checkpoint.reader(damaged) as checkpoints:
                step, tree, extra = checkpoint.restore_latest(checkpoints, like)
        except UsageError as error:
            assert str(error).startswith(f"checkpoint {damaged / '2'}")
            noticed.append(str(error))
        else:
            assert (step, extra) == (2, {"config": {"seed": 7}})
            assert_bitwise_equal(tree, numbers)
    assert any("not what was saved: w)" in error for error in noticed)


def test_a_changed_record_is_an_error(tmp_path):
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        checkpoint.save(checkpoints, 1, train_state(1), {"seconds": 12.5})
    record = tmp_path / "1" / "extra" / "metadata"
    record.write_text(record.read_text().replace("12.5", "13.5"))
    with checkpoint.reader(tmp_path) as checkpoints:
        with pytest.raises(
            UsageError, match=r"1 cannot be read .*its record is not what was saved"
        ):
            checkpoint.restore_latest(checkpoints, train_state(0.0))


def test_a_checkpoint_from_before_checksums_is_read_and_said(tmp_path, capsys):
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        checkpoint.save(checkpoints, 1, train_state(1), {"seconds": 12.5})
    (tmp_path / "1" / "extra" / "metadata").write_text('{"seconds": 12.5}')
    assert capsys.readouterr().out == ""
    with checkpoint.reader(tmp_path) as checkpoints:
        _, tree, extra = checkpoint.restore_latest(checkpoints, train_state(0.0))
    assert_bitwise_equal(tree, train_state(1))
    assert extra == {"seconds": 12.5}
    said = f"checkpoint {tmp_path / '1'} is older than checksums: damage to it would not be seen\n"
    assert capsys.readouterr().out == said


def test_checksums_do_not_depend_on_how_a_leaf_is_sharded(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    state = train_state(1)
    rows = NamedSharding(mesh, P("data"))
    state["lora"]["q"]["a"] = jax.device_put(state["lora"]["q"]["a"], rows)
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {})
        _, tree, _ = checkpoint.restore_latest(checkpoints, train_state(0.0))
    assert_bitwise_equal(tree, train_state(1))


def test_the_first_save_is_read_back(tmp_path):
    """Orbax writes into such a folder without a word, and cannot read what it wrote."""
    with checkpoint.manager(tmp_path / "a [b]", keep=2) as checkpoints:
        with pytest.raises(UsageError, match=r"b]/1 cannot be read"):
            checkpoint.save(checkpoints, 1, train_state(1), {})


def test_a_reader_goes_on_to_the_newer_checkpoint_if_a_run_deletes_its_own(tmp_path):
    like, read = train_state(0.0), ocp.CheckpointManager.restore
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 1, train_state(1), {})

        def overtaken(self, step, args):
            if step == 1:  # while it is being read
                checkpoint.save(checkpoints, 2, train_state(2), {})
                checkpoints.wait_until_finished()
                assert not (tmp_path / "1").exists()
            return read(self, step, args=args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "restore", overtaken)
            step, tree, _ = checkpoint.read(tmp_path, like)
        opened, times = checkpoint.reader, []

        def vanished(directory):  # as it is opened
            times.append(1)
            if len(times) == 1:
                checkpoint.save(checkpoints, 3, train_state(2), {})
                checkpoints.wait_until_finished()
                raise FileNotFoundError(f"{directory}/2")
            return opened(directory)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "reader", vanished)
            assert checkpoint.read(tmp_path, like)[0] == 3
    assert step == 2
    assert_bitwise_equal(tree, train_state(2))
    flip(tmp_path / "3" / "state" / "_METADATA", 0)
    with pytest.raises(UsageError, match="3 cannot be read"):  # and not for ever
        checkpoint.read(tmp_path, like)


def test_later_checkpoints_are_forgotten(tmp_path):
    with checkpoint.manager(tmp_path, keep=5) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoint.save(checkpoints, step, train_state(step), {})
        checkpoint.forget_after(checkpoints, 2)
        checkpoint.save(checkpoints, 3, train_state(9), {})
        assert list(checkpoints.all_steps()) == [1, 2, 3]
        assert_bitwise_equal(
            checkpoint.restore_latest(checkpoints, train_state(0.0))[1], train_state(9)
        )


def save_all(directory, rewards, **keep):
    """Saves a checkpoint for each step -> reward, and says which are left."""
    with checkpoint.manager(directory, **keep) as checkpoints:
        for step, reward in rewards.items():
            checkpoint.save(checkpoints, step, train_state(step), {}, reward)
    return checkpoint.steps(directory)


def test_the_best_are_kept_besides_the_newest(tmp_path):
    """Also those of an earlier process; of equal ones the newest; and no one without a reward."""
    rewards = {1: None, 2: -0.5, 3: 0.9, 4: 0.1, 5: None, 6: 0.2}
    assert save_all(tmp_path, rewards, keep=2, keep_best=1) == [3, 5, 6]
    assert save_all(tmp_path, {7: 0.9, 8: 0.3, 9: None}, keep=1, keep_best=2) == [3, 7, 9]
    assert save_all(tmp_path, {10: 0.9}, keep=1, keep_best=1) == [10]
    assert save_all(tmp_path / "none", dict.fromkeys((1, 2, 3)), keep=1, keep_best=3) == [3]
    assert save_all(tmp_path / "newest", {1: 0.9, 2: 0.1}, keep=1, keep_best=0) == [2]


def test_a_better_checkpoint_that_is_forgotten_counts_no_more(tmp_path):
    with checkpoint.manager(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, reward in {2: None, 3: 0.2, 4: 0.9}.items():
            checkpoint.save(checkpoints, step, train_state(step), {}, reward)
        checkpoint.forget_after(checkpoints, 3)
        for step, reward in {4: None, 5: 0.1, 6: None}.items():
            checkpoint.save(checkpoints, step, train_state(step), {}, reward)
    assert checkpoint.steps(tmp_path) == [3, 5, 6]


def test_a_checkpoint_is_chosen_by_its_number_or_its_reward(tmp_path):
    assert checkpoint.chosen(tmp_path, 7) is None  # there are none
    save_all(tmp_path, {2: 0.5, 4: 0.9, 6: 0.1, 8: None}, keep=9)
    for which, step in (("newest", 8), ("best", 4), (2, 2)):
        found, tree, _ = checkpoint.read(tmp_path, train_state(0.0), which)
        assert found == step
        assert_bitwise_equal(tree, train_state(step))
    there = f"{tmp_path} has the iterations 2, 4, 6, 8; the best of them is 4"
    with pytest.raises(UsageError) as error:
        checkpoint.read(tmp_path, train_state(0.0), 3)
    assert str(error.value) == f"--iteration=3: {there}"
    # A record that has changed says no reward.
    record = tmp_path / "6" / "extra" / "metadata"
    record.write_text(record.read_text().replace("0.1", "9.1"))
    assert checkpoint.chosen(tmp_path, "best") == 4
    for step in (2, 4):
        shutil.rmtree(tmp_path / str(step))
    with pytest.raises(UsageError, match="=best: .* iterations 6, 8; none of them has been eval"):
        checkpoint.chosen(tmp_path, "best")


def test_reading_where_nothing_is_makes_nothing(tmp_path):
    with checkpoint.reader(tmp_path / "none") as checkpoints:
        assert checkpoint.restore_latest(checkpoints, train_state(0.0)) is None
    assert not (tmp_path / "none").exists()


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    program = f"""
import os, signal
import jax.numpy as jnp
from kvpo_jax.runtime import checkpoint
tree = lambda value: {{str(i): jnp.full((1000, 500), value) for i in range(8)}}
checkpoints = checkpoint.manager({str(tmp_path)!r}, keep=2)
checkpoint.save(checkpoints, 1, tree(1.0), {{}})
checkpoints.wait_until_finished()
checkpoint.save(checkpoints, 2, tree(2.0), {{}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert killed.returncode == -signal.SIGKILL
    like = {str(i): jnp.zeros((1000, 500)) for i in range(8)}
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        step, tree, _ = checkpoint.restore_latest(checkpoints, like)
    assert all(bool(jnp.all(x == step)) for x in tree.values())


# ---------------------------------------------------------------- weights


WEIGHTS = {
    "block": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.asarray([1 / 3], jnp.bfloat16)}
}


def test_weights_round_trip_with_bfloat16_and_transposed_arrays(tmp_path):
    path = tmp_path / "sub" / "w.safetensors"
    weights = {
        **WEIGHTS,
        "view": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.float32(2.5),
    }
    checkpoint.save_weights(path, weights, {"seed": "0"})
    loaded = checkpoint.load_weights(
        path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    )
    assert_bitwise_equal(loaded, weights)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_weights_are_cast_and_placed_like_the_tree(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, WEIGHTS, {})
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
    like = {
        "block": {
            "kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16, sharding=sharding),
            "bias": jnp.zeros(1),
        }
    }
    loaded = checkpoint.load_weights(path, like)["block"]
    assert loaded["kernel"].dtype == jnp.bfloat16 and loaded["kernel"].sharding == sharding
    assert loaded["bias"].dtype == jnp.float32 and float(loaded["bias"][0]) == float(
        jnp.bfloat16(1 / 3)
    )


@pytest.mark.parametrize(
    "like, fault",
    [
        ({"block": {**WEIGHTS["block"], "scale": jnp.ones(2)}}, "missing: block/scale"),
        ({"block": {"bias": WEIGHTS["block"]["bias"]}}, "left over: block/kernel"),
        (
            {"block": {**WEIGHTS["block"], "kernel": jnp.ones((3, 2))}},
            r"wrong: block/kernel is \[2, 3\], not \[3, 2\]",
        ),
    ],
)
def test_other_tensors_are_an_error_that_names_file_and_tensor(tmp_path, like, fault):
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, WEIGHTS, {})
    with pytest.raises(ValueError, match=f"w.safetensors: {fault}"):
        checkpoint.load_weights(path, like)


def test_a_part_of_a_file_can_be_left_unread(tmp_path):
    """The other tensors are as strict as ever, and so is a name that only begins like the part."""
    path = tmp_path / "w.safetensors"
    encoder, like = {"encoder": {"kernel": jnp.ones(3)}}, WEIGHTS
    checkpoint.save_weights(path, {**WEIGHTS, **encoder}, {})
    assert_bitwise_equal(checkpoint.load_weights(path, like, unread=("encoder", "none")), WEIGHTS)
    with pytest.raises(UsageError, match="left over: encoder/kernel"):
        checkpoint.load_weights(path, like)
    with pytest.raises(UsageError, match="missing: other"):
        checkpoint.load_weights(path, {**like, "other": jnp.ones(1)}, unread=("encoder",))
    checkpoint.save_weights(path, {**WEIGHTS, "encoder2": jnp.ones(1)}, {})
    with pytest.raises(UsageError, match="left over: encoder2"):
        checkpoint.load_weights(path, like, unread=("encoder",))


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, WEIGHTS, {})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="w.safetensors is not a whole safetensors file"):
        checkpoint.load_weights(path, WEIGHTS)
