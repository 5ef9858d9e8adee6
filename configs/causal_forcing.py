"""KVPO on Causal-Forcing (causal Wan2.1-T2V-1.3B, 480x832), chunk-wise or frame-wise.

    kvpo-convert chunkwise/causal_forcing.pt --output=chunk.safetensors
    kvpo-convert framewise/causal_forcing.pt --ema --output=frame.safetensors
    python -m kvpo_jax.main --config=configs/causal_forcing.py \\
        --config.weights=chunk.safetensors ...                                 # chunks of 3 frames
    python -m kvpo_jax.main --config=configs/causal_forcing.py:frame \\
        --config.weights=frame.safetensors ...                                 # single frames

Files as for configs/self_forcing.py. `chunk_published` and `frame_published` have the windows that
the models were made with, to generate and evaluate. Expected outcome: this project has measured
none.

Only what differs from configs/self_forcing.py stands here; every field is explained in
configs/tiny.py.
"""

from ml_collections import ConfigDict

from kvpo_jax.runtime.config import derive

PRESETS = ("chunk", "frame", "chunk_published", "frame_published")


def get_config(preset: str = "chunk") -> ConfigDict:
    """The Causal-Forcing configuration; `preset` is one of PRESETS."""
    kind, _, published = preset.partition("_")
    c = derive("configs/self_forcing.py", published or "short")
    c.backbone = "causal_forcing"
    if kind == "frame":
        c.video.update(blocks=21, block_frames=1)
        c.rollout.window_blocks = 6  # as many frames as two chunks
        c.replay.chunk = 12  # rows of 1560 tokens: as many as four chunks have
        if published:
            c.window.update(past=17, recache_frames=17)  # all past frames of such a video
    return c
