"""The memory plan, against sizes that can be worked out by hand and against a run."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from equipment import ROOT, SMALLEST, bare_run, batch_of, configure, run_command

from kvpo_jax import memory, train
from kvpo_jax.models import wan_vae
from kvpo_jax.models.wan import init_variables
from kvpo_jax.run import make_mesh
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.state import init_state
from kvpo_jax.types import PyTree

TINY = config_lib.load("configs/tiny.py")
LORA = [
    (TINY.lora.rank * TINY.model.num_layers, sides)
    for sides in [(96, 96)] * 8 + [(96, TINY.model.ffn_dim)] * 2
]
TOOL = ROOT / "tools" / "plan_memory.py"


def plan(tmp_path, *arguments):
    done = run_command(TOOL, f"--json={tmp_path / 'plan.json'}", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "plan.json").read_text()), done.stdout


# ---------------------------------------------------------------- by hand


def test_parts_and_programs_of_the_toy(tmp_path):
    """On 4 devices, 2 over prompts and 2 over branches."""
    figures, said = plan(
        tmp_path,
        "--config=configs/tiny.py",
        "--devices=4",
        "--compile",
        "--config.mesh.data=2",
        "--config.mesh.branch=2",
    )
    sizes = {name: round(1e9 * size) for name, size in figures["resident_gb"].items()}
    frame = 2 * 3 * 4 * 96 * 4  # keys and values, layers, tokens, width, bytes
    index = 4  # bytes of a slot's frame number
    half = 2  # of 4 prompts
    assert sizes["base weights"] == 541_488 * 4
    assert sizes["history (shared by the branches)"] == half * 36 * (frame + index)
    # Every shard has half of the branches and its anchor; a page holds the sink and twelve frames.
    assert sizes["pages (one per trajectory)"] == half * 5 * 15 * (frame + index)
    # The same 4 branches and the anchor.
    assert sizes["latents of all trajectories"] == half * 5 * 36 * 4 * 4 * 12 * 4
    assert sizes["pixels of all trajectories"] == half * 5 * 36 * 8 * 8 * 3 * 4
    lora = 4 * sum(rank * sum(sides) for rank, sides in LORA)
    assert sizes["LoRA: policy, old, reference, EMA"] == 4 * lora
    assert sizes["gradient of LoRA"] == lora
    # As many held-out videos as prompts, half of them on each half of the mesh.
    text = 2 * 3 * 3 * TINY.model.text_len * 96 * 4  # keys and values, layers, segments
    assert sizes["held out: text, history"] == half * (text + 36 * (frame + index))
    # The middle third of a video, of 8 branches and the anchor, joined and then flat.
    assert sizes["a clip of all trajectories"] == 2 * half * 9 * 12 * 8 * 8 * 3 * 4
    # As compiled: in a ring of four devices each sends three quarters twice; little else is sent.
    sent = {title: 1e9 * size for title, size in figures["sent_gb"].items()}
    assert 1.5 * lora <= sent["replay"] < 1.01 * 1.5 * lora
    assert all(size == 0 for title, size in sent.items() if title != "replay")
    stages = figures["stage_gb"]
    assert list(stages) == [
        "held out: a block",
        "held out: decoding",
        "rollout: a block of the prefix",
        "rollout: a block of all branches",
        "decoding: a block",
        "scoring: toy, clips of 12",
        "replay",
    ]
    parts = [
        "base weights",
        "LoRA: policy, old, reference, EMA",
        "optimiser",
        "text keys and values",
        "history (shared by the branches)",
        "latents of all trajectories",
        "replay tuples and the anchor's page",
        "gradient of LoRA",
    ]
    resident = sum(figures["resident_gb"][name] for name in parts)
    line = next(line for line in said.splitlines() if line.startswith("replay  "))
    assert line.split()[1:4] == [
        f"{resident:.2f}",
        f"{stages['replay'] - resident:.2f}",
        f"{stages['replay']:.2f}",
    ]
    assert resident < stages["replay"] < resident + 1
    assert "fits into 141 GB" in said
    assert max(map(len, said.splitlines())) <= 80


def test_full_size_needs_more_than_a_small_card(tmp_path):
    eight = ("--config.train.prompts_per_iteration=8", "--config.train.micro_batch=8")
    figures, said = plan(tmp_path, *eight)
    # 33 frames of 1560 tokens, 30 layers, 1536 channels, keys and values in bf16, and their
    # numbers.
    history = 33 * (2 * 30 * 1560 * 1536 * 2 + 4)
    assert round(1e9 * figures["resident_gb"]["history (shared by the branches)"]) == history
    assert figures["resident_gb"]["base weights"] == pytest.approx(2.84, abs=0.01)
    # The published counts of parameters but HPSv3's unused language head, in bf16; norms and heads
    # are in float32.
    vision_norms = 32 * 4 * 1280 + 2 * 1280
    norms = {
        "hpsv3": vision_norms + (2 * 28 + 1) * 3584,
        "videoalign": vision_norms + (2 * 28 + 1) * 1536,
    }
    rewards = {
        "reward hpsv3": 2 * (7_744_923_136 + norms["hpsv3"]) + 4 * 3_687_474,
        "reward videoalign": 2 * (2_208_561_664 + norms["videoalign"]) + 4 * 4608,
    }
    assert {name: round(1e9 * figures["resident_gb"][name]) for name in rewards} == rewards
    assert "fits into 141 GB: 110." in said and "at most, estimated without compiling" in said
    everything = figures["resident_gb"]
    absent = ("gradient of LoRA", "pixels of all trajectories", "decoder's memory")
    assert not any("servers score it" in name for name in everything)  # there is no server
    absent += ("held out", "a clip", "a batch")
    title = "rollout: a block of all branches"
    working = figures["working_gb"]

    def branches(figures, *absent):
        parts = (x for name, x in figures["resident_gb"].items() if not name.startswith(absent))
        return pytest.approx(sum(parts) + figures["working_gb"][title])

    assert figures["stage_gb"][title] == branches(figures, *absent)
    # All layers' new keys and values of a block of 9 trajectories, of which two nested loops keep a
    # copy, and the widest product of a layer: 8960 channels. Little else.
    new = 9 * 3 * (2 * 30 * 1560 * 1536 * 2)
    widest = 9 * 3 * 1560 * 8960 * 2
    assert working[title] == pytest.approx((2 * new + widest) / 1e9, rel=0.02)
    # A LoRA tree per branch, and the sums of a chunk; XLA says 44.67 GB for an H200.
    assert working["replay"] == pytest.approx(44.67, rel=0.05)
    # 36 frames of 8 branches and the anchor, joined and then flat; of 128 frames, a copy.
    frame = 480 * 832 * 3
    assert everything["a clip of all trajectories"] == pytest.approx(2 * 9 * 36 * frame / 1e9)
    assert everything["a batch of hpsv3"] == pytest.approx(8 * 16 * frame / 1e9)
    # Two frames of the input of every temporal convolution, in bfloat16: 1.89 GB by the release's.
    # The anchor's at the fork, and that of the branch whose turn it is.
    assert everything["decoder's memory"] == pytest.approx(2 * 1.89, rel=0.02)
    # Four clips of 36 frames.
    pixels = "pixels of all trajectories"
    assert round(1e9 * everything[pixels]) == 9 * 4 * 36 * frame
    # Two branches at a time and their anchor; a decoder in float32; rewards that are freed.
    chunks, wide = "--config.rollout.branch_chunk=2", "--config.decoder.dtype=float32"
    other, said = plan(tmp_path, *eight, chunks, wide, "--config.reward.resident=False")
    changed = other["resident_gb"]
    pages = "pages (one per trajectory)"
    assert changed[pages] == pytest.approx(everything[pages] * 3 / 9)
    assert changed["decoder's memory"] == 2 * everything["decoder's memory"]
    assert "19.92 GB of rewards are resident only to score" in said
    assert other["stage_gb"][title] == branches(other, *absent, "reward")
    scored = next(name for name in other["stage_gb"] if "hpsv3" in name)
    wider = pytest.approx(changed["decoder"] - everything["decoder"])
    assert other["stage_gb"][scored] - figures["stage_gb"][scored] == wider


def test_several_batches_keep_the_sum_of_their_gradients():
    def gradient(micro_batch):
        config = configure("configs/tiny.py", {"train.micro_batch": micro_batch})
        parts = memory.plan(config, jax.devices()[:1]).parts
        return memory.bytes_of(parts["gradient of LoRA"])

    assert TINY.train.prompts_per_iteration == 4
    assert gradient(2) == 2 * gradient(4) > 0


def test_clip_dino_and_the_aesthetic_head_are_planned():
    """Watched or optimised: weights in float32, and 32 frames of a device, one by one."""
    names = {"clip": 151_277_312, "dino": 85_798_656, "aesthetic": 303_966_208 + 769}
    config = configure(
        "configs/longlive.py", {"reward.scorer": "dino", "eval.scorer": "stream,clip,aesthetic"}
    )
    rewards = memory.trace_rewards(config, make_mesh(config, jax.devices()[:2]), 36, wide=False)
    assert rewards.keys() == names.keys()
    for name, reward in rewards.items():
        assert sum(x.size * 4 for x in jax.tree.leaves(reward.weights)) == 4 * names[name]
        assert reward.title == f"scoring: {name}, 32 clips of 1"
        # Of all eight devices of this process, which are asked together.
        assert reward.batch.shape == (8 * 32, 1, 480, 832, 3) and reward.program is not None


# ---------------------------------------------------------------- against a run

SMALL_RUN = {
    **SMALLEST,
    "model.num_layers": 1,
    "video.blocks": 8,
    "video.switch_frames": (),
    "window.bank": 2,
    "rollout.branches": 4,
    "rollout.branch_chunk": 2,
    "train.prompts_per_iteration": 4,
    "train.micro_batch": 2,
    "eval.prompts": 4,
    "eval.batch": 2,
    "mesh.fsdp": 2,
    "mesh.branch": 2,
    "mesh.context": 2,
}


def assert_same_arrays(planned: PyTree, real: PyTree) -> None:
    """The same fields, shapes and dtypes, and the same bytes of each on a device."""
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for (path, shape), array in zip(
        jax.tree_util.tree_leaves_with_path(planned), jax.tree.leaves(real), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype), name
        # Noise stays on one device until it is replayed.
        if not name.endswith((".noise", ".on_policy")):
            assert memory.bytes_of(shape) == memory.bytes_of(array), name


def test_the_plan_has_the_arrays_of_a_run():
    """Two chunks of two branches, with a memory bank, on 2 x 2 x 2 devices: half of a weight, and
    half of the heads of a cache on each.
    """
    config = configure("configs/tiny.py", SMALL_RUN)
    mesh = make_mesh(config, jax.devices())
    planned = memory.trace_iteration(config, jax.devices())

    make = jax.jit(partial(init_variables, wan_config(config)))
    variables = sharding.place_weights(make(jax.random.key(0)), mesh)
    run = bare_run(config, mesh, variables["params"])
    state = init_state(config, mesh, variables["lora"])
    embeddings = np.zeros(planned.explored.batch.embeddings.shape, np.float32)
    embeddings = sharding.place(embeddings, mesh, sharding.PROMPTS)
    batch = batch_of(embeddings, np.ones((2, 1), bool))
    pivot = planned.run.draw_pivot(0)
    rolled = train.explore(run, state.old, batch, 0, pivot, windows=())
    experience = train.unjudged(run, state, rolled, batch, on_policy=True)
    experience = experience.replace(
        advantages=sharding.place(experience.advantages, mesh),
        gate_open=sharding.place(experience.gate_open, mesh),
    )

    assert_same_arrays(planned.run.params, run.params)
    assert_same_arrays(planned.state, state)
    assert_same_arrays(planned.rolled, rolled)
    assert_same_arrays(planned.experience, experience)
    history = run.programs.blank(2)
    assert memory.bytes_of(history.k) == history.k.nbytes / 4  # of a prompt, and half of its heads
    assert_same_arrays(planned.explored.history, history)
    assert_same_arrays(planned.pages, run.programs.fork(history))


def test_devices_of_context_remember_their_rows_of_a_frame(tmp_path):
    """Two rows of four; of three devices each has room for two."""
    note = dataclasses.asdict(wan_vae.VAEConfig(base_dim=4, num_res_blocks=0))
    checkpoint.save_weights(tmp_path / "vae", {}, {"kind": "wan_vae", "config": json.dumps(note)})
    fields = {**SMALL_RUN, "backbone": "longlive", "model.channels": 16, "model.num_heads": 3}
    fields |= {"model.dim": 18, "video.width": 6, "paths.vae": tmp_path / "vae"}
    fields |= {f"mesh.{axis}": 1 for axis in sharding.AXES}

    def decoding(devices):
        config = configure("configs/tiny.py", {**fields, "mesh.context": devices})
        return memory.trace_decoding(memory.trace_iteration(config, jax.devices()[:devices]))

    one, three = decoding(1), decoding(3)
    for name in ("memory", "heldout_memory"):
        whole, rows = (memory.bytes_of(getattr(x, name)) for x in (one, three))
        assert rows == whole / 2 > 0
    # What programs other than the decoder's read is whole.
    assert memory.bytes_of(three.pixels) == memory.bytes_of(one.pixels)


# ---------------------------------------------------------------- the command


def test_a_gpu_needs_the_packages_that_compile_for_it(tmp_path):
    """They are not part of a test environment; docs/memory.md shows what is printed with them."""
    done = run_command(TOOL, "--target=h200")
    if done.returncode:
        assert (
            done.stderr.splitlines()[-1]
            == "error: --target=h200 needs JAX's CUDA packages: pip install 'kvpo_jax[cuda12]'"
        )
    else:
        assert "fits into 141 GB" in done.stdout


@pytest.mark.parametrize("command", [[str(TOOL)], ["-m", "kvpo_jax.plan_memory"]])
def test_help_shows_usage_and_flags(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("What a run costs in memory")
    assert "--memory_gb: memory of one device" in done.stdout


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.rollout.branchs=4",
            "there is no field config.rollout.branchs; did you mean 'rollout.branches'?",
        ),
        (
            "--config.model.channels=16",
            "config.model.channels=16: a latent frame of the toy has 12",
        ),
        ("--config.backbone=toyy", "config.backbone='toyy' is not one of toy, return, "),
        ("--config.train.tasks=('x',)", "config.train.tasks=('x',): the prompts of the backbone"),
        ("--config.reward.scorer=motion,hpsv", "there is no reward 'hpsv': expected hpsv3, "),
        ("--config.eval.scorer=nothing", "there is no reward 'nothing': expected hpsv3, "),
        ("--config.weights=none", "config.weights=none: there is no such file (made by: "),
        ("--config.paths.lora=none", "config.paths.lora=none: there is no such file (made by: "),
        ("--memory_gb=nan", "--memory_gb=nan is a number of GB, above 0"),
        ("--memory_gb=0", "--memory_gb=0 is a number of GB, above 0"),
        # Though nothing may have to be timed.
        ("--efficiency=2", "--efficiency=2 is a share of the peak, above 0 and up to 1"),
        ("--json=/", "--json=/ cannot be written; name a file in a folder of yours"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_planned(argument, message):
    done = run_command(TOOL, "--config=configs/tiny.py", argument)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_an_adapter_of_another_rank_is_a_mistake(tmp_path):
    path = tmp_path / "lora.safetensors"
    for note, message in (
        ({"rank": 4, "alpha": 4.0}, "has rank 4 and alpha 4.0, the config has lora.rank=8 and"),
        ({"rank": 8, "alpha": 8.0, "dim": 64}, "is for a model of another size: it has dim 64,"),
        ({"alpha": 4.0}, "says rank=None of its adapter, which is none: make it with"),
    ):
        checkpoint.save_weights(path, {}, {"kind": "wan_lora", "config": json.dumps(note)})
        done = run_command(TOOL, "--config=configs/tiny.py", f"--config.paths.lora={path}")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {path} {message}"), done.stderr


def test_flags_that_mean_nothing_are_a_mistake():
    def said(*flags):
        done = run_command(TOOL, "--config=configs/tiny.py", *flags)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    table = "error: --table is printed alone; leave"
    assert said("--table", "--devices=4", "--json=x.json") == f"{table} --devices and --json out\n"
    assert said("--table", "--memory_gb=80", "--work") == f"{table} --memory_gb and --work out\n"
    assert said("--work", "--target=h200") == (
        "error: --work counts without compiling; leave --target out\n"
    )
