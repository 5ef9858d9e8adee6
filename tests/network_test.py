"""What devices send: by hand, and as traced against as compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import network, work
from kvpo_jax.errors import UsageError
from kvpo_jax.network import Transfer, Wires
from kvpo_jax.runtime import sharding

SIZES = {"data": 2, "fsdp": 2, "branch": 1, "context": 2}


def mesh_of(sizes):
    devices = np.asarray(jax.devices()[: math.prod(sizes.values())])
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


# ---------------------------------------------------------------- a program

LAYERS, WIDTH, ROWS = 3, 16, 8
LAYER, BLOCK = 4 * WIDTH**2, 4 * WIDTH * ROWS // 4  # bytes of a layer, and of a shard's rows


def layers_of(w, x):
    """The gradient of layers that are gathered one by one, and of rows that are exchanged."""

    def layer(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        y = jnp.tanh(x @ w)
        y = jax.lax.all_to_all(y, "context", 1, 0, tiled=True)
        y = jax.lax.all_to_all(2 * y, "context", 0, 1, tiled=True)
        return jax.lax.ppermute(y, "context", [(0, 1), (1, 0)]), None

    def loss(w):
        rows = jax.lax.pcast(x, "context", to="varying")
        w = jax.lax.pcast(w, ("data", "context"), to="varying")
        return jax.lax.scan(layer, rows, w)[0].sum()

    value, gradient = jax.value_and_grad(loss)(w)
    return jax.lax.psum(value, ("data", "fsdp", "context")), gradient


# Gathered once and scattered once; exchanged and passed on forward and backward.
BY_HAND = {
    Transfer("all-gather", ("fsdp",)): LAYERS * LAYER,
    Transfer("reduce-scatter", ("fsdp",)): LAYERS * LAYER,
    Transfer("all-reduce", ("data", "context")): LAYERS * LAYER / 2,
    Transfer("all-reduce", ("data", "fsdp", "context")): 4,
    Transfer("all-to-all", ("context",)): LAYERS * 2 * 2 * BLOCK,
    Transfer("collective-permute", ("context",)): LAYERS * 2 * BLOCK,
}


def test_a_program_as_traced_and_as_compiled():
    weights, rows = Spec(None, "fsdp"), Spec(sharding.ROWS)
    sharded = jax.shard_map(
        layers_of, mesh=mesh_of(SIZES), in_specs=(weights, rows), out_specs=(Spec(), weights)
    )
    sizes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    traced = jax.jit(sharded).trace(*arguments)
    assert work.of_program(traced.jaxpr.jaxpr).sent == BY_HAND
    compiled = traced.lower().compile().as_text()
    assert network.of_compiled(compiled, SIZES) == BY_HAND


def test_groups_as_compilers_list_and_count_them():
    """Devices 0 and 4 differ in data, 0 and 2 in fsdp, 0 and 1 in context."""
    line = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %y = f32[4,2]{1,0} all-reduce(%x), "
    whole = 4 * 4 * 2

    def of(groups):
        return network.of_compiled(line + groups, SIZES)

    for groups, axes in {
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
        "replica_groups=[4,2]<=[8]": ("context",),
        "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
        "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
        "replica_groups=[2,4]<=[8], use_global_device_ids=true": ("fsdp", "context"),
        "replica_groups={}": ("data", "fsdp", "context"),
    }.items():
        assert of(groups) == {Transfer("all-reduce", axes): whole}, groups
    assert of("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}") == {}


@pytest.mark.parametrize(
    "operation, kind, whole",
    [
        ("f32[2,8]{1,0} all-gather(%x)", "all-gather", 64),
        ("(f32[8]{0}, f32[2,8]{1,0}) all-gather-start(%x)", "all-gather", 64),
        ("bf16[8]{0} reduce-scatter(%x)", "reduce-scatter", 2 * 16),
        ("(f32[8]{0}, bf16[8]{0}) all-reduce-start(%x, %y)", "all-reduce", 48),
        (
            "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)",
            "collective-permute",
            32,
        ),
        ("(pred[8]{0}, pred[8]{0}) all-to-all(%x, %y)", "all-to-all", 16),
    ],
)
def test_what_a_compiled_operation_sends(operation, kind, whole):
    """Of all arrays of both devices of a group, where they are gathered or scattered."""
    groups = "source_target_pairs" if "permute" in kind else "replica_groups"
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %y = {operation}, {groups}={{{{0,1}},{{2,3}}}}"
    assert network.of_compiled(text, SIZES) == {Transfer(kind, ("context",)): whole}


def test_a_compiled_loop_of_unknown_length_cannot_be_counted():
    text = """
%body (x: f32[4]) -> f32[4] {
  %y = f32[4]{0} all-reduce(%x), replica_groups=[1,8]<=[8]
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %z = f32[4]{0} while(%x), condition=%condition, body=%body"""
    with pytest.raises(UsageError, match="unknown length sends .* XLA_FLAGS"):
        network.of_compiled(text, SIZES)
    known = text + ', backend_config={"known_trip_count":{"n":"5"}}'
    every = Transfer("all-reduce", ("data", "fsdp", "context"))
    assert network.of_compiled(known, SIZES) == {every: 5 * 16}


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%none, %half, %whole}",
        "true_computation=%whole, false_computation=%none",
    ],
)
def test_of_a_compiled_condition_the_most_is_counted(branches):
    text = """
%none (x: f32[4]) -> f32[4] {
  %y = f32[4]{0} negate(%x)
}
%half (x: f32[4]) -> f32[4] {
  %y = bf16[4]{0} all-reduce(%x), replica_groups=[1,8]<=[8]
}
%whole (x: f32[4]) -> f32[4] {
  %y = f32[4]{0} all-reduce(%x), replica_groups=[1,8]<=[8]
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %z = f32[4]{0} conditional(%i, %x, %x), """
    every = Transfer("all-reduce", ("data", "fsdp", "context"))
    assert network.of_compiled(text + branches, SIZES) == {every: 16}


# ---------------------------------------------------------------- in seconds


def test_what_a_ring_sends_and_how_fast():
    """Of 6 GB: two of two nodes of eight; then eight in each of four nodes."""
    wires, whole = Wires(node=8, inside=400.0, between=50.0), 6e9
    sizes = {"data": 2, "fsdp": 4, "branch": 1, "context": 2}

    def of(kind, *axes, sizes=sizes):
        return network.by_axes({Transfer(kind, axes): whole}, sizes, wires)

    assert of("all-gather", "fsdp") == {("fsdp",): (4.5e9, 4.5e9 / 400, 400)}
    assert of("all-reduce", "data", "branch") == {("data",): (6e9, 6e9 / 50, 50)}
    assert of("all-to-all", "context") == {("context",): (3e9, 3e9 / 400, 400)}
    assert of("all-reduce", "branch") == {}
    # Two rings share the adapters of the two devices that a node has in a group of four.
    both = of("all-reduce", "data", "context")[("data", "context")]
    assert both == (2 * 0.75 * whole, 1.5 * whole / 100, 100)
    assert of("all-to-all", "data", "context")[("data", "context")].bandwidth == 50
    wide = {"data": 32, "fsdp": 1, "branch": 1, "context": 1}
    assert of("all-reduce", "data", sizes=wide)[("data",)].bandwidth == 400
    # Three devices fit into a node of eight twice, and the next three lie in two nodes.
    three = {"data": 8, "fsdp": 1, "branch": 1, "context": 3}
    assert of("all-to-all", "context", sizes=three)[("context",)].bandwidth == 50
    # Of devices 0, 3, 6, ... 21 each node has two or three.
    assert of("all-reduce", "data", sizes=three)[("data",)].bandwidth == 100


def test_transfers_over_the_same_axes_add_up():
    traffic = {Transfer("all-gather", ("fsdp",)): 8.0, Transfer("all-reduce", ("fsdp",)): 8.0}
    sizes = {"data": 1, "fsdp": 2, "branch": 1, "context": 1}
    wires = Wires(node=8, inside=2.0, between=1.0)
    assert network.by_axes(traffic, sizes, wires) == {("fsdp",): (4 + 8, 6, 2)}
    assert network.seconds(traffic, sizes, wires) == 6
