"""KVPO on Self-Forcing (causal Wan2.1-T2V-1.3B, 480x832).

    kvpo-convert self_forcing_dmd.pt --ema --output=self_forcing.safetensors
    python -m kvpo_jax.main --config=configs/self_forcing.py \\
        --config.weights=self_forcing.safetensors --config.paths.vae=vae.safetensors \\
        --config.paths.prompts=prompts.txt --config.paths.embeddings=embeddings

Presets: `short` trains on videos of 5 seconds, which the model was made for. `published` is the
window that it was made with, to generate and evaluate: there is nothing to route. `long` has
LongLive's videos of four prompts. docs/backbones.md says what is known and what is a guess.
Expected outcome: this project has measured none.

Only what differs from configs/longlive.py stands here; every field is explained in configs/tiny.py.
"""

from ml_collections import ConfigDict

from kvpo_jax.runtime.config import derive

PRESETS = ("short", "published", "long")


def get_config(preset: str = "short") -> ConfigDict:
    """The Self-Forcing configuration; `preset` is one of PRESETS."""
    c = derive("configs/longlive.py", "paper")
    c.backbone = "self_forcing"
    if preset == "long":
        return c

    # 21 latent frames (81 of pixels) of one prompt.
    c.video.blocks = 7
    c.video.switch_frames = ()
    c.window.cache_frames = 21
    c.window.recache_frames = 9  # the local window; the page of a branch holds as much

    # With the paper's 3 + 9 past frames the first five blocks attend to all that is there, as
    # published; behind the fork of the sixth there are 84 ways to route.
    c.rollout.window_blocks = 2
    c.reward.clip_frames = 0  # a quarter of the frames lies behind the fork: score all of them
    if preset == "published":
        # With the sink of 3, all past frames of such a video.
        c.window.update(past=15, recache_frames=15)
    return c
