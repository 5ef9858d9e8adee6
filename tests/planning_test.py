"""The fastest mesh that fits: against what was counted of each; one shard against all."""

import math
from types import SimpleNamespace

import jax
import pytest
from equipment import SMALL_RUN, configure

from kvpo_jax import fitting, memory, network, plan_memory, planning, work
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import with_fields

SPEED = planning.Speed()
MESH = [f"mesh.{axis}" for axis in sharding.AXES]


@pytest.fixture(scope="module")
def config():
    return configure("configs/tiny.py", SMALL_RUN)


def sizes_of(fields):
    return tuple(fields[name] for name in MESH)


# ---------------------------------------------------------------- meshes


def test_meshes_use_the_most_devices_and_keep_given_sizes(config):
    """4 prompts, 4 branches, 2 heads: at most 32 devices have something to do."""
    heads = config.model.num_heads
    assert heads == 2
    every = {sizes_of(fields) for fields in planning.meshes(config, 8, node=8)}
    assert all(math.prod(sizes) == 8 for sizes in every)
    assert {(2, 1, 4, 1), (1, 2, 4, 1), (4, 1, 1, 2), (1, 4, 1, 2), (2, 1, 2, 2)} < every
    assert all(sizes[0] * sizes[1] <= 4 and sizes[2] <= 4 and sizes[3] <= 2 for sizes in every)
    forty = {sizes_of(fields) for fields in planning.meshes(config, 40, node=8)}
    assert {math.prod(sizes) for sizes in forty} == {32}
    given = with_fields(config, {"mesh.branch": 1, "mesh.context": 2, "mesh.fsdp": 2})
    assert [sizes_of(x) for x in planning.meshes(given, 8, node=8)] == [(2, 2, 1, 2)]
    given = with_fields(config, {"mesh.branch": 1, "mesh.context": 2, "mesh.data": 2})
    assert [sizes_of(x) for x in planning.meshes(given, 8, node=8)] == [(2, 2, 1, 2)]
    none = with_fields(config, {"mesh.data": 3})
    assert planning.meshes(none, 8, node=8) == []


def test_weights_are_cut_over_one_device_a_node_or_all(config):
    config = with_fields(config, {"train.prompts_per_iteration": 32})
    fixed = with_fields(config, {"mesh.branch": 1, "mesh.context": 2})
    found = [sizes_of(fields) for fields in planning.meshes(fixed, 64, node=8)]
    assert sorted(found) == [(1, 32, 1, 2), (8, 4, 1, 2), (32, 1, 1, 2)]


# ---------------------------------------------------------------- one shard for all


def test_what_one_shard_does_is_what_all_do(config):
    """Bytes and work on 2 x 1 x 2 x 1 devices, and on a shard's 1 x 1 x 2 x 1."""
    fields = {"mesh.data": 2, "mesh.branch": 2, "train.micro_batch": 2}
    config, devices = with_fields(config, fields), jax.devices()[:4]
    alone, mesh = fitting.of_one_shard(config, devices)
    assert mesh.size == 4 and alone.train.prompts_per_iteration == 2
    assert (alone.train.micro_batch, alone.eval.prompts, alone.eval.batch) == (1, 2, 1)
    assert memory.estimate(memory.plan(config, devices)).peak() == fitting.peak(config, devices)
    whole, own = (
        work.sum_of(work.count(*run, lambda pivots: pivots[:1]).stages.values())
        for run in ((config, devices), (alone, devices[:2]))
    )
    assert (whole.flops, whole.seconds, whole.sent) == (own.flops, own.seconds, own.sent)
    assert whole.sent


def test_of_weights_that_are_cut_a_shard_has_as_few_parts_as_can_be(config):
    """What it computes does not depend on how many there are, and few devices are traced sooner."""
    fields = {"train.prompts_per_iteration": 12, "mesh.branch": 1, "eval.prompts": 12}
    for fsdp, parts in (1, 1), (4, 2), (3, 3):
        sizes = {"mesh.data": 12 // fsdp // 3 or 1, "mesh.fsdp": fsdp}
        whole = with_fields(config, {**fields, **sizes})
        alone, mesh = fitting.of_one_shard(whole, jax.devices() * 2, cut_least=True)
        assert mesh.shape["fsdp"] == fsdp and sizes_of(config_lib.flat(alone)) == (1, parts, 1, 1)
        each = 12 // (sizes["mesh.data"] * fsdp)  # prompts of a device
        assert alone.train.prompts_per_iteration == alone.train.micro_batch == parts * each
        assert fitting.of_one_shard(whole, jax.devices() * 2)[0].mesh.fsdp == fsdp


# ---------------------------------------------------------------- the fastest


@pytest.fixture
def two(config, monkeypatch):
    """A run of two prompts whose micro-batch alone may be made smaller."""
    monkeypatch.setattr(planning, "SLOWER", ())
    monkeypatch.setattr(planning, "AS_FAST", ("train.micro_batch",))
    fields = {"mesh.branch": 1, "mesh.context": 1, "mesh.fsdp": 1, "replay.chunk": 0}
    fields |= {"train.prompts_per_iteration": 2, "eval.prompts": 2, "rollout.branches": 2}
    fields |= {"model.num_heads": 1}  # which no context of more devices can divide
    return with_fields(config, fields)


def test_the_fastest_that_fits_and_what_is_said_if_nothing_does(two):
    """On one device both prompts at a time, then one; on two devices one each."""
    one, both = jax.devices()[:1], jax.devices()[:2]
    apart = with_fields(two, {"train.micro_batch": 1})
    needs = {size: fitting.peak(config, one) for size, config in ((2, two), (1, apart))}
    assert needs[1] < needs[2]
    for limit, fields in (needs[2], {}), (needs[2] - 1, {"train.micro_batch": 1}):
        best = planning.fastest(two, one, limit, SPEED).options[0].proposal
        assert best.fields == {**dict.fromkeys(MESH, 1), **fields}
        assert best.peak == needs[fields.get("train.micro_batch", 2)] <= limit
        assert best.is_same_gradient()
    nothing = planning.fastest(two, one, needs[1] - 1, SPEED)
    assert not nothing.options and nothing.least.peak == needs[1]

    [option] = planning.fastest(two, both, needs[1], SPEED).options
    assert sizes_of(option.proposal.fields) == (2, 1, 1, 1)
    assert option.proposal.peak == fitting.peak(with_fields(two, {"mesh.data": 2}), both)
    assert planning.needed(two, both, SPEED, option) == pytest.approx(1, abs=0.02)
    # In a ring of two each sends the gradient of LoRA once: rank 2 of 8 and of 2 Linears.
    lora = 4 * 2 * (8 * (16 + 16) + 2 * (16 + 32))
    assert option.sending == pytest.approx(lora / 450e9)
    slower = planning.Speed(SPEED.efficiency / 2, network.Wires(node=1, between=45e9))
    timed = planning.timed(two, both, slower, option.proposal)
    assert timed.computing == pytest.approx(2 * option.computing)
    assert timed.sending == pytest.approx(10 * option.sending)


def test_what_makes_an_iteration_slower_is_tried_where_nothing_else_fits(two, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(planning, "SLOWER", ("train.micro_batch",))
    monkeypatch.setattr(planning, "AS_FAST", ())
    apart, own = (
        fitting.peak(with_fields(two, {"train.micro_batch": size}), one) for size in (1, 2)
    )
    for limit, fields in (own, {}), (apart, {"train.micro_batch": 1}):
        best = planning.fastest(two, one, limit, SPEED).options[0].proposal
        assert best.fields == {**dict.fromkeys(MESH, 1), **fields}


def test_the_table_says_what_fits_where(two, monkeypatch, capsys):
    """A row for each number of devices, also where the mesh that is asked for needs more."""
    clusters = ((1, "small GPU", 1e-6), (1, "GPU", 0.5), (2, "GPUs", 0.5))
    monkeypatch.setattr(plan_memory, "CLUSTERS", clusters)
    flags = {"efficiency": 0.5, "node_devices": 8, "nvlink_gb": 450.0, "infiniband_gb": 50.0}

    def rows(config):
        plan_memory.report_table(config, SimpleNamespace(**flags))
        lines = capsys.readouterr().out.splitlines()
        table = [line for line in lines if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]

    header, _, small, one, both = rows(two)
    assert len(header) == len(small) == len(one) == len(both) == 9
    assert small[:3] == ["1 small GPU", "0", "no: 0.0 at least"] and not any(small[3:])
    [option] = planning.fastest(two, jax.devices()[:2], 1e9, SPEED).options
    assert both[:2] == ["2 GPUs", "0"] and both[3:6] == ["2 x 1 x 1 x 1", "0", "0.0"]
    assert both[6] in ("98%", "99%", "100%", "101%", "102%")  # nothing is done twice
    assert both[7:] == [f"{3600 * 2 / option.seconds:.0f}", ""]
    assert one[3:7] == ["1 x 1 x 1 x 1", "0", "0.0", "100%"]
    _, _, _, one, both = rows(with_fields(two, {"mesh.data": 2}))
    assert one[2] == "no: mesh.data=2 x mesh.branch=1 needs 2 of 1 devices"
    assert both[3] == "2 x 1 x 1 x 1"
    with pytest.raises(UsageError, match="mesh.data=3 does not divide 2 prompts"):
        rows(with_fields(two, {"mesh.data": 3}))


def test_no_mesh_is_a_mistake(two):
    three = with_fields(two, {"mesh.data": 3})
    with pytest.raises(UsageError, match="mesh.data=3 does not divide 2 prompts"):
        planning.fastest(three, jax.devices()[:3], math.inf, SPEED)
