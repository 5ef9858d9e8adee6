"""Attention over a block and its past: against JAX's own, in tiles of any size, with gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kvpo_jax.models import attention as attention_lib
from kvpo_jax.models.attention import Keys, attention
from kvpo_jax.models.wan import Wan, WanConfig, empty_context, init_variables
from kvpo_jax.runtime import sharding

BATCH, QUERIES, OWN, PAST, HEADS, DIM = 2, 12, 12, 20, 3, 4


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def inputs(dtype=jnp.float32):
    def kv(keys):
        return (
            random(BATCH, keys, HEADS, DIM, dtype=dtype),
            random(BATCH, keys, DIM, HEADS, dtype=dtype),
        )

    (own_k, own_v), (past_k, past_v) = kv(OWN), kv(PAST)

    def swap(x):
        return jnp.moveaxis(x, 2, 3)

    return random(BATCH, QUERIES, HEADS, DIM, dtype=dtype), own_k, swap(own_v), past_k, swap(past_v)


# Which keys of the past and of the block are attended to: (length, mask, own mask).
RULES = {
    "all": (None, None, None),
    "length": (jnp.array([0, 13]), None, None),
    "mask": (
        jnp.array([20, 7]),
        jnp.asarray(np.random.default_rng(0).random((BATCH, HEADS, PAST)) < 0.6),
        None,
    ),
    "own mask": (None, None, jnp.arange(OWN)[None, None] >= jnp.array([3, 0])[:, None, None]),
}


def ours(rule, q, own_k, own_v, past_k, past_v, **options):
    length, mask, own_mask = RULES[rule]
    return attention(
        q, Keys(own_k, own_v, mask=own_mask), Keys(past_k, past_v, length, mask), **options
    )


def theirs(rule, q, own_k, own_v, past_k, past_v):
    length, mask, own_mask = RULES[rule]
    counts = jnp.ones((BATCH, HEADS, PAST + OWN), bool)
    if length is not None:
        counts &= (
            jnp.arange(PAST + OWN) < jnp.where(length == PAST, PAST + OWN, length)[:, None, None]
        )
        counts |= jnp.arange(PAST + OWN) >= PAST
        if rule == "mask":
            counts &= (jnp.arange(PAST + OWN) < length[:, None, None]) | (
                jnp.arange(PAST + OWN) >= PAST
            )
    if mask is not None:
        counts = counts.at[:, :, :PAST].set(counts[:, :, :PAST] & mask)
    if own_mask is not None:
        counts = counts.at[:, :, PAST:].set(own_mask)
    k, v = jnp.concatenate([past_k, own_k], axis=1), jnp.concatenate([past_v, own_v], axis=1)
    return jax.nn.dot_product_attention(q, k, v, mask=counts[:, :, None])


def test_by_hand():
    # Logits q k / sqrt(1) = log 1, log 3, and a masked key: weights 1/4 and 3/4 of the values 8 and
    # 4.
    q, k, v = (
        jnp.asarray(x, jnp.float32).reshape(1, -1, 1, 1)
        for x in ([1], [0, np.log(3), 9], [8, 4, 100])
    )
    masked = attention(q, Keys(k, v, mask=jnp.array([[[True, True, False]]])))
    np.testing.assert_allclose(masked.reshape(-1), [5.0], atol=1e-6)
    past = attention(q, Keys(k[:, :1], v[:, :1]), Keys(k[:, 1:], v[:, 1:], jnp.array([1])))
    np.testing.assert_allclose(past.reshape(-1), [5.0], atol=1e-6)
    none = attention(q, Keys(k[:, :2], v[:, :2]), Keys(k[:, :0], v[:, :0], jnp.array([0])))
    np.testing.assert_allclose(none.reshape(-1), [5.0], atol=1e-6)


@pytest.mark.parametrize("tile", [1, 3 * QUERIES * (OWN + PAST), 2**20])
@pytest.mark.parametrize("rule", RULES)
def test_is_that_of_the_library(rule, tile, monkeypatch):
    """The output, and the gradients of queries and block; those of the past are zero."""
    monkeypatch.setattr(attention_lib, "logits_at_once", lambda: tile)
    arguments = inputs()
    loops = {1: 6, 3 * QUERIES * (OWN + PAST): 2, 2**20: None}[tile]
    program = str(jax.make_jaxpr(lambda *x: ours(rule, *x))(*arguments))
    assert (f"length={loops}" in program) == (loops is not None)
    np.testing.assert_allclose(ours(rule, *arguments), theirs(rule, *arguments), atol=1e-6)

    def loss(function):
        return lambda *x: jnp.sum(jnp.sin(function(rule, *x)))

    gradient, expected = (
        jax.grad(loss(function), (0, 1, 2, 3))(*arguments) for function in (ours, theirs)
    )
    for a, b in zip(gradient[:3], expected[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert not np.any(gradient[3])


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        q, own_k, own_v, past_k, past_v = inputs(jnp.float64)

        def function(q, k, v):
            return attention(q, Keys(k, v), Keys(past_k, past_v, jnp.array([0, 13])))

        check_grads(function, (q, own_k, own_v), order=1, modes=("rev",), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_the_past_has_a_gradient_where_it_is_asked_for(rule):
    arguments = inputs()

    def total(past_gradient, *arrays):
        return jnp.sum(jnp.sin(ours(rule, *arrays, past_gradient=past_gradient)))

    def of_library(*arrays):
        return jnp.sum(jnp.sin(theirs(rule, *arrays)))

    every = tuple(range(5))
    found = jax.grad(partial(total, True), every)(*arguments)
    for one, other in zip(found, jax.grad(of_library, every)(*arguments), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert all(jnp.abs(x).max() > 0.01 for x in found)
    stopped = jax.grad(partial(total, False), every)(*arguments)
    assert not jnp.any(stopped[3]) and not jnp.any(stopped[4])
    np.testing.assert_allclose(stopped[0], found[0], atol=2e-5)


def test_half_precision_is_close():
    arguments = inputs()
    half = ours("length", *(x.astype(jnp.bfloat16) for x in arguments))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), ours("length", *arguments), atol=0.03)


@pytest.mark.parametrize("rule", ["all", "length"])
def test_arguments_of_the_library(rule):
    """cuDNN's arguments on a GPU, here given to XLA: own keys first, lengths instead of masks."""
    q, own_k, own_v, past_k, past_v = inputs()
    past = Keys(past_k, past_v, RULES[rule][0])
    out = attention_lib._library(q, Keys(own_k, own_v), past, implementation="xla")
    np.testing.assert_allclose(out, theirs(rule, q, own_k, own_v, past_k, past_v), atol=1e-6)
    alone = attention_lib._library(q, Keys(own_k, own_v), implementation="xla")
    np.testing.assert_allclose(alone, attention(q, Keys(own_k, own_v)), atol=1e-6)


# ---------------------------------------------------------------- cuDNN, lowered without a GPU


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks the installed library for its version before it traces; that is all it needs."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )


def calls(function, *arguments) -> dict[str, int]:
    """How often the program for NVIDIA GPUs calls cuDNN's attention, forward and backward."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return {name: program.count(f"@__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward")}


def test_cudnn_has_gradients_on_a_mesh(cudnn):
    """Their types say over which axes of the mesh they vary (JAX before 0.10.2 loses this)."""
    mesh, spec = sharding.make_mesh(2, 4, 2, 4), sharding.TRAJECTORIES

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec)
    def attention_per_shard(q, own_k, own_v, past_k, past_v, length):
        past = Keys(past_k[0], past_v[0], length[0])
        return attention(q[0], Keys(own_k[0], own_v[0]), past, "cudnn")[None]

    def loss(*arguments):
        return jnp.sum(attention_per_shard(*arguments).astype(jnp.float32))

    def half(keys):
        return jax.ShapeDtypeStruct((2, 4, keys, 2, 8), jnp.bfloat16)

    arguments = [half(k) for k in (6, 6, 6, 10, 10)]
    gradient = jax.grad(loss, (0, 1, 2))
    length = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    assert [x.shape for x in jax.eval_shape(gradient, *arguments, length)] == [
        x.shape for x in arguments[:3]
    ]
    assert calls(gradient, *arguments, length) == {"": 1, "Backward": 1}


@pytest.mark.parametrize("remat, forward", [("none", 2), ("products", 2), ("block", 4)])
def test_attention_is_not_computed_again_where_products_are_saved(remat, forward, cudnn):
    """Attention over the context and over the text, in a loop over layers.

    With "block" there is a second forward pass.
    """
    cfg = WanConfig(
        dim=32,
        ffn_dim=64,
        num_heads=2,
        num_layers=2,
        freq_dim=16,
        text_dim=8,
        text_len=4,
        channels=4,
        lora_rank=2,
        dtype="bfloat16",
        attention="cudnn",
        remat=remat,
    )
    variables = jax.eval_shape(lambda: init_variables(cfg, jax.random.key(0)))

    def loss(lora, params, x, text, context):
        sigma, start_frame = jnp.zeros(len(x)), jnp.zeros(len(x), jnp.int32)
        variables = {"params": params, "lora": lora}
        velocity = Wan(cfg).apply(
            variables, x, sigma, text, context, start_frame, method=Wan.touch_all
        )
        return jnp.sum(velocity)

    def half(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    context = jax.eval_shape(lambda: empty_context(cfg, 1, 2, 4))
    program = calls(
        jax.grad(loss),
        variables["lora"],
        variables["params"],
        half(1, 3, 4, 4, 4),
        half(1, 4, 8),
        context,
    )
    assert program == {"": forward, "Backward": 2}
