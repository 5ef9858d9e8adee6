"""LongLive, MemFlow and other generators from PyTorch files to videos and back, through the
commands that a user runs, at a tiny size.

The checkpoints are random but in the upstreams' formats: a wrapped LongLive `.pt`, its LoRA `.pt`,
a diffusers VAE, a transformers text encoder with a tokenizer.
"""

import json
import re

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from backbones_test import FORMATS, random_state
from equipment import ROOT, run_command
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kvpo_jax.convert.wan_weights import official_name
from kvpo_jax.models.wan import WanConfig
from kvpo_jax.runtime import checkpoint

DIM, FFN, HEADS, LAYERS, TEXT_DIM, TEXT_LEN, RANK = 48, 64, 2, 2, 16, 8, 4
WORDS = ("a", "red", "fox", "runs", "stops", "looks", "back", "snow")
SEQUENCES = [[f"a red fox {WORDS[3 + i % 5]}", "snow", "a fox looks back"] for i in range(4)] + [
    ["a fox", "a red fox"]
]
CONFIG = """
from kvpo_jax.runtime import config as config_lib
from ml_collections import ConfigDict

def get_config(preset="paper"):
    c = config_lib.load("configs/{name}.py:" + preset).copy_and_resolve_references()
    c.unlock()
    c.model.update(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=16)
    c.model.update(text_len=8, dtype="float32")
    c.lora.update(rank=4, alpha=4.0)
    c.video.update(height=4, width=6, blocks=8, switch_frames=(12, 21))
    c.rollout.update(branches=2, window_blocks=1)
    c.replay.blocks = 1
    c.replay.chunk = 3
    c.reward.scorer = "kvpo_jax.rewards.motion:score"
    c.eval.scorer = ""
    c.reward.weights = ConfigDict(dict(motion=1.0, smoothness=0.5))
    c.reward.clip_frames = 8
    c.train.update(held_out=2, prompts_per_iteration=1, iterations=2, checkpoint_every=1)
    c.train.update(warmup=1, learning_rate=1e-3)
    c.eval.update(prompts=2, batch=2, every=0)
    return c
"""


def run(*command):
    done = run_command(*command, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    # Libraries do not talk to the user; a long stage says how far it is.
    assert all(re.fullmatch(r".+: \d+(/\d+)?", line) for line in done.stderr.splitlines())
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Upstream's files, and what the converter makes of them."""
    folder = tmp_path_factory.mktemp("longlive")
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=FFN,
        num_layers=LAYERS,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    )
    state = {
        official_name(n): 0.1 * torch.randn(t.shape) for n, t in transformer.state_dict().items()
    }
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}
    torch.save({"generator": wrapped}, folder / "longlive_base.pt")
    lora = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, tensor.shape[1])
            lora[f"{module}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], RANK)
    torch.save({"generator_lora": lora, "critic_lora": {}}, folder / "lora.pt")
    diffusers.AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=16,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=24,
            num_heads=2,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(folder / "umt5")
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompts": s}) + "\n" for s in SEQUENCES)
    )
    for name in ("longlive", "memflow"):
        (folder / f"{name}.py").write_text(CONFIG.replace("{name}", name))

    def convert(source, output, *flags):
        return run(
            "tools/convert_weights.py", folder / source, f"--output={folder / output}", *flags
        )

    convert(
        "longlive_base.pt", "base.safetensors", f"--num_heads={HEADS}", f"--text_len={TEXT_LEN}"
    )
    convert("lora.pt", "lora.safetensors")
    convert("vae", "vae.safetensors")
    convert("umt5", "umt5.safetensors")
    config = checkpoint.metadata_config(folder / "base.safetensors", "wan")
    assert WanConfig(**config).head_dim == 24
    return folder


def paths(folder, text):
    out = [f"--config.weights={folder / 'base.safetensors'}"]
    out += [
        f"--config.paths.{name}={folder / file}"
        for name, file in {
            "lora": "lora.safetensors",
            "vae": "vae.safetensors",
            "prompts": "prompts.jsonl",
        }.items()
    ]
    if text == "embeddings":
        return [*out, f"--config.paths.embeddings={folder / 'embeddings'}"]
    return [
        *out,
        f"--config.paths.umt5={folder / 'umt5.safetensors'}",
        f"--config.paths.tokenizer={folder / 'tokenizer'}",
    ]


@pytest.mark.slow
def test_longlive_from_files_to_lora(files):
    run(
        "tools/encode_prompts.py",
        f"--prompts={files / 'prompts.jsonl'}",
        f"--output={files / 'embeddings'}",
        f"--weights={files / 'umt5.safetensors'}",
        f"--tokenizer={files / 'tokenizer'}",
        f"--max_length={TEXT_LEN}",
    )
    workdir = files / "run"
    run(
        "-m",
        "kvpo_jax.main",
        f"--config={files / 'longlive.py'}",
        f"--workdir={workdir}",
        *paths(files, "embeddings"),
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["reward_std_in_group"] > 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["heldout"]["num_prompts"] == 2

    # The same reward on the fly as from stored embeddings: bf16 of the embeddings is all that
    # differs.
    run(
        "-m",
        "kvpo_jax.main",
        f"--config={files / 'longlive.py'}",
        f"--workdir={files / 'fly'}",
        "--config.train.iterations=1",
        *paths(files, "umt5"),
    )
    fly = json.loads((files / "fly" / "metrics.jsonl").read_text().splitlines()[0])
    assert fly["reward_anchor"] == pytest.approx(lines[0]["reward_anchor"], rel=2e-2)

    # The trained LoRA leaves for PyTorch with the names that it came with, and the run streams
    # video.
    run(
        "tools/export_lora.py",
        f"--workdir={workdir}",
        "--format=peft",
        f"--output={files / 'peft'}",
    )
    exported = safetensors.numpy.load_file(files / "peft" / "adapter_model.safetensors")
    given = torch.load(files / "lora.pt", weights_only=True)["generator_lora"]
    assert exported.keys() == given.keys()
    moved = [np.abs(exported[name] - given[name].numpy()).max() for name in given]
    assert 0 < max(moved) < 5e-3  # two steps of at most the learning rate
    out = run(
        "-m",
        "kvpo_jax.generate",
        f"--checkpoint={workdir}",
        "--prompt=a red fox runs",
        "--prompt=a fox stops",
        "--num_frames=15",
        f"--output={files / 'videos'}",
        "--ema",
        f"--config.paths.umt5={files / 'umt5.safetensors'}",
        f"--config.paths.tokenizer={files / 'tokenizer'}",
        "--config.paths.embeddings=",
    )
    assert ".mp4: 57 frames, " in out
    assert iio.imread(files / "videos" / "000_a_red_fox_runs.mp4").shape == (57, 128, 192, 3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_memflow_trains(files, preset):
    workdir = files / f"memflow_{preset}"
    run(
        "-m",
        "kvpo_jax.main",
        f"--config={files / 'memflow.py'}:{preset}",
        f"--workdir={workdir}",
        "--config.train.iterations=1",
        *paths(files, "umt5"),
    )
    (line,) = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert line["reward_std_in_group"] > 0
    assert json.loads((workdir / "config.json").read_text())["window"]["bank"] == 3


@pytest.mark.slow
def test_a_suite_of_upstreams_files(files, tmp_path):
    first = {"prompts": ["a red fox runs", "a fox stops"], "durations": [6, 3]}
    second = {"prompts": ["snow"], "durations": [3]}
    lines = "".join(json.dumps(line) + "\n" for line in (first, second))
    (tmp_path / "p.jsonl").write_text(lines)
    base, *others = paths(files, "umt5")
    others = [x for x in others if "paths.lora" not in x and "paths.prompts" not in x]
    command = ["-m", "kvpo_jax.evaluate", "--suite=long", f"--config={files / 'longlive.py'}"]
    command += [f"--prompts={tmp_path / 'p.jsonl'}", base, *others, "--segment_clips"]
    command += ["--config.mesh.data=1", "--config.eval.scorer=stream"]
    lora = files / "lora.safetensors"
    run(*command, f"--output={tmp_path / 'base'}")
    merged = f"--lora={lora}:1.0,{lora}:0.5"
    against = f"--against={tmp_path / 'base'}"
    out = run(*command, f"--output={tmp_path / 'lora'}", merged, against)
    assert "2 videos of 2 prompts" in out and "continuity" in out and "difference" in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))
    videos = [tmp_path / x / "videos" / "0000-0.mp4" for x in ("base", "lora")]
    frames = [iio.imread(path) for path in videos]
    # 9 latent frames are 33 of pixels, 6 are 21; 32x48 pixels are enlarged to 128 and more.
    assert frames[0].shape == frames[1].shape == (33, 128, 192, 3)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 1
    clips = tmp_path / "lora" / "segments" / "videos"
    assert [len(iio.imread(clips / f"0000_seg{m}-0.mp4")) for m in (0, 1)] == [21, 12]
    results = json.loads((tmp_path / "lora" / "results.json").read_text())
    assert results["policy"]["name"] == "lora" and results["against"]["motion"]["win_rate"] >= 0


# What of a configuration is not in the file of a generator, made tiny.
SMALL = [
    "--config.video.height=4",
    "--config.video.width=6",
    "--config.model.dtype=float32",
    "--config.eval.scorer=stream",
    "--config.reward.scorer=motion",
    "--config.reward.weights.motion=1",
]


def generator(files, folder, spec):
    """(--config, --config.weights and the flags of the other files) of a published generator.

    Only the converted file says its sizes.
    """
    write, options = FORMATS[spec]
    flags = [f"--{name}={x}" for name, x in options.items()]
    output = folder / "generator.safetensors"
    run("tools/convert_weights.py", write(random_state(), folder), f"--output={output}", *flags)
    _, _, *others = paths(files, "umt5")  # neither LongLive's weights nor its adapter
    return f"--config={spec}", f"--config.weights={output}", others


@pytest.mark.slow
def test_krea_streams_and_is_planned(files, tmp_path):
    config, weights, (vae, _, *text) = generator(files, tmp_path, "configs/krea14b.py")
    checkpoint = weights.replace("config.weights", "checkpoint")
    output = ["--prompt=a red fox runs", "--num_frames=6", f"--output={tmp_path}"]
    out = run("-m", "kvpo_jax.generate", config, checkpoint, vae, *text, *SMALL, *output)
    assert "has dim=48, ffn_dim=64, num_heads=2, num_layers=2, " in out
    assert iio.imread(tmp_path / "000_a_red_fox_runs.mp4").shape == (21, 128, 192, 3)
    figures = f"--json={tmp_path / 'plan.json'}"
    run("-m", "kvpo_jax.plan_memory", config, weights, vae, *SMALL, "--devices=1", figures)
    resident = json.loads((tmp_path / "plan.json").read_text())["resident_gb"]
    assert 0 < resident["base weights"] < 1e-3  # 14B would be 28.6


@pytest.mark.slow
def test_frames_one_by_one_train(files, tmp_path):
    fields = {"video.blocks": 16, "rollout.branches": 2, "rollout.window_blocks": 1}
    fields |= {"reward.min_behind": 0, "lora.rank": 4, "lora.alpha": 4, "replay.chunk": 3}
    fields |= {"train.held_out": 2, "train.prompts_per_iteration": 1, "train.iterations": 1}
    fields |= {"eval.prompts": 2, "eval.every": 0, "train.video_every": 0}
    flags = [f"--config.{name}={x}" for name, x in fields.items()]
    config, weights, others = generator(files, tmp_path, "configs/causal_forcing.py:frame")
    workdir = f"--workdir={tmp_path / 'run'}"
    run("-m", "kvpo_jax.main", config, workdir, weights, *others, *SMALL, *flags)
    (line,) = (tmp_path / "run" / "branches.jsonl").read_text().splitlines()
    record = json.loads(line)
    # So small a model hardly heeds what it remembers: no pixel has changed, but the energies have.
    first, second = record["routed"]
    assert first != second and all(len(frames) == 6 for frames in (first, second))
    assert all(1e-9 < energy < 1 for energy in record["energy"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["dim"] == 48 and saved["video"]["block_frames"] == 1


@pytest.mark.slow
def test_self_forcing_is_rated_in_the_published_window(files, tmp_path):
    config, weights, (vae, _, *text) = generator(files, tmp_path, "configs/self_forcing.py")
    line = {"prompts": ["a red fox runs"], "durations": [6]}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    command = ["-m", "kvpo_jax.evaluate", "--suite=long", f"{config}:published", weights, vae]
    command += [*text, *SMALL, f"--prompts={tmp_path / 'p.jsonl'}", "--config.mesh.data=1"]
    out = run(*command, f"--output={tmp_path / 'rated'}", "--config.reward.clip_frames=8")
    assert "1 videos of 1 prompts" in out and "continuity" in out
    assert iio.imread(tmp_path / "rated" / "videos" / "0000-0.mp4").shape == (21, 128, 192, 3)


def test_a_missing_file_says_which_command_makes_it(tmp_path):
    arguments = ("--config=configs/memflow.py", "--config.weights=nowhere.safetensors")
    done = run_command("-m", "kvpo_jax.main", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the memflow backbone needs --config.paths.vae=..., made by: kvpo-convert" in done.stderr
    assert not list(tmp_path.iterdir())
