"""KVPO on Krea Realtime 14B (causal Wan2.1-T2V-14B, 480x832).

    kvpo-convert krea-realtime-video-14b.safetensors --output=krea14b.safetensors
    python -m kvpo_jax.main --config=configs/krea14b.py --config.weights=krea14b.safetensors ...
    kvpo-plan --config=configs/krea14b.py --devices=32

Files as for configs/self_forcing.py, whose presets these are; the VAE, the text encoder and stored
embeddings are the same. docs/backbones.md says what is known and what is a guess. Expected outcome:
this project has measured none.

Only what differs from configs/self_forcing.py stands here; every field is explained in
configs/tiny.py.
"""

from ml_collections import ConfigDict

from kvpo_jax.runtime.config import derive

PRESETS = ("short", "published", "long")


def get_config(preset: str = "short") -> ConfigDict:
    """The Krea Realtime 14B configuration; `preset` is one of PRESETS."""
    c = derive("configs/self_forcing.py", preset)
    c.backbone = "krea14b"

    # Wan2.1-T2V-14B. The converted file says so too; a plan needs no file.
    c.model.update(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    c.model.remat = "block"  # a layer has 3.3 times the activations of 1.3B
    c.lora.update(rank=64, alpha=64.0)  # 307 M parameters; the paper's 256 has 350 M of 1.3B
    c.replay.chunk = 1
    return c
