"""The transformer at a small size with every parameter random, and its layers against NumPy."""

import dataclasses
from functools import partial

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kvpo_jax.algorithm.kv_cache import Context, Store
from kvpo_jax.models import layers
from kvpo_jax.models.wan import Wan, WanConfig, empty_context, init_variables
from kvpo_jax.types import BlockKV

CFG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=5,
    text_len=4,
    channels=3,
    lora_rank=2,
    lora_alpha=3.0,
)
BATCH, FRAMES, HEIGHT, WIDTH, SLOTS = 2, 3, 4, 6, 5
TOKENS = CFG.tokens_per_frame(HEIGHT, WIDTH)
START = 7  # first frame of the block, after the frames of its context
PROMPT = 2  # tokens of the prompts; the others are padding


def random_variables(cfg: WanConfig, seed: int):
    """Every parameter random: the initialisation's zeros and ones would hide what they affect."""
    like = jax.eval_shape(partial(init_variables, cfg), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), like)


@struct.dataclass
class Inputs:
    """The arguments of one call."""

    x: jax.Array
    sigma: jax.Array
    text: jax.Array
    context: Context
    start_frame: jax.Array


@pytest.fixture(scope="module")
def variables():
    return random_variables(CFG, 0)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    kv = (CFG.num_layers, BATCH, SLOTS, TOKENS, CFG.num_heads, CFG.head_dim)
    # Slot 1 of row 0 and slots 3 and 4 of row 1 are empty, but hold numbers.
    frame = jnp.array([[0, -1, 2, 5, 6], [0, 1, 4, -1, -1]])
    return Inputs(
        x=normal(BATCH, FRAMES, HEIGHT, WIDTH, CFG.channels),
        sigma=jnp.array([0.9, 0.3]),
        text=normal(BATCH, CFG.text_len, CFG.text_dim).at[:, PROMPT:].set(0),
        context=Context.of(k=normal(*kv), v=normal(*kv), frame=frame),
        start_frame=jnp.full(BATCH, START),
    )


def network(cfg: WanConfig, context_axis: str | None = None):
    """(variables, Inputs, own_keys) -> velocity, BlockKV."""
    model = Wan(cfg, context_axis)

    def apply(variables, inputs, own_keys=None):
        text = model.apply(variables, inputs.text, method=Wan.encode_text)
        return model.apply(
            variables,
            inputs.x,
            inputs.sigma,
            text,
            inputs.context,
            inputs.start_frame,
            own_keys=own_keys,
        )

    return apply


forward = jax.jit(network(CFG))
without_lora = jax.jit(network(dataclasses.replace(CFG, lora_rank=0)))


def relative_l2(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---------------------------------------------------------------- shapes


def test_shapes(variables, inputs):
    velocity, kv = forward(variables, inputs)
    assert velocity.shape == inputs.x.shape and velocity.dtype == jnp.float32
    expected = (CFG.num_layers, BATCH, FRAMES, TOKENS, CFG.num_heads, CFG.head_dim)
    assert kv.k.shape == kv.v.shape == expected
    text = Wan(CFG).apply(variables, inputs.text, method=Wan.encode_text)
    assert (
        text.k.shape
        == text.v.shape
        == (CFG.num_layers, BATCH, CFG.text_len, CFG.num_heads, CFG.head_dim)
    )


def test_other_lengths_need_other_shapes_only(variables, inputs):
    """A context of any size and a block of any length, with the same parameters."""
    context = empty_context(CFG, BATCH, 1, TOKENS)
    velocity, kv = forward(variables, inputs.replace(x=inputs.x[:, :1], context=context))
    assert velocity.shape == (BATCH, 1, HEIGHT, WIDTH, CFG.channels)
    assert kv.k.shape[2] == 1


def test_a_context_of_another_shape_is_an_error(variables, inputs):
    context = inputs.context.replace(frame=inputs.context.frame[:, :-1])
    with pytest.raises(AssertionError):
        forward(variables, inputs.replace(context=context))


def test_an_unknown_remat_is_an_error(variables, inputs):
    with pytest.raises(ValueError, match="model.remat='all' is not one of none, products, block"):
        network(dataclasses.replace(CFG, remat="all"))(variables, inputs)


# ---------------------------------------------------------------- what is read, and what is not


def test_masked_frames_have_no_influence(variables, inputs):
    context = inputs.context
    empty = (context.frame < 0)[None, :, :, None, None, None]
    other = Context.of(
        jnp.where(empty, 50.0, context.k), jnp.where(empty, -70.0, context.v), context.frame
    )
    assert not np.array_equal(other.k, context.k)
    chex.assert_trees_all_equal(
        forward(variables, inputs.replace(context=other)), forward(variables, inputs)
    )


def test_every_frame_that_is_not_masked_is_read(variables, inputs):
    plain, _ = forward(variables, inputs)
    for slot in range(SLOTS):
        given = inputs.context
        context = Context.of(given.k, given.v.at[:, :, slot].add(1.0), given.frame)
        velocity, _ = forward(variables, inputs.replace(context=context))
        changed = np.any(np.asarray(velocity != plain), axis=(1, 2, 3, 4))
        np.testing.assert_array_equal(changed, inputs.context.frame[:, slot] >= 0)


def test_the_order_of_the_context_does_not_matter(variables, inputs):
    order = jnp.array([3, 0, 4, 2, 1])
    context = inputs.context
    permuted = Context.of(
        k=context.k[:, :, order], v=context.v[:, :, order], frame=context.frame[:, order]
    )
    ours, theirs = forward(variables, inputs.replace(context=permuted)), forward(variables, inputs)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_frame_numbers_of_the_context_only_say_what_is_empty(variables, inputs):
    """Keys are stored rotated: a context needs no position of its own."""
    frame = jnp.where(inputs.context.frame < 0, -1, 99)
    other = inputs.replace(context=inputs.context.replace(frame=frame))
    chex.assert_trees_all_equal(forward(variables, other), forward(variables, inputs))


def test_rows_of_a_batch_do_not_meet(variables, inputs):
    """Changing everything of row 1 leaves row 0 bit for bit as it was."""

    def kv(x):
        return x.at[:, 1].add(1.0)

    def row(x):
        return x.at[1].add(1)

    changed = Inputs(
        x=row(inputs.x),
        sigma=row(inputs.sigma),
        text=row(inputs.text),
        context=Context.of(
            k=kv(inputs.context.k), v=kv(inputs.context.v), frame=row(inputs.context.frame)
        ),
        start_frame=row(inputs.start_frame),
    )
    (velocity, new), (plain, old) = forward(variables, changed), forward(variables, inputs)
    np.testing.assert_array_equal(velocity[0], plain[0])
    np.testing.assert_array_equal(new.k[:, 0], old.k[:, 0])
    assert relative_l2(velocity[1], plain[1]) > 1e-2


def test_positions_of_a_window_are_those_of_the_video_while_it_cuts_nothing_off(variables, inputs):
    """Keys that are stored without RoPE, and turned where they are read."""

    def turned(k, frame):
        """float[L, batch, A, N, H, D] with the RoPE of frames int32[batch, A]."""
        for a in range(frame.shape[1]):
            cos, sin = layers.rope_table(frame[:, a], 1, HEIGHT // 2, WIDTH // 2, CFG.head_dim)
            k = k.at[:, :, a].set(jnp.stack([layers.apply_rope(x, cos, sin) for x in k[:, :, a]]))
        return k

    context = inputs.context
    frame = jnp.maximum(context.frame, 0)
    absolute = inputs.replace(
        context=Context.of(turned(context.k, frame), context.v, context.frame)
    )
    relative = inputs.replace(context=context.replace(sink=2, span=START + FRAMES))
    (velocity, kv), (expected, expected_kv) = (forward(variables, i) for i in (relative, absolute))
    np.testing.assert_allclose(velocity, expected, atol=1e-5, rtol=0)
    start = jnp.full((BATCH, FRAMES), START) + jnp.arange(FRAMES)
    np.testing.assert_allclose(turned(kv.k, start), expected_kv.k, atol=1e-5, rtol=0)
    assert relative_l2(kv.k, expected_kv.k) > 0.1


def test_a_block_of_a_window_depends_on_differences_of_frames_alone(variables, inputs):
    """Frames far beyond the table of positions, and all positions moved by 20."""
    frame = jnp.array([[2994, -1, 2995, 2998, 2999], [2996, 2997, 2999, -1, -1]])

    def velocity(frame, start, span, sink=0):
        context = inputs.context.replace(frame=frame, sink=sink, span=span)
        given = inputs.replace(context=context, start_frame=jnp.full(BATCH, start))
        return forward(variables, given)[0]

    ours = velocity(frame, 3000, 12)
    later = velocity(jnp.where(frame < 0, -1, frame + 7000), 10000, 12)
    np.testing.assert_array_equal(later, ours)
    np.testing.assert_allclose(velocity(frame, 3000, 32), ours, atol=1e-5, rtol=0)
    moved = velocity(frame.at[:, 0].add(-1), 3000, 12)
    assert all(relative_l2(moved[row], ours[row]) > 1e-4 for row in range(BATCH))
    # As in a video that ends with its first window: the block too, and behind a sink that stays.
    first = 12 - FRAMES
    early = velocity(jnp.where(frame < 0, -1, frame - 3000 + first), first, 12)
    np.testing.assert_array_equal(early, ours)
    behind = frame.at[:, 0].set(1)
    ours = velocity(behind, 3000, 12, sink=2)
    early = velocity(jnp.where(behind < 2, behind, behind - 3000 + first), first, 12, sink=2)
    np.testing.assert_array_equal(early, ours)


def test_attention_is_bidirectional_within_the_block(variables, inputs):
    plain, _ = forward(variables, inputs)
    for frame in range(FRAMES):
        velocity, _ = forward(variables, inputs.replace(x=inputs.x.at[:, frame].add(1.0)))
        assert np.all(np.any(np.asarray(velocity != plain), axis=(2, 3, 4)))


def test_own_frames_that_are_queries_only(variables, inputs):
    """They see the others and are not seen: the recache at a prompt switch."""
    own_keys = jnp.array([False, True, True])
    changed = inputs.replace(x=inputs.x.at[:, 0].add(1.0))
    (plain, _), (velocity, _) = (forward(variables, i, own_keys) for i in (inputs, changed))
    np.testing.assert_array_equal(velocity[:, 1:], plain[:, 1:])
    assert relative_l2(velocity[:, 0], plain[:, 0]) > 1e-2
    later, _ = forward(variables, inputs.replace(x=inputs.x.at[:, 2].add(1.0)), own_keys)
    assert np.all(np.any(np.asarray(later != plain), axis=(2, 3, 4)))
    all_keys = forward(variables, inputs, jnp.ones(FRAMES, bool))
    chex.assert_trees_all_close(all_keys, forward(variables, inputs), atol=2e-6, rtol=0)


def test_only_relative_time_matters(variables, inputs):
    """A block and its context, both moved by 11 frames, have the same velocity.

    The keys carry the positions.
    """
    written = inputs.replace(x=inputs.x[:, ::-1], context=empty_context(CFG, BATCH, SLOTS, TOKENS))

    def continued(start):
        _, kv = forward(variables, written.replace(start_frame=jnp.full(BATCH, start)))

        def pad(x):
            return jnp.pad(x, ((0, 0), (0, 0), (0, SLOTS - FRAMES), (0, 0), (0, 0), (0, 0)))

        frame = jnp.broadcast_to(jnp.array([start, start + 1, start + 2, -1, -1]), (BATCH, SLOTS))
        context = Context.of(k=pad(kv.k), v=pad(kv.v), frame=frame)
        return forward(
            variables, inputs.replace(context=context, start_frame=jnp.full(BATCH, start + 4))
        )[0]

    np.testing.assert_allclose(continued(11), continued(0), atol=1e-5)
    apart = forward(variables, inputs.replace(start_frame=inputs.start_frame + 1))[0]
    assert relative_l2(apart, forward(variables, inputs)[0]) > 1e-4


def test_padding_of_the_text_is_attended_to(variables, inputs):
    model = Wan(CFG)
    text = model.apply(variables, inputs.text, method=Wan.encode_text)
    # Padding is zeros going in, and the same non-zero constant in every prompt coming out.
    for kv in (text.k, text.v):
        padding = kv[:, :, PROMPT:]
        np.testing.assert_allclose(
            padding, jnp.broadcast_to(padding[:, :1, :1], padding.shape), atol=1e-6
        )
        assert float(jnp.abs(padding).max()) > 0.01

    def apply(text):
        return model.apply(
            variables, inputs.x, inputs.sigma, text, inputs.context, inputs.start_frame
        )[0]

    cut = jax.tree.map(lambda x: x[:, :, :PROMPT], text)
    assert relative_l2(jax.jit(apply)(cut), jax.jit(apply)(text)) > 1e-3


def test_noise_level_and_text_are_read(variables, inputs):
    plain, _ = forward(variables, inputs)
    for other in (
        inputs.replace(sigma=inputs.sigma + 0.01),
        inputs.replace(text=inputs.text[::-1]),
    ):
        assert relative_l2(forward(variables, other)[0], plain) > 1e-3


# ---------------------------------------------------------------- LoRA


LINEARS = {
    "blocks/self_q": (24, 24),
    "blocks/self_k": (24, 24),
    "blocks/self_v": (24, 24),
    "blocks/self_o": (24, 24),
    "blocks/cross_q": (24, 24),
    "text_kv/k": (24, 24),
    "text_kv/v": (24, 24),
    "blocks/cross_o": (24, 24),
    "blocks/ffn_0": (24, 32),
    "blocks/ffn_2": (32, 24),
}


def flat(tree) -> dict[str, jax.Array]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_the_ten_linears_of_a_block_have_lora_and_nothing_else_has(variables):
    shapes = {name: x.shape for name, x in flat(variables["lora"]).items()}
    expected = {}
    for name, (fan_in, features) in LINEARS.items():
        expected |= {f"{name}/a": (2, fan_in, 2), f"{name}/b": (2, 2, features)}
    assert shapes == expected
    # Their kernels, and those of the Linears outside the blocks.
    kernels = {
        name.removesuffix("/kernel")
        for name in flat(variables["params"])
        if name.endswith("/kernel")
    }
    outside = {
        "patch_embedding",
        "text_embedding_0",
        "text_embedding_2",
        "time_embedding_0",
        "time_embedding_2",
    }
    assert kernels == set(LINEARS) | outside | {"time_projection_1", "head"}


def test_no_rank_no_collection():
    like = jax.eval_shape(
        partial(init_variables, dataclasses.replace(CFG, lora_rank=0)), jax.random.key(0)
    )
    assert set(like) == {"params"}


def test_a_fresh_adapter_changes_nothing(variables, inputs):
    fresh = jax.jit(lambda key: init_variables(CFG, key)["lora"])(jax.random.key(3))
    for name, x in flat(fresh).items():
        if name.endswith("/b"):
            assert not np.any(x), name
        else:
            # Uniform in +-1/sqrt(in), anew in every layer.
            bound = LINEARS[name.removesuffix("/a")][0] ** -0.5
            assert 0.8 * bound < np.abs(x).max() <= bound, name
            assert not np.array_equal(x[0], x[1]), name
    ours = forward({"params": variables["params"], "lora": fresh}, inputs)
    chex.assert_trees_all_equal(ours, without_lora({"params": variables["params"]}, inputs))


def test_lora_is_an_update_of_the_kernel(variables, inputs):
    """W + alpha / r A B, merged in every Linear."""
    params, lora = flat(variables["params"]), flat(variables["lora"])
    for name in LINEARS:
        update = jnp.einsum("lir,lro->lio", lora[f"{name}/a"], lora[f"{name}/b"])
        params[f"{name}/kernel"] += CFG.lora_alpha / CFG.lora_rank * update
    merged = {"params": flax.traverse_util.unflatten_dict(params, sep="/")}
    ours, theirs = forward(variables, inputs), without_lora(merged, inputs)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5, rtol=0)
    assert relative_l2(without_lora({"params": variables["params"]}, inputs)[0], ours[0]) > 1e-2


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients_of_a_lora_linear(dtype, rtol, rows):
    """With respect to all inputs, against the closed form in float64.

    Only many rows go through the summed kernel.
    """
    rng = np.random.default_rng(4)
    layer = layers.LoRADense(7, rank=3, alpha=6.0, dtype=jnp.dtype(dtype))

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, d_y = draw(2, rows, 4), draw(2, rows, 7)
    params = {"kernel": draw(4, 7), "bias": draw(7)}
    lora = {"a": draw(4, 3, dtype="float32"), "b": draw(3, 7, dtype="float32")}
    apply = jax.jit(lambda x, params, lora: layer.apply({"params": params, "lora": lora}, x))
    y, pullback = jax.vjp(apply, x, params, lora)
    d_x, d_params, d_lora = jax.jit(pullback)(d_y)

    def wide(tree):
        return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

    x, d_y, params, lora = wide((x.reshape(-1, 4), d_y.reshape(-1, 7), params, lora))
    kernel = params["kernel"] + 2.0 * lora["a"] @ lora["b"]
    expected = {
        "y": (y, x @ kernel + params["bias"]),
        "x": (d_x, d_y @ kernel.T),
        "kernel": (d_params["kernel"], x.T @ d_y),
        "bias": (d_params["bias"], d_y.sum(axis=0)),
        "a": (d_lora["a"], 2.0 * x.T @ d_y @ lora["b"].T),
        "b": (d_lora["b"], 2.0 * (x @ lora["a"]).T @ d_y),
    }
    for name, (ours, theirs) in expected.items():
        ours = wide(ours).reshape(theirs.shape)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max(), err_msg=name
        )


# ---------------------------------------------------------------- memory and precision


def test_remat_changes_neither_value_nor_gradient(variables, inputs):
    def loss(cfg, lora):
        velocity, kv = network(cfg)({"params": variables["params"], "lora": lora}, inputs)
        return jnp.mean(jnp.square(velocity)) + jnp.mean(kv.k * kv.v)

    value, gradient = {}, {}
    for remat in ("none", "products", "block"):
        function = jax.jit(jax.value_and_grad(partial(loss, dataclasses.replace(CFG, remat=remat))))
        value[remat], gradient[remat] = function(variables["lora"])
    for remat in ("products", "block"):
        np.testing.assert_allclose(value[remat], value["none"], rtol=1e-6)
        for name, ours in flat(gradient[remat]).items():
            theirs = flat(gradient["none"])[name]
            assert np.any(theirs), name
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max(), err_msg=name
            )


def test_tokens_over_devices_change_neither_value_nor_gradient(variables, inputs):
    """Two devices with half of the tokens of every frame and one head each.

    With frames that are queries only, empty entries, and far ones of which each head picks one.
    """
    cfg = dataclasses.replace(CFG, remat="products", sparse_memory=1)
    far = jnp.array([[True, False, True, False, False], [True, True, False, False, False]])
    inputs = inputs.replace(context=inputs.context.replace(far=far))
    one, heads = P(), P(None, None, None, None, "context")
    own_keys = jnp.array([False, True, True])

    def run(axis, variables, inputs):
        if axis is not None:
            variables = jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), variables)
        return network(cfg, axis)(variables, inputs, own_keys)

    spread = jax.shard_map(
        partial(run, "context"),
        mesh=Mesh(np.asarray(jax.devices()[:2]), ("context",)),
        in_specs=(
            one,
            Inputs(
                x=one,
                sigma=one,
                text=one,
                start_frame=one,
                context=inputs.context.replace(
                    stores=(Store(k=heads, v=heads),), row=one, slot=one, frame=one, far=one
                ),
            ),
        ),
        out_specs=(one, BlockKV(k=heads, v=heads)),
    )

    def loss(function, lora):
        velocity, kv = function({"params": variables["params"], "lora": lora}, inputs)
        return jnp.mean(jnp.square(velocity)) + jnp.mean(kv.k * kv.v), (velocity, kv)

    (_, theirs), slope = jax.jit(
        jax.value_and_grad(partial(loss, partial(run, None)), has_aux=True)
    )(variables["lora"])
    (_, ours), own_slope = jax.jit(jax.value_and_grad(partial(loss, spread), has_aux=True))(
        variables["lora"]
    )
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=3e-6)
    for name, gradient in flat(own_slope).items():
        assert np.any(slope_of := flat(slope)[name]), name
        assert relative_l2(gradient, slope_of) < 2e-6, name


def test_bfloat16_is_near_float32(variables, inputs):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    like = jax.eval_shape(partial(init_variables, cfg), jax.random.key(0))
    half = jax.tree.map(lambda x, like: x.astype(like.dtype), variables, like)
    dtypes = {name: x.dtype for name, x in flat(half["params"]).items()}
    assert dtypes["blocks/self_q/kernel"] == dtypes["head/kernel"] == jnp.bfloat16
    assert dtypes["blocks/modulation"] == dtypes["blocks/norm3/scale"] == jnp.float32
    assert all(x.dtype == jnp.float32 for x in flat(half["lora"]).values())
    velocity, kv = jax.jit(network(cfg))(half, inputs)
    exact, exact_kv = forward(variables, inputs)
    assert velocity.dtype == jnp.float32 and kv.k.dtype == kv.v.dtype == jnp.bfloat16
    assert relative_l2(velocity, exact) < 2e-2
    assert relative_l2(kv.k, exact_kv.k) < 2e-2
    assert relative_l2(kv.v, exact_kv.v) < 2e-2


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("head_dim", [12, 16, 24, 128])
def test_rope_is_a_complex_product(head_dim):
    """Against Wan's table of complex128, 1024 positions long, one part of the channels per axis."""
    frames, height, width, start = 2, 3, 4, (0, 1000)
    part = head_dim // 6 * 2  # channels of y and of x; time has the rest

    def table(channels):
        return np.exp(
            1j * np.outer(np.arange(1024), 10000.0 ** (-np.arange(0, channels, 2) / channels))
        )

    time, space = table(head_dim - 2 * part), table(part)
    expected = np.empty((2, frames, height, width, head_dim // 2), np.complex128)
    for b, f, y, x in np.ndindex(expected.shape[:-1]):
        expected[b, f, y, x] = np.concatenate([time[start[b] + f], space[y], space[x]])
    expected = expected.reshape(2, -1, head_dim // 2)

    cos, sin = layers.rope_table(jnp.array(start), frames, height, width, head_dim)
    np.testing.assert_allclose(cos, expected.real, atol=1e-6)
    np.testing.assert_allclose(sin, expected.imag, atol=1e-6)

    x = (
        np.random.default_rng(0)
        .normal(size=(2, frames * height * width, 2, head_dim))
        .astype(np.float32)
    )
    rotated = x.astype(np.float64).view(np.complex128) * expected[:, :, None]
    np.testing.assert_allclose(
        layers.apply_rope(jnp.asarray(x), cos, sin), rotated.view(np.float64), atol=1e-6
    )


def test_sinusoid_against_float64():
    t = np.array([0.0, 1.0, 625.0, 937.5, 1000.0])
    angle = t[:, None] * 10000.0 ** (-np.arange(32) / 32)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    # float32 knows an angle of 1000 to 6e-5 / 2.
    np.testing.assert_allclose(layers.sinusoid(jnp.asarray(t), 64), expected, atol=4e-5)


def test_norms_by_hand():
    # mean 2, variance 1; mean square of (1, -1, 5, 3) is 9
    np.testing.assert_allclose(layers.layer_norm(jnp.array([1.0, 3.0]), 0.0), [-1, 1], atol=1e-6)
    norm = layers.RMSNorm(eps=0.0)
    scaled = norm.apply(
        {"params": {"scale": jnp.array([1.0, 2.0, 3.0, 6.0])}}, jnp.array([1.0, -1.0, 5.0, 3.0])
    )
    np.testing.assert_allclose(scaled, [1 / 3, -2 / 3, 5, 6], atol=1e-6)
