"""The benchmark: what it writes, that it counts the FLOPs there are, and the golden preset."""

import dataclasses
import json
from functools import partial

import benchmark
import jax
import jax.numpy as jnp
import pytest
from equipment import ROOT, run_command

from kvpo_jax.models.wan import Wan, WanConfig, empty_context, init_variables
from kvpo_jax.types import TextKV

SMALL = WanConfig(
    dim=4,
    ffn_dim=6,
    num_heads=1,
    num_layers=2,
    freq_dim=2,
    text_dim=3,
    text_len=5,
    channels=1,
    lora_rank=1,
)


def run(*arguments):
    return run_command(ROOT / "tools" / "benchmark.py", *arguments)


def preset_config(name: str):
    return benchmark.PRESETS[name].resolve()


def test_json(tmp_path):
    """Every row of the contract, from the real command, with the threads that were asked for."""
    done = run("--preset=tiny", "--repeats=1", "--threads=1", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in out["rows"]] == list(benchmark.ROWS)
    for row in out["rows"]:
        assert row["n"] == 1
        assert row["median_s"] == row["min_s"] > 0
        assert row["flops"] > 0 and isinstance(row["flops"], int)
        assert row["peak_memory_bytes"] > 1e7
        assert f"\n{row['name']} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert out["hardware"]["threads"] == 1
    assert out["hardware"]["matrix_peak_flops_per_s"] > 0


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--rows=denoise", "denoise_forward"),
        ("--threads=1000", "cores"),
        ("--config.model.dims=3", "model.dim"),
    ],
)
def test_mistakes(argument, message):
    done = run("--preset=tiny", argument)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_forward_flops_by_hand():
    """Two frames of three tokens attend also to one frame before them, in two layers.

    That makes 6 queries, 9 keys, and 5 keys of text.
    """
    linears = 6 * 4 * 4 + 2 * 4 * 6  # 144
    lora = 6 * (4 + 4) + 2 * (4 + 6)  # 68
    attention = 2 * 4 * 9 + 2 * 4 * 5  # 112
    patches = 2 * 4 * 4  # in and out, of 1 x 2 x 2 pixels
    level = 2 * 4 + 4 * 4 + 4 * 24
    assert 2 * (2 * 6 * (linears + lora + attention) + 6 * patches + level) == 8400
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    assert benchmark.forward_flops(half, tokens=3, frames=2, past=1) == 8400
    # In float32 LoRA is in the kernels.
    assert benchmark.forward_flops(SMALL, tokens=3, frames=2, past=1) == 8400 - 2 * 2 * 6 * lora


def test_backward_flops_by_hand():
    """The block's 6 keys carry gradient, and the text's 5 do if it is the policy's own."""
    linears, lora = 144, 2 * 68
    attention = 2 * 4 * 9 + 2 * 4 * 6 + 2 * 4 * 5  # 160
    assert 2 * (2 * 6 * (linears + lora + attention) + 6 * 4 * 4) == 10752
    assert benchmark.backward_flops(SMALL, tokens=3, frames=2, past=1, text_gradient=False) == 10752
    text = 2 * 2 * 6 * (2 * 4 * 5)
    assert (
        benchmark.backward_flops(SMALL, tokens=3, frames=2, past=1, text_gradient=True)
        == 10752 + text
    )


def test_text_flops_by_hand():
    assert benchmark.text_flops(SMALL) == 2 * 5 * (3 * 4 + 4 * 4 + 2 * 2 * (4 * 4 + 4 + 4))


@pytest.mark.parametrize("past, published", [(9, 28.4e12), (12, 32.5e12)])
def test_flops_of_the_full_size(past, published):
    """To 1 %: a block pass of Wan2.1-1.3B over 12 and 15 frames, with its text, without LoRA."""
    cfg = WanConfig(
        dim=1536,
        ffn_dim=8960,
        num_heads=12,
        num_layers=30,
        freq_dim=256,
        text_dim=4096,
        text_len=512,
        channels=16,
    )
    one_pass = benchmark.forward_flops(cfg, tokens=1560, frames=3, past=past)
    assert one_pass + benchmark.text_flops(cfg) == pytest.approx(published, rel=0.01)


def test_flops_are_those_of_the_program():
    """XLA counts the body of a loop once, so there is one layer here.

    At this size whatever is not a product is a few percent.
    """
    cfg = WanConfig(
        dim=128,
        ffn_dim=256,
        num_heads=2,
        num_layers=1,
        freq_dim=64,
        text_dim=32,
        text_len=16,
        channels=4,
        lora_rank=8,
    )
    tokens, past = 64, 3
    abstract = jax.eval_shape(partial(init_variables, cfg), jax.random.key(0))
    kv = jax.ShapeDtypeStruct((1, 1, 16, 2, 64), jnp.float32)

    def forward(lora, params, x, text):
        variables = {"params": params, "lora": lora}
        context = empty_context(cfg, 1, past, tokens)
        return Wan(cfg).apply(variables, x, jnp.ones(1), text, context, jnp.zeros(1, jnp.int32))[0]

    arguments = (
        abstract["lora"],
        abstract["params"],
        jax.ShapeDtypeStruct((1, 3, 16, 16, 4), jnp.float32),
        TextKV(kv, kv),
    )
    counted = jax.jit(forward).lower(*arguments).cost_analysis()["flops"]
    needed = benchmark.forward_flops(cfg, tokens, 3, past)
    assert needed < counted < 1.08 * needed

    backward = jax.jit(jax.grad(lambda *xs: forward(*xs).sum()))
    gradient = backward.lower(*arguments).cost_analysis()["flops"]
    needed += benchmark.backward_flops(cfg, tokens, 3, past, text_gradient=False)
    assert 0.97 * needed < gradient < 1.25 * needed


def test_a_switch_at_the_pivot_by_hand():
    """LongLive's prompts switch at blocks 13, 25 (the pivot) and 37.

    A block has 5 passes, and a recache is as long as 4. The prefix makes the recaches at 13 and 25,
    the anchor and each of 8 branches make that at 37. The replay of 5 blocks has one pass of the
    first step for all branches, which the gradient makes again, and 3 of each.
    """
    config, pivot = preset_config("longlive"), benchmark.PRESETS["longlive"].pivot
    assert config.video.switch_frames == (39, 75, 111)
    assert (config.video.blocks, config.rollout.branches) == (49, 8)
    assert (config.window.recache_frames, config.rollout.window_blocks, pivot) == (12, 5, 25)
    works = benchmark.counted(config, pivot)
    passes = {name: work.tokens / (3 * 1560) for name, work in works.items()}
    assert passes["window_rollout_1"] == 5 * 5 and passes["window_rollout_G"] == 8 * 25
    replays = 2 * 5 * (1 + 8 * 3) + 5
    assert passes["iteration"] == 25 * 5 + 2 * 4 + 9 * (24 * 5 + 4) + replays


@pytest.mark.golden
def test_golden_perf_is_the_work_of_the_golden_file(golden_dir):
    """Sizes, and numbers of passes: 25 a branch, 24 a replayed branch."""
    c = json.loads((golden_dir / "perf.json").read_text())["config"]
    config, pivot = preset_config("golden_perf"), benchmark.PRESETS["golden_perf"].pivot
    video, model, window = config.video, config.model, config.window
    assert (model.dim, model.num_heads, model.num_layers) == (c["dim"], c["heads"], c["layers"])
    assert (model.ffn_dim, model.text_dim) == (c["ffn"], c["text_dim"])
    assert model.text_len == c["text_len"]
    assert (model.freq_dim, model.dtype) == (c["freq_dim"], c["dtype"])
    assert [model.channels, video.height, video.width] == c["latent"]
    assert video.block_frames == c["block"] and pivot * video.block_frames == c["fork_frame"]
    assert window.sink + window.past + video.block_frames == c["local_attn"]
    assert (window.sink, window.cache_frames) == (c["sink"], c["cache_frames"])
    assert (config.rollout.branches, config.rollout.window_blocks) == (c["G"], c["W"])
    assert len(config.sampler.steps) == c["steps"] and config.replay.grad_steps == 2

    tokens = c["block"] * c["tokens_per_frame"]
    passes = {name: work.tokens / tokens for name, work in benchmark.counted(config, pivot).items()}
    replay = c["G"] * (c["W"] * 4 + c["W"] - 1)
    assert passes == {
        "denoise_forward": 1,
        "window_rollout_1": 25,
        "window_rollout_G": 200,
        "replay_forward": replay,
        "replay_forward_backward": replay,
        "iteration": 8 * 5 + 9 * 25 + 2 * replay,
    }
