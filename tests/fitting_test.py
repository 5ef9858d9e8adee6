"""Settings that fit: against capacities between the figures of two settings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from equipment import SMALL_RUN, configure, run_command
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax import fitting, memory, plan_memory
from kvpo_jax.errors import UsageError
from kvpo_jax.models import umt5
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding

PLANNED = {**SMALL_RUN, "eval.batch": 1, "mesh.data": 1, "mesh.branch": 1}


@pytest.fixture(scope="module")
def config():
    return configure("configs/tiny.py", PLANNED)


@pytest.fixture(scope="module")
def device():
    return jax.devices()[:1]


def with_micro_batch(config, size):
    return config_lib.with_fields(config, {"train.micro_batch": size})


@pytest.fixture(scope="module")
def needs(config, device):
    """micro-batch -> bytes."""
    return {size: fitting.peak(with_micro_batch(config, size), device) for size in (4, 2, 1)}


# ---------------------------------------------------------------- the micro-batch


@pytest.mark.parametrize("above, below", [(2, 4), (1, 2)])
def test_the_largest_micro_batch_that_fits(config, device, needs, above, below):
    """A capacity between the figures of two."""
    assert needs[above] < needs[below]
    for limit in (needs[above], (needs[above] + needs[below]) / 2, needs[below] - 1):
        chosen, reason = fitting.choose_micro_batch(config, device, limit)
        assert chosen == with_micro_batch(config, above)
        assert reason.startswith(f"train.micro_batch={above} of 4: ")
        assert reason.endswith(f"; {below} would need {needs[below] / 1e9:.1f} GB")
        assert len(reason) <= 80


def test_all_prompts_if_they_fit_and_the_smallest_if_none_does(config, device, needs):
    assert fitting.choose_micro_batch(config, device, needs[4]).config.train.micro_batch == 4
    smallest, reason = fitting.choose_micro_batch(config, device, needs[1] - 1)
    assert smallest.train.micro_batch == 1
    assert reason.endswith("; no other needs less (see kvpo-plan)")


def test_a_micro_batch_that_does_not_divide_over_the_devices_is_passed_over(config):
    two = config_lib.with_fields(config, {"mesh.data": 2, "eval.batch": 2})
    assert fitting.choose_micro_batch(two, jax.devices()[:2], 1.0).config.train.micro_batch == 2
    three = config_lib.with_fields(config, {"mesh.data": 3})
    with pytest.raises(ValueError, match="mesh.data=3 does not divide 4 prompts at a time"):
        fitting.choose_micro_batch(three, jax.devices()[:3], 1.0)


def test_where_no_limit_is_known_a_run_takes_all_prompts(config, needs, monkeypatch, capsys):
    """As on CPUs. A micro-batch that is given stays, whatever the memory."""
    assert sharding.device_memory() is None
    assert fitting.fitted(config) is config and config_lib.prompts_at_once(config) == 4
    monkeypatch.setattr(sharding, "device_memory", lambda: needs[2])
    given = with_micro_batch(config, 4)
    assert fitting.fitted(given) is given and not capsys.readouterr().out
    assert fitting.fitted(config) == with_micro_batch(config, 2)
    assert capsys.readouterr().out.startswith("train.micro_batch=2 of 4: ")
    over_prompts = config_lib.with_fields(config, {"objective.advantage": "batch_std"})
    with pytest.raises(UsageError, match="the devices take 2 of 4: set config.train.micro_batch=2"):
        fitting.fitted(over_prompts)
    monkeypatch.setattr(sharding, "device_memory", lambda: needs[4])
    assert fitting.fitted(over_prompts).train.micro_batch == 4


# ---------------------------------------------------------------- further settings


def test_a_proposal_fits_when_it_is_fed_back(config, device, needs):
    limit = 0.9 * needs[1]
    proposal = fitting.propose(config, device, limit)
    assert proposal.is_same_gradient() and proposal.peak <= limit
    said = plan_memory.advice(proposal, limit)
    arguments = said.partition("with: ")[2].split()
    assert said.startswith("it fits with the same gradient, ") and len(arguments) > 1
    given = config_lib.override(config, arguments)
    config_lib.check(given)
    assert fitting.peak(given, device) == proposal.peak


@pytest.mark.slow
def test_the_command_proposes_what_fits_when_it_is_fed_back(needs):
    """Between what two and four prompts need; and below what anything does."""
    flags = ["--config=configs/tiny.py", *(f"--config.{n}={v}" for n, v in PLANNED.items())]

    def planned(limit, *more):
        memory_gb = f"--memory_gb={limit / fitting.GB:.6f}"
        done = run_command("-m", "kvpo_jax.plan_memory", "--devices=1", memory_gb, *flags, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    limit, all_at_once = (needs[2] + needs[4]) / 2, "--config.train.micro_batch=4"
    said = planned(limit, all_at_once)
    assert "does not fit into" in said and "it fits with the same gradient" in said
    proposed = said.rpartition("with: ")[2].split()
    assert proposed and all(flag.startswith("--config.") for flag in proposed)
    assert "\nfits into" in planned(limit, *proposed)
    assert "nothing that was tried fits" in planned(0.02 * needs[1])


@pytest.mark.parametrize(
    ("spec", "fields", "chunks"),
    [
        # 3 blocks of 4 states; 3 of drawn steps, or 2, or 1; end points at 4 levels or at 1.
        ("kvpo", {}, [6, 3, 1]),
        ("flow_grpo", {}, [4, 2, 1]),
        ("flow_grpo", {"replay.grad_steps": 2}, [3, 1]),  # no other is replayed
        ("dance_grpo", {}, [3, 1]),
        ("cm_grpo", {"rollout.window_blocks": 1}, [1]),
        ("nft", {}, [6, 3, 1]),
        ("rwr", {"replay.times": (0.5,)}, [1]),
        ("ar_copo", {}, [2, 1]),  # one block
        ("release", {}, [8, 4, 2, 1]),  # 4 blocks
        ("flow_grpo", {"replay.chunk": 5}, [2, 1]),
        ("flow_grpo", {"replay.chunk": 1}, []),
    ],
)
def test_smaller_chunks_are_of_the_states_that_a_branch_replays(spec, fields, chunks):
    config = configure(f"configs/tiny.py:{spec}", fields)
    assert fitting.SAME_GRADIENT["replay.chunk"](config) == chunks


def test_a_setting_is_lowered_no_further_than_it_has_to_be(config, device, needs):
    proposal = fitting.propose(config, device, needs[2])
    assert proposal == fitting.Proposal({"train.micro_batch": 2}, needs[2])
    assert fitting.propose(config, device, needs[4]).fields == {}


def test_a_setting_that_later_ones_made_needless_is_raised_again(
    config, device, needs, monkeypatch
):
    """A smaller rank is tried first and helps too little; then a micro-batch is enough alone."""
    smaller = fitting.SAME_GRADIENT["train.micro_batch"]
    rank = {"lora.rank": lambda c: [1] if c.lora.rank > 1 else []}
    monkeypatch.setattr(fitting, "SAME_GRADIENT", rank)
    monkeypatch.setattr(fitting, "OTHER_RUN", {"train.micro_batch": smaller})
    assert fitting.peak(config_lib.with_fields(config, {"lora.rank": 1}), device) < needs[4]
    proposal = fitting.propose(config, device, needs[2])
    assert proposal == fitting.Proposal({"train.micro_batch": 2}, needs[2])


def test_what_changes_the_run_comes_last_and_is_said(config, device, needs, monkeypatch):
    monkeypatch.setattr(
        fitting, "SAME_GRADIENT", {"eval.batch": fitting.SAME_GRADIENT["eval.batch"]}
    )
    limit = needs[4] - 1
    proposal = fitting.propose(config, device, limit)
    assert proposal.fields == {"model.dtype": "bfloat16"}
    expected = (
        f"it fits as another run, {proposal.peak / 1e9:.2f} GB, with: --config.model.dtype=bfloat16"
    )
    assert plan_memory.advice(proposal, limit) == expected


def test_it_is_said_when_nothing_fits(config, device, needs, monkeypatch):
    only = {"train.micro_batch": fitting.SAME_GRADIENT["train.micro_batch"]}
    monkeypatch.setattr(fitting, "SAME_GRADIENT", only)
    monkeypatch.setattr(fitting, "OTHER_RUN", {})
    proposal = fitting.propose(config, device, needs[1] - 1)
    assert proposal == fitting.Proposal({"train.micro_batch": 1}, needs[1])
    assert plan_memory.advice(proposal, needs[1] - 1) == (
        f"nothing that was tried fits; the least is {needs[1] / 1e9:.2f} GB with"
        " --config.train.micro_batch=1. It takes more devices, or devices with more memory"
    )


# ---------------------------------------------------------------- the estimate


def test_working_memory_is_that_of_nested_loops():
    """Per device: the rows of a loop, those of the loop inside it, and a product."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), "data")

    def inner(x, _):
        return x + 1, x @ jnp.ones((6, 10))  # [4, 10]

    def outer(x, _):
        return x + 1, jax.lax.scan(inner, x, length=3)[1].sum(axis=0)[:, :6]

    def program(x):
        return jax.lax.scan(outer, x, length=5)[1]

    sharded = jax.shard_map(program, mesh=mesh, in_specs=Spec("data"), out_specs=Spec(None, "data"))
    jaxpr = jax.make_jaxpr(sharded)(jnp.ones((8, 6))).jaxpr
    carried, product = 4 * 6, 4 * 10
    assert memory.working_bytes(jaxpr) == 4 * (
        (carried + 5 * 4 * 6) + (carried + 3 * product) + product
    )
    whole = jax.make_jaxpr(program)(jnp.ones((8, 6))).jaxpr
    assert memory.working_bytes(whole) == 0  # of all devices together: not said of one

    def gathering(x, w):  # half of [6, 10] in bfloat16 on each device
        def layer(x, _):
            return x, x @ jax.lax.all_gather(w, "data", axis=0, tiled=True)  # in float32

        return jax.lax.scan(layer, x, length=3)[1]

    cut = (Spec("data"), Spec("data"))
    sharded = jax.shard_map(gathering, mesh=mesh, in_specs=cut, out_specs=Spec(None, "data"))
    arguments = (jnp.ones((8, 6)), jnp.ones((6, 10), jnp.bfloat16))
    expected = 4 * 3 * product + 4 * product + 2 * 6 * 10  # x is read, and not made anew
    assert memory.working_bytes(jax.make_jaxpr(sharded)(*arguments).jaxpr) == expected


def test_prompts_that_wait_for_further_epochs_are_counted(config, device):
    """What the replay reads of three prompts, while the fourth is explored."""
    fields = {"train.micro_batch": 1, "train.epochs": 2}
    planned = memory.plan(config_lib.with_fields(config, fields), device)
    kept = planned.parts["kept of other prompts for further epochs"]
    sizes = memory.estimate(planned).sizes
    of_one = (
        sizes["history (shared by the branches)"]
        + sizes["replay tuples and the anchor's page"]
        + sizes["text keys and values"]
    )
    assert memory.bytes_of(kept) == 3 * of_one
    assert "kept of other prompts for further epochs" in planned.stages["replay"]
    once = memory.plan(with_micro_batch(config, 1), device)
    assert "kept of other prompts for further epochs" not in once.parts


def test_a_text_encoder_on_the_fly_is_counted(tmp_path, config, device):
    """It stays on the device; stored embeddings do without."""
    cfg = {"vocab": 100, "dim": 8, "heads": 2, "head_dim": 4, "ffn_dim": 16, "layers": 2}
    path = tmp_path / "umt5.safetensors"
    metadata = {"kind": "umt5", "config": json.dumps(cfg)}
    safetensors.numpy.save_file({"a": np.zeros(1)}, path, metadata)
    wan = {"backbone": "longlive", "model.channels": 16, "paths.umt5": str(path)}
    planned = memory.plan(config_lib.with_fields(config, wan), device)
    parameters = umt5.abstract_params(umt5.UMT5Config(**cfg))
    numbers, norms = sum(x.size for x in jax.tree.leaves(parameters)), (2 * 2 + 1) * 8
    # bfloat16, and float32 for the norms.
    assert memory.bytes_of(planned.parts["text encoder"]) == 2 * numbers + 2 * norms
    assert all("text encoder" in names for names in planned.stages.values())
    stored = config_lib.with_fields(config, {**wan, "paths.embeddings": "folder"})
    assert "text encoder" not in memory.plan(stored, device).parts
