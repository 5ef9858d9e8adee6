"""Training YAMLs of the release as flags."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvpo_jax.convert import import_config
from kvpo_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]

# The settings of the release's train_kvpo_longlive.yaml that say what is computed.
LONGLIVE = {
    "generator_ckpt": "checkpoints/longlive/models/longlive_base.pt",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "model_kwargs": {"local_attn_size": 12, "timestep_shift": 5.0, "sink_size": 3},
    "streaming_chunk_size": 21,
    "streaming_max_length": 147,
    "slice_last_frames": 21,
    "context_noise": 0,
    "prompt_max_segments": 4,
    "switch_frame_indices": "39, 75, 111",
    "global_sink": True,
    "K": 8,
    "m_nearest_frames": 4,
    "perturb_num_blocks": 5,
    "train_local": True,
    "train_global": True,
    "local_loss_weight": 1.0,
    "global_loss_weight": 0.5,
    "policy_window_frames": 0,
    "advantage_fusion_mode": "std",
    "log_prob_grad_steps": 2,
    "log_prob_sigma_floor": 1.0,
    "per_step_protect_mode": "mechanism_2",
    "ppo_epochs": 1,
    "clip_range": 0.2,
    "clip_range_low": 0.1,
    "clip_range_high": 0.2,
    "adv_clip_max": 2.5,
    "kl_coef": 10,
    "kl_loss_mode": "discrete_kl",
    "lr": 1.0e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5,
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "ema_decay": 0.999,
    "max_train_steps": 1500,
    "eval_prompts": "world_size",
    "seed": 42,
    "reward_components": [{"name": "video_hpsv3", "weight": 1.0}],
    "long_reward_normal_clip_len": 36,
    "num_gpus": 8,
    "adapter": {"type": "lora", "rank": 256, "alpha": 256},
}
MEMFLOW = {
    **LONGLIVE,
    "model_kwargs": {
        **{"local_attn_size": 12, "timestep_shift": 5.0, "sink_size": 3},
        **{"bank_size": 3, "record_interval": 3, "SMA": False},
    },
    "m_nearest_frames": 3,
}
OF_A_RUN = {
    "train.iterations": 1500,
    "eval.prompts": 8,
    "train.held_out": 8,
    "seed": 42,
    "train.prompts_per_iteration": 8,
}


def imported(tmp_path, given, **changes):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**given, **changes}, sort_keys=False))
    return import_config.imported(path)


@pytest.mark.parametrize("backbone, given", [("longlive", LONGLIVE), ("memflow", MEMFLOW)])
def test_the_release_presets_are_what_the_release_says(tmp_path, backbone, given):
    """Nothing but the sizes of a run differs."""
    made = imported(tmp_path, given)
    assert made.spec == f"configs/{backbone}.py:release" and made.overrides == OF_A_RUN
    assert [key for key, _, _ in made.missing] == ["streaming_chunk_size"]
    assert made.files == [
        ("generator_ckpt", LONGLIVE["generator_ckpt"], import_config.FILES["generator_ckpt"])
    ]


@pytest.mark.parametrize(
    "changes, overrides",
    [
        ({"K": 4, "lr": "3e-6"}, {"rollout.branches": 4, "train.learning_rate": 3e-6}),
        ({"warp_denoising_step": False}, {"sampler.shift": 1.0}),
        (
            {"denoising_step_list": [1000, 500]},
            {"sampler.steps": (1.0, 0.5), "rollout.perturbed_steps": 2},
        ),
        ({"m_nearest_frames": 5}, {"window.near": 2, "window.excluded": 5}),
        ({"slice_last_frames": 24}, {"window.cache_frames": 36}),
        ({"streaming_max_length": 150}, {"video.blocks": 50}),
        ({"train_local": False}, {"objective.local_weight": 0.0}),
        ({"global_loss_weight": 0.25}, {"objective.global_weight": 0.25}),
        ({"advantage_fusion_global_weight": 0.75}, {"objective.global_weight": 0.75}),
        ({"policy_window_frames": 13}, {"replay.blocks": 5}),
        ({"lr_scheduler": "constant"}, {"train.warmup": 0}),
        ({"context_noise": 20}, {"sampler.context_step": 0.02}),
        (
            {"switch_frame_indices": [48, 96], "prompt_max_segments": 3},
            {"video.switch_frames": (48, 96)},
        ),
        (
            {"reward_components": [{"name": "videoalign_overall", "weight": 3.0}]},
            {"reward.scorer": "videoalign", "reward.weights.Overall": 1.0},
        ),
        (
            {
                "reward_components": [
                    {"name": "video_hpsv3"},
                    {"name": "videoalign_ta", "weight": 0.1},
                ]
            },
            {
                "reward.scorer": "hpsv3,videoalign",
                "reward.weights.VQ": 1.0,
                "reward.weights.TA": 0.1,
            },
        ),
        (
            {"eval_reward_components": [{"name": "videoalign_mq"}]},
            {"eval.scorer": "motion,videoalign"},
        ),
        ({"adapter": {"rank": 64, "alpha": 32}}, {"lora.rank": 64, "lora.alpha": 32.0}),
    ],
)
def test_each_change_is_an_override(tmp_path, changes, overrides):
    made = imported(tmp_path, LONGLIVE, **changes)
    assert {n: x for n, x in made.overrides.items() if OF_A_RUN.get(n) != x} == overrides


@pytest.mark.parametrize(
    "changes, key, reason",
    [
        ({"kl_loss_mode": "try_kl"}, "kl_loss_mode", "only 'discrete_kl' can be had"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler", "constant here"),
        (
            {"reward_components": [{"name": "video_hpsv2"}]},
            "reward_components",
            "no scorer 'video_h",
        ),
        (
            {"streaming_max_length": 148},
            "streaming_max_length",
            "a multiple of num_frame_per_block",
        ),
        ({"prompt_max_segments": 6}, "prompt_max_segments", "has 4 prompts"),
        ({"K": "many"}, "K", "could not convert"),
        ({"kl_coeff": 3}, "kl_coeff", "no key that the release reads; did you mean 'kl_coef'?"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout", "only 0.0 can be had"),
    ],
)
def test_what_has_no_counterpart_is_said(tmp_path, changes, key, reason):
    found = {name: why for name, _, why in imported(tmp_path, LONGLIVE, **changes).missing}
    assert reason in found[key]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", r"a\.yaml:\d: not YAML: expected"),
        (
            "a: !!python/object/apply:os.system [true]",
            "not YAML: could not determine a constructor",
        ),
        ("- K", "expected a training YAML of the release"),
        ("model: x\ndata: y", "none of its keys is one of the release's .* it has model, data"),
        ("K: 1", r"a\.yaml: config.rollout.branches=1 is less than 2"),
    ],
)
def test_what_is_no_yaml_of_the_release_is_one_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        import_config.imported(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_the_flags_start_a_run_and_the_rest_is_said_beside_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**LONGLIVE, "reward_batch_size": 4}))
    tool = [sys.executable, str(ROOT / "tools" / "import_config.py"), str(path)]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "--config=configs/longlive.py:release"
    assert "--config.train.iterations=1500\n" in done.stdout
    assert "  reward_batch_size=4: memory only" in done.stderr
    assert (
        "  generator_ckpt=checkpoints/longlive/models/longlive_base.pt: --config.w" in done.stderr
    )
    run = [sys.executable, "-m", "kvpo_jax.main", *done.stdout.split(), f"--workdir={tmp_path}/r"]
    started = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert "the longlive backbone needs --config.weights" in started.stderr  # and no flag is wrong


def test_the_page_has_the_table():
    assert import_config.table() in (ROOT / "docs" / "import_config.md").read_text()
