"""The counted work of an iteration: by hand, against XLA's count, and of the shipped config."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import ROOT, SMALL, SMALL_RUN, configure, run_command
from jax.sharding import Mesh

from kvpo_jax import memory, work
from kvpo_jax.algorithm import replay
from kvpo_jax.models import layers
from kvpo_jax.models.attention import Keys, attention
from kvpo_jax.network import Transfer
from kvpo_jax.rewards import composite
from kvpo_jax.run import eligible_pivots


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(function, *arguments, taken=1.0) -> work.Work:
    return work.of_program(jax.make_jaxpr(function)(*arguments).jaxpr, taken)


# ---------------------------------------------------------------- a program


def test_loops_are_multiplied_and_what_nobody_reads_does_not_count():
    def program(x, w):
        def step(x, _):
            return (x @ w) @ w.T, None

        _ = x @ w  # nobody reads it
        return jax.lax.scan(step, x, None, length=3)[0]

    done = counted(program, shape(4, 8), shape(8, 16))
    assert done.flops == 3 * 2 * (2 * 4 * 8 * 16)
    # x or the result of 4 x 8, the weights and the hidden 4 x 16, twice per turn.
    assert done.bytes == 3 * 2 * 4 * (4 * 8 + 8 * 16 + 4 * 16)


def test_a_convolution_by_hand():
    """3 x 3 taps of 5 channels for each of 7 features, at 6 x 4 places."""

    def program(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    assert counted(program, shape(1, 6, 4, 5), shape(3, 3, 5, 7)).flops == 2 * 6 * 4 * 7 * 9 * 5


def test_a_condition_counts_as_often_as_it_is_taken():
    """One of a product, and one of a product or two."""

    def program(flag, x):
        x = jax.lax.cond(flag, lambda: x @ x, lambda: x)
        return jax.lax.cond(flag, lambda: x @ x @ x, lambda: x @ x)

    arguments, one = (shape(dtype=bool), shape(4, 4)), 2 * 4**3
    for taken, products in (1.0, 3), (0.0, 1), ((0.25, 0.5), 1.75), ((0.5,), 1.5):
        assert counted(program, *arguments, taken=taken).flops == products * one


def test_a_loop_of_unknown_length_cannot_be_counted():
    def program(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown length"):
        counted(program, shape(4, 4))


@pytest.mark.parametrize(
    "kind, dtype, wrap",
    [
        ("bfloat16", jnp.bfloat16, layers.exact),
        ("tf32", jnp.float32, lambda function: function),
        ("float32", jnp.float32, layers.exact),
    ],
)
def test_products_take_as_long_as_their_type_does(kind, dtype, wrap):
    x = shape(8, 8, dtype=dtype)
    with jax.default_matmul_precision(None):
        done = counted(wrap(jnp.matmul), x, x)
    assert done.seconds == 2 * 8**3 / work.PEAK[kind]


def test_products_are_those_that_xla_counts():
    """XLA also counts what is elementwise, which is little at this size."""

    def program(x, kernel, w, q):
        numbers = ("NTHWC", "THWIO", "NTHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), [(0, 0), (0, 0), (0, 0)], dimension_numbers=numbers
        )
        return jax.nn.dot_product_attention(q, q, q, implementation="xla").sum(), y @ w

    arguments = (
        shape(1, 4, 18, 18, 32),
        shape(3, 3, 3, 32, 64),
        shape(64, 128),
        shape(1, 64, 2, 256),
    )
    by_xla = jax.jit(program).lower(*arguments).cost_analysis()["flops"]
    ours = counted(program, *arguments).flops
    assert ours < by_xla < 1.01 * ours


def test_attention_is_counted_as_that_of_cudnn(monkeypatch):
    """Two products of 6 queries and 16 keys forward and five backward, of 2 heads of 8 channels."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    q, past, length = (shape(3, n, 2, 8, dtype=jnp.bfloat16) for n in (6, 10, 1))

    def gradient(implementation, q, k, v, past):
        def loss(q, k, v):
            keys = Keys(past, past, jnp.full(3, 7))
            return attention(q, Keys(k, v), keys, implementation).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    one = 2 * 3 * 6 * 16 * 2 * 8
    for implementation in ("cudnn", "as_cudnn"):
        assert counted(partial(gradient, implementation), q, q, q, past).flops == 7 * one
    # In our own tiles only 6 of the 16 keys have a gradient.
    assert counted(partial(gradient, "xla"), q, q, q, past).flops == (5 + 2 * 6 / 16) * one


def test_attention_as_cudnn_is_attention():
    def random(seed, keys):
        return jax.random.normal(jax.random.key(seed), (2, keys, 2, 8), jnp.bfloat16)

    past = Keys(random(3, 10), random(4, 10), jnp.array([10, 4]))
    q, block = random(0, 6), Keys(random(1, 6), random(2, 6))

    def both(implementation):
        def loss(q):
            return jnp.sum(attention(q, block, past, implementation).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss)(q)

    for one, other in zip(both("as_cudnn"), both("xla"), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=0.03 * np.abs(other).max())


# ---------------------------------------------------------------- an iteration


def test_calls_of_a_small_run_by_hand(monkeypatch):
    """12 blocks, of which blocks 4 and 8 begin another prompt; 2 of 4 prompts at a time."""
    config = configure("configs/tiny.py", {**SMALL, "train.micro_batch": 2})
    config.model.attention = "xla"
    devices, traced, energies = jax.devices()[:2], [], replay.CONTEXTS[config.replay.context]

    def counted_energies(*arguments):
        traced.append(arguments)
        return energies(*arguments)

    monkeypatch.setitem(replay.CONTEXTS, config.replay.context, counted_energies)
    done = work.count(config, devices).stages
    assert len(traced) == 1  # the largest program, with its gradient and without
    iteration = memory.trace_iteration(config, devices)
    decoding = memory.trace_decoding(iteration)
    programs = memory._programs(iteration, decoding)

    def of(title, taken=1.0):
        program = programs[title]
        traced = program.function.trace(*program.arguments)
        return work.of_program(traced.jaxpr.jaxpr, taken)

    pivots = np.array(iteration.run.pivots)
    assert set(pivots) <= set(range(12))
    prefix, branches = (
        of(f"rollout: a block of {which}") for which in ("the prefix", "all branches")
    )
    assert done["prefix"].flops == pytest.approx(2 * pivots.mean() * prefix.flops)
    assert done["anchor and branches"].flops == pytest.approx(
        2 * (12 - pivots).mean() * branches.flops
    )
    assert done["energies of other policies"].flops == pytest.approx(2 * of("replay", 0.0).flops)
    assert done["energies and gradient"].flops == pytest.approx(2 * of("replay").flops)
    assert of("replay").flops > 2 * of("replay", 0.0).flops
    # The gradient of LoRA is summed over all devices, once for each of two micro-batches.
    everywhere = Transfer("all-reduce", ("data", "fsdp", "branch"))
    lora = sum(4 * x.size for x in jax.tree.leaves(iteration.state.lora))
    assert done["energies and gradient"].sent == {everywhere: 2 * lora}
    assert not done["energies of other policies"].sent and not done["prefix"].sent
    assert "decoding" not in done  # the toy's has no products


def test_a_block_that_is_split_over_tokens_exchanges_heads():
    """2 prompts of 12 tokens of 16 channels, in 2 layers and 5 passes; 48 numbers of a token come
    out. Queries, keys, values and results go through exchanges, half of the tokens of each.
    """
    fields = {**SMALL, "mesh.data": 1, "mesh.branch": 1, "mesh.context": 2}
    config = configure("configs/tiny.py", {**fields, "train.micro_batch": 2})
    iteration = memory.trace_iteration(config, jax.devices()[:2])
    prompts, variables = iteration.explored, iteration.run.variables(iteration.state.lora)
    history, noise = prompts.history, prompts.noise
    block = iteration.run.programs.shared_block
    traced = block.trace(variables, prompts.text, 0, history, noise, memory.START)
    assert work.of_program(traced.jaxpr.jaxpr).sent == {
        Transfer("all-to-all", ("context",)): 5 * 2 * 4 * 4 * (2 * 12 / 2 * 16),
        Transfer("all-gather", ("context",)): 5 * 4 * (2 * 12 * 48),
    }


def test_weights_in_shards_are_gathered_in_every_pass():
    """All that a pass reads, with LoRA, five times for a block. In a replay LoRA once, whose
    gradient is cut once, and the backward pass gathers weights again.
    """
    fields = {**SMALL_RUN, "mesh.data": 1, "mesh.fsdp": 2, "mesh.branch": 1, "replay.chunk": 2}
    config = configure("configs/tiny.py", {**fields, "rollout.branches": 2, "train.micro_batch": 2})
    iteration = memory.trace_iteration(config, jax.devices()[:2])
    lora, params, prompts = iteration.state.lora, iteration.run.params, iteration.explored

    def of_block(tree):  # bytes of all but the text's
        return sum(4 * x.size for n in tree if "text" not in n for x in jax.tree.leaves(tree[n]))

    gathered = Transfer("all-gather", ("fsdp",))
    whole = sum(4 * x.size for x in jax.tree.leaves(lora))
    arguments = (prompts.text, 0, prompts.history, prompts.noise, memory.START)
    block = iteration.run.programs.shared_block.trace(iteration.run.variables(lora), *arguments)
    passes = 5 * (of_block(params) + of_block(lora))
    assert work.of_program(block.jaxpr.jaxpr).sent == {gathered: passes}
    replay = iteration.run.programs.replay.trace(
        lora, params, iteration.experience, shape(dtype=bool)
    )
    forward, both = (work.of_program(replay.jaxpr.jaxpr, taken).sent for taken in (0.0, 1.0))
    assert forward.keys() == {gathered} and both[gathered] > 1.5 * forward[gathered]
    assert both == {
        gathered: both[gathered],
        Transfer("reduce-scatter", ("fsdp",)): whole,
        Transfer("all-reduce", ("data", "branch")): whole / 2,
    }


def test_recaches_at_switches_by_hand():
    """One for a group up to the fork, one for each of 9 trajectories behind it."""

    def of_one(*switches):
        """The work of a recache, with switches at these blocks of three frames."""
        fields = {**SMALL, "video.switch_frames": tuple(3 * block for block in switches)}
        done = work.count(configure("configs/tiny.py", fields), jax.devices()[:1])
        pivots = eligible_pivots(configure("configs/tiny.py", fields), lambda frame: frame)
        made = [sum(9 if block > pivot else 1 for block in switches) for pivot in pivots]
        assert len(set(made)) > 1 and done.pivots == len(made)
        return done.stages["recaches at prompt switches"].flops / np.mean(made)

    assert 0 < of_one(4, 8) == pytest.approx(of_one(6, 9), rel=0.01)


def test_policies_that_are_behind_and_epochs_are_counted():
    def stages(**fields):
        fields = {f"train.{name}": value for name, value in fields.items()}
        return work.count(
            configure("configs/tiny.py", {**SMALL, **fields}), jax.devices()[:1]
        ).stages

    plain, behind, repeated = (
        stages(),
        stages(rollouts_per_sync=2),
        stages(rollouts_per_sync=2, epochs=3),
    )

    def ratios(one, other):
        return {name: one[name].flops / other[name].flops for name in other}

    # The old policy's energies are those of the trained one every other iteration.
    ratio = ratios(behind, plain)
    assert ratio.pop("energies of other policies") == pytest.approx(1.5, rel=0.01)
    # Where it is behind, the settled steps have a gradient: 2 of 3 * 4, that is 16 of 75 states.
    assert 1.1 < ratio.pop("energies and gradient") < 75 / 59
    assert set(ratio.values()) == {1.0}
    ratio = ratios(repeated, behind)
    assert ratio.pop("energies and gradient") == pytest.approx(3)
    assert set(ratio.values()) == {1.0}


@pytest.mark.parametrize(
    ("name", "gflop"),
    [
        # 12 layers of 7.08 M weights of 50 tokens, and of 337; 24 of 12.58 M of 257; attention.
        ("clip", 12 * (2 * 7.078e6 * 50 + 4 * 50**2 * 768) / 1e9),
        ("dino", 12 * (2 * 7.078e6 * 337 + 4 * 337**2 * 768) / 1e9),
        ("aesthetic", 24 * (2 * 12.583e6 * 257 + 4 * 257**2 * 1024) / 1e9),
    ],
)
def test_towers_read_shared_frames_once(name, gflop):
    """Of two clips of four frames, the first one the same: seven frames of 480 x 832."""
    config, mesh = configure("configs/longlive.py", {}), Mesh(np.asarray(jax.devices()[:1]), "data")
    call = work.Call(2, 4, composite.Shared(2, 1))
    done = work._scorer(config, name, mesh, call)
    text = 12 * 2 * 3.146e6 * 77 / 1e9 if name == "clip" else 0  # one sentence
    # Two batches of four frames; patches and projections besides.
    assert done.flops / 1e9 == pytest.approx(8 * gflop + text, rel=0.04)


# ---------------------------------------------------------------- the command


def run(*arguments):
    return run_command(ROOT / "tools" / "plan_memory.py", "--work", *arguments)


def test_the_shipped_config(tmp_path):
    """One prompt per device; published counts of a pass, a latent and a frame.

    On each device the energies of 125 states are replayed, at 35.4 TFLOP: of W = 5 blocks the
    first step, which G = 8 branches share, and 3 steps of each. All but the last 2 of the first
    block have a gradient; a forward pass with it is 104.4 TFLOP.
    """
    done = run("--config=configs/longlive.py", "--devices=32", f"--json={tmp_path / 'work.json'}")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    figures = json.loads((tmp_path / "work.json").read_text())
    stages = {stage["name"]: stage for stage in figures["stages"]}
    pflop = {name: stage["pflop"] for name, stage in stages.items()}
    assert figures["efficiency"] == 0.5
    assert figures["seconds"] == pytest.approx(sum(s["seconds"] for s in figures["stages"]))
    assert pflop["energies of other policies"] == pytest.approx(125 * 35.4e-3, rel=0.01)
    learned = (125 - 16) * 104.4e-3 + (16 + 5) * 35.4e-3  # first steps run forward twice
    assert pflop["energies and gradient"] == pytest.approx(learned, rel=0.01)
    assert stages["energies and gradient"]["seconds"] == pytest.approx(learned / 0.395, rel=0.01)
    # 790 of 1296 frames (144 of 9 videos): what is before the fork is scored once.
    assert pflop["scoring: hpsv3"] == pytest.approx(790 * 11.7e-3, rel=0.01)
    assert pflop["prefix"] == pytest.approx(4.09, rel=0.01)
    # 45 of 49 blocks: 1.58 PFLOP each, of all trajectories.
    assert pflop["anchor and branches"] == pytest.approx(34.5, rel=0.01)
    assert pflop["decoding"] == pytest.approx(4.83, rel=0.01)
    assert figures["seconds"] == pytest.approx(181.2, rel=0.01)
    # The gradient of 349,962,240 numbers in float32, in a ring of 32 devices, which eight adapters
    # of a node share: 400 GB/s, less than NVLink's.
    assert figures["sent"].keys() == {"data"} and figures["mesh"]["data"] == 32
    gradient = 2 * 31 / 32 * 4 * 349_962_240
    assert figures["sent"]["data"]["bytes"] == pytest.approx(gradient, rel=1e-6)
    assert figures["network_seconds"] == pytest.approx(gradient / 400e9, rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--efficiency=0", "--efficiency=0 is a share"),
        ("--efficiency=1.5", "--efficiency=1.5 is a share"),
        ("--efficiency=nan", "--efficiency=nan is a share"),
        ("--nvlink_gb=-1", "--nvlink_gb=-1 is a number of GB/s, above 0"),
        ("--infiniband_gb=nan", "--infiniband_gb=nan is a number of GB/s, above 0"),
        ("--infiniband_gb=inf", "--infiniband_gb=inf is a number of GB/s, above 0"),
        ("--compile", "--work counts without compiling; leave --compile out"),
        ("--table", "--table is printed alone; leave --work out"),
    ],
)
def test_what_cannot_be_counted_is_a_mistake(flag, said):
    done = run("--config=configs/tiny.py", flag)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
