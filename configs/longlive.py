"""KVPO on LongLive (causal Wan2.1-T2V-1.3B, 480x832): the paper's setting, and the release's.

    python -m kvpo_jax.main --config=configs/longlive.py --config.weights=longlive.safetensors \\
        --config.paths.lora=lora.safetensors --config.paths.vae=vae.safetensors \\
        --config.paths.prompts=prompts.txt --config.paths.embeddings=embeddings   # paper
    python -m kvpo_jax.main --config=configs/longlive.py:release ...              # release

kvpo-convert and kvpo-encode make the files from the PyTorch releases (README). Expected outcome:
this project has measured none.

Only what differs from configs/tiny.py stands here; every field is explained there.
"""

from ml_collections import ConfigDict

from kvpo_jax.runtime.config import derive

PRESETS = ("paper", "release")


def get_config(preset: str = "paper") -> ConfigDict:
    """The LongLive configuration; `preset` is "paper" or "release"."""
    c = derive("configs/tiny.py", preset)
    c.backbone = "longlive"

    # Wan2.1-T2V-1.3B.
    c.model.update(
        dim=1536,
        ffn_dim=8960,
        num_heads=12,
        num_layers=30,
        freq_dim=256,
        text_dim=4096,
        text_len=512,
    )
    c.model.update(channels=16)
    c.model.dtype = "bfloat16"  # LoRA masters, norms, softmax, modulation and energies stay float32
    # within a chunk of the replay; "block" takes less memory and a forward pass more
    c.model.remat = "products"
    c.lora.update(rank=256, alpha=256.0)  # paper §4.1; LongLive's own adapter has the same

    # 480x832 pixels, 147 latent frames (585 of pixels), 4 prompts (paper §4.1).
    c.video.update(height=60, width=104, blocks=49)
    c.video.switch_frames = (39, 75, 111)  # the release's

    # The few-step sampler that LongLive was distilled with: levels 1, .9375, .8333, .625 after the
    # shift.
    c.sampler.update(solver="renoise", shift=5.0)

    # The paper's window is 3 + 9 past frames. LongLive was distilled with the release's 3 + 6, and
    # :release keeps that.
    c.window.cache_frames = 33  # as released; a frame of 1.3B keys and values is 288 MB
    c.rollout.window_blocks = 5  # Table 2: best of 3, 5, 7

    c.replay.chunk = 4  # rows replayed at a time, of 4680 tokens each

    # The paper's beta is 5 (Appendix E); it gives no tau. What acts is beta std(E) / tau
    # (docs/algorithm.md): at one std of a group's energies beta = 5 freezes the policy, at 100 it
    # has the strength 0.05 that trains the toy.
    c.objective.update(tau=100.0, tau_unit="running_std", beta=5.0)

    c.eval.every = c.train.video_every = 20
    c.eval.by_block = False  # it would score four times as many frames

    c.reward.scorer = "hpsv3,videoalign"  # VQ, and MQ and TA (paper §3.4)
    c.reward.clip_frames = 36  # pixel frames scored per prompt segment

    c.train.update(
        prompts_per_iteration=32, iterations=125
    )  # the best checkpoint comes at 3,000-4,000 samples
    # The paper's optimiser table is lost; these are the release's.
    c.train.update(learning_rate=1e-5, weight_decay=0.01, warmup=5, ema_decay=0.999)

    if preset == "release":
        c.replay.blocks = 6  # to the end of the fork chunk: 5 or 6 blocks there
        c.objective.update(tau=1.0, tau_unit="absolute", beta=10.0)
        c.reward.scorer = "hpsv3"
        c.reward.weights = ConfigDict({"VQ": 1.0})  # HPSv3 alone is recommended to start with
    return c
